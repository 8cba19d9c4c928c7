"""Partials: blobs that are not complete yet, and survive the end of the process and a power failure.

A partial is two files in pulls/<n>/: its bytes so far, and a note. The note is a JSON object that says how many of
the bytes are surely on disk, since which boot of the machine, how large the whole blob is, which repository it comes
from, and how many bytes came from the registry itself before a mirror sent any. A flock protects the partial while
it is written. `pullthrough/download.py` decides at the end of a download, also at a shutdown, what becomes of it.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial as bind
from pathlib import Path
from typing import ParamSpec, TypeVar

from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.interfaces import IReactorTime

from ociregistry.errors import is_out_of_descriptors
from ociregistry.names import Digest
from ociregistry.store.files import (
    FileReplaced,
    Files,
    SharedFile,
    check_same,
    hold,
    is_at,
    is_full,
    is_of_the_file,
    read_regular,
    read_written,
)
from ociregistry.store.paths import note_path, temporary
from ociregistry.store.readers import PartialReader, Tail
from ociregistry.store.space import Space
from ociregistry.store.threads import Threads
from ociregistry.strictjson import parse_json

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Note:
    """The facts about a partial that are stored beside its bytes."""

    durable: int
    """Number of bytes that were on disk when the note was written."""
    boot: str
    size: int | None
    """Size of the whole blob in bytes, if it is known."""
    source: str
    """The repository that the blob comes from."""
    mirrored_from: int | None = None
    """Offset of the first byte that a mirror sent; None if the registry itself sent all bytes."""

    @classmethod
    def parse(cls, data: bytes) -> Note | None:
        """Parse the content of a note; return None if it is not valid."""
        try:
            document = parse_json(data)
            durable, boot, size, source = (document[key] for key in ("durable", "boot", "size", "source"))
            # Notes of older versions lack it.
            mirrored_from = document.get("mirrored_from")
        except (ValueError, KeyError, TypeError):
            return None
        sizes_hold = isinstance(durable, int) and isinstance(size, int | None) and durable >= 0
        if not (sizes_hold and isinstance(boot, str) and isinstance(mirrored_from, int | None)):
            return None
        return cls(durable, boot, size, source, mirrored_from)

    def render(self) -> bytes:
        """Return the content of the file."""
        return json.dumps(asdict(self)).encode() + b"\n"


def create_held(path: Path, files: Files) -> tuple[SharedFile, SharedFile]:
    """Create an empty file at `path` and return it together with the flock on it. Blocks.

    Raises:
        OSError: it cannot be created or locked.
    """
    while True:
        # Another process may be about to remove an existing file by its name, which must not hit the new file.
        before = hold(path, writes=True)
        try:
            file = files.create(path)
        finally:
            if before is not None:
                before.release()
        held = hold(path, writes=True)
        if held is not None:
            return file, held
        # The file was removed before it was locked.
        file.release()


def open_usable(path: Path, files: Files) -> tuple[Note, SharedFile] | None:
    """Open the partial at `path`, cutting off the bytes that may not be on disk. Blocks.

    Returns:
        The note and the open file, or None if the partial cannot be resumed.

    Raises:
        OSError: a file cannot be read or written.
    """
    try:
        note = Note.parse(read_regular(note_path(path)))
        file = files.open(path)
    except OSError as error:
        if error.errno != errno.ENOENT and not is_of_the_file(error):
            raise
        return None
    try:
        usable = _cut_to_durable(path, note, file, files) if note is not None else None
    except BaseException:
        file.release()
        raise
    if usable is None:
        file.release()
        return None
    return usable, file


def _cut_to_durable(path: Path, note: Note, file: SharedFile, files: Files) -> Note | None:
    boot = files.boot()
    if note.boot == boot:
        return note
    if file.size() < note.durable:
        return None
    files.truncate(file, note.durable)
    note = replace(note, boot=boot)
    write_note(path, note, files)
    return note


def write_note(path: Path, note: Note, files: Files) -> None:
    """Write the note of the partial at `path`, synced. Blocks.

    Raises:
        OSError: the note cannot be written.
    """
    files.put(note_path(path), note.render(), temporary(path))


_SYNC_BYTES = 64 * 1024 * 1024
_SYNC_SECONDS = 30.0
CHECKPOINT_EVERY = 1.0
"""Seconds from one sync to the next, at least: a sync holds up the writes, and a second's bytes soon come again."""
_SLICE = 8 * 1024 * 1024
"""Bytes that a thread hashes again in one job."""


class DigestMismatch(Exception):
    """The bytes that were written do not have the digest."""


