"""The interface to the file system: every write, sync, rename and lock.

Everything blocks; `threads` runs it. Tests substitute a `Files` that fails or loses unsynced data.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from ociregistry.store.sockets import send_file

T = TypeVar("T")

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})


def is_full(error: OSError) -> bool:
    """Tell whether `error` says that the disk, or the user's quota on it, has no free block or inode."""
    return error.errno in _NO_SPACE


_OF_THE_FILE = frozenset(
    {
        *(errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.ENODATA),
        *(errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENXIO, errno.EISDIR),
    }
)


def is_of_the_file(error: OSError) -> bool:
    """Tell whether `error` belongs to the one file, which fails so for this user at any time.

    Others are of the process, such as too many open files, or of the machine, and may pass.
    """
    return error.errno in _OF_THE_FILE


def is_gone(error: OSError) -> bool:
    """Tell whether `error` says that a file is no more, also an open one: on NFS and FUSE others may remove it."""
    return error.errno in (errno.ENOENT, errno.ESTALE)


def reason(error: Exception) -> str:
    """Return why a file could not be read, without the file's path."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def close_descriptor(descriptor: int) -> None:
    """Close a file, also where that reports an error, as NFS and FUSE may for a file that another machine replaced.

    The descriptor is free in any case (close(2)), and what had to be on disk was synced before.
    """
    try:  # noqa: SIM105  # at each of ten thousand records, suppress would cost four calls
        os.close(descriptor)
    except OSError:
        pass


class SharedFile:
    """An open file that several readers and threads use; it is closed when the last lease is released.

    A read may still run in a thread after its client has disconnected. If the descriptor were closed meanwhile, the
    thread would read from whichever file gets its number next.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.content = b""
        """All bytes of a small file, if they were read when it was opened."""
        self._leases = 1
        self._lock = threading.Lock()

    def lease(self) -> SharedFile:
        """Add a user of this file, which must call `release` once.

        Raises:
            ValueError: the file is closed.
        """
        with self._lock:
            if self._leases == 0:
                raise ValueError("the file is closed already")
            self._leases += 1
        return self

    def release(self, close: Callable[[int], object] = close_descriptor) -> None:
        """Release a lease; `close` closes the descriptor if it was the last.

        With `close_descriptor` this blocks where the file was removed: its space is freed then.
        """
        with self._lock:
            self._leases -= 1
            last = self._leases == 0
        if last:
            close(self._descriptor)

    def fileno(self) -> int:
        """Return the descriptor, which is valid while a lease is held."""
        return self._descriptor

    def size(self) -> int:
        """Return the size in bytes."""
        return os.fstat(self._descriptor).st_size


