"""Whole blobs: content-addressed files that never change.

A file counts as the blob only if it has the right size: `Store.blob` decides that for a request, and `missing_blobs`
for the blobs of a manifest.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping
from pathlib import Path

from twisted.internet.defer import Deferred, succeed

from ociregistry.names import Digest
from ociregistry.store.files import SharedFile, Threads

_TICK = 2_000_000_000
"""Nanoseconds after a change of a folder during which a second change may not alter its mtime."""


class StoredBlob:
    """A whole blob, open for reading until `close` is called."""

    def __init__(self, digest: Digest, file: SharedFile, size: int, threads: Threads) -> None:
        self._digest = digest
        self._file = file
        self._threads = threads
        self.size = size

    def more_than(self, offset: int) -> Deferred[int]:
        """Return the number of bytes that can be read: all of them."""
        return succeed(self.size)

    def read(self, offset: int, count: int) -> Deferred[bytes]:
        """Read at most `count`, but at least one, of the bytes at `offset`."""
        return read_at(self._file, offset, count, self._threads)

    def close(self) -> None:
        """Release the file."""
        self._file.release()

    def __str__(self) -> str:
        return f"the blob {self._digest}"


def open_blob(path: Path) -> tuple[SharedFile, int] | None:
    """Open the file at `path` and return it with its size in bytes, or None if there is none. Blocks."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    return SharedFile(descriptor), os.fstat(descriptor).st_size


def size_of_blob(path: Path | str) -> int | None:
    """Return the size of the file at `path` in bytes, or None if there is none. Blocks."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return None


def missing_blobs(folder: Path, blobs: Mapping[Digest, int]) -> dict[Digest, int]:
    """Return those of `blobs` that are not in `folder`, or not with these sizes in bytes. Blocks."""
    # Paths as text: with tens of thousands of blobs, making a Path for each takes longer than the stat.
    return {blob: size for blob, size in blobs.items() if size_of_blob(f"{folder}/{blob.hex}") != size}


class BlobFolder:
    """Detects which blobs are removed from a folder. All methods block."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._changed = 0
        self._names: frozenset[str] = frozenset()

    def gone(self) -> frozenset[Digest]:
        """Return the blobs that were removed since the last call.

        Raises:
            OSError: the folder cannot be read.
        """
        changed = self._folder.stat().st_mtime_ns
        if changed == self._changed:
            return frozenset()
        # Another change may follow so soon that it leaves the mtime as it is, so the folder is read once more.
        self._changed = changed if time.time_ns() - changed > _TICK else 0
        with os.scandir(self._folder) as entries:
            names = frozenset(entry.name for entry in entries)
        before, self._names = self._names, names
        return frozenset(digest for name in before - names if (digest := Digest.from_hex(name)) is not None)


def read_at(file: SharedFile, offset: int, count: int, threads: Threads) -> Deferred[bytes]:
    """Read at most `count` of the bytes of `file` at `offset`.

    If the kernel has them in memory the Deferred has fired already; otherwise a thread reads them.
    """
    buffer = bytearray(count)
    try:
        got = os.preadv(file.fileno(), [buffer], offset, os.RWF_NOWAIT)
    except OSError as error:
        # EAGAIN: the read would wait for the disk. EOPNOTSUPP: this file system does not support RWF_NOWAIT.
        if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
            raise
        got = 0
    if got:
        del buffer[got:]
        return succeed(bytes(buffer))
    return threads.read(_read_and_release, file.lease(), offset, count)


def _read_and_release(file: SharedFile, offset: int, count: int) -> bytes:
    try:
        return os.pread(file.fileno(), count, offset)
    finally:
        file.release()
