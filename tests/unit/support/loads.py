"""A fetcher in memory that counts requests, and the progress of a loader."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from twisted.internet.defer import CancelledError, Deferred

from ociregistry.errors import BlobUnknown, ManifestUnknown
from ociregistry.manifests import OCI_INDEX, Manifest
from ociregistry.names import Digest, ImageReference, Repository
from ociregistry.platforms import Platform
from ociregistry.pullthrough.cache import FoundManifest
from ociregistry.pullthrough.fetchers import Advance, Fetcher
from ociregistry.pullthrough.loader import Loader, LoadResult
from ociregistry.pullthrough.waiting import CacheStatus
from ociregistry.store.store import Store
from tests.images import Image, Index
from tests.unit.support.common import REACTOR, image, manifest, turn

AMD64 = Platform("linux", "amd64")
ARM64 = Platform("linux", "arm64")


def index_of(*entries: tuple[Manifest, str], media_type: str = OCI_INDEX) -> Manifest:
    """Return an index of manifests, each with a platform such as `linux/arm/v7`, or without."""
    listed = [
        {
            "mediaType": one.media_type,
            "digest": one.digest,
            "size": one.size,
            **(
                {"platform": dict(zip(("os", "architecture", "variant"), where.split("/"), strict=False))}
                if where
                else {}
            ),
        }
        for one, where in entries
    ]
    document = {"schemaVersion": 2, "mediaType": media_type, "manifests": listed}
    return Manifest.parse(json.dumps(document).encode(), media_type)


def image_of(*blobs: bytes) -> Manifest:
    """Return an image manifest over these blobs, the first of which is the config."""
    config, *layers = (
        {"mediaType": "application/octet-stream", "digest": Digest.of(blob), "size": len(blob)} for blob in blobs
    )
    media_type = "application/vnd.oci.image.manifest.v1+json"
    document = {"schemaVersion": 2, "mediaType": media_type, "config": config, "layers": layers}
    return Manifest.parse(json.dumps(document).encode(), media_type)


async def settle(store: Store) -> None:
    """Wait until the store's threads are idle and all pending calls have run."""
    calm = 0
    pools = (store._threads._reading, store._threads._writing, store._threads._in_turn)
    while calm < 5:
        await turn()
        found = [pool._team.statistics() for pool in pools]
        calm = 0 if any(one.busyWorkerCount or one.backloggedWorkCount for one in found) else calm + 1


