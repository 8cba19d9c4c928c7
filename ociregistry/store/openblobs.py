"""Whole blobs that are kept open, and small ones in memory, so that a hit needs no thread."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cachetools import LRUCache
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall

from ociregistry.names import Digest
from ociregistry.process import descriptors_are_scarce, most_descriptors
from ociregistry.store.files import SharedFile
from ociregistry.store.threads import Threads

_MOST = 2048
"""Files that are kept open, if the process may open four times as many. Each look at all of them takes 4 ms."""
_MOST_IN_MEMORY = 16 * 1024 * 1024
"""Bytes of small blobs that are in memory: a further one is read from its file, which is kept open all the same."""
_AT_ONCE = 256
"""Files that are looked at in one read: a look at all may take longer than a read of a disk that hangs."""
_LOOK_EVERY = 1.0
"""Seconds."""


class Identity(NamedTuple):
    """What stays the same while a name leads to the same file."""

    device: int
    inode: int
    size: int
    """In bytes."""
    mode: int
    changed: int
    """When the content or anything else of the file changed last (st_ctime), in nanoseconds."""

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """Take it from the status of a file."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mode, status.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class _OpenBlob:
    digest: Digest
    path: Path
    file: SharedFile
    identity: Identity


class _Files(LRUCache[Digest, _OpenBlob]):
    """The open files; one that is dropped is closed when its last reader has ended."""

    def __init__(self, most: int, close: Callable[[int], object]) -> None:
        super().__init__(most)
        self._close = close
        self._in_memory = 0
        """The bytes of all that are in memory."""
        self.all: dict[Digest, _OpenBlob] = {}
        """The same files; looking at them here does not count as using them."""

    def __setitem__(self, digest: Digest, kept: _OpenBlob) -> None:
        super().__setitem__(digest, kept)
        self.all[digest] = kept
        if self._in_memory + len(kept.file.content) > _MOST_IN_MEMORY:
            kept.file.content = b""
        self._in_memory += len(kept.file.content)

    def __delitem__(self, digest: Digest) -> None:
        super().__delitem__(digest)
        file = self.all.pop(digest).file
        self._in_memory -= len(file.content)
        # Slow clients of many small blobs would hold all their bytes: what is left is sent from the file.
        file.content = b""
        file.release(self._close)


class OpenBlobs:
    """The blobs that were opened last.

    Every second a thread looks whether their names still lead to the same files. A file that was removed is closed,
    as the disk gets its space back only then. While descriptors are scarce, no file is kept open.
    """

    def __init__(self, threads: Threads, clock: IReactorTime, most: int = _MOST) -> None:
        self._threads = threads
        self._files = _Files(min(most, most_descriptors() // 4), threads.close)
        self.forgotten = 0
        """Grows each time that files were removed or replaced: one that was opened before is not to be kept."""
        self._looking: Deferred[None] = succeed(None)
        self._loop = LoopingCall(self._look)
        self._loop.clock = clock

    def start(self) -> None:
        """Start to look at the files."""
        self._loop.start(_LOOK_EVERY, now=False)

    def stop(self) -> None:
        """Close the files."""
        self._loop.stop()
        self._drop(list(self._files))

    def get(self, digest: Digest) -> tuple[SharedFile, int] | None:
        """Return a lease on an open file and its size in bytes, or None."""
        kept = self._files.get(digest)
        return None if kept is None else (kept.file.lease(), kept.identity.size)

    def add(self, digest: Digest, path: Path, file: SharedFile, identity: Identity, forgotten: int) -> None:
        """Keep the `file` at `path` open; `forgotten` is what `self.forgotten` was before it was opened.

        If another program removed it meanwhile, the next look finds that. A file that is not kept is not in memory.
        """
        if self._loop.running and forgotten == self.forgotten and not descriptors_are_scarce():
            self._drop([digest])
            self._files[digest] = _OpenBlob(digest, path, file.lease(), identity)
        else:
            file.content = b""

    def forget(self, digests: Iterable[Digest]) -> None:
        """Close the files of these blobs, which were removed or replaced, if they are open."""
        self.forgotten += 1
        self._drop(digests)

    def _drop(self, digests: Iterable[Digest]) -> None:
        for digest in digests:
            if digest in self._files:
                del self._files[digest]

    def _look(self) -> None:
        # Not by the thread, which may wait for a disk that does not answer.
        if descriptors_are_scarce():
            self._drop(list(self._files))
        if self._looking.called:
            self._looking = Deferred.fromCoroutine(self._look_at_all())

    async def _look_at_all(self) -> None:
        files = list(self._files.all.values())
        for start in range(0, len(files), _AT_ONCE):
            changed = await self._threads.read(_changed, files[start : start + _AT_ONCE])
            # A file that was opened meanwhile is looked at next time.
            self._drop([kept.digest for kept in changed if self._files.all.get(kept.digest) is kept])


def _changed(files: Iterable[_OpenBlob]) -> list[_OpenBlob]:
    """Return those of which the path leads to another file than before. Blocks."""
    return [kept for kept in files if _identity_at(kept.path) != kept.identity]


def _identity_at(path: Path) -> Identity | None:
    try:
        return Identity.of(os.lstat(path))
    except OSError:
        return None
