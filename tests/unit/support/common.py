"""Helpers for Deferreds, the reactor and log events."""

from __future__ import annotations

import gc
import os
import time
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
"""The real reactor; mypy does not know its type."""


@implementer(ILogObserver)
class RecordingObserver:
    """Records the events that are logged."""

    def __init__(self) -> None:
        self.events: list[LogEvent] = []

    def __call__(self, event: LogEvent) -> None:
        self.events.append(event)


def open_descriptors() -> int:
    """Return the number of open file descriptors of this process, without those of garbage of earlier tests."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def is_open(descriptor: int) -> bool:
    """Return whether a descriptor is open."""
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def fired(deferred: Deferred[T]) -> T:
    """Return the result of a Deferred that must have fired."""
    results: list[T] = []
    failures: list[Failure] = []
    deferred.addCallbacks(results.append, failures.append)
    assert results or failures, "it has not fired yet"
    for failure in failures:
        failure.raiseException()
    return results[0]


def failed(deferred: Deferred[T], kind: type[E]) -> E:
    """Return the error of a Deferred that must have failed with this type."""
    results: list[object] = []
    deferred.addBoth(results.append)
    assert results, "it has not fired yet"
    assert isinstance(results[0], Failure), f"it fired with {results[0]!r}"
    assert isinstance(results[0].value, kind), repr(results[0].value)
    return results[0].value


def on_reactor(test: Callable[..., Coroutine[Deferred[Any], Any, None]]) -> Callable[..., Any]:
    """Run an async test on the real reactor; cancel it after a minute, because it would hang all others."""

    @wraps(test)
    async def limited(*args: Any, **kwargs: Any) -> None:
        running = Deferred.fromCoroutine(test(*args, **kwargs))
        limit = REACTOR.callLater(60, running.cancel)
        try:
            await running
        finally:
            if limit.active():
                limit.cancel()

    limited_test: Callable[..., Any] = pytest_twisted.ensureDeferred(limited)
    return limited_test


async def turn() -> None:
    """Wait for one iteration of the reactor, so that pending calls run."""
    await deferLater(REACTOR, 0)


async def until(predicate: Callable[[], object]) -> None:
    """Run the reactor until the predicate holds, for results of threads and sockets; fail after half a minute."""
    limit = time.monotonic() + 30
    while not predicate():
        if time.monotonic() > limit:
            raise AssertionError("it never came")
        await deferLater(REACTOR, 0.001)


def texts(events: Iterable[LogEvent], level: LogLevel | None = None) -> list[str]:
    """Return the texts of the events, of one level if given."""
    return [formatEvent(event) for event in events if level in (None, event["log_level"])]


HUB = Upstream("docker.io")


def image(url: str) -> ImageReference:
    """Parse an image URL."""
    return ImageReference.parse(url, HUB)


def manifest(what: Image | Index) -> Manifest:
    """Parse the manifest of an image or index."""
    return Manifest.parse(what.manifest.data, what.manifest.media_type)


def record(root: Path, digest: Digest) -> Path:
    """Return the path of an image's record."""
    return root / "img" / digest.hex
