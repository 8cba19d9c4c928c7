"""A metadata fetcher with upstreams that have the manifests and configs of four platforms."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from ociregistry.errors import ManifestUnknown, RegistryError
from ociregistry.manifests import Descriptor, Manifest
from ociregistry.names import Digest, ImageReference, Repository
from ociregistry.store.store import Store
from tests.unit.support.loads import image_of


def platform(name: str) -> Manifest:
    """Return the image of a platform."""
    return image_of(f"config of {name}".encode(), f"layer of {name}".encode())


A, B, C, D = (platform(name) for name in "ABCD")
NAMES = {one.digest: name for name, one in zip("ABCD", (A, B, C, D), strict=True)}
CONFIGS = {Digest.of(f"config of {name}".encode()): name.lower() for name in "ABCD"}


class Fetcher:
    """Fetch metadata or fail as configured; `asked` names manifests in capitals, configs in small letters."""

    def __init__(self, store: Store, root: Path) -> None:
        self._store = store
        self._root = root
        self._manifests: dict[Digest, Manifest] = {}
        self.asked: list[str] = []
        self.errors: dict[Digest, list[RegistryError]] = defaultdict(list)
        """Digest -> errors of the next requests for it."""

    def add(self, *manifests: Manifest) -> None:
        """Add manifests to the upstreams."""
        self._manifests |= {one.digest: one for one in manifests}

    async def fetch_manifest(self, image: ImageReference) -> None:
        """See `MetadataFetcher`."""
        assert isinstance(image.reference, Digest)
        self.asked.append(NAMES.get(image.reference, image.reference))
        if self.errors[image.reference]:
            raise self.errors[image.reference].pop(0)
        if image.reference not in self._manifests:
            raise ManifestUnknown(f"{image}: the upstream answered 404")
        manifest = self._manifests[image.reference]
        await self._store.keep(manifest, image, wanted=None if manifest.is_list else False)

    async def fetch_config(self, repository: Repository, config: Descriptor) -> None:
        """See `MetadataFetcher`; a present config is not requested."""
        if await self._store.holds(config.digest, config.size):
            return
        self.asked.append(CONFIGS.get(config.digest, config.digest))
        if self.errors[config.digest]:
            raise self.errors[config.digest].pop(0)
        (self._root / "blobs" / config.digest.hex).write_bytes(b"x" * config.size)
