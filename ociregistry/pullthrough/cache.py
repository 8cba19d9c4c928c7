"""The read-through cache: answers from the store, and from the upstream what the store does not have."""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from twisted.internet import defer
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger

from ociregistry.concurrency import SingleFlight
from ociregistry.errors import BlobUnknown, RegistryError, Unavailable
from ociregistry.manifests import Descriptor, Manifest
from ociregistry.names import Digest, ImageReference, Repository, Tag
from ociregistry.pullthrough.download import Download
from ociregistry.pullthrough.transfer import Abandoned, Connections, PriorityScheduler
from ociregistry.store.store import Store
from ociregistry.upstream.http import DEFAULT_OPTIONS, RequestOptions
from ociregistry.upstream.network import Registries
from ociregistry.via import NO_VIA, Via

T = TypeVar("T")


class Content(Protocol):
    """A manifest or blob, open for reading by one client, who closes it. Printed, it says what it is, for the log."""

    @property
    def size(self) -> int:
        """Bytes, when all are there."""

    def more_than(self, offset: int) -> Deferred[int]:
        """Fires with how many bytes can be read, as soon as that is more than `offset`.

        Fails with a `RegistryError` when no more will come. The last byte comes only when the digest holds.
        """

    def read(self, offset: int, count: int) -> Deferred[bytes]:
        """Fires with at most `count` and at least one of the bytes at `offset`."""

    def close(self) -> None:
        """Gives back what is held for reading."""


ANSWER_DEADLINE = 25.0
"""Seconds, below the 30 after which containerd gives up on a server that sends no headers."""


class DeadlineExceeded(Unavailable):
    """The upstream has not answered yet; whoever asks again waits for the same answer."""


async def within_deadline(waiting: Deferred[T], clock: IReactorTime, what: object) -> T:
    """What `waiting` gives, which may be cancelled; raises `NotYet` when that takes too long."""
    waiting.addTimeout(ANSWER_DEADLINE, clock)
    try:
        return await waiting
    except defer.TimeoutError:
        raise DeadlineExceeded(f"{what}: the upstream gave no answer within {ANSWER_DEADLINE:.0f} s") from None


_KEPT = 60.0
_MOST_KEPT = 1000


class NegativeCache:
    """Remembers them for a minute, so that the client's next request is told at once what the first could not be."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._kept: dict[tuple[Repository, Digest], tuple[BlobUnknown, float]] = {}

    def remember(self, repository: Repository, digest: Digest, error: BlobUnknown) -> None:
        """The upstream does not have the blob."""
        if len(self._kept) >= _MOST_KEPT:
            self._kept.clear()
        self._kept[repository, digest] = error, self._clock.seconds() + _KEPT

    def check(self, repository: Repository, digest: Digest) -> None:
        """Raises what the upstream said of the blob less than a minute ago."""
        error, until = self._kept.get((repository, digest), (None, 0.0))
        if error is None:
            return
        if self._clock.seconds() < until:
            raise BlobUnknown(error.message)
        del self._kept[repository, digest]


_LATEST = Tag("latest")
_LATEST_WITHIN = 5.0
"""Seconds that an upstream has to say what `latest` means, where the cache knows what it meant."""
_HEADERS_WITHIN = 10.0
"""Seconds after which a client is promised a blob of which only a manifest has told so far."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator decided of when upstreams are asked."""

    always_pull_latest: bool = False
    air_gapped: bool = False


@dataclass(frozen=True, slots=True)
class FoundManifest:
    """A manifest, and whether the store had it."""

    manifest: Manifest
    hit: bool
    stale: bool = False
    """Whether the upstream was to be asked, and gave no manifest."""


@dataclass(frozen=True, slots=True)
class FoundBlob:
    """A blob, open for reading, and whether the store had it."""

    content: Content
    hit: bool


@dataclass(frozen=True, slots=True)
class FoundSize:
    """The size of a blob in bytes, and whether the store had it."""

    size: int
    hit: bool