class Partial:
    """A blob that grows: one writer appends, any number of readers follow.

    What is appended is hashed in the same thread job that writes it. The partial becomes a blob only when the digest
    matches. Bytes of an earlier process are hashed again piece by piece, along with the writes.

    A flock on the file tells other processes that it is being written and must not be removed. It is held on a
    descriptor of its own, so that it ends with the writer and its last thread job, even while readers go on.
    """

    def __init__(
        self,
        digest: Digest,
        path: Path,
        note: Note,
        file: SharedFile,
        held: SharedFile,
        space: Space,
        files: Files,
        threads: Threads,
    ) -> None:
        """Take over the open `file` and `held`, the flock on it; `space` accounts for the bytes that are written."""
        self.digest = digest
        self.length = file.size()
        """Number of bytes that can be read."""
        self.resumed = self.length > 0
        """Whether the partial holds bytes that an earlier process wrote."""
        self.sound = True
        """Whether everything that was written can be trusted to be in the file."""
        self._path = path
        self._note = note
        self._file = file
        self._held = held
        self._space = space
        self._files = files
        self._threads = threads
        self._hasher = digest.hasher()
        self._hashed = 0
        self._tail = Tail()
        self._turn = DeferredLock()
        """Held while a thread syncs, changes the note, or makes the partial a blob."""
        self._synced_at: float | None = None
        self._broken: OSError | None = None

    @classmethod
    def create(
        cls,
        digest: Digest,
        path: Path,
        size: int | None,
        source: str,
        space: Space,
        files: Files,
        threads: Threads,
        *,
        mirrored: bool = False,
    ) -> Partial:
        """Create an empty partial at `path`; `mirrored` if a mirror sends its first bytes. Blocks.

        Raises:
            OSError: the files cannot be made.
        """
        note = Note(0, files.boot(), size, source, 0 if mirrored else None)
        file, held = create_held(path, files)
        try:
            # Not synced: there are no bytes yet that could be lost, and a client may be waiting.
            note_file = files.create(note_path(path))
            try:
                files.write(note_file, note.render(), 0)
            finally:
                note_file.release()
        except BaseException:
            files.unlink(path)
            file.release()
            held.release()
            raise
        return cls(digest, path, note, file, held, space, files, threads)

    @classmethod
    def resume(cls, digest: Digest, path: Path, space: Space, files: Files, threads: Threads) -> Partial | None:
        """Open what an earlier process left at `path`, or return None if there is nothing to resume. Blocks.

        After another boot of the machine, the bytes that were not surely on disk are cut off: the file may have grown
        without getting its content.

        Raises:
            OSError: the files cannot be opened.
        """
        held = hold(path, writes=True)
        if held is None:
            return None
        try:
            opened = open_usable(path, files)
        except BaseException:
            held.release()
            raise
        if opened is None:
            held.release()
            return None
        note, file = opened
        return cls(digest, path, note, file, held, space, files, threads)

    @property
    def size(self) -> int | None:
        """Size of the whole blob in bytes, if it was known when the partial was made."""
        return self._note.size

    @property
    def mirrored(self) -> bool:
        """Whether a mirror sent some of the bytes."""
        return self._note.mirrored_from is not None and self._note.mirrored_from < self.length

    async def note_mirror(self) -> None:
        """Note that a mirror sends the bytes that are appended next.

        Raises:
            OSError: the note cannot be written.
        """
        mirrored_from = self._note.mirrored_from
        if mirrored_from is None or mirrored_from > self.length:
            await self._in_turn(bind(self._change_note, mirrored_from=self.length))

    async def cut_mirrored(self) -> bool:
        """Cut off the first byte that a mirror sent and all bytes after it; they are wrong.

        Returns:
            Whether bytes are left, which the registry itself sent.

        Raises:
            OSError: the note cannot be written, or the file cannot be cut.
        """
        kept = min(self._note.mirrored_from or 0, self.length)
        if not kept or not self.sound:
            return False
        # First the note: it must not promise bytes that the file lacks.
        await self._in_turn(self._disown, kept)
        self.length = kept
        self._tail.clear()
        await self._in_turn(self._files.truncate, self._file, kept)
        return True

    def _disown(self, kept: int) -> None:
        self._change_note(durable=min(self._note.durable, kept), mirrored_from=None)

    def _change_note(self, **changes: int | None) -> None:
        # In a store that was replaced, it may be the note of another partial.
        check_same(self._file, self._path)
        note = replace(self._note, **changes)  # type: ignore[arg-type]  # the numbers among its fields
        write_note(self._path, note, self._files)
        self._note = note

    def append(self, *pieces: bytes) -> Deferred[None]:
        """Write `pieces` at the end, in one thread job; `length` has grown when the Deferred fires.

        Raises:
            OSError: through the Deferred: there is no room, or a write or an earlier sync failed.
            DigestMismatch: through the Deferred: bytes of an earlier process are missing from the file.
        """
        return self._in_thread(self._append, pieces).addCallback(self._grown, pieces)

    def _append(self, pieces: tuple[bytes, ...]) -> int:
        try:
            # Otherwise the rest of the blob would cross the link for nothing.
            check_same(self._file, self._path)
        except FileReplaced:
            self.sound = False
            raise
        if self._broken is not None:
            raise self._broken
        count = sum(map(len, pieces))
        self._space.spend(count)
        try:
            self._write(pieces)
        except OSError as error:
            # A full disk leaves the bytes that were written before intact.
            self.sound = self.sound and is_full(error)
            raise
        if self._hashed == self.length:
            for piece in pieces:
                self._hasher.update(piece)
            self._hashed += count
        else:
            self._hash_more()
        return count

    def _write(self, pieces: tuple[bytes, ...]) -> None:
        offset = self.length
        for piece in pieces:
            self._files.write(self._file, piece, offset)
            offset += len(piece)

    def _grown(self, count: int, pieces: tuple[bytes, ...]) -> None:
        self._tail.replace(self.length, pieces)
        self.length += count

    def _hash_more(self) -> None:
        data = read_written(self._file.fileno(), _SLICE, self._hashed)
        if not data:
            raise DigestMismatch(f"the file ends at byte {self._hashed} of {self.length}")
        self._hasher.update(data)
        self._hashed += len(data)

    def checkpoint(self, clock: IReactorTime) -> None:
        """Begin to sync and note what is there, if 64 MiB have come since the last time, or after 30 s.

        Call it every `CHECKPOINT_EVERY` seconds, also while no byte comes: earlier ones may be due only now.
        The bytes that arrive meanwhile are not delayed. A sync that fails makes every later call fail. What came last
        leaves the memory at the second call after it.
        """
        self._tail.expire()
        now = clock.seconds()
        if self._synced_at is None:
            self._synced_at = now
        count = self.length - self._note.durable
        is_due = count >= _SYNC_BYTES or (count > 0 and now - self._synced_at >= _SYNC_SECONDS)
        if is_due and not self._turn.locked and self._broken is None:
            self._synced_at = now
            self.sync()

    def sync(self) -> Deferred[None]:
        """Sync what is there and note its length, after a sync that runs already, unless that did so.

        The Deferred never fails; after a failure, every later call fails instead.
        """
        return self._in_turn(self._sync)

    def _sync(self) -> None:
        length = self.length
        if length == self._note.durable:
            return
        try:
            self._sound_only_after(lambda: self._files.sync_data(self._file))
            self._change_note(durable=length)
        except Exception as error:
            if is_out_of_descriptors(error):
                # The bytes are there; the next call notes them.
                return
            self._broken = error if isinstance(error, OSError) else OSError(str(error))

    async def verify(self) -> None:
        """Return once the digest is proven to match.

        Raises:
            DigestMismatch: it does not match.
            OSError: the file cannot be read.
        """
        while self._hashed < self.length:
            await self._in_thread(self._hash_more)
        if self._hasher.hexdigest() != self.digest.hex:
            raise DigestMismatch(f"the {self.length} bytes received do not have the digest {self.digest}")

    async def commit(self, target: Path, make_way: Callable[[], object]) -> None:
        """Make the verified partial the blob `target`, synced, after `make_way` was called in a thread.

        Call `verify` first.

        Raises:
            OSError: the blob cannot be synced or renamed, or an earlier sync failed.
        """
        await self._in_turn(self._commit, target, make_way)

    def _commit(self, target: Path, make_way: Callable[[], object]) -> None:
        if self._broken is not None:
            raise self._broken
        make_way()
        self._sound_only_after(lambda: self._files.commit(self._file, self._path, target))
        self._files.unlink(note_path(self._path))

    def _sound_only_after(self, syncing: Callable[[], None]) -> None:
        try:
            syncing()
        except OSError:
            # The kernel reports lost bytes only once; a later sync that succeeds would prove nothing.
            self.sound = False
            raise

    async def discard(self) -> None:
        """Remove the partial and its note."""
        await self._in_turn(self.remove)

    def remove(self) -> None:
        """Remove the partial and its note, as `discard` does. Blocks."""
        # In a store that was replaced, another partial may have that name.
        if is_at(self._file.fileno(), self._path) or not os.path.lexists(self._path):
            self._files.unlink(self._path)
            self._files.unlink(note_path(self._path))

    def reader(self) -> PartialReader:
        """Return a reader, which keeps its file when the partial becomes a blob or is removed."""
        return PartialReader(self._path, self._file.lease(), self._tail, self._threads)

    def close(self) -> None:
        """End writing; readers may go on, and another process may resume the partial."""
        self._tail.clear()
        # The lock first: this process may resume the partial, and then waits until a thread has closed it.
        self._held.release(self._threads.close)
        self._file.release(self._threads.close)

    def _in_turn(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        """Run `function` in a thread after those that were given earlier have ended, also the cancelled ones.

        Two threads that write the note at once would take the temporary file from each other.
        """
        result: Deferred[T] = Deferred()
        self._turn.run(lambda: self._in_thread(function, *args, **kwargs)).addBoth(result.callback)
        return result

    def _in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        leases = self._file.lease(), self._held.lease()

        def run() -> T:
            try:
                return function(*args, **kwargs)
            finally:
                for lease in leases:
                    lease.release()

        return self._threads.write(run)


def known_size(partial: Partial | None, expected: int | None) -> int | None:
    """Return the size of the whole blob in bytes: what a manifest tells, `expected`, else what the partial notes."""
    return expected if expected is not None or partial is None else partial.size
