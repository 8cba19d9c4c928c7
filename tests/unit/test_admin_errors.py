"""The last failures that were logged."""

from __future__ import annotations

from pathlib import Path

import pytest
from twisted.logger import Logger, LogLevel

from ociregistry.admin.errors import RecentErrors


@pytest.fixture
def recent() -> RecentErrors:
    """Return no errors yet."""
    return RecentErrors()


@pytest.fixture
def log(recent: RecentErrors) -> Logger:
    """Return a log that they come from."""
    return Logger(namespace="ociregistry.web", observer=recent)


def test_failures_are_kept_as_text(recent: RecentErrors, log: Logger) -> None:
    for level in (LogLevel.debug, LogLevel.info, LogLevel.warn, LogLevel.error, LogLevel.critical):
        log.emit(level, "{what} of {kind}", what="a line", kind=level.name)
    assert [error.text for error in recent.errors] == ["a line of error", "a line of critical"]
    assert {error.namespace for error in recent.errors} == {"ociregistry.web"}


def test_defect_is_kept_without_its_traceback(recent: RecentErrors, log: Logger) -> None:
    try:
        raise ValueError("a secret")
    except ValueError:
        log.failure("a defect in answering {path}", path="/v2/")
    assert [error.text for error in recent.errors] == ["a defect in answering /v2/"]


def test_text_is_one_line_that_every_reader_can_show(recent: RecentErrors, log: Logger) -> None:
    log.error("{path}: {why}", path=Path("/store/\udcff"), why="a\nb\x1b[31m\u202e")
    assert [error.text for error in recent.errors] == [r"/store/\udcff: a\nb\x1b[31m\u202e"]


def test_number_and_length_are_bounded(recent: RecentErrors, log: Logger) -> None:
    for number in range(60):
        log.error("{number} {text}", number=number, text="x" * 100_000)
    assert [error.text.split()[0] for error in recent.errors] == [str(number) for number in range(10, 60)]
    assert {len(error.text) for error in recent.errors} == {1000}
