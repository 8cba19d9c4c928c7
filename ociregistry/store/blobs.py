"""Whole blobs: content-addressed files that never change.

A file counts as the blob only if it has the right size: `Blobs.open` decides that for a request, and `missing_blobs`
for the blobs of a manifest.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Collection, Mapping, Set
from contextlib import suppress
from functools import partial as bind
from pathlib import Path

from twisted.internet.defer import Deferred, execute, maybeDeferred, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from ociregistry.errors import Unavailable, is_out_of_descriptors
from ociregistry.names import Digest
from ociregistry.store.files import SharedFile, is_of_the_file, open_regular, reason
from ociregistry.store.openblobs import Identity, OpenBlobs
from ociregistry.store.pagecache import send_resident
from ociregistry.store.paths import blobs_folder
from ociregistry.store.smallblobs import AnyPartial, is_small
from ociregistry.store.sockets import send_bytes
from ociregistry.store.threads import Hung, Threads

_log = Logger(namespace="ociregistry.store")

_TICK = 2_000_000_000
"""Nanoseconds after a change of a folder during which a second change may not alter its mtime."""
_READABLE_BY_ALL = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH


class StoredBlob:
    """A whole blob, open for reading until `close` is called; a small one is in memory."""

    def __init__(
        self,
        folder: Path,
        digest: Digest,
        file: SharedFile,
        size: int,
        threads: Threads,
        failed: Callable[[int], object],
    ) -> None:
        """Read the open `file` in `folder`; `failed` is called with an offset at which that fails."""
        self._folder = folder
        self._digest = digest
        self._file = file
        self._threads = threads
        self._failed = failed
        self.size = size

    @property
    def _path(self) -> Path:
        # A hit that is sent at once does not need it, and joining takes a tenth of its time.
        return self._folder / self._digest.hex

    @property
    def data(self) -> bytes:
        """All bytes of a small blob, none of a larger one."""
        return self._file.content

    def more_than(self, offset: int) -> Deferred[int]:
        """Return the number of bytes that can be read: all of them."""
        return succeed(self.size)

    def read(self, offset: int, count: int) -> Deferred[bytes]:
        """Read at most `count`, but at least one, of the bytes at `offset`.

        Raises:
            OSError: through the Deferred: they cannot be read.
        """
        if self.data:
            return succeed(self.data[offset : offset + count])
        reading = maybeDeferred(self._threads.read_at, self._file, self._path, offset, count)
        return reading.addErrback(self._cannot_read, offset)

    def send(self, to: int, offset: int, count: int, *, in_thread: bool) -> Deferred[int]:
        """Send at most `count` of the bytes at `offset` to a socket, as `Threads.send_at` does.

        Raises:
            OSError: through the Deferred: they cannot be read, or the connection is lost.
        """
        if self.data:
            return execute(send_bytes, to, [memoryview(self.data)[offset : offset + count]])
        sending = maybeDeferred(self._threads.send_at, self._file, self._path, offset, count, to, in_thread=in_thread)
        return sending.addErrback(self._cannot_read, offset)

    def send_at_once(self, to: int, offset: int, count: int) -> int:
        """Send what needs no waiting for the disk, and return its number of bytes, 0 on a failure."""
        return send_resident(self._file, offset, count, to)

    def _cannot_read(self, failure: Failure, offset: int) -> Failure:
        error = failure.value
        # A disk that hangs and a connection that is lost are no faults of the file.
        is_no_fault = isinstance(error, Hung | ConnectionError)
        if isinstance(error, OSError) and not is_no_fault and not is_out_of_descriptors(error):
            # The log names the file.
            error.filename = str(self._path)
            self._failed(offset)
        return failure

    def close(self) -> None:
        """Release the file."""
        self._file.release(self._threads.close)

    def __str__(self) -> str:
        return f"the blob {self._digest}"


def open_blob(path: Path, failed_at: int | None = None) -> tuple[SharedFile, Identity] | None:
    """Open the file at `path` and return it with its identity, or None if there is none. Blocks.

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
        return file, Identity.of(os.fstat(file.fileno()))
    except BaseException:
        file.release()
        raise


