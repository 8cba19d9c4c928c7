"""Preloading: the images of a file, loaded by the daemon while it serves, again and again until all are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, DeferredList, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from ociregistry.names import ImageReference
from ociregistry.pullthrough.imagelist import ImageList
from ociregistry.pullthrough.loading import Loader
from ociregistry.pullthrough.outcomes import Ended

_AGAIN = 30.0
"""Seconds until an image is tried again that could not be loaded for now."""


@dataclass(frozen=True, slots=True)
class Preloaded:
    """How far it is."""

    images: int
    """Those of the file."""
    loaded: int
    failed: int
    """Those that will not be tried again."""


class Preloading:
    """Loads images in the background. Whatever goes wrong is logged."""

    log = Logger(namespace="ociregistry.pullthrough")

    def __init__(self, read: Callable[[], Deferred[ImageList]], loader: Loader, clock: IReactorTime) -> None:
        """`read` gives what is to be loaded; it fails with `OSError`."""
        self._read = read
        self._loader = loader
        self._clock = clock
        self._ended: dict[ImageReference, Ended] = {}
        self._images: Sequence[ImageReference] = ()
        self._running: Deferred[None] = succeed(None)

    @property
    def progress(self) -> Preloaded:
        """How far it is."""
        failed = sum(ended is Ended.FAILED for ended in self._ended.values())
        return Preloaded(len(self._images), len(self._ended) - failed, failed)

    def start(self) -> None:
        """Begins."""
        self._running = Deferred.fromCoroutine(self._preload()).addErrback(self._failed)

    def stop(self) -> None:
        """Leaves the rest to the next start."""
        self._running.cancel()

    def _failed(self, failure: Failure) -> None:
        if failure.check(OSError):
            self.log.error("nothing is preloaded: {why}", why=failure.value)
        elif not failure.check(CancelledError):
            self.log.failure("a defect in preloading", failure)

    async def _preload(self) -> None:
        listed = await self._read()
        for error in listed.errors:
            self.log.error("not preloaded: {error}", error=error)
        self._images = listed.images
        # The last ones first: who is cancelled gives its turn to the next, which has to be cancelled by then.
        loading = [Deferred.fromCoroutine(self._preload_one(image)) for image in listed.images]
        await DeferredList(loading[::-1], consumeErrors=True).addCallback(_raise_first)
        done = self.progress
        self.log.info("preloaded {loaded} images, {failed} failed", loaded=done.loaded, failed=done.failed)

    async def _preload_one(self, image: ImageReference) -> None:
        told = False
        while True:
            (outcome,) = await self._loader.load([image])
            if outcome.ended is not Ended.FAILED:
                self.log.info("preloading: {outcome}", outcome=outcome)
            elif not told or not outcome.again:
                self.log.error("preloading: {outcome}", outcome=outcome)
            if not outcome.again:
                self._ended[image] = outcome.ended
                return
            told = True
            await deferLater(self._clock, _AGAIN)


def _raise_first(results: list[tuple[bool, Any]]) -> None:
    for succeeded, result in results:
        if not succeeded:
            result.raiseException()
