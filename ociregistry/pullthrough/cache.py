"""The read-through cache: serve from the store, and fetch from the upstream what the store lacks."""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeGuard, TypeVar

from twisted.application.service import Service
from twisted.internet import defer
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from ociregistry.context import FROM_CLIENT, IN_BACKGROUND, Context, Priority
from ociregistry.errors import LoopDetected, RegistryError, Unavailable, cannot_store
from ociregistry.manifests import Descriptor, Manifest
from ociregistry.names import Digest, ImageReference, Repository, Tag
from ociregistry.pullthrough.download import Download
from ociregistry.pullthrough.downloads import Downloads
from ociregistry.pullthrough.transfer import PriorityScheduler
from ociregistry.pullthrough.waiting import (
    LOOK_AGAIN,
    CacheStatus,
    DeadlineExceeded,
    SharedRequests,
    unless_down,
    unless_loop,
    within_deadline,
)
from ociregistry.store.blobs import StoredBlob
from ociregistry.store.store import Store
from ociregistry.upstream.breaker import LinkDown
from ociregistry.upstream.network import Registries

_log = Logger(namespace="ociregistry.pullthrough")

T = TypeVar("T")


class Content(Protocol):
    """A manifest or blob that is open for reading by one client; the client closes it.

    `str()` gives the repository and digest, for the log.
    """

    @property
    def size(self) -> int:
        """The size in bytes of the complete content."""

    def more_than(self, offset: int) -> Deferred[int]:
        """Fire with the number of readable bytes as soon as it exceeds `offset`.

        Fails with a `RegistryError` when no more bytes will come. The last byte is readable only after the digest
        has been verified.
        """

    def read(self, offset: int, count: int) -> Deferred[bytes]:
        """Fire with the bytes at `offset`: at least one, at most `count`."""

    def close(self) -> None:
        """Release what is held for reading, such as the open file."""


class FileContent(Content, Protocol):
    """Content that is in a file."""

    def send(self, to: int, offset: int, count: int, *, in_thread: bool) -> Deferred[int]:
        """Send at most `count` of the bytes at `offset`, which must be readable, to the socket `to`.

        Fires with the number of bytes that were sent, 0 if the socket takes none at present. Fails with `EOFError`
        where the file ends at `offset`, and with `OSError`.
        """


def is_in_file(content: Content) -> TypeGuard[FileContent]:
    """Tell whether `content` is in a file."""
    # An isinstance of a protocol is slow, and this is asked for each slice that is sent.
    return hasattr(content, "send")


_DISK_SLACK = 0.5
"""Seconds after the deadline for the upstream: it ends what waits for the upstream alone."""
_METADATA = Context(priority=Priority.METADATA, patient=True)
_LATEST = Tag("latest")
_LATEST_WITHIN = 5.0
"""Seconds to wait for the upstream's digest of the tag `latest` when the store has a manifest for it."""
_NOTED_EVERY = 60.0
"""Seconds from one note that a manifest was pulled to the next."""
_HEADERS_WITHIN = 10.0
"""Seconds after which a client gets headers for a blob whose size only a manifest has told so far."""


@dataclass(frozen=True, slots=True)
class Policy:
    """The settings that decide when upstreams are asked."""

    always_pull_latest: bool = False
    air_gapped: bool = False


@dataclass(frozen=True, slots=True)
class FoundManifest:
    """A manifest, and where it is from."""

    manifest: Manifest
    cache_status: CacheStatus


@dataclass(frozen=True, slots=True)
class FoundBlob:
    """A blob that is open for reading, and where it is from."""

    content: Content
    cache_status: CacheStatus


@dataclass(frozen=True, slots=True)
class FoundSize:
    """The size of a blob in bytes, and where it is from."""

    size: int
    cache_status: CacheStatus