_REGULAR_ALONE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Opening a FIFO, a device or a socket with these flags does not block, and a symbolic link is not followed."""


def _open(path: Path | str, flags: int) -> int:
    """Open an existing file so that reads leave its access time as it is, and return the descriptor.

    Noting that time may wait for the disk, although the content is in memory.
    """
    try:
        return os.open(path, flags | os.O_NOATIME)
    except PermissionError:
        # Only the owner of the file and root may ask for that.
        return os.open(path, flags)


_STALE_FOR = 2.5
_STALE_PAUSE = 0.05
"""Seconds."""


def _retry_stale(read: Callable[[], T], is_stale: Callable[[Exception], bool]) -> T:
    """Call `read` again while it fails because a cached attribute of the file is stale, for 2.5 s at most.

    NFS and FUSE cache for a second or two where a name leads, and how large a file is, although another machine may
    have replaced the file meanwhile, or another thread have written more.
    """
    deadline = time.monotonic() + _STALE_FOR
    while True:
        try:
            return read()
        except (OSError, EOFError) as error:
            if not is_stale(error) or time.monotonic() > deadline:
                raise
        time.sleep(_STALE_PAUSE)


def _is_stale_name(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno == errno.ESTALE


def open_regular(path: Path, flags: int = os.O_RDONLY) -> SharedFile:
    """Open the regular file at `path`. It does not wait for the other end of a FIFO or device.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be opened; ELOOP for a symbolic link, and ENXIO for anything else that is no regular file.
    """
    descriptor, _ = _retry_stale(lambda: _open_regular(path, flags), _is_stale_name)
    return SharedFile(descriptor)


def _open_regular(path: Path | str, flags: int) -> tuple[int, int]:
    """Return the descriptor, and the size in bytes."""
    try:
        descriptor = _open(path, flags | _REGULAR_ALONE)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.ELOOP, "it is a symbolic link", str(path)) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.ENXIO, "it is not a regular file", str(path))
    except BaseException:
        close_descriptor(descriptor)
        raise
    return descriptor, status.st_size


def send_written(to: int, descriptor: int, offset: int, count: int) -> int:
    """Send bytes as `send_file` does, of which one at least was written, maybe on another machine. Blocks.

    Raises:
        EOFError: the file ends at `offset` nevertheless: it was cut.
        OSError: as for `send_file`.
    """
    return _retry_stale(lambda: send_file(to, descriptor, offset, count), lambda error: isinstance(error, EOFError))


def read_written(descriptor: int, count: int, offset: int) -> bytes:
    """Read at most `count` bytes at `offset` of a file, of which one at least was written. Blocks.

    Returns:
        No bytes, if the file ends at `offset` nevertheless: it was cut.

    Raises:
        OSError: they cannot be read.
    """

    def read() -> bytes:
        if not (data := os.pread(descriptor, count, offset)):
            raise EOFError
        return data

    try:
        return _retry_stale(read, lambda error: isinstance(error, EOFError))
    except EOFError:
        return b""


_PIECE = 1024 * 1024
"""Bytes."""


def read_regular(path: Path | str, largest: int = sys.maxsize) -> bytes:
    """Return the content of the regular file at `path`.

    Raises:
        OSError: it cannot be opened, as `open_regular` says, or read; EFBIG if it has more than `largest` bytes.
    """
    try:
        return _read_regular(path, largest)
    except OSError as error:
        if not _is_stale_name(error):
            raise
        return _retry_stale(lambda: _read_regular(path, largest), _is_stale_name)


def _read_regular(path: Path | str, largest: int) -> bytes:
    descriptor, size = _open_regular(path, os.O_RDONLY)
    try:
        # One byte more than there should be: where it does not come, this was all.
        data = os.read(descriptor, size + 1) if size <= largest else b""
        if len(data) != size <= largest:
            # The file is being written, or the file system gives less than it was asked for.
            while len(data) <= largest and (more := os.read(descriptor, _PIECE)):
                data += more
            size = len(data)
    finally:
        close_descriptor(descriptor)
    if size > largest:
        raise OSError(errno.EFBIG, f"larger than {largest} bytes", str(path))
    return data


def note_time(path: Path, now: float) -> None:
    """Set the times of the file at `path` to `now`, in seconds, or to the kernel's now for a file of another user.

    A user who may write a file may set its times to the present; only its owner and root may choose them
    (utimensat(2)).

    Raises:
        OSError: they cannot be set.
    """
    try:
        os.utime(path, (now, now))
    except PermissionError:
        os.utime(path)


def restore_time(path: Path, nanoseconds: int) -> None:
    """Set the times of a file that was rewritten to what they were. Those of another user's file stay as they are.

    Raises:
        OSError: they cannot be set.
    """
    with suppress(PermissionError):
        os.utime(path, ns=(nanoseconds, nanoseconds))


def is_at(descriptor: int, path: Path) -> bool:
    """Tell whether the file at `path` is the one that is open as `descriptor`.

    Raises:
        OSError: it cannot be examined.
    """
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except (FileNotFoundError, NotADirectoryError):
        return False


def check_same(file: SharedFile, path: Path) -> None:
    """Check that `file` is still the file at `path`.

    Raises:
        FileReplaced: there is none, or another one.
        OSError: it cannot be examined.
    """
    if not is_at(file.fileno(), path):
        raise FileReplaced(path)


class FileReplaced(OSError):
    """Another program has removed or replaced a file that is open."""

    def __init__(self, path: Path) -> None:
        super().__init__(errno.ESTALE, "another program has removed or replaced it", str(path))


class Files:
    """The real file system. Methods raise `OSError` where a call fails."""

    def create(self, path: Path) -> SharedFile:
        """Create an empty file, open for reading and writing, after unlinking an earlier file of that name."""
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        # Where a server decides who owns a new file, as with NFS, SMB and FUSE, open(2) with O_NOATIME creates the
        # file, and then fails.
        with suppress(PermissionError):
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_NOATIME)
        return SharedFile(descriptor)

    def open(self, path: Path) -> SharedFile:
        """Open the regular file at `path` for reading and writing.

        Raises:
            FileNotFoundError: there is none.
        """
        return open_regular(path, os.O_RDWR)

    def write(self, file: SharedFile, data: bytes, offset: int) -> None:
        """Write all of `data` at `offset`."""
        view = memoryview(data)
        while view:
            written = os.pwrite(file.fileno(), view, offset)
            view, offset = view[written:], offset + written

    def truncate(self, file: SharedFile, size: int) -> None:
        """Cut the file to `size` bytes."""
        os.ftruncate(file.fileno(), size)

    def sync_data(self, file: SharedFile) -> None:
        """Sync the bytes that were written, and the size that is needed to read them."""
        os.fdatasync(file.fileno())

    def sync(self, file: SharedFile) -> None:
        """Sync the file: return once everything that was written is on disk."""
        os.fsync(file.fileno())

    def rename(self, path: Path, target: Path) -> None:
        """Rename a file within the store, replacing the file at `target`."""
        path.rename(target)

    def sync_folder(self, folder: Path) -> None:
        """Sync the names in `folder`."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            close_descriptor(descriptor)

    def unlink(self, path: Path) -> None:
        """Remove a file, if it is there."""
        path.unlink(missing_ok=True)

    def boot(self) -> str:
        """Return an identifier of the current boot of the machine."""
        return _BOOT_ID.read_text("ascii").strip()

    def commit(self, file: SharedFile, path: Path, target: Path) -> None:
        """Make the finished `file` at `path` appear at `target`, either whole and on disk or not at all.

        Raises:
            OSError: also when `path` has gone to another file, as in a store that was replaced.
        """
        self.sync(file)
        check_same(file, path)
        self.rename(path, target)
        self.sync_folder(target.parent)

    def put(self, target: Path, data: bytes, temporary: Path) -> None:
        """Make `data` the content of `target`, whole and on disk or not at all, through the file `temporary`."""
        file = self.create(temporary)
        try:
            self.write(file, data, 0)
            self.commit(file, temporary, target)
        except BaseException:
            self.unlink(temporary)
            raise
        finally:
            file.release()