def _open_and_read(path: Path, failed_at: int | None) -> tuple[SharedFile, Identity] | None:
    """Open a file as `open_blob` does; read it, if it is small."""
    opened = open_blob(path, failed_at)
    if opened is None:
        return None
    file, identity = opened
    try:
        if is_small(identity.size):
            content = os.pread(file.fileno(), identity.size, 0)
            if len(content) == identity.size:
                file.content = content
    except BaseException:
        file.release()
        raise
    return opened


def size_of_blob(path: Path | str) -> int | None:
    """Return the size in bytes of the regular file at `path`, or None if there is none that can be read. Blocks."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    mode = status.st_mode
    # Blobs that this program wrote can be read by everyone, so few need the second system call.
    readable = stat.S_ISREG(mode) and (mode & _READABLE_BY_ALL == _READABLE_BY_ALL or os.access(path, os.R_OK))
    return status.st_size if readable else None


def missing_blobs(folder: Path, blobs: Mapping[Digest, int]) -> dict[Digest, int]:
    """Return those of `blobs` that are not in `folder`, or not with these sizes in bytes. Blocks."""
    # Paths as text: with tens of thousands of blobs, making a Path for each takes longer than the stat.
    return {blob: size for blob, size in blobs.items() if size_of_blob(f"{folder}/{blob.hex}") != size}


def is_settled(mtime: int) -> bool:
    """Tell whether the next change of a folder is sure to alter its `mtime`, in nanoseconds.

    It is not just after a change. An mtime in the future is from before the clock was set back: the next one differs.
    """
    return abs(time.time_ns() - mtime) > _TICK


class BlobFolder:
    """Detects which blobs are removed from a folder. All methods block."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen = (0, 0, 0)
        """Device, inode and mtime in nanoseconds."""
        self._names: frozenset[str] = frozenset()

    def gone(self) -> frozenset[Digest]:
        """Return the blobs that were removed since the last call.

        Raises:
            OSError: the folder cannot be read.
        """
        try:
            status = self._folder.stat()
            seen = (status.st_dev, status.st_ino, status.st_mtime_ns)
            if seen == self._seen:
                return frozenset()
            # Otherwise the folder is read once more.
            self._seen = seen if is_settled(status.st_mtime_ns) else (0, 0, 0)
            with os.scandir(self._folder) as entries:
                names = frozenset(entry.name for entry in entries)
        except FileNotFoundError:
            names = frozenset()
        before, self._names = self._names, names
        return frozenset(digest for name in before - names if (digest := Digest.from_hex(name)) is not None)