class MemoryFetcher:
    """A fetcher with content in memory, which it returns at once or when the test says so.

    What it returns is in the store afterwards; stored content is not requested, as in `CacheFetcher`.
    """

    def __init__(self, store: Store, root: Path) -> None:
        self._store = store
        self._blob_files = root / "blobs"
        self._manifests: dict[str, Manifest] = {}
        self._blobs: dict[Digest, bytes] = {}
        self._referrers: dict[Digest, Manifest] = {}
        self.errors: dict[str, Exception] = {}
        """Request -> error that it fails with until removed."""
        self.held: set[str] = set()
        """Kinds of requests (`manifest`, `blob`) or whole requests that wait."""
        self.waiting: dict[str, Deferred[None]] = {}
        self.asked: list[str] = []
        self.running: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        """Largest number of concurrent requests by kind."""
        self.cancelled = 0
        self.pieces = 1
        """Number of progress reports for a blob."""

    def add(self, url: str, what: Image | Index) -> None:
        """Add an image, or an index with its images, at this URL."""
        built = what.images if isinstance(what, Index) else (what,)
        for one in built:
            self._blobs |= {Digest(blob.digest): blob.data for blob in one.blobs}
        self.put(url, manifest(what), *map(manifest, built))

    def put(self, url: str, what: Manifest, *others: Manifest, blobs: Sequence[bytes] = ()) -> None:
        """Add a manifest at this URL, and it and others by digest."""
        at = image(url)
        self._manifests[str(at)] = what
        for one in (what, *others):
            self._manifests[f"{at.repository}@{one.digest}"] = one
        self._blobs |= {Digest.of(blob): blob for blob in blobs}

    def add_referrers(self, subject: Digest, index: Manifest) -> None:
        """Set the referrers of a manifest."""
        self._referrers[subject] = index

    def release(self, kind: str = "") -> None:
        """Let waiting requests with this prefix continue."""
        for request in [request for request in self.waiting if request.startswith(kind)]:
            self.waiting.pop(request).callback(None)

    async def _ask(self, kind: str, what: object) -> None:
        request = f"{kind} {what}"
        self.asked.append(request)
        self.running[kind] += 1
        self.most[kind] = max(self.most[kind], self.running[kind])
        try:
            if kind in self.held or request in self.held:
                self.waiting[request] = Deferred()
                await self.waiting[request]
            if request in self.errors:
                raise self.errors[request]
        except CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running[kind] -= 1

    async def manifest(self, image: ImageReference) -> FoundManifest:
        """See `Fetcher.manifest`."""
        stored = await self._store.manifest(image)
        if stored is not None:
            return FoundManifest(stored, CacheStatus.HIT)
        await self._ask("manifest", image)
        found = self._manifests.get(str(image))
        if found is None:
            raise ManifestUnknown(f"{image}: the upstream answered 404")
        await self._store.keep(found, image)
        return FoundManifest(found, CacheStatus.MISS)

    async def referrers(self, repository: Repository, digest: Digest) -> Manifest | None:
        """See `Fetcher.referrers`."""
        await self._ask("referrers", f"{repository}@{digest}")
        return self._referrers.get(digest)

    async def blob(self, repository: Repository, digest: Digest, size: int, advance: Advance) -> None:
        """See `Fetcher.blob`."""
        await self._ask("blob", f"{repository}@{digest}")
        if digest not in self._blobs:
            raise BlobUnknown(f"{repository}@{digest}: the upstream answered 404")
        for count in _split(size, self.pieces):
            advance(count)
        (self._blob_files / digest.hex).write_bytes(self._blobs[digest])


def _split(size: int, pieces: int) -> Iterator[int]:
    for number in range(pieces):
        yield size * (number + 1) // pieces - size * number // pieces


class RecordedProgress:
    """Progress that records all reports."""

    def __init__(self) -> None:
        self.expected: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self.outcomes: list[LoadResult] = []

    def expect(self, name: str, size: int) -> None:
        """See `Progress.expect`."""
        self.expected[name] += size

    def advance(self, name: str, count: int) -> None:
        """See `Progress.advance`."""
        self.received[name] += count
        assert self.received[name] <= self.expected[name]

    def ended(self, outcome: LoadResult) -> None:
        """See `Progress.ended`."""
        self.outcomes.append(outcome)


class Loads:
    """Load images over a fetcher and record the progress."""

    def __init__(self, store: Store, fetcher: Fetcher) -> None:
        self._store = store
        self._fetcher = fetcher
        self.progress = RecordedProgress()

    def loader(
        self,
        *wanted: Platform,
        signatures: bool = False,
        concurrent: int = 1,
        connections: int = 4,
    ) -> Loader:
        """Return a loader of these platforms, or of all."""
        return Loader(
            self._store,
            self._fetcher,
            wanted,
            signatures=signatures,
            concurrent=concurrent,
            connections=connections,
            progress=self.progress,
            clock=REACTOR,
        )

    def load(
        self,
        *urls: str,
        wanted: Sequence[Platform] = (AMD64,),
        signatures: bool = False,
        concurrent: int = 1,
        connections: int = 4,
    ) -> Deferred[list[LoadResult]]:
        """Load images; the Deferred fires with the outcome of each."""
        loader = self.loader(*wanted, signatures=signatures, concurrent=concurrent, connections=connections)
        return Deferred.fromCoroutine(loader.load([image(url) for url in urls]))
