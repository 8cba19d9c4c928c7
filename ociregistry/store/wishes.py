"""Wishes: images of which blobs are to be fetched that nobody has asked for. Each is a small file in pulls/<n>/, so
that it outlives the process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Pending:
    """An image whose blobs are to be fetched from `repository`.

    It is `undecided` while it may turn out not to be wanted.
    """

    image: Digest
    repository: Repository
    undecided: bool = False


class WishFiles:
    """The wishes of this process, `<hex of the manifest>.wish` in its folder. All of it blocks; raises `OSError`."""

    def __init__(self, folder: Path, files: Files) -> None:
        self._folder = folder
        self._files = files

    def write(self, pending: Pending) -> None:
        """Write the file of one pending image."""
        repository = pending.repository
        document: dict[str, object] = {"upstream": repository.upstream.name, "repository": repository.path}
        document |= {"undecided": True} if pending.undecided else {}
        path = self._path(pending.image)
        self._files.put(path, json.dumps(document).encode() + b"\n", path.with_name(f"{path.name}.new"))

    def remove(self, manifest: Digest) -> None:
        """Wishes no more."""
        self._files.unlink(self._path(manifest))

    def read(self) -> Iterator[Pending]:
        """All that is wished for; what is no wish is removed."""
        for path in sorted(path for path in self._folder.glob(f"*{WISH_SUFFIX}") if path.is_file()):
            pending = _read(path)
            if pending is None:
                self._files.unlink(path)
            else:
                yield pending

    def look(self) -> Iterator[Pending]:
        """Yield the pending images of a folder that may be another process's."""
        for path in self._folder.glob(f"*{WISH_SUFFIX}"):
            pending = _read(path)
            if pending is not None:
                yield pending

    def _path(self, manifest: Digest) -> Path:
        return self._folder / f"{manifest.hex}{WISH_SUFFIX}"


def pending_images(root: Path) -> frozenset[Digest]:
    """Return the images, asked for in any process on the store at `root`, of which nothing is decided yet. Blocks."""
    files = (WishFiles(folder, Files()) for folder in pulls_folders(root))
    return frozenset(pending.image for one in files for pending in one.look() if pending.undecided)


def _read(path: Path) -> Pending | None:
    manifest = Digest.from_hex(path.stem)
    if manifest is None:
        return None
    try:
        # Only a file: a pipe would be waited for.
        document = json.loads(path.read_bytes() if path.is_file() else b"")
        repository = Repository.at(Upstream.parse(document["upstream"]), document["repository"])
        return Pending(manifest, repository, document.get("undecided") is True)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RegistryError):
        return None
