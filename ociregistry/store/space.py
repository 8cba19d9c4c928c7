"""The free space on the store's disk, and the reserve that is kept of it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from ociregistry.config.values import Reserve, size_text
from ociregistry.store.threads import Threads

_log = Logger(namespace="ociregistry.store")

_READ_EVERY = 1.0
"""Seconds. Other processes write to the disk too."""
_FULL = 2 * 1024 * 1024
"""Bytes beside the reserve, more than a download writes at once: with less, the disk counts as full."""
_REFUSED_FOR = 300.0
"""Seconds for which a refusal is told. A blob that is still wanted is tried again within that time."""


@dataclass(frozen=True, slots=True)
class Room:
    """The state of the disk. `size`, `free` and `reserve` are in bytes."""

    size: int
    free: int
    reserve: int
    full: bool
    """Whether so little is free beside the reserve that most downloads stop."""

    @property
    def left(self) -> int:
        """Bytes that are free beside the reserve; no larger download fits."""
        return max(0, self.free - self.reserve)


class Space:
    """Refuses writes that would take the disk below the reserve, and logs when the disk is full.

    Free space is read by statvfs, in threads, every second and before a write is refused. Between two readings, the
    bytes that this process writes are subtracted.
    """

    def __init__(
        self,
        folder: Path,
        reserve: Reserve,
        make_room: Callable[[int], object],
        threads: Threads,
        clock: IReactorTime,
    ) -> None:
        """Account for the disk of `folder`.

        `make_room` is called in a thread with the number of bytes that are missing, and may remove files.
        """
        self.room = Room(0, 0, 0, full=False)
        self.why = ""
        """Why the free space cannot be read; empty if it can be."""
        self._folder = folder
        self._reserve = reserve
        self._make_room = make_room
        self._threads = threads
        self._clock = clock
        self._lock = threading.Lock()
        self._size = 0
        self._free = 0
        self._reserved = 0
        self._read_at = 0.0
        self._refused = 0
        self._refused_at = 0.0
        self._loop = LoopingCall(self._read_again)
        self._loop.clock = clock

    @property
    def refused(self) -> int:
        """The bytes of the last write that was refused, within five minutes; 0 if none was, or they fit by now."""
        is_recent = self._clock.seconds() - self._refused_at < _REFUSED_FOR
        return self._refused if is_recent and self._refused + self.room.reserve > self.room.free else 0

    def reconfigure(self, reserve: Reserve) -> None:
        """Apply a new `reserve` from the next reading on."""
        self._reserve = reserve

    def start(self) -> None:
        """Read the free space now, and then every second. Blocks for the first reading.

        Raises:
            OSError: it cannot be read.
        """
        self._apply(self._read_locked())
        self._loop.start(_READ_EVERY, now=False)

    def stop(self) -> None:
        """Stop reading."""
        self._loop.stop()

    def check(self, count: int | None) -> Deferred[None]:
        """Check in a thread that `count` bytes fit beside the reserve; with None, that any byte does.

        What other downloads still need does not count, so that a slow one cannot keep room from all others. Downloads
        that do not fit together stop at the reserve.

        Raises:
            OSError: through the Deferred: ENOSPC, they do not fit.
        """
        return self._threads.write(self.check_now, count)

    def check_now(self, count: int | None) -> None:
        """Check the same at once. Blocks.

        Raises:
            OSError: ENOSPC, they do not fit.
        """
        with self._lock:
            self._ensure(1 if count is None else count, fresh=True)

    def spend(self, count: int) -> None:
        """Note that `count` bytes are about to be written. Blocks.

        Raises:
            OSError: ENOSPC, that would leave less than the reserve.
        """
        with self._lock:
            self._ensure(count)
            self._free -= count

    def _ensure(self, count: int, *, fresh: bool = False) -> None:
        if fresh or self._clock.seconds() - self._read_at >= _READ_EVERY or self._missing(count) > 0:
            self._read()
        if (missing := self._missing(count)) > 0:
            self._make_room(missing)
            self._read()
        if self._missing(count) > 0:
            self._refused, self._refused_at = count, self._clock.seconds()
            left = max(0, self._free - self._reserved)
            raise OSError(
                errno.ENOSPC,
                f"the disk of {self._folder} has no room: {count} bytes are needed and {left} are free beside the "
                f"reserve of {self._reserved}",
            )

    def _missing(self, needed: int) -> int:
        return needed + self._reserved - self._free

    def _read(self) -> None:
        status = os.statvfs(self._folder)
        self._free = status.f_bavail * status.f_frsize
        self._size = status.f_blocks * status.f_frsize
        self._reserved = self._reserve.of(self._size)
        self._read_at = self._clock.seconds()

    def _read_locked(self) -> tuple[int, int, int]:
        with self._lock:
            self._read()
            return self._size, self._free, self._reserved

    def _read_again(self) -> Deferred[None]:
        read = self._threads.read(self._read_locked).addCallback(self._apply)
        return read.addErrback(self._failed)

    def _failed(self, failure: Failure) -> None:
        if failure.check(FileNotFoundError):
            # `Folders` makes the folder anew, or tells why it cannot.
            return
        why = str(failure.value)
        if why != self.why:
            _log.error("cannot read the free disk space: {why}", why=why)
        self.why = why

    def _apply(self, read: tuple[int, int, int]) -> None:
        self.why = ""
        size, free, reserve = read
        was_full = self.room.full
        # Leaving this state takes more free space than entering it, so that it is not logged repeatedly.
        full = free - reserve < (2 * _FULL if was_full else _FULL)
        self.room = Room(size, free, reserve, full)
        if full and not was_full:
            _log.warn(
                "the disk of {store} is full: {what} are free beside the reserve, so no larger download fits; "
                "what is cached is served",
                store=self._folder,
                what=size_text(self.room.left),
                free=free,
                reserve=reserve,
            )
        elif was_full and not full:
            _log.warn(
                "the disk of {store} has room again: {what} are free beside the reserve, downloads resume",
                store=self._folder,
                what=size_text(self.room.left),
                free=free,
            )
