"""Whole images: the blobs of an image that a client pulled, and did not ask for, are fetched in the background.

A client asks only for the layers that it does not have; the next one may have none of them when the link is down.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from twisted.internet import defer
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from ociregistry.errors import BlobUnknown, Denied, RegistryError
from ociregistry.flights import Bell
from ociregistry.manifests import Manifest
from ociregistry.names import Digest, Repository, Upstream
from ociregistry.store.store import Store

_AGAIN = 30.0
"""Seconds from one round to the next, while some image could not be completed."""
_BELIEVED = 30.0
"""Seconds for which an image that was found to be complete is not looked at again."""
_MOST_COMPLETE = 10_000

Fetch = Callable[[Repository, Digest], Coroutine[Deferred[Any], Any, None]]
"""Brings a blob into the store, after what clients wait for; raises `RegistryError`."""


@dataclass(frozen=True, slots=True)
class Incomplete:
    """How many images lack blobs, and how many bytes these have in all."""

    images: int
    bytes: int


class Completion:
    """Completes images: for each upstream one after the other, in each the small blobs first."""

    log = Logger(namespace="ociregistry.pullthrough")

    def __init__(self, store: Store, fetch: Fetch, clock: IReactorTime) -> None:
        self._store = store
        self._fetch = fetch
        self._clock = clock
        self._missing: dict[Digest, int] = {}
        self._looked_at: set[Digest] = set()
        """Images of which it is not known yet whether they lack blobs."""
        self._complete: dict[Digest, float] = {}
        """When all blobs of an image were found to be there."""
        self._work: dict[Upstream, Deferred[None]] = {}
        self._stopped = False
        self._wished = Bell()
        self._fresh: set[Upstream] = set()
        """Upstreams for which something was wished since the round that is under way began."""

    @property
    def incomplete(self) -> Incomplete:
        """What is still missing, as far as it is known."""
        return Incomplete(len(self._store.wishes.keys() | self._looked_at), sum(self._missing.values()))

    def start(self) -> None:
        """Goes on with what was wished for before."""
        for upstream in {repository.upstream for repository in self._store.wishes.values()}:
            self._work_on(upstream)

    def stop(self) -> None:
        """Leaves the rest to the next start."""
        self._stopped = True
        for work in list(self._work.values()):
            work.cancel()

    async def wish(self, manifest: Manifest, repository: Repository, *, hit: bool = True) -> None:
        """A client has been given `manifest`, which was a `hit`: all its blobs shall be there too."""
        digest = manifest.digest
        found = self._complete.get(digest)
        if manifest.is_list or digest in self._store.wishes or digest in self._looked_at:
            return
        # One that had to be fetched may have been pruned with its blobs since.
        if hit and found is not None and self._clock.seconds() - found < _BELIEVED:
            return
        self._looked_at.add(digest)
        try:
            missing = await self._store.missing(digest)
        finally:
            self._looked_at.discard(digest)
        if not missing:
            if len(self._complete) >= _MOST_COMPLETE:
                self._complete.clear()
            self._complete[digest] = self._clock.seconds()
            return
        self._missing[digest] = sum(missing.values())
        try:
            await self._store.wish(digest, repository)
        except OSError as error:
            self.log.error("cannot note that {image} is incomplete: {why}", image=digest, why=error.strerror)
        self._fresh.add(repository.upstream)
        self._work_on(repository.upstream)

    def _work_on(self, upstream: Upstream) -> None:
        if self._stopped:
            return
        if upstream in self._work:
            self._wished.ring()
            return
        work = self._work[upstream] = Deferred.fromCoroutine(self._complete_all(upstream))
        work.addBoth(self._end, upstream)

    def _end(self, result: Failure | None, upstream: Upstream) -> None:
        self._work.pop(upstream, None)
        if isinstance(result, Failure):
            result.trap(CancelledError)

    async def _complete_all(self, upstream: Upstream) -> None:
        while wishes := [(digest, at) for digest, at in self._store.wishes.items() if at.upstream == upstream]:
            self._fresh.discard(upstream)
            for digest, repository in wishes:
                try:
                    await self._complete_one(digest, repository)
                except CancelledError:
                    raise
                except Exception:
                    self.log.failure("a defect in completing {image}", image=digest)
            if upstream not in self._fresh and any(digest in self._store.wishes for digest, _ in wishes):
                await self._pause()

    async def _pause(self) -> None:
        try:
            await self._wished.wait().addTimeout(_AGAIN, self._clock)
        except defer.TimeoutError:
            return

    async def _complete_one(self, digest: Digest, repository: Repository) -> None:
        image = f"{repository}@{digest}"
        try:
            missing = dict(await self._store.missing(digest) or {})
        except OSError as error:
            self.log.error("cannot see what {image} lacks: {why}", image=image, why=error.strerror)
            return
        if missing:
            self.log.info(
                "completing {image}: {blobs} blobs with {bytes} bytes are missing",
                image=image,
                blobs=len(missing),
                bytes=sum(missing.values()),
            )
        try:
            for blob in sorted(missing, key=missing.__getitem__):
                self._missing[digest] = sum(missing.values())
                try:
                    await self._fetch(repository, blob)
                except (BlobUnknown, Denied) as error:
                    self.log.warn("{image} stays incomplete: {why}", image=image, why=error.message)
                del missing[blob]
        except RegistryError as error:
            self.log.debug("{image} is not complete yet: {why}", image=image, why=error.message)
            self._missing[digest] = sum(missing.values())
            return
        self._missing.pop(digest, None)
        await self._drop(digest)
        self.log.info("no blob of {image} is to be fetched any more", image=image)

    async def _drop(self, digest: Digest) -> None:
        try:
            await self._store.unwish(digest)
        except OSError as error:
            self.log.error("cannot remove the wish for {image}: {why}", image=digest, why=error.strerror)
