"""How much of the disk a store uses: found by a walk through its folders, in short slices of a thread."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall, deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from ociregistry.names import is_hex_of_digest
from ociregistry.store.paths import BLOBS_FOLDER, pulls_folder, store_folders
from ociregistry.store.threads import Threads

_log = Logger(namespace="ociregistry.store")

_SOONEST, _LATEST = 5.0, 60.0
"""Seconds from the end of one walk to the start of the next, at least and at most."""
_SHARE = 0.001
"""The share of the time that walks may take: the longer one takes, the later the next one begins."""
_SLICE = 0.1
"""Seconds of one slice of a walk."""
_REST = 9
"""The pause after a slice as a multiple of its duration, so that a walk takes a tenth of the time at most."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a store uses of the disk."""

    bytes: int
    """The sizes of all files in its folders: records, blobs, partials, and what is in bad/."""
    blobs: int
    """The number of whole blobs."""


class Walk:
    """A walk through the folders of the store at `root`, which can be paused. All methods block."""

    def __init__(self, root: Path, seconds: Callable[[], float]) -> None:
        self._seconds = seconds
        self._files = _files(root)
        self._bytes = 0
        self._blobs = 0

    def go_on(self) -> tuple[Usage | None, float]:
        """Walk for one slice.

        Returns:
            What the store uses, None as long as the walk has not ended, and the seconds that the slice took.

        Raises:
            OSError: a folder cannot be read.
        """
        began = self._seconds()
        for size, is_blob in self._files:
            self._bytes += size
            self._blobs += is_blob
            took = self._seconds() - began
            if took >= _SLICE:
                return None, took
        return Usage(self._bytes, self._blobs), self._seconds() - began


def _files(root: Path) -> Iterator[tuple[int, bool]]:
    """Yield the size in bytes of each file of a store, and whether it is a blob."""
    folders = [str(folder) for folder in (*store_folders(root), pulls_folder(root))]
    while folders:
        folder = folders.pop()
        has_blobs = os.path.basename(folder) == BLOBS_FOLDER
        try:
            entries = os.scandir(folder)
        except FileNotFoundError:
            continue
        with entries:
            for entry in entries:
                try:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                        continue
                    size = entry.stat(follow_symlinks=False).st_size
                except OSError:
                    # It is gone by now; a file that cannot be looked at is told by what reads it.
                    continue
                yield size, has_blobs and is_hex_of_digest(entry.name)


def measured(root: Path, seconds: Callable[[], float]) -> Usage:
    """Return what the store at `root` uses. Blocks.

    Raises:
        OSError: a folder cannot be read.
    """
    walk, found = Walk(root, seconds), None
    while found is None:
        found, _ = walk.go_on()
    return found


class UsageMeter:
    """Finds out what a store uses, again and again."""

    def __init__(self, root: Path, threads: Threads, clock: IReactorTime) -> None:
        self.latest: Usage | None = None
        """What the last walk found; None before, and where the folders cannot be read."""
        self._root = root
        self._threads = threads
        self._clock = clock
        self._walking: Deferred[Any] = succeed(None)
        self._due = clock.seconds()
        self._loop = LoopingCall(self._begin)
        self._loop.clock = clock

    def start(self) -> None:
        """Begin the first walk."""
        self._loop.start(_SOONEST)

    def stop(self) -> None:
        """Stop."""
        self._loop.stop()
        self._walking.cancel()

    def _begin(self) -> None:
        """Begin a walk, if the last one has ended and the next one is due."""
        if self._walking.called and self._clock.seconds() >= self._due:
            self._walking = Deferred.fromCoroutine(self._measure()).addErrback(self._failed)

    async def _measure(self) -> None:
        try:
            self.latest = await self._walk()
        except OSError:
            # The scan for records logs why.
            self.latest = None

    async def _walk(self) -> Usage:
        walk, took = Walk(self._root, time.monotonic), 0.0
        while True:
            found, slice_took = await self._threads.read(walk.go_on)
            took += slice_took
            if found is not None:
                self._due = self._clock.seconds() + min(max(took / _SHARE, _SOONEST), _LATEST)
                return found
            await deferLater(self._clock, min(_REST * slice_took, _LATEST))

    def _failed(self, failure: Failure) -> None:
        if not failure.check(CancelledError):
            _log.failure("a defect in measuring the store", failure)
