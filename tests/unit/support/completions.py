"""An incomplete image, and a blob fetcher whose results the test decides."""

from __future__ import annotations

from pathlib import Path

from twisted.internet.defer import CancelledError, Deferred

from ociregistry.manifests import Manifest
from ociregistry.names import Digest, Repository
from ociregistry.pullthrough.completion import Completion
from ociregistry.store.store import Store
from tests.images import make_image
from tests.unit.support.common import image, manifest, until

# The manifest lists the large layer before the small one.
BASE = make_image("base", layers=1, layer_size=50_000)
BUILT = make_image("image", layers=1, base=BASE)
IMAGE, OTHER = manifest(BUILT), manifest(make_image("other"))
CONFIG, LARGE, SMALL = (Digest(blob.digest) for blob in BUILT.blobs)
SIZES = {blob.digest: blob.size for blob in (*IMAGE.blobs, *OTHER.blobs)}
APP, ELSEWHERE = image("reg.example/team/app:1"), image("else.example/other:1")
NAME = f"{APP.repository}@{IMAGE.digest}"
DATA = {Digest(blob.digest): blob.data for built in (BUILT, make_image("other")) for blob in built.blobs}


class FakeBlobFetcher:
    """Fetch blobs when the test says so."""

    def __init__(self, root: Path) -> None:
        self._blobs = root / "blobs"
        self.asked: list[tuple[Repository, Digest]] = []
        self.results: list[Deferred[None]] = []
        self.cancelled = 0

    async def __call__(self, repository: Repository, digest: Digest) -> None:
        self.asked.append((repository, digest))
        self.results.append(Deferred())
        try:
            await self.results[-1]
        except CancelledError:
            self.cancelled += 1
            raise

    @property
    def digests(self) -> list[Digest]:
        """Return the digests of the requests."""
        return [digest for _, digest in self.asked]

    async def bring(self, digest: Digest) -> None:
        """Complete the last request, which must be for this digest."""
        await until(lambda: self.asked and self.asked[-1][1] == digest and not self.results[-1].called)
        self.put(digest)
        self.results[-1].callback(None)

    async def refuse(self, error: Exception, count: int) -> None:
        """Fail request number `count`, which must be the last."""
        await until(lambda: len(self.asked) == count)
        self.results[-1].errback(error)

    def put(self, digest: Digest) -> None:
        """Write the blob into the store."""
        (self._blobs / digest.hex).write_bytes(DATA[digest])


async def pulled(completion: Completion, store: Store, what: Manifest = IMAGE, where: str = str(APP)) -> None:
    """Store the manifest and register it, as for a client's pull."""
    await store.keep(what, image(where))
    await completion.complete(what.digest, image(where).repository)


def pending(root: Path) -> list[str]:
    """Return the names of the pending files."""
    return [path.stem for path in (root / "pulls").rglob("*.wish")]