class PullThrough:
    """The cache. Every answer comes within 25 s, or `Unavailable` does; the fetch then goes on for a later call.

    All methods raise `Denied` for an upstream that is not allowed. `chain` is who stands between us and the client.
    """

    log = Logger(namespace="ociregistry.pullthrough")

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
        self._jitter = jitter
        self._registries = registries
        self._clock = clock
        self._manifests: SingleFlight[ImageReference, Manifest] = SingleFlight()
        self._in_background: set[ImageReference] = set()
        """Manifests in flight that no client had asked for when their fetch began."""
        self._checks: SingleFlight[ImageReference, Manifest] = SingleFlight()
        self._sizes: SingleFlight[tuple[Repository, Digest], int | None] = SingleFlight()
        self._downloads: dict[Digest, Download] = {}
        self._scheduler = PriorityScheduler()
        self._negative = NegativeCache(clock)
        self._stopping = False
        self._ended = 0
        """Counts the downloads that have ended."""

    def stop(self) -> Deferred[None]:
        """Ends what is in flight; fires when it has ended."""
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        self._stopping = True
        running = list(self._downloads.values())
        if running:
            # Not at once: what leads here may be the very download that just told its last client of the last byte.
            await deferLater(self._clock, 0)
            await gatherResults([download.cancel() for download in running])

    async def manifest(self, image: ImageReference, via: Via = NO_VIA, *, wanted: bool = False) -> FoundManifest:
        """The manifest that `image` means; raises `ManifestUnknown` or `Unavailable`.

        `wanted` is what a new record says of an image. One that an index names is never wanted at first, and what
        another cache asks for on behalf of its clients is wanted there.
        """
        self._registries.check(image.repository.upstream)
        stored = await self._store.manifest(image)
        if stored is not None and self._must_be_latest(image):
            return await self._latest(image, stored, via, wanted)
        if stored is not None:
            self.log.debug("serving manifest from cache: {image}", image=image)
            return FoundManifest(stored, hit=True)
        while True:
            in_background = image in self._in_background
            fetched = self._manifests.join(image, lambda: self._fetch_manifest(image, image, via, wanted))
            try:
                return FoundManifest(await within_deadline(fetched, self._clock, image), hit=False)
            except Unavailable as error:
                # What was refused for its low priority is not refused to a client.
                if not in_background or isinstance(error, DeadlineExceeded):
                    raise

    async def fetch_manifest(self, image: ImageReference) -> None:
        """Bring the manifest that a digest means into the store after everything else, as one that is not wanted.

        Raises `ManifestUnknown` or `Unavailable`.
        """
        while self._scheduler.yields:
            await self._scheduler.change()
        if isinstance(image.reference, Digest) and self._store.entry(image.reference) is not None:
            return
        if image not in self._manifests:
            self._in_background.add(image)
        try:
            await within_deadline(self._manifests.join(image, lambda: self._fetch_last(image)), self._clock, image)
        finally:
            self._in_background.discard(image)

    async def _fetch_last(self, image: ImageReference) -> Manifest:
        return await self._fetch_manifest(image, image, NO_VIA, wanted=False, options=RequestOptions(last=True))

    async def fetch_config(self, repository: Repository, config: Descriptor) -> None:
        """Bring a config into the store after what clients wait for; raises `RegistryError`."""
        await self.fetch(repository, config.digest)

    async def _fetch_manifest(
        self,
        asked: ImageReference,
        image: ImageReference,
        via: Via,
        wanted: bool,
        options: RequestOptions = DEFAULT_OPTIONS,
    ) -> Manifest:
        """The manifest `asked` for, kept as what `image` means."""
        self.log.debug("pulling manifest from upstream: {image}", image=asked)
        manifest = await self._registries.get(asked.repository.upstream, via).manifest(asked, options)
        is_child = isinstance(image.reference, Digest) and bool(self._store.indexes(manifest.digest))
        try:
            await self._store.keep(manifest, image, wanted=None if manifest.is_list else wanted and not is_child)
        except OSError as error:
            raise Unavailable(f"{image}: cannot be stored: {error.strerror or error}") from error
        return manifest

    def _must_be_latest(self, image: ImageReference) -> bool:
        return self._policy.always_pull_latest and image.reference == _LATEST and not self._policy.air_gapped

    async def _latest(self, image: ImageReference, stored: Manifest, via: Via, wanted: bool) -> FoundManifest:
        """What the upstream says that `image` means now; what the store says when the upstream gives no manifest."""
        checked = self._checks.join(image, lambda: self._check(image, stored, via, wanted))
        try:
            manifest = await checked.addTimeout(_LATEST_WITHIN, self._clock)
        except (defer.TimeoutError, RegistryError) as error:
            why = error.message if isinstance(error, RegistryError) else f"no answer within {_LATEST_WITHIN:g} s"
            self.log.warn("serving {image} from the cache, unchecked: {why}", image=image, why=why)
            return FoundManifest(stored, hit=True, stale=True)
        return FoundManifest(manifest, hit=manifest.digest == stored.digest)

    async def _check(self, image: ImageReference, stored: Manifest, via: Via, wanted: bool) -> Manifest:
        digest = await self._registries.get(image.repository.upstream, via).manifest_digest(image)
        if digest == stored.digest:
            return stored
        # By digest: a HEAD does not count against the limits that registries set, a GET of the tag does.
        return await self._fetch_manifest(replace(image, reference=digest or image.reference), image, via, wanted)

    async def blob(self, repository: Repository, digest: Digest, via: Via = NO_VIA) -> FoundBlob:
        """The blob, as soon as its size is known and it can be followed; raises `BlobUnknown` or `Unavailable`.

        Where a manifest tells the size, that is after 10 s at the latest; what the upstream then says may be that it
        has no such blob, so that the answer ends short.
        """
        self._registries.check(repository.upstream)
        while True:
            ended = self._ended
            stored = await self._store.blob(digest)
            if stored is not None:
                self.log.debug("serving blob from cache: {repository}@{digest}", repository=repository, digest=digest)
                return FoundBlob(stored, hit=True)
            # A download that ended while we looked may have brought it.
            if ended == self._ended:
                break
        self._negative.check(repository, digest)
        expected = self._store.size_in(repository, digest)
        use = partial(self._reader, expected)
        followed = Deferred.fromCoroutine(self._with_download(repository, digest, via, use))
        return FoundBlob(await within_deadline(followed, self._clock, f"{repository}@{digest}"), hit=False)

    async def _reader(self, expected: int | None, download: Download) -> Content:
        if expected is None:
            return await download.reader()
        waiting = Deferred.fromCoroutine(download.reader())
        try:
            return await waiting.addTimeout(_HEADERS_WITHIN, self._clock)
        except defer.TimeoutError:
            return download.early_reader(expected)

    async def fetch(self, repository: Repository, digest: Digest, *, extra: bool = True) -> None:
        """Brings the blob into the store, after what clients wait for; raises `RegistryError`.

        An `extra` one takes none of the connections for blobs: there must be one such call at a time.
        """
        while digest not in self._downloads:
            ended = self._ended
            stored = await self._store.blob(digest)
            if stored is not None:
                stored.close()
                return
            if ended == self._ended:
                break
        await self._with_download(repository, digest, NO_VIA, lambda download: download.finished(), extra=extra)

    async def _with_download(
        self,
        repository: Repository,
        digest: Digest,
        via: Via,
        use: Callable[[Download], Coroutine[Deferred[Any], Any, T]],
        *,
        extra: bool = True,
    ) -> T:
        while True:
            download = self._downloads.get(digest)
            if download is None or download.error is not None:
                download = self._start(repository, digest, via, extra=extra)
            try:
                return await use(download)
            except Abandoned:
                # It ended just before somebody came to wait for it.
                if self._stopping:
                    raise
            except RegistryError:
                # What another repository lacks or refuses, this one may have; what was resumed, begins anew.
                if self._stopping or (download.repository == repository and not download.spoiled):
                    raise

    def _start(
        self, repository: Repository, digest: Digest, via: Via, *, again: bool = True, extra: bool = True
    ) -> Download:
        """A new download; one whose bytes turn out wrong after a resume is made once `again`."""
        self.log.debug("pulling blob from upstream: {repository}@{digest}", repository=repository, digest=digest)
        registry = partial(self._registries.get, repository.upstream, via)
        expected = self._store.size_in(repository, digest)
        connections = Connections(
            registry, repository, digest, expected, self._scheduler, self._clock, self._jitter, extra=extra
        )
        download = self._downloads[digest] = Download(connections, self._store, repository, digest, expected)
        download.start().addCallback(self._finish, download, again)
        return download

    def _finish(self, _: None, download: Download, again: bool) -> None:
        self._ended += 1
        if download.promised and isinstance(download.error, BlobUnknown):
            self._negative.remember(download.repository, download.digest, download.error)
        if self._downloads.get(download.digest) is not download:
            return
        del self._downloads[download.digest]
        if download.spoiled and again and not self._stopping:
            self._start(download.repository, download.digest, NO_VIA, again=False)

    @property
    def in_flight(self) -> frozenset[Digest]:
        """The blobs that are being downloaded."""
        return frozenset(self._downloads)

    async def blob_size(self, repository: Repository, digest: Digest, via: Via = NO_VIA) -> FoundSize:
        """The size of the blob, without fetching it; raises `BlobUnknown` or `Unavailable`."""
        self._registries.check(repository.upstream)
        stored = await self._store.blob(digest)
        if stored is not None:
            stored.close()
            return FoundSize(stored.size, hit=True)
        download = self._downloads.get(digest)
        if download is not None and download.size is not None:
            return FoundSize(download.size, hit=False)
        registry = self._registries.get(repository.upstream, via)
        asked = self._sizes.join((repository, digest), lambda: registry.blob_size(repository, digest))
        told = await within_deadline(asked, self._clock, f"{repository}@{digest}")
        known = self._store.size_in(repository, digest)
        size = told if known is None else known
        if size is None or told not in (None, size):
            raise Unavailable(f"{repository}@{digest}: its size is {told} to the upstream, {known} to its manifest")
        return FoundSize(size, hit=False)
