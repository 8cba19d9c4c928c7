"""Orphans: blobs that no record names, and partials that no process owns and nobody wishes for."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from ociregistry.names import Digest
from ociregistry.store.blobs import size_of_blob
from ociregistry.store.files import Files, is_full
from ociregistry.store.inventory import Inventory
from ociregistry.store.pulls import NOTE_SUFFIX, pulls_folders, store_locked
from ociregistry.store.wishes import WISH_SUFFIX


def find_orphans(root: Path, unchanged_since: datetime) -> Mapping[Path, int]:
    """The orphans of the store at `root` that have not changed since, and their sizes in bytes.

    Blocks; raises `OSError`.
    """
    return dict(_orphans(root, unchanged_since, removes=False))


def remove_orphans(root: Path, unchanged_since: datetime, files: Files) -> Mapping[Path, int]:
    """Removes what `find_orphans` finds, under the store's lock, and gives it. Blocks; raises `OSError`."""
    found = {}
    with store_locked(root):
        for path, size in _orphans(root, unchanged_since, removes=True):
            files.unlink(path)
            files.unlink(path.with_name(path.name + NOTE_SUFFIX))
            found[path] = size
    return found


def _orphans(root: Path, unchanged_since: datetime, *, removes: bool) -> Iterator[tuple[Path, int]]:
    """Each as it is found; who `removes` it then can be sure that no process takes it meanwhile."""
    inventory = Inventory.read(root)
    named = {digest.hex for digest in inventory.named}
    wished = {
        blob.digest.hex
        for folder in pulls_folders(root)
        for wish in folder.glob(f"*{WISH_SUFFIX}")
        if (manifest := Digest.from_hex(wish.stem)) is not None and manifest in inventory.records
        for blob in inventory.records[manifest].manifest.blobs
    }
    for paths in (_blobs(root, named | inventory.mentioned), _partials(root, wished, removes=removes)):
        for path in paths:
            size = _old_size(path, unchanged_since)
            if size is not None:
                yield path, size


def _blobs(root: Path, named: Set[str]) -> Iterator[Path]:
    with suppress(FileNotFoundError):
        for path in sorted((root / "blobs").iterdir()):
            if Digest.from_hex(path.name) is not None and path.name not in named:
                yield path


def _partials(root: Path, wished: Set[str], *, removes: bool) -> Iterator[Path]:
    for folder in pulls_folders(root):
        if removes:
            _make_lock(folder)
        with _free(folder) as is_free:
            for path in sorted(folder.iterdir()):
                digest = Digest.from_hex(path.name)
                if digest is None or not path.is_file():
                    continue
                # Of what a living process has, only what another one has finished in the meantime.
                if _is_whole(root, digest, path) or (is_free and path.name not in wished):
                    yield path


def _make_lock(folder: Path) -> None:
    """Make the lock's file, so that no process can take the folder meanwhile; without space for it none can."""
    try:
        (folder / "lock").touch()
    except OSError as error:
        if not is_full(error):
            raise


@contextmanager
def _free(folder: Path) -> Iterator[bool]:
    """Whether no process owns the folder; none takes it while the block runs."""
    try:
        lock = os.open(folder / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(lock)


def _is_whole(root: Path, digest: Digest, partial: Path) -> bool:
    with suppress(FileNotFoundError, ValueError, TypeError, KeyError):
        size = json.loads(partial.with_name(partial.name + NOTE_SUFFIX).read_bytes())["size"]
        return size is not None and size_of_blob(root / "blobs" / digest.hex) == size
    return False


def _old_size(path: Path, unchanged_since: datetime) -> int | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    # Not the mtime: whoever copies a store may carry over one from long ago.
    return status.st_size if status.st_ctime <= unchanged_since.timestamp() else None
