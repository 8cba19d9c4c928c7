"""Readers of blobs that are being downloaded: from memory what came last, everything else from the file."""

from __future__ import annotations

from pathlib import Path

from twisted.internet.defer import Deferred, execute, succeed

from ociregistry.store.files import SharedFile
from ociregistry.store.sockets import MOST_PIECES, send_bytes
from ociregistry.store.threads import Threads


class Tail:
    """The bytes that were appended last, which are kept in memory for readers.

    A client that keeps up gets them from here, as sending them from the file would cost the processor more.
    """

    def __init__(self) -> None:
        self.readers = 0
        """How many may ask for them."""
        self.clear()

    def clear(self) -> None:
        """Forget them; they are in the file."""
        self._start = 0
        self._pieces: tuple[bytes, ...] = ()
        self._is_new = False

    def replace(self, start: int, pieces: tuple[bytes, ...]) -> None:
        """Keep `pieces`, which begin at byte `start` of the blob, if there are readers; forget those before.

        Pieces that are too many for one call are tiny, and sent faster from the file: they are not kept.
        """
        self.clear()
        if self.readers and len(pieces) <= MOST_PIECES:
            self._start, self._pieces, self._is_new = start, pieces, True

    def expire(self) -> None:
        """Forget what was here at the last call already: many downloads may stall, each with MiBs."""
        if not self._is_new:
            self.clear()
        self._is_new = False

    def at(self, offset: int, count: int) -> list[memoryview]:
        """Return at most `count` of the bytes at `offset`; none where they are not here."""
        found: list[memoryview] = []
        at = self._start
        if offset < at:
            return found
        for piece in self._pieces:
            if part := memoryview(piece)[max(0, offset - at) :][:count]:
                found.append(part)
                count -= len(part)
            at += len(piece)
        return found


class PartialReader:
    """Reads what a partial has so far."""

    def __init__(self, path: Path, file: SharedFile, tail: Tail, threads: Threads) -> None:
        self._path = path
        self._file = file
        self._tail = tail
        self._threads = threads
        tail.readers += 1

    def read(self, offset: int, count: int) -> Deferred[bytes]:
        """Read at most `count` of the bytes at `offset`, which must be below the partial's `length`."""
        if data := self._tail.at(offset, count):
            return succeed(b"".join(data))
        return self._threads.read_at(self._file, self._path, offset, count)

    def send(self, to: int, offset: int, count: int, *, in_thread: bool) -> Deferred[int]:
        """Send at most `count` of the bytes at `offset`, as `read` does, to the socket `to`; give their number."""
        if data := self._tail.at(offset, count):
            return execute(send_bytes, to, data)
        return self._threads.send_at(self._file, self._path, offset, count, to, in_thread=in_thread)

    def close(self) -> None:
        """Release the file."""
        self._tail.readers -= 1
        self._file.release(self._threads.close)


class MemoryReader:
    """Reads what a `PartialInMemory` has so far."""

    def __init__(self, data: bytearray) -> None:
        self._data = data

    def read(self, offset: int, count: int) -> Deferred[bytes]:
        """Read at most `count` of the bytes at `offset`."""
        return succeed(bytes(self._data[offset : offset + count]))

    def close(self) -> None:
        """Do nothing: there is no file."""
