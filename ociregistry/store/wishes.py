"""Wishes: images of which blobs are to be fetched that nobody has asked for. Each is a small file in pulls/<n>/, so
that it outlives the process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ociregistry.errors import RegistryError
from ociregistry.names import Digest, Repository, Upstream
from ociregistry.store.files import Files
from ociregistry.store.pulls import WISH_SUFFIX, pulls_folders


def wanted_blobs(root: Path, blobs_of: Callable[[Digest], Iterable[Digest]]) -> frozenset[Digest]:
    """Return the blobs that are to be fetched for images of the store at `root`, by whichever process.

    `blobs_of` gives the blobs that the record of a manifest names, none where there is no record. Blocks. Raises:
    `OSError`.
    """
    wishes = (wish for folder in pulls_folders(root) for wish in folder.glob(f"*{WISH_SUFFIX}"))
    manifests = (Digest.from_hex(wish.stem) for wish in wishes)
    return frozenset(blob for manifest in manifests if manifest is not None for blob in blobs_of(manifest))


class WishFiles:
    """The wishes of this process, `<hex of the manifest>.wish` in its folder. All of it blocks; raises `OSError`."""

    def __init__(self, folder: Path, files: Files) -> None:
        self._folder = folder
        self._files = files

    def write(self, manifest: Digest, repository: Repository) -> None:
        """Wishes for all blobs of the image `manifest`, from `repository`."""
        document = {"upstream": repository.upstream.name, "repository": repository.path}
        path = self._path(manifest)
        self._files.put(path, json.dumps(document).encode() + b"\n", path.with_name(f"{path.name}.new"))

    def remove(self, manifest: Digest) -> None:
        """Wishes no more."""
        self._files.unlink(self._path(manifest))

    def read(self) -> Iterator[tuple[Digest, Repository]]:
        """All that is wished for; what is no wish is removed."""
        for path in sorted(path for path in self._folder.glob(f"*{WISH_SUFFIX}") if path.is_file()):
            manifest = Digest.from_hex(path.stem)
            repository = _repository(path)
            if manifest is None or repository is None:
                self._files.unlink(path)
            else:
                yield manifest, repository

    def _path(self, manifest: Digest) -> Path:
        return self._folder / f"{manifest.hex}{WISH_SUFFIX}"


def _repository(path: Path) -> Repository | None:
    try:
        document = json.loads(path.read_bytes())
        return Repository.at(Upstream.parse(document["upstream"]), document["repository"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RegistryError):
        return None
