"""Clients that request images of an index, and the resulting demand."""

from __future__ import annotations

from pathlib import Path

from twisted.internet.task import Clock

from ociregistry.manifests import Manifest
from ociregistry.names import Digest, ImageReference, Repository
from ociregistry.platforms import NO_PLATFORM, Platform
from ociregistry.pullthrough.completion import Completion, CompletionPolicy
from ociregistry.pullthrough.demand import Demand
from ociregistry.store.paths import record_path
from ociregistry.store.records import read_record
from ociregistry.store.store import Store
from tests.unit.support.common import image
from tests.unit.support.completions import FakeBlobFetcher
from tests.unit.support.loads import image_of, index_of, settle

MACHINE = Platform("linux", "amd64")
SHARED = b"layer of two platforms"
AMD64 = image_of(b"config of amd64", SHARED, b"layer of amd64")
ARM64 = image_of(b"config of arm64", SHARED, b"layer of arm64")
S390X = image_of(b"config of s390x", b"layer of s390x")
ATTESTATION = image_of(b"config of the attestation", b"in-toto")
PLATFORMS = (
    (AMD64, "linux/amd64"),
    (ARM64, "linux/arm64"),
    (S390X, "linux/s390x"),
    (ATTESTATION, NO_PLATFORM),
)
INDEX = index_of(*PLATFORMS)
COMPLETED = CompletionPolicy()
APP = "reg.example/team/app"


class NoDemand(Demand):
    """A demand that ignores all requests."""

    def __init__(self) -> None:
        pass

    def manifest_requested(self, image: ImageReference, digest: Digest, *, is_list: bool, hit: bool) -> None:
        """Do nothing."""

    def blob_requested(self, repository: Repository, digest: Digest) -> None:
        """Do nothing."""


def names(digests: object) -> list[str]:
    """Return the platforms of images of `INDEX`, and the digests of others."""
    known = {one.digest: platform for one, platform in PLATFORMS}
    assert hasattr(digests, "__iter__")
    return sorted(known.get(digest, str(digest)) for digest in digests)


class Demands:
    """A demand with its completion; nothing is ever fetched."""

    def __init__(
        self,
        root: Path,
        store: Store,
        clock: Clock,
        machine: Platform = MACHINE,
        policy: CompletionPolicy = COMPLETED,
    ) -> None:
        self.root = root
        self.store = store
        self.clock = clock
        self.completion = Completion(store, FakeBlobFetcher(root), clock, None, policy)
        self.demand = Demand(store, self.completion, machine, clock)
        self.completion.startService()
        self.demand.startService()

    def stop(self) -> None:
        """Stop demand and completion."""
        self.demand.stopService()
        self.completion.stopService()

    async def get(self, *manifests: Manifest, tag: str = "", repository: str = APP, hit: bool = False) -> None:
        """Request manifests by digest, or by `tag`, and store them like the cache does."""
        for one in manifests:
            asked = image(f"{repository}:{tag}" if tag else f"{repository}@{one.digest}")
            if not hit:
                is_child = not tag and bool(self.store.indexes(one.digest))
                await self.store.keep(one, asked, wanted=None if one.is_list else not is_child)
            self.demand.manifest_requested(asked, one.digest, is_list=one.is_list, hit=hit)
        await settle(self.store)

    async def get_layers(self, *layers: bytes, repository: str = APP) -> None:
        """Request layers at the same time and wait for the outcome."""
        self.ask_for_layers(*layers, repository=repository)
        await settle(self.store)

    def ask_for_layers(self, *layers: bytes, repository: str = APP) -> None:
        """Request layers."""
        for layer in layers:
            self.demand.blob_requested(image(f"{repository}:1").repository, Digest.of(layer))

    async def wait(self, seconds: float = 30) -> None:
        """Advance the clock."""
        self.clock.advance(seconds)
        await settle(self.store)

    @property
    def pending(self) -> list[str]:
        """Return the undecided images; memory and files must agree."""
        self._check_files()
        return names(self.store.undecided)

    @property
    def completing(self) -> list[str]:
        """Return the images being completed; memory and files must agree."""
        self._check_files()
        return names(self.store.pending)

    def _check_files(self) -> None:
        files = {path.stem for path in (self.root / "pulls").rglob("*.wish")}
        assert files == {digest.hex for digest in (*self.store.undecided, *self.store.pending)}

    def wanted(self, *manifests: Manifest) -> list[bool | None]:
        """Return `wanted` of the records."""
        return [read_record(record_path(self.root, one.digest, is_list=False)).wanted for one in manifests]
