"""A `Demand` for tests that look at something else."""

from __future__ import annotations

from ociregistry.manifests import Manifest
from ociregistry.names import Digest, ImageReference, Repository
from ociregistry.pullthrough.demand import Demand


class NoDemand(Demand):
    """Takes no notice of what clients ask for."""

    def __init__(self) -> None:
        pass

    def manifest_requested(self, manifest: Manifest, image: ImageReference, *, hit: bool) -> None:
        """Nothing happens."""

    def blob_requested(self, repository: Repository, digest: Digest) -> None:
        """Nothing happens."""
