"""Orphans: blobs that no record names, and partials that no process writes and no pending image needs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from ociregistry.names import Digest
from ociregistry.store.blobs import size_of_blob
from ociregistry.store.files import Files, SharedFile, hold, read_regular, reason
from ociregistry.store.partials import Note
from ociregistry.store.paths import STAGED_SUFFIX, blob_path, blobs_folder, note_path, pulls_folders
from ociregistry.store.snapshot import Snapshot
from ociregistry.store.workdir import store_locked, wanted_blobs


def find_orphans(root: Path, unchanged_since: datetime) -> Mapping[Path, int]:
    """Return the orphans of the store at `root` that are unchanged since then, with their sizes in bytes. Blocks.

    Raises:
        OSError: the store cannot be read.
    """
    return dict(_orphans(root, unchanged_since))


def remove_orphans(root: Path, unchanged_since: datetime, files: Files) -> Mapping[Path, int]:
    """Remove the orphans that `find_orphans` finds, under the store's lock; return what was removed. Blocks.

    Raises:
        OSError: the store cannot be read, or a file cannot be removed.
    """
    found = {}
    with store_locked(root):
        for path, size in _orphans(root, unchanged_since):
            _remove(path, files)
            found[path] = size
    return found


def remove_partials(root: Path, wanted: Set[Digest], missing: int, files: Files) -> None:
    """Remove partials that are neither `wanted` nor being written, until `missing` bytes are free. Blocks.

    Those written least recently go first. When all of them together have fewer than `missing` bytes, none is removed.

    Raises:
        OSError: the store cannot be read, or a file cannot be removed.
    """
    unwanted = []
    for path, digest in _partials(root):
        with _unwritten(path) as held:
            if held is not None and digest not in wanted:
                status = os.fstat(held.fileno())
                unwanted.append((status.st_mtime, path, status.st_size))
    if sum(size for _, _, size in unwanted) < missing:
        return
    for _, path, size in sorted(unwanted):
        if missing <= 0:
            return
        with _unwritten(path) as held:
            if held is not None:
                _remove(path, files)
                missing -= size


def _remove(path: Path, files: Files) -> None:
    files.unlink(path)
    files.unlink(note_path(path))


def _orphans(root: Path, unchanged_since: datetime) -> Iterator[tuple[Path, int]]:
    """Yield each orphan, with its size in bytes, as it is found.

    A partial stays locked until the next orphan is asked for, so that no process resumes it.
    """
    snapshot = Snapshot.read(root)
    for error in snapshot.unknown:
        why = f"a record that may name any of the blobs cannot be read: {reason(error)}; verify moves it away"
        raise OSError(error.errno, why, error.filename)

    def blobs_of(manifest: Digest) -> Iterable[Digest]:
        entry = snapshot.index.get(manifest)
        return entry.blobs if entry is not None else ()

    named = {digest.hex for digest in snapshot.index.blobs}
    for path in _blobs(root, named | snapshot.mentioned):
        size = _old_size(path, unchanged_since)
        if size is not None:
            yield path, size
    wanted = wanted_blobs(root, blobs_of)
    for path, digest in _partials(root):
        if digest is None or digest not in wanted or _is_whole(root, digest, path):
            with _unwritten(path) as held:
                size = _old_size(path, unchanged_since) if held is not None else None
                if size is not None:
                    yield path, size


def _blobs(root: Path, named: Set[str]) -> Iterator[Path]:
    with suppress(FileNotFoundError):
        for path in sorted((blobs_folder(root)).iterdir()):
            if Digest.from_hex(path.name) is not None and path.name not in named and not path.is_dir():
                yield path


def _partials(root: Path) -> Iterator[tuple[Path, Digest | None]]:
    """Yield the partials of all processes, including ended ones, each with the blob that it can be resumed for.

    That is None for a partial that was filled from an archive.
    """
    for folder in pulls_folders(root):
        for path in sorted(folder.iterdir()):
            digest = Digest.from_hex(path.name.removesuffix(STAGED_SUFFIX))
            if digest is not None and path.is_file():
                yield path, None if path.suffix == STAGED_SUFFIX else digest


@contextmanager
def _unwritten(path: Path) -> Iterator[SharedFile | None]:
    """Hold the partial at `path` so that no process begins to write it; yield None if a process is writing it."""
    held = hold(path, writes=False)
    try:
        yield held
    finally:
        if held is not None:
            held.release()


def _is_whole(root: Path, digest: Digest, partial: Path) -> bool:
    with suppress(OSError):
        note = Note.parse(read_regular(note_path(partial)))
        return note is not None and note.size is not None and size_of_blob(blob_path(root, digest)) == note.size
    return False


def _old_size(path: Path, unchanged_since: datetime) -> int | None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    # Not the mtime: a copy of a store may keep mtimes from long ago.
    return status.st_size if status.st_ctime <= unchanged_since.timestamp() else None
