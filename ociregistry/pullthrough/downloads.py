"""The blobs in flight: one download for each, however many clients and background fetches wait for it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from cachetools import TTLCache
from twisted.internet import defer
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger

from ociregistry.context import IN_BACKGROUND, Context
from ociregistry.errors import BlobUnknown, RegistryError
from ociregistry.names import Digest, Repository
from ociregistry.pullthrough.download import Download
from ociregistry.pullthrough.transfer import Abandoned, Connections, PriorityScheduler
from ociregistry.store.store import Store
from ociregistry.upstream.breaker import LinkDown
from ociregistry.upstream.network import Registries

_log = Logger(namespace="ociregistry.pullthrough")

T = TypeVar("T")

_END_WITHIN = 5.0
"""Seconds that downloads get to sync their partials at a stop."""
_ERROR_KEPT = 60.0
"""Seconds for which an error is remembered."""
_MOST_ERRORS = 1000


class NegativeCache:
    """Remembers for 60 s which blobs an upstream does not have.

    A client that got its headers before the upstream answered cannot get a 404 any more. Its next request gets it at
    once.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._errors: TTLCache[tuple[Repository, Digest], BlobUnknown, float] = TTLCache(
            _MOST_ERRORS, ttl=_ERROR_KEPT, timer=clock.seconds
        )

    def remember(self, repository: Repository, digest: Digest, error: BlobUnknown) -> None:
        """Remember that the upstream does not have the blob."""
        self._errors[repository, digest] = error

    def check(self, repository: Repository, digest: Digest) -> None:
        """Check that the upstream was not found to lack the blob in the last 60 s.

        Raises:
            BlobUnknown: it was.
        """
        error = self._errors.get((repository, digest))
        if error is not None:
            # A new one: the traceback of a kept exception would grow with each time that it is raised.
            raise BlobUnknown(error.message)


class Downloads:
    """Starts downloads, and lets any number of requests follow each of them."""

    def __init__(
        self,
        store: Store,
        registries: Registries,
        scheduler: PriorityScheduler,
        clock: IReactorTime,
        jitter: Callable[[], float],
    ) -> None:
        self._store = store
        self._registries = registries
        self._scheduler = scheduler
        self._clock = clock
        self._jitter = jitter
        self._in_flight: dict[Digest, Download] = {}
        self._negative = NegativeCache(clock)
        self._stopping = False
        self.ended = 0
        """Number of downloads that have ended."""

    @property
    def in_flight(self) -> Mapping[Digest, Download]:
        """The blobs that are being downloaded."""
        return self._in_flight

    def check(self, repository: Repository, digest: Digest) -> None:
        """Check that the upstream was not found to lack the blob a moment ago.

        Raises:
            BlobUnknown: it was.
        """
        self._negative.check(repository, digest)

    async def stop(self) -> None:
        """End all downloads; return when they have ended, but after a few seconds at most."""
        self._stopping = True
        running = list(self._in_flight.values())
        if running:
            # Not in this turn of the reactor: the caller may be the download that has just served its last byte.
            await deferLater(self._clock, 0)
            ended: Deferred[object] = Deferred()
            gatherResults([download.cancel() for download in running]).addCallback(ended.callback)
            # A disk that does not answer must not keep the process; the partials are good without their last note.
            with suppress(defer.TimeoutError):
                await ended.addTimeout(_END_WITHIN, self._clock)

    async def follow(
        self,
        repository: Repository,
        digest: Digest,
        context: Context,
        wait: Callable[[Download], Coroutine[Deferred[Any], Any, T]],
    ) -> T:
        """Return what `wait` returns of the download of a blob, which is started where none is in flight.

        Raises:
            RegistryError: `wait` raised it, and another download would fail in the same way.
        """
        while True:
            download = self._in_flight.get(digest)
            if download is None or download.error is not None:
                download = self._start(repository, digest, context)
            try:
                return await wait(download)
            except LinkDown:
                if download.error is None or download.repository == repository:
                    raise
            except Abandoned:
                # The download was given up just before this request joined it: start another.
                if self._stopping:
                    raise
            except RegistryError:
                # Start another where the failed one was for another repository, resumed wrong bytes or lost them.
                if self._stopping or (download.repository == repository and not download.spoiled):
                    raise

    def _start(self, repository: Repository, digest: Digest, context: Context, *, again: bool = True) -> Download:
        """Start a download; with again=True, restart it once if its bytes are wrong after a resume, or lost."""
        _log.debug("pulling blob from upstream: {blob}", blob=f"{repository}@{digest}")
        registry = partial(self._registries.get, repository.upstream)
        expected = self._store.size_in(repository, digest)
        connections = Connections(
            registry, repository, digest, expected, self._scheduler, self._clock, self._jitter, context
        )
        download = self._in_flight[digest] = Download(connections, self._store, repository, digest, expected)
        download.start().addCallback(self._finish, download, again)
        return download

    def _finish(self, _: None, download: Download, again: bool) -> None:
        self.ended += 1
        if download.has_early_readers and isinstance(download.error, BlobUnknown):
            self._negative.remember(download.repository, download.digest, download.error)
        if self._in_flight.get(download.digest) is not download:
            return
        del self._in_flight[download.digest]
        if download.spoiled and again and not self._stopping:
            self._start(download.repository, download.digest, IN_BACKGROUND, again=False)