def lock(path: Path, *, wait: bool = True) -> int | None:
    """Take an exclusive flock on `path`, held until the returned descriptor is closed or the process ends. Blocks.

    The file is created if it is missing.

    Returns:
        The descriptor; with wait=False, None when another process holds the lock.

    Raises:
        OSError: the file cannot be opened or locked.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        close_descriptor(descriptor)
        return None
    except BaseException:
        close_descriptor(descriptor)
        raise
    return descriptor


def hold(path: Path, *, writes: bool) -> SharedFile | None:
    """Take a flock on the existing file at `path`, held until the returned lease is released. Blocks.

    A process that writes the file (`writes`) waits for an exclusive lock. A process that may remove the file takes a
    shared lock, and gets None at once while another process writes it.

    Returns:
        None also when there is no such regular file, or when its name has gone to another file by the time the lock
        is taken.

    Raises:
        OSError: the file cannot be opened or locked.
    """
    try:
        file = open_regular(path, os.O_RDWR if writes else os.O_RDONLY)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
        return None
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX if writes else fcntl.LOCK_SH | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        file.release()
        raise
    file.release()
    return None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive flock on `path`. Blocks.

    Raises:
        OSError: the file cannot be opened or locked.
    """
    descriptor = lock(path)
    assert descriptor is not None
    while not is_at(descriptor, path):
        # It was removed while this process waited: others lock a new file of that name.
        close_descriptor(descriptor)
        descriptor = lock(path)
        assert descriptor is not None
    try:
        yield
    finally:
        close_descriptor(descriptor)
