"""Partials, blobs that are not complete yet, and pulls/<n>/, the folder in which one process keeps its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from twisted.internet.defer import Deferred

from ociregistry.names import Digest
from ociregistry.store.blobs import read_at
from ociregistry.store.files import Files, SharedFile, lock
from ociregistry.store.threads import Threads

P = ParamSpec("P")
T = TypeVar("T")


class DigestMismatch(Exception):
    """The bytes that were written are not those that the digest names."""


class PullsFolder:
    """The folder pulls/<n>/ of this process, held by a flock on its `lock` for as long as the process lives."""

    def __init__(self, pulls: Path) -> None:
        """Takes the first folder that no process holds. Blocks; raises `OSError`."""
        number = 0
        while True:
            self.path = pulls / str(number)
            self.path.mkdir(parents=True, exist_ok=True)
            held = lock(self.path / "lock", wait=False)
            if held is not None:
                break
            number += 1
        self._held = held
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        for path in self.path.iterdir():
            if path.is_file() and path.name != "lock":
                path.unlink()

    def close(self) -> None:
        """Lets another process take the folder."""
        os.close(self._held)


class Partial:
    """A blob that grows: one writer appends, any number of readers follow.

    It is hashed as it is written, in the same thread job, and becomes a blob only when the digest holds.
    """

    def __init__(self, digest: Digest, path: Path, target: Path, files: Files, threads: Threads) -> None:
        """An empty partial at `path` that is to become `target`. Blocks; raises `OSError`."""
        self.digest = digest
        self.length = 0
        """Bytes that can be read."""
        self._path = path
        self._target = target
        self._files = files
        self._threads = threads
        self._hasher = digest.hasher()
        self._file = files.create(path)

    def append(self, data: bytes) -> Deferred[None]:
        """Writes `data` at the end and hashes it; when it fires `length` has grown. Fails with `OSError`."""
        return self._in_thread(self._append, data).addCallback(self._grown)

    def _append(self, data: bytes) -> int:
        self._files.write(self._file, data, self.length)
        self._hasher.update(data)
        return len(data)

    def _grown(self, count: int) -> None:
        self.length += count

    def verify(self) -> None:
        """Raises `DigestMismatch` unless what was written is what the digest names."""
        if self._hasher.hexdigest() != self.digest.hex:
            raise DigestMismatch(f"the {self.length} bytes received do not have the digest {self.digest}")

    def commit(self) -> Deferred[None]:
        """Syncs it to disk and makes it a blob. To be called after `verify`. Fails with `OSError`."""
        return self._in_thread(self._files.commit, self._file, self._path, self._target)

    def discard(self) -> Deferred[None]:
        """Removes what was written."""
        return self._in_thread(self._files.unlink, self._path)

    def reader(self) -> PartialReader:
        """A reader, which keeps its file when the partial becomes a blob or is removed."""
        return PartialReader(self._file.lease(), self._threads)

    def close(self) -> None:
        """The writer's end; readers may go on."""
        self._file.release()

    def _in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        lease = self._file.lease()

        def run() -> T:
            try:
                return function(*args, **kwargs)
            finally:
                lease.release()

        return self._threads.write(run)


class PartialReader:
    """Reads what a partial has so far."""

    def __init__(self, file: SharedFile, threads: Threads) -> None:
        self._file = file
        self._threads = threads

    def read(self, offset: int, count: int) -> Deferred[bytes]:
        """Fires with at most `count` of the bytes at `offset`, which must be below the partial's `length`."""
        return read_at(self._file, offset, count, self._threads)

    def close(self) -> None:
        """Gives the file back."""
        self._file.release()
