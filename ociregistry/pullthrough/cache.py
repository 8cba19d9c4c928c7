"""The read-through cache: answers from the store, and from the upstream what the store does not have."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger

from ociregistry.chain import NOBODY, Chain
from ociregistry.errors import RegistryError, Unavailable
from ociregistry.flights import Flights
from ociregistry.manifests import Manifest
from ociregistry.names import Digest, ImageReference, Repository
from ociregistry.pullthrough.connections import Connections
from ociregistry.pullthrough.content import Content
from ociregistry.pullthrough.download import Download
from ociregistry.pullthrough.patience import in_time
from ociregistry.store.store import Counts, Store
from ociregistry.upstream.registries import Registries


@dataclass(frozen=True, slots=True)
class FoundManifest:
    """A manifest, and whether the store had it."""

    manifest: Manifest
    hit: bool


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
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._store = store
        self._jitter = jitter
        self._registries = registries
        self._clock = clock
        self._manifests: Flights[ImageReference, Manifest] = Flights()
        self._sizes: Flights[tuple[Repository, Digest], int | None] = Flights()
        self._downloads: dict[Digest, Download] = {}
        self._stopping = False
        self._ended = 0
        """Counts the downloads that have ended."""

    @property
    def counts(self) -> Counts:
        """What the store holds."""
        return self._store.counts

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

    async def manifest(self, image: ImageReference, chain: Chain = NOBODY) -> FoundManifest:
        """The manifest that `image` means; raises `ManifestUnknown` or `Unavailable`."""
        self._registries.check(image.repository.upstream)
        stored = await self._store.manifest(image)
        if stored is not None:
            self.log.debug("serving manifest from cache: {image}", image=image)
            return FoundManifest(stored, hit=True)
        fetched = self._manifests.join(image, lambda: self._fetch_manifest(image, chain))
        return FoundManifest(await in_time(fetched, self._clock, image), hit=False)

    async def _fetch_manifest(self, image: ImageReference, chain: Chain) -> Manifest:
        self.log.debug("pulling manifest from upstream: {image}", image=image)
        manifest = await self._registries.get(image.repository.upstream, chain).manifest(image)
        try:
            await self._store.keep(manifest, image)
        except OSError as error:
            raise Unavailable(f"{image}: cannot be stored: {error.strerror or error}") from error
        return manifest

    async def blob(self, repository: Repository, digest: Digest, chain: Chain = NOBODY) -> FoundBlob:
        """The blob, as soon as its size is known and it can be followed; raises `BlobUnknown` or `Unavailable`."""
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
        followed = Deferred.fromCoroutine(self._follow(repository, digest, chain))
        return FoundBlob(await in_time(followed, self._clock, f"{repository}@{digest}"), hit=False)

    async def _follow(self, repository: Repository, digest: Digest, chain: Chain) -> Content:
        while True:
            download = self._downloads.get(digest)
            if download is None or download.error is not None:
                download = self._start(repository, digest, chain)
            try:
                return await download.reader()
            except RegistryError:
                # What another repository lacks or refuses, this one may have; what was resumed, begins anew.
                if self._stopping or (download.repository == repository and not download.spoiled):
                    raise

    def _start(self, repository: Repository, digest: Digest, chain: Chain, *, again: bool = True) -> Download:
        """A new download; one whose bytes turn out wrong after a resume is made once `again`."""
        self.log.debug("pulling blob from upstream: {repository}@{digest}", repository=repository, digest=digest)
        registry = self._registries.get(repository.upstream, chain)
        expected = self._store.size_in(repository, digest)
        connections = Connections(registry, repository, digest, self._clock, self._jitter)
        download = self._downloads[digest] = Download(connections, self._store, repository, digest, expected)
        download.start().addCallback(self._land, download, again)
        return download

    def _land(self, _: None, download: Download, again: bool) -> None:
        self._ended += 1
        if self._downloads.get(download.digest) is not download:
            return
        del self._downloads[download.digest]
        if download.spoiled and again and not self._stopping:
            self._start(download.repository, download.digest, NOBODY, again=False)

    async def blob_size(self, repository: Repository, digest: Digest, chain: Chain = NOBODY) -> FoundSize:
        """The size of the blob, without fetching it; raises `BlobUnknown` or `Unavailable`."""
        self._registries.check(repository.upstream)
        stored = await self._store.blob(digest)
        if stored is not None:
            stored.close()
            return FoundSize(stored.size, hit=True)
        download = self._downloads.get(digest)
        if download is not None and download.size is not None:
            return FoundSize(download.size, hit=False)
        registry = self._registries.get(repository.upstream, chain)
        asked = self._sizes.join((repository, digest), lambda: registry.blob_size(repository, digest))
        told = await in_time(asked, self._clock, f"{repository}@{digest}")
        known = self._store.size_in(repository, digest)
        size = told if known is None else known
        if size is None or told not in (None, size):
            raise Unavailable(f"{repository}@{digest}: its size is {told} to the upstream, {known} to its manifest")
        return FoundSize(size, hit=False)
