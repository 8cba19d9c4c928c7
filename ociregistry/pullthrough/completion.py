"""Whole images: the blobs of an image that a client pulled, and did not ask for, are fetched in the background.

A client asks only for the layers that it does not have; the next one may have none of them when the link is down.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from twisted.internet import defer
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from ociregistry.concurrency import Event
from ociregistry.errors import BlobUnknown, Denied, RegistryError
from ociregistry.manifests import Manifest
from ociregistry.names import Digest, Repository, Upstream
from ociregistry.platforms import Platform, chosen
from ociregistry.pullthrough.metadata import Metadata
from ociregistry.store.store import Store

_AGAIN = 30.0
"""Seconds from one round to the next, while some image could not be completed."""
_BELIEVED = 30.0
"""Seconds for which an image that was found to be complete is not looked at again."""
_REFUSED_FOR = 3600.0
"""Seconds until a blob that its upstream does not have is asked for again."""
_MOST_COMPLETE = 10_000
_AT_ONCE = 500
"""Records that are looked at in one go of a thread."""

Fetch = Callable[[Repository, Digest], Coroutine[Deferred[Any], Any, None]]
"""Brings a blob into the store, after what clients wait for; raises `RegistryError`."""


@dataclass(frozen=True, slots=True)
class Incomplete:
    """How many images lack blobs, and how many bytes these have in all."""

    images: int
    """Those whose platform is not decided yet included."""
    bytes: int
    pending: int = 0
    """Images of which it is not decided yet whether they are wanted."""
    indexes: int = 0
    """Indexes of which manifests or configs of some platforms are missing."""


@dataclass(frozen=True, slots=True)
class CompletionPolicy:
    """What is completed without being asked for."""

    images: bool = True
    """Whether images that are wanted get the blobs that they lack; else it is only told."""
    metadata: bool = True
    """Whether indexes get the manifests and configs of all platforms."""
    platforms: tuple[Platform, ...] = ()
    """The platforms of an index that are always, and alone, completed; empty for those that clients ask for."""


class Completion:
    """Completes images: for each upstream one after the other, in each the small blobs first, metadata last."""

    log = Logger(namespace="ociregistry.pullthrough")

    def __init__(
        self,
        store: Store,
        fetch: Fetch,
        clock: IReactorTime,
        metadata: Metadata | None = None,
        policy: CompletionPolicy = CompletionPolicy(),
    ) -> None:
        """Fetch missing blobs by `fetch`; `metadata` fetches manifests and configs of other platforms, None none."""
        self._store = store
        self._fetch = fetch
        self._clock = clock
        self._metadata = metadata
        self._policy = policy
        self._missing: dict[Digest, int] = {}
        """Wanted images, and the bytes that they lack."""
        self._refused: dict[Digest, float] = {}
        """When an image was left incomplete, since its upstream does not have all of it."""
        self._changed: set[Digest] = set()
        """Records that are still to be looked at."""
        self._checking = False
        self._looked_at: set[Digest] = set()
        """Images of which it is not known yet whether they lack blobs."""
        self._complete: dict[Digest, float] = {}
        """When all blobs of an image were found to be there."""
        self._work: dict[Upstream, Deferred[None]] = {}
        self._stopped = False
        self._work_added = Event()
        self._fresh: set[Upstream] = set()
        """Upstreams for which something was wished since the round that is under way began."""
        self._rechecking = LoopingCall(self._recheck)
        self._rechecking.clock = clock

    @property
    def policy(self) -> CompletionPolicy:
        """What is completed without being asked for."""
        return self._policy

    @property
    def incomplete(self) -> Incomplete:
        """What is still missing, as far as it is known."""
        known = self._store.pending.keys() | self._looked_at | self._store.undecided.keys() | self._missing.keys()
        indexes = self._metadata.incomplete if self._metadata else 0
        return Incomplete(len(known), sum(self._missing.values()), len(self._store.undecided), indexes)

    def start(self) -> None:
        """Look for what is missing in the whole store, and go on with what was begun before."""
        self._store.watch(self._look_at)
        self._look_at(set(self._store.digests))
        self._rechecking.start(_AGAIN, now=False)
        if self._policy.images:
            for upstream in {repository.upstream for repository in self._store.pending.values()}:
                self._work_on(upstream)

    def stop(self) -> None:
        """Leaves the rest to the next start."""
        self._stopped = True
        self._store.watch(lambda changed: None)
        if self._rechecking.running:
            self._rechecking.stop()
        for work in list(self._work.values()):
            work.cancel()

    # What is missing

    def _look_at(self, changed: Set[Digest]) -> None:
        """Find out, soon, what the records `changed` lack."""
        self._changed |= changed
        for digest in changed:
            self._changed.update(self._store.indexes(digest))
        if not self._checking and self._changed and not self._stopped:
            self._checking = True
            self._begin(self._check_all())

    def _recheck(self) -> None:
        """Look again at the images that lack something, and at which nobody works."""
        self._look_at(self._missing.keys() - self._store.pending.keys())

    async def _check_all(self) -> None:
        try:
            while self._changed and not self._stopped:
                some = {self._changed.pop() for _ in range(min(_AT_ONCE, len(self._changed)))}
                await self._check(some)
        finally:
            self._checking = False

    async def _check(self, digests: Set[Digest]) -> None:
        try:
            lacking = await self._store.lacking_images(digests)
        except OSError as error:
            self.log.error("cannot see what {image} lacks: {why}", image="the store", why=error.strerror)
            return
        for digest in digests:
            entry = self._store.entry(digest)
            if entry is not None and entry.is_list:
                await self._check_index(digest)
            elif entry is None or not lacking.get(digest):
                self._is_complete(digest)
                if entry is None and self._metadata is not None:
                    # It may have been an index, which went while its metadata was being fetched.
                    self._metadata.forget(digest)
            else:
                await self._is_incomplete(digest, lacking[digest])

    def _is_complete(self, digest: Digest) -> None:
        if digest not in self._store.pending:
            self._missing.pop(digest, None)
        self._refused.pop(digest, None)

    async def _is_incomplete(self, digest: Digest, missing: Mapping[Digest, int]) -> None:
        if digest in self._store.pending or digest in self._looked_at:
            return
        self._missing[digest] = sum(missing.values())
        refused = self._refused.get(digest)
        if refused is not None and self._clock.seconds() - refused < _REFUSED_FOR:
            return
        repositories = self._store.repositories(digest)
        if repositories and self._completes(digest):
            await self._request(digest, min(repositories))

    async def _check_index(self, index: Digest) -> None:
        """Have the manifests and configs fetched that are missing of an index, and want its configured platforms."""
        entry = self._store.entry(index)
        if entry is None or entry.is_referrers or self._metadata is None:
            return
        always: Set[Digest] = set()
        if self._policy.platforms:
            found, _ = chosen([child for child in entry.children if child.platform], self._policy.platforms)
            always = {child.digest for child in found}
            for child in always:
                known = self._store.entry(child)
                if known is not None and not known.wanted:
                    await self._want(child)
        children = [child for child in entry.children if self._policy.metadata or child.digest in always]
        repositories = self._store.repositories(index)
        if repositories:
            repository = min(repositories)
            await self._metadata.look_at(index, repository, children, first=always)
            if repository.upstream not in self._work:
                self._work_on(repository.upstream)

    async def _want(self, image: Digest) -> None:
        try:
            await self._store.want(image)
        except OSError as error:
            self.log.error("cannot note that {image} is wanted: {why}", image=image, why=error.strerror)

    def _completes(self, image: Digest) -> bool:
        """Tell whether an image that is wanted is to be completed."""
        if not self._policy.images:
            return False
        return not self._policy.platforms or not self._store.indexes(image) or image in self._always(image)

    def _always(self, image: Digest) -> Collection[Digest]:
        entries = [self._store.entry(index) for index in self._store.indexes(image)]
        children = [child for entry in entries if entry is not None for child in entry.children if child.platform]
        return [child.digest for child in chosen(children, self._policy.platforms)[0]]

    # What is asked for

    async def add_pending(self, manifest: Manifest, repository: Repository, *, hit: bool = True) -> None:
        """A client has been given `manifest`, which was a `hit`: all its blobs shall be there too."""
        if not manifest.is_list:
            await self.complete(manifest.digest, repository, hit=hit)

    async def complete(self, digest: Digest, repository: Repository, *, hit: bool = True) -> None:
        """Note that the image `digest` is wanted, and have its blobs fetched that are missing."""
        if digest in self._store.pending or digest in self._looked_at:
            return
        self._looked_at.add(digest)
        try:
            await self._want(digest)
            missing = await self._missing_now(digest, hit=hit)
        finally:
            self._looked_at.discard(digest)
        if missing:
            self._missing[digest] = sum(missing.values())
        if missing and self._completes(digest):
            await self._request(digest, repository)
        elif digest in self._store.undecided:
            await self.drop(digest)

    async def _missing_now(self, digest: Digest, *, hit: bool) -> Mapping[Digest, int]:
        found = self._complete.get(digest)
        # One that had to be fetched may have been pruned with its blobs since.
        if hit and found is not None and self._clock.seconds() - found < _BELIEVED:
            return {}
        missing = await self._store.missing(digest)
        if not missing:
            if len(self._complete) >= _MOST_COMPLETE:
                self._complete.clear()
            self._complete[digest] = self._clock.seconds()
        return missing or {}

    async def _request(self, digest: Digest, repository: Repository) -> None:
        try:
            await self._store.add_pending(digest, repository)
        except OSError as error:
            self.log.error("cannot note that {image} is incomplete: {why}", image=digest, why=error.strerror)
        self._fresh.add(repository.upstream)
        self._work_on(repository.upstream)

    # The work

    def _work_on(self, upstream: Upstream) -> None:
        if self._stopped:
            return
        if upstream in self._work:
            self._work_added.fire()
            return
        work = self._work[upstream] = Deferred.fromCoroutine(self._complete_all(upstream))
        work.addBoth(self._end, upstream)

    def _end(self, result: Failure | None, upstream: Upstream) -> None:
        self._work.pop(upstream, None)
        if isinstance(result, Failure):
            result.trap(CancelledError)

    def _begin(self, work: Coroutine[Deferred[Any], Any, None]) -> None:
        started = Deferred.fromCoroutine(work)
        started.addErrback(lambda failure: self.log.failure("a defect in looking for what is missing", failure))

    async def _complete_all(self, upstream: Upstream) -> None:
        while True:
            self._fresh.discard(upstream)
            for digest, repository in self._pending_of(upstream):
                try:
                    await self._complete_one(digest, repository)
                except CancelledError:
                    raise
                except Exception:
                    self.log.failure("a defect in completing {image}", image=digest)
            wait = await self._fetch_metadata(upstream)
            if upstream in self._fresh:
                continue
            waits = [_AGAIN] if any(self._pending_of(upstream)) else []
            waits += [wait] if wait is not None else []
            if not waits:
                return
            await self._pause(min(waits))

    def _pending_of(self, upstream: Upstream) -> Sequence[tuple[Digest, Repository]]:
        return [(digest, at) for digest, at in self._store.pending.items() if at.upstream == upstream]

    async def _fetch_metadata(self, upstream: Upstream) -> float | None:
        """Fetch metadata until there is something else to do; return the seconds to wait, None when all is there."""
        wait: float | None = None
        while self._metadata is not None and upstream not in self._fresh:
            wait = await self._metadata.fetch_next(upstream)
            if wait is None or wait > 0:
                break
        return wait

    async def _pause(self, seconds: float) -> None:
        try:
            await self._work_added.wait().addTimeout(seconds, self._clock)
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
        refused = dict[Digest, int]()
        try:
            for blob in sorted(missing, key=missing.__getitem__):
                self._missing[digest] = sum(missing.values())
                try:
                    await self._fetch_from_any(repository, digest, blob)
                except (BlobUnknown, Denied) as error:
                    self.log.warn("{image} stays incomplete: {why}", image=image, why=error.message)
                    refused[blob] = missing[blob]
                del missing[blob]
        except RegistryError as error:
            self.log.debug("{image} is not complete yet: {why}", image=image, why=error.message)
            self._missing[digest] = sum((missing | refused).values())
            return
        if refused:
            self._missing[digest] = sum(refused.values())
            self._refused[digest] = self._clock.seconds()
        else:
            self._missing.pop(digest, None)
        await self.drop(digest)
        self.log.info("no blob of {image} is to be fetched any more", image=image)

    async def _fetch_from_any(self, repository: Repository, image: Digest, blob: Digest) -> None:
        """Fetch a blob from `repository`, or from another one that has the image if it is not there."""
        try:
            await self._fetch(repository, blob)
        except (BlobUnknown, Denied):
            others = (one for one in self._store.repositories(image) if one.upstream == repository.upstream)
            for other in sorted(set(others) - {repository}):
                with suppress(BlobUnknown, Denied):
                    await self._fetch(other, blob)
                    return
            raise

    async def drop(self, digest: Digest) -> None:
        """Note that no blobs of the image are to be fetched any more."""
        try:
            await self._store.remove_pending(digest)
        except OSError as error:
            self.log.error("cannot remove the wish for {image}: {why}", image=digest, why=error.strerror)
