"""What the kernel has in memory of a file, and how it is sent without waiting for the disk."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import time

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

_READ_AT_ONCE = 64 * 1024
"""Bytes that are read to see whether they are in memory: faster than the calls that ask for them."""
_SAMPLE_EVERY = 128 * 1024
"""Bytes: the kernel reads files ahead, and drops what it has read, in such pieces or larger ones."""
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
    """Tell whether the kernel has the `count` bytes at `offset` of a file in memory.

    False where the file system cannot tell, such as tmpfs and FUSE: there even a read of what is in memory may wait,
    for a server that is asked whether the file has changed. mincore(2) tells the truth to the owner of a file; for
    others samples decide as well.
    """
    if count <= _READ_AT_ONCE:
        return read_at_once(descriptor, bytearray(count), offset) == count
    byte = bytearray(1)
    # First: where the file system cannot tell, any other call, fstat(2) too, may wait for its server.
    if not read_at_once(descriptor, byte, offset):
        return False
    owned = os.fstat(descriptor).st_uid == os.geteuid()
    last = offset + count - 1
    samples = () if owned else (*range(offset + _SAMPLE_EVERY, last, _SAMPLE_EVERY), last)
    return all(read_at_once(descriptor, byte, at) for at in samples) and _in_core(descriptor, offset, count)


def read_at_once(descriptor: int, buffer: bytearray, offset: int) -> int:
    """Read what needs no waiting for the disk into `buffer`; return the number of bytes."""
    try:
        return os.preadv(descriptor, [buffer], offset, os.RWF_NOWAIT)
    except OSError as error:
        # EAGAIN: the read would wait for the disk. EOPNOTSUPP: this file system does not support RWF_NOWAIT.
        if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
            raise
        return 0


def _in_core(descriptor: int, offset: int, count: int) -> bool:
    """Ask the kernel about each page (mincore(2))."""
    start = offset - offset % _PAGE
    length = offset + count - start
    pages = ctypes.create_string_buffer(-(-length // _PAGE))
    address = _mmap(None, length, mmap.PROT_READ, mmap.MAP_PRIVATE, descriptor, start)
    if address == _FAILED:
        return False
    failed = _mincore(address, length, pages)
    _munmap(address, length)
    return not failed and pages.raw.count(b"\1") == len(pages)


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
