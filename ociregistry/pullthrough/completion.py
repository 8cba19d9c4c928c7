"""Completion: fetch in the background the blobs of a pulled image that its client did not request.

A client requests only the layers that it lacks; the next client may need all of them while the link is down.
"""

from __future__ import annotations

from collections.abc import Collection, Coroutine, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from cachetools import TTLCache
from twisted.application.service import Service
from twisted.internet import defer
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall, deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from ociregistry.concurrency import Event
from ociregistry.config.values import count_text
from ociregistry.errors import RegistryError
from ociregistry.names import Digest, Repository, Upstream
from ociregistry.platforms import Platform, chosen
from ociregistry.pullthrough.imageblobs import MOST_BLOBS, Fetch, ImageBlobs
from ociregistry.pullthrough.metadata import Metadata
from ociregistry.store.store import Store

_log = Logger(namespace="ociregistry.pullthrough")

_AGAIN = 30.0
"""Seconds until an image whose upstream could not be asked is tried again."""
_CLIENT_FIRST = 1.0
"""Seconds that a client has to request the blobs of an image that it has just pulled."""
_COMPLETE_FOR = 30.0
"""Seconds for which an image that was found complete is not checked again."""
_REFUSED_FOR = 3600.0
"""Seconds until an image that had to stay incomplete is tried again."""
_MOST_COMPLETE = 10_000
"""Images, at most, that are remembered as complete."""
_MOST_CHECKED = 500
"""Records that are checked in one call of a thread."""


@dataclass(frozen=True, slots=True)
class Incomplete:
    """The numbers of incomplete images and indexes, and of the bytes that they lack."""

    images: int
    """Images that lack blobs, including those that are still undecided."""
    bytes: int
    """The size of all known missing blobs, each counted once."""
    pending: int = 0
    """Undecided images: it is still open whether they are wanted."""
    indexes: int = 0
    """Indexes that lack manifests or configs of some platforms."""


@dataclass(frozen=True, slots=True)
class CompletionPolicy:
    """The settings that decide what is completed without a client's request."""

    images: bool = True
    """Whether the missing blobs of wanted images are fetched; otherwise they are only reported."""
    metadata: bool = True
    """Whether the manifests and configs of all platforms of an index are fetched."""
    platforms: tuple[Platform, ...] = ()
    """The only platforms of an index to complete, always; if empty, those that clients request."""


