"""Small blobs while they are downloaded: in memory until they are whole, so that one file and one job are written.

A partial on disk would take two files and several jobs of threads, which is what most of a small blob's time goes to.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeGuard

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IReactorTime

from ociregistry.names import Digest
from ociregistry.store.files import Files
from ociregistry.store.partials import DigestMismatch, Note, Partial, create_held, write_note
from ociregistry.store.paths import blob_temporary
from ociregistry.store.readers import MemoryReader
from ociregistry.store.space import Space
from ociregistry.store.threads import Threads
from ociregistry.store.workdir import PullsFolder

LARGEST_SMALL = 64 * 1024
"""Bytes, and what the end of the process may lose."""


def is_small(size: int | None) -> TypeGuard[int]:
    """Tell whether a blob of `size` bytes, None if that is unknown, is downloaded in memory."""
    return size is not None and size <= LARGEST_SMALL


class PartialInMemory:
    """A small blob that grows as a `Partial` does, but in memory.

    Where its download ends before it is whole, `sync` writes what is there to disk, as a partial that a later
    download resumes.
    """

    resumed = False

    def __init__(
        self,
        digest: Digest,
        size: int,
        source: str,
        pulls: PullsFolder,
        space: Space,
        files: Files,
        threads: Threads,
        *,
        mirrored: bool = False,
    ) -> None:
        """Begin the blob of `size` bytes from the repository `source`; `mirrored` if a mirror of it is to send it."""
        self.digest = digest
        self.size = size
        self.sound = True
        """Whether the bytes are in memory still, or were written to disk."""
        self._source = source
        self._pulls = pulls
        self._space = space
        self._files = files
        self._threads = threads
        self._data = bytearray()
        self._mirrored_from = 0 if mirrored else None

    @property
    def length(self) -> int:
        """Number of bytes that can be read."""
        return len(self._data)

    @property
    def mirrored(self) -> bool:
        """Whether a mirror sent some of the bytes."""
        return self._mirrored_from is not None and self._mirrored_from < self.length

    async def note_mirror(self) -> None:
        """Note that a mirror sends the bytes that are appended next."""
        if not self.mirrored:
            self._mirrored_from = self.length

    async def cut_mirrored(self) -> bool:
        """Cut off the first byte that a mirror sent and all bytes after it; write those before it to disk.

        Returns:
            Whether bytes are left, which the registry itself sent.
        """
        del self._data[self._mirrored_from or 0 :]
        self._mirrored_from = None
        await self.sync()
        return self.length > 0

    def append(self, *pieces: bytes) -> Deferred[None]:
        """Add `pieces` at the end, at once."""
        for piece in pieces:
            self._data += piece
        return succeed(None)

    def checkpoint(self, clock: IReactorTime) -> None:
        """Do nothing: a small blob is written when it is whole."""

    async def sync(self) -> None:
        """Write what is there to disk, as a partial. Never fails: nothing is left of it then."""
        if not self._data:
            return
        # What failed is logged by the download; these few bytes are fetched again.
        with suppress(OSError):
            await self._threads.write(self._leave_behind)

    def _leave_behind(self) -> None:
        path, data = self._pulls.path / self.digest.hex, bytes(self._data)
        self._space.spend(len(data))
        file, held = create_held(path, self._files)
        try:
            self._files.write(file, data, 0)
            self._files.sync_data(file)
            write_note(
                path, Note(len(data), self._files.boot(), self.size, self._source, self._mirrored_from), self._files
            )
        except BaseException:
            self._files.unlink(path)
            raise
        finally:
            file.release()
            held.release()

    async def verify(self) -> None:
        """Return once the digest is proven to match.

        Raises:
            DigestMismatch: it does not match.
        """
        hasher = self.digest.hasher()
        hasher.update(self._data)
        if hasher.hexdigest() != self.digest.hex:
            raise DigestMismatch(f"the {self.length} bytes received do not have the digest {self.digest}")

    async def commit(self, target: Path, make_way: Callable[[], object]) -> None:
        """Make the verified bytes the blob `target`, synced, after `make_way` was called in a thread.

        Raises:
            OSError: the blob cannot be written.
        """
        await self._threads.write(self._commit, target, make_way)

    def _commit(self, target: Path, make_way: Callable[[], object]) -> None:
        make_way()
        self._space.spend(self.length)
        self._files.put(target, bytes(self._data), blob_temporary(self._pulls.path, target))

    async def discard(self) -> None:
        """Do nothing: the bytes go with their last reader."""

    def reader(self) -> MemoryReader:
        """Return a reader, which keeps the bytes."""
        return MemoryReader(self._data)

    def close(self) -> None:
        """Do nothing: there is no file."""


AnyPartial = Partial | PartialInMemory
"""A blob that is not complete yet."""
