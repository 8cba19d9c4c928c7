"""Fixtures for all tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
from twisted.logger import ILogObserver, LogEvent, LogLevel, eventAsText, globalLogPublisher
from zope.interface import implementer

from tests.upstream import ScriptedRegistry

# The peers of the tests are on this machine. A proxy of the machine's own would be asked for what it cannot reach, by
# the daemons and by the programs that the tests start.
for variable in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"):
    os.environ.pop(variable, None)
    os.environ.pop(variable.lower(), None)


@implementer(ILogObserver)
class _Failures:
    """Collects the texts of logged failures."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, event: LogEvent) -> None:
        if "log_failure" in event or event.get("log_level") is LogLevel.critical:
            self.texts.append(eventAsText(event))


@pytest.fixture(autouse=True)
def no_logged_failures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that Twisted logged a failure in, unless the test is marked `expect_logged_failures`."""
    failures = _Failures()
    globalLogPublisher.addObserver(failures)
    try:
        yield
        # An unhandled error of a Deferred is logged when the Deferred is collected.
        gc.collect()
    finally:
        globalLogPublisher.removeObserver(failures)
    if failures.texts and request.node.get_closest_marker("expect_logged_failures") is None:
        pytest.fail("failures were logged:\n" + "\n".join(failures.texts), pytrace=False)


@pytest.fixture
def upstream() -> Iterator[ScriptedRegistry]:
    """A scripted registry without content."""
    with ScriptedRegistry() as upstream:
        yield upstream
