"""Whole blobs: content-addressed files that never change.

A file counts as the blob only if it has the right size: `Store.blob` decides that for a request, and `missing_blobs`
for the blobs of a manifest.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from twisted.internet.defer import Deferred, fail, succeed
from twisted.python.failure import Failure

from ociregistry.names import Digest
from ociregistry.store.files import SharedFile, Threads, open_regular

TICK = 2_000_000_000
"""Nanoseconds after a change of a folder during which a second change may not alter its mtime."""


_FOR_ALL = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH


class StoredBlob:
    """A whole blob, open for reading until `close` is called."""

    def __init__(
        self,
        path: Path,
        digest: Digest,
        file: SharedFile,
        size: int,
        threads: Threads,
        failed: Callable[[int], object],
    ) -> None:
        """Read the open `file` at `path`; `failed` is called with an offset at which that fails."""
        self._path = path
        self._digest = digest
        self._file = file
        self._threads = threads
        self._failed = failed
        self.size = size

    def more_than(self, offset: int) -> Deferred[int]:
        """Return the number of bytes that can be read: all of them."""
        return succeed(self.size)

    def read(self, offset: int, count: int) -> Deferred[bytes]:
        """Read at most `count`, but at least one, of the bytes at `offset`.

        Raises:
            OSError: through the Deferred: they cannot be read.
        """
        try:
            reading = read_at(self._file, offset, count, self._threads)
        except OSError as error:
            reading = fail(error)
        return reading.addErrback(self._cannot_read, offset)

    def _cannot_read(self, failure: Failure, offset: int) -> Failure:
        if isinstance(failure.value, OSError):
            # The log names the file.
            failure.value.filename = str(self._path)
            self._failed(offset)
        return failure

    def close(self) -> None:
        """Release the file."""
        self._file.release()

    def __str__(self) -> str:
        return f"the blob {self._digest}"


def open_blob(path: Path, failed_at: int | None = None) -> tuple[SharedFile, int] | None:
    """Open the file at `path` and return it with its size in bytes, or None if there is none. Blocks.

    The byte at `failed_at`, where an earlier read failed, is read again first.

    Raises:
        OSError: it cannot be opened, is no regular file, or the byte at `failed_at` still cannot be read.
    """
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return None
    try:
        if failed_at is not None:
            os.pread(file.fileno(), 1, failed_at)
        return file, file.size()
    except BaseException:
        file.release()
        raise


def size_of_blob(path: Path | str) -> int | None:
    """Return the size in bytes of the regular file at `path`, or None if there is none that can be read. Blocks."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    mode = status.st_mode
    # Blobs that this program wrote can be read by everyone, so few need the second system call.
    readable = stat.S_ISREG(mode) and (mode & _FOR_ALL == _FOR_ALL or os.access(path, os.R_OK))
    return status.st_size if readable else None


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
        # An mtime in the future was set before the clock was set back.
        self._changed = changed if abs(time.time_ns() - changed) > TICK else 0
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
