"""What the unit tests put in the place of the network and of clients, and how they look at Deferreds and logs."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import ILogObserver, LogEvent, LogLevel, formatEvent
from twisted.python.failure import Failure
from zope.interface import implementer

from ociregistry.manifests import Manifest
from ociregistry.names import Digest, ImageReference, Upstream
from tests.images import Image, Index

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)

REACTOR: Any = reactor
"""The real one; its type is not known to mypy."""


@implementer(ILogObserver)
class RecordingObserver:
    """Records the events that are logged."""

    def __init__(self) -> None:
        self.events: list[LogEvent] = []

    def __call__(self, event: LogEvent) -> None:
        self.events.append(event)


def fired(deferred: Deferred[T]) -> T:
    """What it has fired with; it must have."""
    results: list[T] = []
    failures: list[Failure] = []
    deferred.addCallbacks(results.append, failures.append)
    assert results or failures, "it has not fired yet"
    for failure in failures:
        failure.raiseException()
    return results[0]


def failed(deferred: Deferred[T], kind: type[E]) -> E:
    """What it has failed with; it must have, and with that kind of error."""
    results: list[object] = []
    deferred.addBoth(results.append)
    assert results, "it has not fired yet"
    assert isinstance(results[0], Failure), f"it fired with {results[0]!r}"
    assert isinstance(results[0].value, kind), repr(results[0].value)
    return results[0].value


def on_reactor(test: Callable[..., Coroutine[Deferred[Any], Any, None]]) -> Callable[..., Any]:
    """An async test on the real reactor. After ten seconds it is cancelled where it waits: it would hang them all."""

    @wraps(test)
    async def limited(*args: Any, **kwargs: Any) -> None:
        running = Deferred.fromCoroutine(test(*args, **kwargs))
        limit = REACTOR.callLater(10, running.cancel)
        try:
            await running
        finally:
            if limit.active():
                limit.cancel()

    limited_test: Callable[..., Any] = pytest_twisted.ensureDeferred(limited)
    return limited_test


async def turn() -> None:
    """Lets the reactor turn once, so that what called the test has come to its end."""
    await deferLater(REACTOR, 0)


async def until(predicate: Callable[[], object]) -> None:
    """Lets the reactor turn until something holds: what threads and sockets bring takes a moment."""
    for _ in range(3000):
        if predicate():
            return
        await deferLater(REACTOR, 0.001)
    raise AssertionError("it never came")


def texts(events: Iterable[LogEvent], level: LogLevel | None = None) -> list[str]:
    """What the events say, only those of a level if it is given."""
    return [formatEvent(event) for event in events if level in (None, event["log_level"])]


HUB = Upstream("docker.io")


def image(url: str) -> ImageReference:
    """The image that a URL names."""
    return ImageReference.parse(url, HUB)


def manifest(what: Image | Index) -> Manifest:
    """The manifest of an image or index, as the daemon sees it."""
    return Manifest.parse(what.manifest.data, what.manifest.media_type)


def record(root: Path, digest: Digest) -> Path:
    """The file of an image's record."""
    return root / "img" / digest.hex
