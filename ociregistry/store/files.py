"""The seam to the file system: the store's threads, and every write, sync, rename and lock.

All of it blocks but for `Threads`, which runs it. A test puts another `Files` in its place, to lose what was not
synced or to fail.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorFromThreads
from twisted.internet.threads import deferToThreadPool
from twisted.python.threadpool import ThreadPool

P = ParamSpec("P")
T = TypeVar("T")


class Threads:
    """A pool for reading and one for writing, so that a hanging fsync never keeps a hit waiting; and one thread
    for what waits for the store's lock, so that this never keeps a blob waiting."""

    def __init__(self, reactor: IReactorFromThreads, readers: int = 8, writers: int = 16) -> None:
        self._reactor = reactor
        self._reading = ThreadPool(0, readers, "store-reading")
        self._writing = ThreadPool(0, writers, "store-writing")
        self._in_turn = ThreadPool(0, 1, "store-in-turn")

    def start(self) -> None:
        """Must be called after the process has daemonized: threads do not survive a fork."""
        self._reading.start()
        self._writing.start()
        self._in_turn.start()

    def stop(self) -> None:
        """Blocks until what runs has ended."""
        self._reading.stop()
        self._writing.stop()
        self._in_turn.stop()

    def read(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        """Runs `function`, which reads, in a thread."""
        return deferToThreadPool(self._reactor, self._reading, function, *args, **kwargs)

    def write(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        """Runs `function`, which writes or syncs, in a thread."""
        return deferToThreadPool(self._reactor, self._writing, function, *args, **kwargs)

    def write_in_turn(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        """As `write`, one after the other."""
        return deferToThreadPool(self._reactor, self._in_turn, function, *args, **kwargs)


_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})


def is_full(error: OSError) -> bool:
    """Tell whether `error` says that the disk, or the user's quota on it, has no free block or inode."""
    return error.errno in _NO_SPACE


class SharedFile:
    """An open file that several readers and threads use, closed when the last lease is given back.

    A read may still run in a thread when its client has gone; closing the descriptor under it would let the
    thread read whatever file gets the number next.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._leases = 1
        self._lock = threading.Lock()

    def lease(self) -> SharedFile:
        """One more user of this file, who calls `release` once."""
        with self._lock:
            if self._leases == 0:
                raise ValueError("the file is closed already")
            self._leases += 1
        return self

    def release(self) -> None:
        """Gives a lease back."""
        with self._lock:
            self._leases -= 1
            last = self._leases == 0
        if last:
            os.close(self._descriptor)

    def fileno(self) -> int:
        """The descriptor, valid while a lease is held."""
        return self._descriptor

    def size(self) -> int:
        """Bytes."""
        return os.fstat(self._descriptor).st_size


class Files:
    """The real file system."""

    def create(self, path: Path) -> SharedFile:
        """A new empty file, open for reading and writing; what was there under that name is unlinked first."""
        path.unlink(missing_ok=True)
        return SharedFile(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))

    def open(self, path: Path) -> SharedFile:
        """The file at `path`, open for reading and writing. Raises `FileNotFoundError`."""
        return SharedFile(os.open(path, os.O_RDWR | os.O_CLOEXEC))

    def write(self, file: SharedFile, data: bytes, offset: int) -> None:
        """Writes all of `data` at `offset`."""
        view = memoryview(data)
        while view:
            written = os.pwrite(file.fileno(), view, offset)
            view, offset = view[written:], offset + written

    def truncate(self, file: SharedFile, size: int) -> None:
        """Cuts the file to `size` bytes."""
        os.ftruncate(file.fileno(), size)

    def sync_data(self, file: SharedFile) -> None:
        """Returns when the bytes that were written are on disk, and the size that they need."""
        os.fdatasync(file.fileno())

    def sync(self, file: SharedFile) -> None:
        """Returns when what was written is on disk."""
        os.fsync(file.fileno())

    def rename(self, path: Path, target: Path) -> None:
        """Renames within the store, over what is there."""
        path.rename(target)

    def sync_folder(self, folder: Path) -> None:
        """Returns when the names in `folder` are on disk."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def unlink(self, path: Path) -> None:
        """Removes a file, if it is there."""
        path.unlink(missing_ok=True)

    def boot(self) -> str:
        """What tells this run of the machine from the one before."""
        return _BOOT_ID.read_text("ascii").strip()

    def commit(self, file: SharedFile, path: Path, target: Path) -> None:
        """Makes the finished `file` at `path` appear as `target`, whole and on disk, or not at all."""
        self.sync(file)
        self.rename(path, target)
        self.sync_folder(target.parent)

    def put(self, target: Path, data: bytes, temporary: Path) -> None:
        """Makes `data` the content of `target`, whole and on disk, or not at all, by way of `temporary`."""
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
    """An exclusive flock on `path`, held until the returned descriptor is closed or the process ends.

    Without `wait`, None when another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def hold(path: Path, *, writes: bool) -> SharedFile | None:
    """Take a flock on the file at `path` itself, which lasts until the returned lease is released.

    A process that `writes` the file takes an exclusive one and waits for it. One that may remove the file takes a
    shared one, and gets None at once while somebody writes it. None too when there is no such file, or another one
    has its name by the time the lock is there. Blocks. Raises: `OSError`.
    """
    try:
        descriptor = os.open(path, (os.O_RDWR if writes else os.O_RDONLY) | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if writes else fcntl.LOCK_SH | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return SharedFile(descriptor)
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive flock on `path`."""
    descriptor = lock(path)
    assert descriptor is not None
    try:
        yield
    finally:
        os.close(descriptor)