class Completion(Service):
    """Completes images: per upstream in turns, some blobs of each image, the smallest first; metadata last."""

    def __init__(
        self,
        store: Store,
        fetch: Fetch,
        clock: IReactorTime,
        metadata: Metadata | None = None,
        policy: CompletionPolicy = CompletionPolicy(),
    ) -> None:
        """Use `fetch` for missing blobs and `metadata` for the metadata of indexes; None leaves that out."""
        self._store = store
        self._fetch = fetch
        self._clock = clock
        self._metadata = metadata
        self._policy = policy
        self._missing: dict[Digest, dict[Digest, int]] = {}
        """Wanted images -> the blobs that each lacks, with their sizes in bytes."""
        self._refused: dict[Digest, dict[Upstream, float]] = {}
        """Images left incomplete -> the upstreams that refused blobs of them, and when (clock seconds)."""
        self._too_large: TTLCache[Digest, None, float] = TTLCache(
            _MOST_COMPLETE, ttl=_REFUSED_FOR, timer=clock.seconds
        )
        """Images that name too many blobs, which was logged."""
        self._foreign_refused: TTLCache[Digest, None, float] = TTLCache(
            _MOST_COMPLETE, ttl=_REFUSED_FOR, timer=clock.seconds
        )
        """Images whose upstream did not have all foreign layers."""
        self._changed: set[Digest] = set()
        """Records that are still to be checked."""
        self._checking = False
        self._being_checked: set[Digest] = set()
        """Images that are being checked for missing blobs."""
        self._complete: TTLCache[Digest, None, float] = TTLCache(
            _MOST_COMPLETE, ttl=_COMPLETE_FOR, timer=clock.seconds
        )
        """Images that were found complete in the last 30 s."""
        self._work: dict[Upstream, Deferred[None]] = {}
        self._begun: dict[Digest, ImageBlobs] = {}
        """Images that have had a turn."""
        self._put_off_until: dict[Digest, float] = {}
        """Pending images that get no turn for now, as a try failed -> when they get the next one (clock seconds)."""
        self._stopped = False
        self._work_added = Event()
        self._has_new_work: set[Upstream] = set()
        """Upstreams that got a new pending image since their current round began."""
        self._rechecking = LoopingCall(self._recheck)
        self._rechecking.clock = clock

    @property
    def policy(self) -> CompletionPolicy:
        """The settings that decide what is completed."""
        return self._policy

    @property
    def incomplete(self) -> Incomplete:
        """What is known to be missing."""
        known = self._store.pending.keys() | self._store.undecided.keys() | self._missing.keys()
        indexes = self._metadata.incomplete if self._metadata else 0
        # Images share blobs.
        blobs: dict[Digest, int] = {}
        for missing in self._missing.values():
            blobs.update(missing)
        return Incomplete(len(known), sum(blobs.values()), len(self._store.undecided), indexes)

    @property
    def missing(self) -> Mapping[Digest, int]:
        """The wanted images that lack blobs, and the number of bytes that each lacks."""
        return {image: sum(missing.values()) for image, missing in self._missing.items()}

    def startService(self) -> None:
        """Check the whole store for missing blobs, and continue with the pending images of the last run."""
        super().startService()
        self._store.watch(self._schedule_check)
        self._schedule_check(set(self._store.digests))
        self._rechecking.start(_AGAIN, now=False)
        if self._policy.images:
            for upstream in {repository.upstream for repository in self._store.pending.values()}:
                self._work_on(upstream)

    def stopService(self) -> None:
        """Stop; the pending images stay recorded for the next start."""
        super().stopService()
        self._stopped = True
        self._store.watch(lambda changed: None)
        if self._rechecking.running:
            self._rechecking.stop()
        for work in list(self._work.values()):
            work.cancel()

    # Checks

    def _schedule_check(self, changed: Set[Digest]) -> None:
        """Schedule a check of the records `changed`, and of the indexes that name them."""
        self._changed |= changed
        for digest in changed:
            self._changed.update(self._store.indexes(digest))
        if not self._checking and self._changed and not self._stopped:
            self._checking = True
            self._begin(self._check_all())

    def _recheck(self) -> None:
        """Check again the incomplete images that are not pending."""
        self._schedule_check(self._missing.keys() - self._store.pending.keys())

    async def _check_all(self) -> None:
        try:
            while self._changed and not self._stopped:
                some = {self._changed.pop() for _ in range(min(_MOST_CHECKED, len(self._changed)))}
                await self._check(some)
        finally:
            self._checking = False

    async def _check(self, digests: Set[Digest]) -> None:
        try:
            missing = await self._store.missing_of_images(digests)
        except OSError as error:
            _log.error("cannot check what {image} lacks: {why}", image="the store", why=error.strerror)
            return
        for digest in digests:
            entry = self._store.entry(digest)
            if entry is not None and entry.is_list:
                await self._check_index(digest)
            elif entry is None or not missing.get(digest):
                if entry is None and digest in self._store.pending:
                    await self.drop(digest)
                self._note_complete(digest)
                if entry is None and self._metadata is not None:
                    # It may be an index that was removed while its metadata was being fetched.
                    self._metadata.forget(digest)
            else:
                await self._note_incomplete(digest, missing[digest])

    def _note_complete(self, digest: Digest) -> None:
        """Note that an image lacks nothing, or is not wanted."""
        if digest not in self._store.pending:
            self._missing.pop(digest, None)
        self._refused.pop(digest, None)

    async def _note_incomplete(self, digest: Digest, missing: Mapping[Digest, int]) -> None:
        """Note the missing blobs of an image, and request them unless the upstream refused them recently."""
        # Also of a pending one: a client may have brought some.
        self._missing[digest] = dict(missing)
        if digest in self._store.pending or digest in self._being_checked:
            return
        repository = self._untried(digest)
        if repository is not None and self._completes(digest, repository):
            await self._request(digest, repository)

    def _untried(self, image: Digest) -> Repository | None:
        """Return a repository with the image, of an upstream that did not refuse a blob of it in the last hour."""
        long_ago = self._clock.seconds() - _REFUSED_FOR
        refused = self._refused.get(image, {})
        known = self._store.repositories(image)
        return min((one for one in known if refused.get(one.upstream, long_ago) <= long_ago), default=None)

    async def _check_index(self, index: Digest) -> None:
        """Queue the missing manifests and configs of an index, and mark its configured platforms as wanted."""
        entry = self._store.entry(index)
        if entry is None or entry.is_referrers or self._metadata is None or self._is_deep(index):
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
        repository = min((one for one in repositories if not self._metadata.gave_up(index, one)), default=None)
        if repository is not None:
            await self._metadata.queue_missing(index, repository, children, first=always)
            if repository.upstream not in self._work:
                self._work_on(repository.upstream)

    def _is_deep(self, index: Digest) -> bool:
        """Tell whether an index is in others more than one level deep: an upstream can make up such without end."""
        parents = self._store.indexes(index)
        entries = {parent: self._store.entry(parent) for parent in parents if not self._store.indexes(parent)}
        return bool(parents) and not any(
            child.digest == index for entry in entries.values() if entry is not None for child in entry.children
        )

    async def _want(self, image: Digest) -> None:
        try:
            await self._store.want(image)
        except OSError as error:
            _log.error("cannot record that {image} is wanted: {why}", image=image, why=error.strerror)

    def _completes(self, image: Digest, repository: Repository) -> bool:
        """Tell whether the policy completes this wanted image, and log it where it names too many blobs for that."""
        if not self._policy.images:
            return False
        if self._policy.platforms and self._store.indexes(image) and image not in self._always(image):
            return False
        entry = self._store.entry(image)
        if entry is None or len(entry.blobs) <= MOST_BLOBS:
            return True
        if image not in self._too_large:
            self._too_large[image] = None
            _log.warn(
                "{image} is not completed: its manifest names {blobs} blobs, more than {most}",
                image=f"{repository}@{image}",
                blobs=len(entry.blobs),
                most=MOST_BLOBS,
            )
        return False

    def _always(self, image: Digest) -> Collection[Digest]:
        """Return the images for the configured platforms in all indexes that name `image`."""
        entries = [self._store.entry(index) for index in self._store.indexes(image)]
        children = [child for entry in entries if entry is not None for child in entry.children if child.platform]
        return [child.digest for child in chosen(children, self._policy.platforms)[0]]

    # Requests

    def lacks_nothing(self, digest: Digest) -> bool:
        """Tell whether `complete` has nothing to do for an image that was a hit."""
        entry = self._store.entry(digest)
        known = entry is not None and entry.wanted and not entry.foreign_layers and digest in self._complete
        return bool(known) and digest not in self._store.pending and digest not in self._store.undecided

    async def complete(self, digest: Digest, repository: Repository, *, hit: bool = True) -> None:
        """Complete the image `digest`, which a client has pulled: mark it as wanted and fetch its missing blobs.

        `hit` tells whether the store had it.
        """
        at = self._store.pending.get(digest)
        if at is not None and at.upstream != repository.upstream and digest in self._put_off_until:
            # The upstream that the image waits for could not be asked.
            await self.drop(digest)
        if digest in self._store.pending or digest in self._being_checked:
            return
        self._being_checked.add(digest)
        try:
            await self._want(digest)
            if not hit:
                # Most blobs are about to be requested: nothing is to be noted for an image that is whole by then.
                await deferLater(self._clock, _CLIENT_FIRST)
                if self._stopped:
                    return
            missing = await self._missing_now(digest, hit=hit)
            lacks = bool(missing) or await self._lacks_foreign_layers(digest)
        finally:
            self._being_checked.discard(digest)
        if missing:
            self._missing[digest] = dict(missing)
        source = self._source(digest, repository)
        if lacks and self._completes(digest, source):
            await self._request(digest, source)
        elif digest in self._store.undecided:
            await self.drop(digest)

    def _source(self, image: Digest, asked: Repository) -> Repository:
        """Return the repository that a client `asked` if it has shown the image, else one that has."""
        known = self._store.repositories(image)
        return min(known) if known and not self._store.shown_in(asked, image) else asked

    async def _missing_now(self, digest: Digest, *, hit: bool) -> Mapping[Digest, int]:
        # After a miss, an earlier result does not hold: the image may have been pruned with its blobs since.
        if hit and digest in self._complete:
            return {}
        missing = await self._store.missing(digest)
        if not missing:
            self._complete[digest] = None
        return missing or {}

    async def _lacks_foreign_layers(self, digest: Digest) -> bool:
        """Tell whether an image lacks foreign layers that its upstream has not refused recently."""
        entry = self._store.entry(digest)
        if entry is None or not entry.foreign_layers or digest in self._foreign_refused:
            return False
        return bool(await self._store.missing_foreign_layers(entry.foreign_layers))

    async def _request(self, digest: Digest, repository: Repository) -> None:
        try:
            await self._store.add_pending(digest, repository)
        except OSError as error:
            _log.error("cannot record that {image} is incomplete: {why}", image=digest, why=error.strerror)
        self._has_new_work.add(repository.upstream)
        self._work_on(repository.upstream)

    # Work

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
        started.addErrback(lambda failure: _log.failure("a defect in looking for what is missing", failure))

    async def _complete_all(self, upstream: Upstream) -> None:
        while True:
            self._has_new_work.discard(upstream)
            for digest, repository in self._due(upstream):
                try:
                    await self._take_turn(digest, repository)
                except CancelledError:
                    raise
                except Exception:
                    _log.failure("a defect in completing {image}", image=digest)
                    self._put_off(digest)
            wait = await self._fetch_metadata(upstream)
            if upstream in self._has_new_work or self._due(upstream):
                continue
            again = [self._put_off_until[digest] for digest, _ in self._pending_of(upstream)]
            waits = [min(again) - self._clock.seconds()] if again else []
            waits += [wait] if wait is not None else []
            if not waits:
                return
            await self._pause(min(waits))

    def _pending_of(self, upstream: Upstream) -> Sequence[tuple[Digest, Repository]]:
        return [(digest, at) for digest, at in self._store.pending.items() if at.upstream == upstream]

    def _due(self, upstream: Upstream) -> Sequence[tuple[Digest, Repository]]:
        """Return the pending images of an upstream without those that are put off."""
        now, until = self._clock.seconds(), self._put_off_until
        return [(digest, at) for digest, at in self._pending_of(upstream) if until.get(digest, now) <= now]

    def _put_off(self, digest: Digest) -> None:
        """Give an image no turn for 30 s."""
        self._put_off_until[digest] = self._clock.seconds() + _AGAIN

    async def _fetch_metadata(self, upstream: Upstream) -> float | None:
        """Fetch metadata until a pending image comes up; return the seconds to wait, None if nothing is missing."""
        wait: float | None = None
        while self._metadata is not None and upstream not in self._has_new_work and not self._due(upstream):
            wait = await self._metadata.fetch_next(upstream)
            if wait is None or wait > 0:
                break
        return wait

    async def _pause(self, seconds: float) -> None:
        """Wait for `seconds`, or until work is added."""
        try:
            await self._work_added.wait().addTimeout(seconds, self._clock)
        except defer.TimeoutError:
            return

    async def _take_turn(self, digest: Digest, repository: Repository) -> None:
        """Fetch some of the missing blobs of an image, and end its completion after the last one."""
        if not self._completes(digest, repository):
            # The last process may have noted it, by other settings.
            await self.drop(digest)
            return
        image = f"{repository}@{digest}"
        is_first_turn = digest not in self._begun
        blobs = self._begun.setdefault(digest, ImageBlobs(digest, repository, self._store, self._fetch))
        try:
            await blobs.look()
        except OSError as error:
            _log.error("cannot check what {image} lacks: {why}", image=image, why=error.strerror)
            self._put_off(digest)
            return
        if is_first_turn and blobs.missing:
            size = sum(blobs.missing.values())
            _log.info(
                "completing {image}, missing: {what}",
                image=image,
                what=f"{count_text(len(blobs.missing), 'blob')} with {count_text(size, 'byte')}",
                blobs=len(blobs.missing),
                bytes=size,
            )
        self._missing[digest] = dict(blobs.missing)
        try:
            more = await blobs.take_turn(self._brought)
        except RegistryError as error:
            _log.debug("{image} is not complete yet: {why}", image=image, why=error.message)
            self._put_off(digest)
            return
        if not more:
            await self._end_completion(digest, repository, blobs)

    async def _end_completion(self, digest: Digest, repository: Repository, blobs: ImageBlobs) -> None:
        """End the completion of an image after its last turn; note what it still lacks because it was refused."""
        image = f"{repository}@{digest}"
        if blobs.refused:
            _log.warn("{image} stays incomplete: {why}", image=image, why=blobs.refused)
            self._refused.setdefault(digest, {})[repository.upstream] = self._clock.seconds()
        else:
            self._missing.pop(digest, None)
        if blobs.refused_foreign:
            _log.info("{image} stays without foreign layers: {why}", image=image, why=blobs.refused_foreign)
            self._foreign_refused[digest] = None
        await self.drop(digest)
        _log.info("completion finished: {image}", image=image)

    def _brought(self, blob: Digest) -> None:
        """Note that a blob is missing no more, in any image."""
        for image in self._store.naming(blob):
            self._missing.get(image, {}).pop(blob, None)

    async def drop(self, digest: Digest) -> None:
        """Remove an image from the pending and undecided ones: no more of its blobs are fetched."""
        self._begun.pop(digest, None)
        self._put_off_until.pop(digest, None)
        try:
            await self._store.remove_pending(digest)
        except OSError as error:
            _log.error("cannot remove the pending image {image}: {why}", image=digest, why=error.strerror)