class PullThrough(Service):
    """The read-through cache: manifests and blobs from the store, else from their upstream.

    Requests of clients return within 25 s or raise `Unavailable`, as soon as the link counts as down; the fetch then
    continues for a later call. They raise `Denied` for an upstream that is not allowed, `AirGapped` where no upstream
    may be asked, and `LoopDetected` where a request in flight waits for the cache that asks.
    """

    def __init__(
        self,
        store: Store,
        registries: Registries,
        clock: IReactorTime,
        policy: Policy = Policy(),
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._policy = policy
        self._store = store
        self._registries = registries
        self._clock = clock
        self._manifests: SharedRequests[ImageReference, Manifest] = SharedRequests(clock, self._silent)
        self._in_background: set[ImageReference] = set()
        """Manifests in flight whose fetch was started in the background, without a client's request."""
        self._checks: SharedRequests[ImageReference, Manifest] = SharedRequests(clock)
        self._sizes: SharedRequests[str, int | None] = SharedRequests(clock)
        self._scheduler = PriorityScheduler()
        self._downloads = Downloads(store, registries, self._scheduler, clock, jitter)

    def stopService(self) -> Deferred[None]:
        """End all downloads; fire when they have ended, but after a few seconds at most."""
        super().stopService()
        return Deferred.fromCoroutine(self._downloads.stop())

    async def manifest(
        self, image: ImageReference, context: Context = FROM_CLIENT, *, wanted: bool = False
    ) -> FoundManifest:
        """Return the manifest that `image` refers to.

        `wanted` is stored in a new record of an image: whether all its layers are wanted. A child of an index is
        never wanted at first; an image that another cache requests for its clients is wanted in that cache.

        Raises:
            ManifestUnknown: the upstream does not have it.
            Unavailable: the upstream cannot be asked or did not answer in time, or the disk failed.
            Denied: the upstream is not allowed.
        """
        self._registries.check(image.repository.upstream)
        return await self._in_time(self._manifest(image, context, wanted), image, context)

    async def _manifest(self, image: ImageReference, context: Context, wanted: bool) -> FoundManifest:
        stored = await self._store.manifest(image)
        if stored is not None and self._must_be_latest(image):
            return await self._latest(image, stored, context, wanted)
        if stored is not None:
            _log.debug("serving manifest from cache: {image}", image=image)
            return FoundManifest(stored, CacheStatus.HIT)
        while True:
            in_background = image in self._in_background
            joined = image in self._manifests and not in_background
            try:
                manifest = await self._manifests.wait(
                    image,
                    lambda context: self._fetch_manifest(image, image, context, wanted),
                    context,
                    again=lambda: self._again(image, wanted),
                    loops=lambda context: self._loops(image.repository, f"manifests/{image.reference}", context),
                )
            except Unavailable as error:
                # A background fetch may be refused for its low priority; a client's request is then sent again.
                if not in_background or isinstance(error, DeadlineExceeded | LinkDown):
                    raise
            else:
                return FoundManifest(manifest, CacheStatus.fetched(joined=joined))

    def repeats(self, image: ImageReference, digest: Digest) -> Callable[[], bool] | None:
        """Return a function for repeated requests of `image`, for which the store has the manifest `digest` now.

        It tells whether that would be the answer again, and if so, notes the pull. It reads no file.

        Returns:
            None where each request has to be looked at.
        """
        entry, noted = self._store.entry(digest), self._clock.seconds()
        # In another repository, it may have to be noted that the image is known there.
        if self._must_be_latest(image) or entry is None or not entry.known_in(image.repository):
            return None

        meaning = self._store.meanings(image)

        def repeated() -> bool:
            nonlocal noted
            changed = self._store.entry(digest) is not entry or meaning() != digest
            if changed or self._store.faults.scan_fails:
                return False
            now = self._clock.seconds()
            if now - noted >= _NOTED_EVERY:
                noted = now
                self._store.pulled(digest)
            return True

        return repeated

    def opened(self, digest: Digest) -> Content | None:
        """Return a whole blob for reading at once, or None where that is not open already."""
        return self._store.opened(digest)

    def _again(self, image: ImageReference, wanted: bool) -> Coroutine[Deferred[Any], Any, None] | None:
        """Fetch a manifest that a client missed, as a probe.

        Returns:
            None where its request is in flight still, or where the store has it now: a probe must not move a tag that
            was loaded meanwhile.
        """
        if image in self._manifests or self._store.meaning(image) is not None:
            return None
        return self._fetch_last(image, wanted)

    async def _loops(self, repository: Repository, path: str, context: Context) -> LoopDetected | None:
        return await self._registries.get(repository.upstream).loops(repository, path, context)

    async def fetch_manifest(self, image: ImageReference) -> None:
        """Fetch a manifest by digest into the store at the lowest priority, as not wanted.

        Raises:
            ManifestUnknown: the upstream does not have it.
            Unavailable: the upstream cannot be asked or did not answer in time, or the disk failed.
            Denied: the upstream is not allowed.
        """
        while self._scheduler.pauses(_METADATA.priority):
            await self._scheduler.change()
        if isinstance(image.reference, Digest) and self._store.entry(image.reference) is not None:
            return
        await self._fetch_last(image, wanted=False)

    async def _fetch_last(self, image: ImageReference, wanted: bool) -> None:
        if image not in self._manifests:
            self._in_background.add(image)
        try:
            await self._manifests.wait(
                image, lambda context: self._fetch_manifest(image, image, context, wanted), _METADATA
            )
        finally:
            self._in_background.discard(image)

    async def fetch_config(self, repository: Repository, config: Descriptor) -> None:
        """Fetch a config into the store at the lowest priority.

        Raises:
            RegistryError: it could not be fetched.
        """
        await self.fetch(repository, config.digest, _METADATA)

    async def _fetch_manifest(
        self,
        asked: ImageReference,
        image: ImageReference,
        context: Context,
        wanted: bool,
    ) -> Manifest:
        """Fetch the manifest `asked` and store it under the name `image`."""
        _log.debug("pulling manifest from upstream: {image}", image=asked)
        manifest = await self._registries.get(asked.repository.upstream).manifest(asked, context)
        is_child = isinstance(image.reference, Digest) and bool(self._store.indexes(manifest.digest))
        try:
            await self._store.keep(manifest, image, wanted=None if manifest.is_list else wanted and not is_child)
        except OSError as error:
            raise cannot_store(image, error) from error
        return manifest

    def _must_be_latest(self, image: ImageReference) -> bool:
        return self._policy.always_pull_latest and image.reference == _LATEST and not self._policy.air_gapped

    async def _latest(self, image: ImageReference, stored: Manifest, context: Context, wanted: bool) -> FoundManifest:
        """Return the manifest that `image` now refers to upstream; `stored` if the upstream gives none."""
        joined = image in self._checks
        checked = self._checks.wait(
            image,
            lambda context: self._check(image, stored, context, wanted),
            context,
            loops=lambda context: self._loops(image.repository, f"manifests/{image.reference}", context),
        )
        try:
            manifest = await Deferred.fromCoroutine(checked).addTimeout(_LATEST_WITHIN, self._clock)
        except (defer.TimeoutError, RegistryError) as error:
            if isinstance(error, LoopDetected) and context.from_cache:
                raise
            why = error.message if isinstance(error, RegistryError) else f"no answer within {_LATEST_WITHIN:g} s"
            _log.warn("serving {image} from the cache, unchecked: {why}", image=image, why=why)
            return FoundManifest(stored, CacheStatus.STALE)
        same = manifest.digest == stored.digest
        return FoundManifest(manifest, CacheStatus.HIT if same else CacheStatus.fetched(joined=joined))

    async def _check(self, image: ImageReference, stored: Manifest, context: Context, wanted: bool) -> Manifest:
        digest = await self._registries.get(image.repository.upstream).manifest_digest(image, context)
        if digest == stored.digest:
            if self._store.disputed(image):
                # On a full disk the newest date goes on deciding.
                with suppress(OSError):
                    await self._store.keep(stored, image)
            return stored
        # HEAD first, then GET by digest only on a change: registries' rate limits count a GET, not a HEAD.
        asked = replace(image, reference=digest or image.reference)
        return await self._fetch_manifest(asked, image, context, wanted)

    async def blob(self, repository: Repository, digest: Digest, context: Context = FROM_CLIENT) -> FoundBlob:
        """Open a blob for reading, from the store or while it is being downloaded.

        Returns as soon as the size is known. Where a manifest tells the size, that is after at most 10 s; if the
        upstream then turns out not to have the blob, the content ends early.

        Raises:
            BlobUnknown: the upstream does not have it.
            Unavailable: the upstream cannot be asked or did not answer in time, or the disk failed.
            Denied: the upstream is not allowed.
        """
        self._registries.check(repository.upstream)
        return await self._in_time(self._blob(repository, digest, context), f"{repository}@{digest}", context)

    async def _blob(self, repository: Repository, digest: Digest, context: Context) -> FoundBlob:
        stored = await self._stored(digest)
        if stored is not None:
            _log.debug("serving blob from cache: {blob}", blob=f"{repository}@{digest}")
            return FoundBlob(stored, CacheStatus.HIT)
        self._downloads.check(repository, digest)
        # Another cache asks elsewhere, or again: bytes that do not come would look as if this one were silent.
        expected = None if context.from_cache else self._store.size_in(repository, digest)
        download = self._downloads.in_flight.get(digest)
        joined = download is not None and download.requested
        wait = partial(self._reader, expected, context, context.from_cache and download is not None)
        followed = unless_down(lambda: self._downloads.follow(repository, digest, context, wait), context)
        what = f"{repository}@{digest}"
        found = await within_deadline(Deferred.fromCoroutine(followed), self._clock, what, context, of=self._silent)
        return FoundBlob(found, CacheStatus.fetched(joined=joined))

    async def _stored(self, digest: Digest) -> StoredBlob | None:
        """Open a blob of the store; look again where a download that ended meanwhile may have stored it."""
        while True:
            ended = self._downloads.ended
            stored = await self._store.blob(digest)
            if stored is not None or ended == self._downloads.ended:
                return stored

    async def _in_time(self, answer: Coroutine[Deferred[Any], Any, T], what: object, context: Context) -> T:
        """Return `answer`, also where the disk does not answer in time."""
        waiting = Deferred.fromCoroutine(answer)
        return await within_deadline(waiting, self._clock, what, context, slack=_DISK_SLACK, of=lambda: "the disk")

    def _silent(self) -> str:
        """Return what a client waits for in vain. Where a write takes long, the upstream may have answered."""
        return "the upstream, or the disk, where a write takes long," if self._store.writes_slowly else "the upstream"

    async def _reader(self, expected: int | None, context: Context, joins: bool, download: Download) -> Content:
        if download.down is not None and not context.patient:
            raise download.down
        waiting = Deferred.fromCoroutine(download.reader(patient=context.patient))
        if joins and not download.has_size:
            path = f"blobs/{download.digest}"
            return await unless_loop(waiting, lambda: self._loops(download.repository, path, context), self._clock)
        if expected is None:
            return await waiting
        try:
            return await waiting.addTimeout(_HEADERS_WITHIN, self._clock)
        except (defer.TimeoutError, LinkDown):
            return download.early_reader(expected)

    async def fetch(self, repository: Repository, digest: Digest, context: Context = IN_BACKGROUND) -> None:
        """Fetch a blob into the store, unless `context` says otherwise in the background.

        Where the priority uses the reserved connections, only one such call per upstream may run at a time.

        Raises:
            RegistryError: it could not be fetched.
        """
        if digest not in self._downloads.in_flight:
            stored = await self._stored(digest)
            if stored is not None:
                stored.close()
                return
        await self._downloads.follow(repository, digest, context, lambda download: download.finished())

    @property
    def in_flight(self) -> Mapping[Digest, Download]:
        """The blobs that are being downloaded."""
        return self._downloads.in_flight

    async def blob_size(self, repository: Repository, digest: Digest, context: Context = FROM_CLIENT) -> FoundSize:
        """Return the size of a blob without fetching it.

        Raises:
            BlobUnknown: the upstream does not have it.
            Unavailable: the upstream cannot be asked, did not answer in time, or contradicts the manifest.
            Denied: the upstream is not allowed.
        """
        self._registries.check(repository.upstream)
        return await self._in_time(self._blob_size(repository, digest, context), f"{repository}@{digest}", context)

    async def _blob_size(self, repository: Repository, digest: Digest, context: Context) -> FoundSize:
        stored = await self._store.blob(digest)
        if stored is not None:
            stored.close()
            return FoundSize(stored.size, CacheStatus.HIT)
        download = self._downloads.in_flight.get(digest)
        if download is not None and download.size is not None:
            return FoundSize(download.size, CacheStatus.fetched(joined=download.requested))
        registry = self._registries.get(repository.upstream)
        path = f"blobs/{digest}"
        if download is not None and context.from_cache:
            # The download may wait for the cache that asks. A size from elsewhere would hide that.
            looking = Deferred.fromCoroutine(self._loops(repository, path, context))
            with suppress(defer.TimeoutError):
                found = await looking.addTimeout(LOOK_AGAIN, self._clock)
                if found is not None:
                    raise found
        what = f"{repository}@{digest}"
        joined = what in self._sizes
        told = await self._sizes.wait(
            what,
            lambda context: registry.blob_size(repository, digest, context),
            context,
            loops=lambda context: self._loops(repository, path, context),
        )
        known = self._store.size_in(repository, digest)
        size = told if known is None else known
        if size is None or told not in (None, size):
            raise Unavailable(f"{what}: size mismatch: {told} bytes by the upstream, {known} by the manifest")
        return FoundSize(size, CacheStatus.fetched(joined=joined))