class Blobs:
    """The whole blobs of a store: opened, checked and committed, in threads."""

    def __init__(
        self, root: Path, threads: Threads, clock: IReactorTime, gives: Callable[[Digest, int], bool]
    ) -> None:
        """Use the store at `root`; `gives` tells whether a manifest gives a blob this size in bytes."""
        self._folder = blobs_folder(root)
        self._threads = threads
        self._open_blobs = OpenBlobs(threads, clock)
        self._gives = gives
        self._committed: dict[Digest, int] = {}
        """Blob -> size in bytes, for the blobs that this process committed: no record may name them yet."""
        self._unreadable: dict[Digest, int] = {}
        """Blob that could not be read, which was logged -> the offset at which that failed last."""
        self.lost: set[Digest] = set()
        """Blobs that were damaged, and could not be fetched again."""

    @property
    def unreadable(self) -> Set[Digest]:
        """The blobs that could not be read when they were last asked for."""
        return self._unreadable.keys()

    def start(self) -> None:
        """Keep blobs open from now on."""
        self._open_blobs.start()

    def stop(self) -> None:
        """Close the blobs that are kept open."""
        self._open_blobs.stop()

    def removed(self, gone: Collection[Digest]) -> None:
        """Forget what was found out about files that are gone, and close them."""
        for digest in gone:
            self._unreadable.pop(digest, None)
        self._open_blobs.forget(gone)

    def opened(self, digest: Digest) -> StoredBlob | None:
        """Return a whole blob for reading at once, or None if it is not open already."""
        kept = self._open_blobs.get(digest)
        return None if kept is None else self._reader(digest, *kept)

    def _reader(self, digest: Digest, file: SharedFile, size: int) -> StoredBlob | None:
        """Return a reader of the open `file`, or None if it does not have the size of the blob."""
        if not self._gives(digest, size) and self._committed.get(digest) != size:
            file.release(self._threads.close)
            return None
        return StoredBlob(self._folder, digest, file, size, self._threads, bind(self._failed, digest))

    def _failed(self, digest: Digest, offset: int) -> None:
        self._unreadable[digest] = offset
        self._open_blobs.forget([digest])

    async def open(self, digest: Digest) -> StoredBlob | None:
        """Open a whole blob for reading, or return None on a miss.

        A file counts as the blob when it has a size that a manifest gives the blob, or that this process committed it
        with. So a half-copied file is a miss, and so is one that cannot be read.

        Raises:
            Unavailable: the disk does not answer.
        """
        path, forgotten = self._folder / digest.hex, self._open_blobs.forgotten
        found = await self._open(path, digest)
        blob = None if found is None else self._reader(digest, found[0], found[1].size)
        if found is not None and blob is not None:
            self._open_blobs.add(digest, path, *found, forgotten)
        return blob

    async def _open(self, path: Path, digest: Digest) -> tuple[SharedFile, Identity] | None:
        failed_at = self._unreadable.get(digest)
        try:
            opened = await self._threads.read_file(
                path, lambda: _open_and_read(path, failed_at), discard=self._discard
            )
        except Hung as error:
            # Not a miss: a disk that is busy must not cause the link to be used.
            raise Unavailable(f"{digest}: cannot be read: {reason(error)}") from error
        except OSError as error:
            if is_out_of_descriptors(error):
                raise
            self._unreadable[digest] = failed_at or 0
            if failed_at is None:
                _log.error("cannot read the blob {file}: {why}", file=path, why=reason(error))
            return None
        self._unreadable.pop(digest, None)
        if opened is not None:
            self.lost.discard(digest)
        return opened

    def _discard(self, opened: tuple[SharedFile, Identity] | None) -> None:
        if opened is not None:
            opened[0].release(self._threads.close)

    async def missing(self, blobs: Mapping[Digest, int]) -> Mapping[Digest, int]:
        """Return those of `blobs` that are missing, with their sizes in bytes."""
        return await self._threads.read(missing_blobs, self._folder, blobs) if blobs else {}

    async def missing_each(
        self, images: Mapping[Digest, Mapping[Digest, int]]
    ) -> Mapping[Digest, Mapping[Digest, int]]:
        """Return the images that lack blobs, with these and their sizes in bytes, given all blobs of each."""
        return await self._threads.read(_missing_each, self._folder, images)

    async def holds(self, digest: Digest, size: int) -> bool:
        """Tell whether a blob is in the store with this size in bytes."""
        return await self._threads.read(size_of_blob, self._folder / digest.hex) == size

    async def commit(self, partial: AnyPartial, quarantine: Callable[[Path], object]) -> None:
        """Make the verified `partial` a blob, which counts as present from then on.

        A file in its place that cannot be read is handed to `quarantine` first.

        Raises:
            OSError: the blob cannot be written.
        """
        path = self._folder / partial.digest.hex
        known_bad = partial.digest in self._unreadable
        await partial.commit(path, bind(_make_way, path, quarantine, known_bad=known_bad))
        self._unreadable.pop(partial.digest, None)
        self._open_blobs.forget([partial.digest])
        self.lost.discard(partial.digest)
        self._committed[partial.digest] = partial.length


def _make_way(path: Path, quarantine: Callable[[Path], object], *, known_bad: bool) -> None:
    """Quarantine the file at `path` if it is `known_bad` or cannot be opened; else it is to be replaced."""
    bad = known_bad
    try:
        open_regular(path).release()
    except OSError as error:
        bad = is_of_the_file(error)
    if bad:
        # A file that can be renamed to this name wins over one that cannot be moved.
        with suppress(OSError):
            quarantine(path)


def _missing_each(
    folder: Path, images: Mapping[Digest, Mapping[Digest, int]]
) -> Mapping[Digest, Mapping[Digest, int]]:
    found = {digest: missing_blobs(folder, blobs) for digest, blobs in images.items()}
    return {digest: missing for digest, missing in found.items() if missing}
