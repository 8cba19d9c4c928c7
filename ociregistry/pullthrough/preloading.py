"""Preloading: the images of a file, loaded by the daemon while it serves, again and again until all are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from ociregistry.names import ImageReference
from ociregistry.pullthrough.imagelist import ImageList
from ociregistry.pullthrough.loading import Loader
from ociregistry.pullthrough.outcomes import Ended, Outcome, summary

_AGAIN = 30.0
"""Seconds from one round to the next, while some image could not be loaded for now."""


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
        self._told: set[str] = set()
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
        waiting = self._images = listed.images
        while waiting:
            outcomes = await self._loader.load(waiting)
            for image, outcome in zip(waiting, outcomes, strict=True):
                self._tell(outcome)
                if not outcome.again:
                    self._ended[image] = outcome.ended
            waiting = tuple(image for image in waiting if image not in self._ended)
            self.log.info(
                "preloading: {summary}, {waiting} to be tried again", summary=summary(outcomes), waiting=len(waiting)
            )
            if waiting:
                await deferLater(self._clock, _AGAIN)

    def _tell(self, outcome: Outcome) -> None:
        """Of an image that fails again and again, once."""
        if outcome.ended is not Ended.FAILED:
            self.log.info("preloading: {outcome}", outcome=outcome)
        elif outcome.name not in self._told:
            self._told.add(outcome.name)
            self.log.error("preloading: {outcome}", outcome=outcome)
