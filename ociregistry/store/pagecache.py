"""What the kernel has in memory of a file, and how it is sent without waiting for the disk."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import select
import time
from collections.abc import Sequence

from ociregistry.store.files import SharedFile, send_written
from ociregistry.store.sockets import send_file

SLICE = 2 * 1024 * 1024
"""Bytes of a file that are sent at once by the thread of the reactor, before it is the turn of other connections."""
TURN = 16 * SLICE
"""Bytes of a file that a thread sends before it is the turn of another connection."""
_TURN_SECONDS = 0.05
_FAST = 64 * 1024
"""Bytes that a client has to take at once for a thread to wait until it takes more."""
_WAIT = 2
"""Milliseconds of such a wait, at most."""

_READ_AHEAD = tuple(64 * 1024 * 4**step for step in range(5))
"""Bytes behind those that are read, up to 16 MiB, which the kernel may read as well: it is usually told less."""
_BEHIND = 1 << 62
"""An offset behind the end of every file."""
_PAGE = mmap.PAGESIZE

_libc = ctypes.CDLL(None)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_munmap = _libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_mincore = _libc.mincore
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
_FAILED = ctypes.c_void_p(-1).value


def is_resident(descriptor: int, offset: int, count: int) -> bool:
    """Tell whether the kernel has the bytes at `offset` of a file in memory: `count` of them, or those up to its end.

    Nothing is read to find that out. Even a read with RWF_NOWAIT has the kernel fetch what is missing, and waits
    while the queue of a disk that does not answer is full. For the same reason false is returned where the kernel
    would read ahead.

    It is also false where the kernel does not tell: for a file of another user (mincore(2)), and on file systems
    such as tmpfs and FUSE. There even a read of what is in memory may wait, for a server that is asked whether the
    file has changed.
    """
    if not _tells(descriptor):
        return False
    status = os.fstat(descriptor)
    if os.geteuid() not in (0, status.st_uid):
        # It was given to another user after it was opened.
        return False
    size = status.st_size
    stop = min(offset + count, size)
    # Where the reading of a file has ended or waits, much of what follows is missing: a few pages tell.
    ahead = {_page_of(min(stop + distance, size) - 1) for distance in _READ_AHEAD}
    return offset < stop and _in_core(descriptor, _page_of(offset), stop, [page for page in ahead if page >= stop])


def _page_of(offset: int) -> int:
    """Return the offset at which the page of a byte begins."""
    return offset - offset % _PAGE


def _tells(descriptor: int) -> bool:
    """Tell whether the kernel tells what it has of a file in memory."""
    # Only the owner of a file, and root, may open it so, and are told the truth by mincore(2).
    if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_NOATIME:
        return False
    try:
        # Where the file system cannot tell, any other call, fstat(2) too, may wait for its server.
        os.preadv(descriptor, [bytearray(1)], _BEHIND, os.RWF_NOWAIT)
    except OSError as error:
        # EAGAIN: it would wait. EOPNOTSUPP: this file system does not support RWF_NOWAIT.
        if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
            raise
        return False
    return True


def _in_core(descriptor: int, start: int, stop: int, more: Sequence[int]) -> bool:
    """Ask the kernel about the pages from that at `start` to that before `stop`, and about those at `more`."""
    length = max([stop, *(page + 1 for page in more)]) - start
    address = _mmap(None, length, mmap.PROT_READ, mmap.MAP_PRIVATE, descriptor, start)
    if address == _FAILED:
        return False
    try:
        return _all_in_core(address, stop - start) and all(_all_in_core(address + page - start, 1) for page in more)
    finally:
        _munmap(address, length)


def _all_in_core(address: int, length: int) -> bool:
    """Ask the kernel about each page of a mapped file (mincore(2))."""
    pages = ctypes.create_string_buffer(-(-length // _PAGE))
    return not _mincore(address, length, pages) and pages.raw.count(b"\1") == len(pages)


def read_resident(descriptor: int, offset: int, count: int) -> bytes:
    """Read at most `count` of the bytes at `offset` of a file, none if they are not resident.

    Raises:
        OSError: they cannot be read.
    """
    return os.pread(descriptor, count, offset) if is_resident(descriptor, offset, count) else b""


def send_resident(file: SharedFile, offset: int, count: int, to: int) -> int:
    """Send bytes of a file as `send_file` does, if they are resident; return their number, 0 also on a failure."""
    descriptor = file.fileno()
    try:
        return send_file(to, descriptor, offset, count) if is_resident(descriptor, offset, count) else 0
    except (EOFError, OSError):
        return 0


def send_for_a_turn(to: int, descriptor: int, offset: int, count: int) -> int:
    """Send bytes as `send_written` does, as long as the client is fast, but not for long. Blocks.

    After the first `SLICE` it sends only what is in memory.
    """
    known = min(count, SLICE)
    sent = taken = send_written(to, descriptor, offset, known)
    ends = time.monotonic() + _TURN_SECONDS
    writable = select.poll()
    writable.register(to, select.POLLOUT)
    while taken >= _FAST and sent < count and time.monotonic() < ends and writable.poll(_WAIT):
        try:
            if sent == known:
                known = min(count, sent + SLICE)
                if not is_resident(descriptor, offset + sent, known - sent):
                    break
            taken = send_file(to, descriptor, offset + sent, known - sent)
        except (EOFError, OSError):
            # The next turn begins with it, and fails.
            break
        sent += taken
    return sent
