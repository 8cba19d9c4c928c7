"""Sending to the sockets of clients, by their descriptors: from a file within the kernel, and from memory."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SocketNumber:
    """The descriptor of a socket, which may be that of another file once the connection is closed."""

    descriptor: int
    status: os.stat_result

    @classmethod
    def of(cls, descriptor: int) -> SocketNumber:
        """Take it from the descriptor of a socket that is open."""
        return cls(descriptor, os.fstat(descriptor))

    @contextmanager
    def duplicated(self) -> Iterator[int]:
        """Give a duplicate of the descriptor, which stays valid when the connection is closed meanwhile.

        Raises:
            ConnectionAbortedError: the connection is closed.
            OSError: there is no descriptor for the duplicate.
        """
        try:
            copy = os.dup(self.descriptor)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            raise ConnectionAbortedError(errno.ECONNABORTED, "the connection is closed") from error
        try:
            if not os.path.samestat(os.fstat(copy), self.status):
                raise ConnectionAbortedError(errno.ECONNABORTED, "the connection is closed")
            yield copy
        finally:
            os.close(copy)


_OF_THE_CONNECTION = frozenset({errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN})
"""Errors of a socket that Python does not make a ConnectionError."""

MOST_PIECES = os.sysconf("SC_IOV_MAX")
"""Pieces that the kernel sends by one call, at most."""


def send_bytes(to: int, data: Sequence[memoryview]) -> int:
    """Send bytes to the socket `to`; return the number that it took, 0 if it takes none at present.

    Raises:
        ConnectionError: the connection is lost.
        OSError: they cannot be sent.
    """
    try:
        return os.writev(to, data[:MOST_PIECES])
    except OSError as error:
        return _none_taken(error)


def send_file(to: int, descriptor: int, offset: int, count: int) -> int:
    """Send at most `count` of the bytes at `offset` of a file to the socket `to`, within the kernel.

    Returns:
        The number of bytes that the socket took, 0 if it takes none at present.

    Raises:
        EOFError: the file ends at `offset`.
        ConnectionError: the connection is lost.
        OSError: the file cannot be read.
    """
    try:
        sent = os.sendfile(to, descriptor, offset, count)
    except OSError as error:
        return _none_taken(error)
    if sent == 0:
        raise EOFError
    return sent


def _none_taken(error: OSError) -> int:
    """Return 0 if `error` says that the socket takes no bytes at present; raise it otherwise."""
    if isinstance(error, BlockingIOError):
        return 0
    if error.errno in _OF_THE_CONNECTION:
        raise ConnectionAbortedError(error.errno, error.strerror) from error
    raise error
