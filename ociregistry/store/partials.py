"""Partials: blobs that are not complete yet, and survive the end of the process and of the machine's power.

A partial is two files in pulls/<n>/: its bytes so far, and a note, a JSON object that says how many of them are
surely on disk, since which boot of the machine, and what they are a part of. A flock protects it while it is
written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ParamSpec, TypeVar

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IReactorTime

from ociregistry.names import Digest
from ociregistry.store.blobs import read_at
from ociregistry.store.files import Files, SharedFile, Threads, hold, is_full
from ociregistry.store.paths import note_path, temporary
from ociregistry.store.space import Space

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Note:
    """What is known of a partial beside its bytes."""

    durable: int
    """How many of its bytes were on disk when the note was written."""
    boot: str
    size: int | None
    """Of the whole blob, in bytes."""
    source: str
    """The repository that it comes from."""

    @classmethod
    def parse(cls, data: bytes) -> Note | None:
        """The note in `data`, or None if that is none."""
        try:
            document = json.loads(data)
            durable, boot, size, source = (document[key] for key in ("durable", "boot", "size", "source"))
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        sizes_hold = isinstance(durable, int) and isinstance(size, int | None) and durable >= 0
        return cls(durable, boot, size, source) if sizes_hold and isinstance(boot, str) else None

    def render(self) -> bytes:
        """The bytes of the file."""
        return json.dumps(asdict(self)).encode() + b"\n"


def create_held(path: Path, files: Files) -> tuple[SharedFile, SharedFile]:
    """Create an empty file at `path` and return it with the flock on it. Blocks. Raises: `OSError`."""
    while True:
        # A file that is there already may be about to be removed by its name, which must not hit the new one.
        before = hold(path, writes=True)
        try:
            file = files.create(path)
        finally:
            if before is not None:
                before.release()
        held = hold(path, writes=True)
        if held is not None:
            return file, held
        # It was removed before it was locked.
        file.release()


def open_usable(path: Path, files: Files) -> tuple[Note, SharedFile] | None:
    """Return the note and the open file of the partial at `path`, or None if it cannot be gone on with."""
    try:
        note = Note.parse(note_path(path).read_bytes())
        file = files.open(path)
    except FileNotFoundError:
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
    """Write the note of the partial at `path`, synced. Blocks. Raises: `OSError`."""
    files.put(note_path(path), note.render(), temporary(path))


_SYNC_BYTES = 64 * 1024 * 1024
_SYNC_SECONDS = 30.0
_SLICE = 8 * 1024 * 1024
"""Bytes that are re-hashed in one go of a thread."""


class DigestMismatch(Exception):
    """The bytes that were written are not those that the digest names."""


class Partial:
    """A blob that grows: one writer appends, any number of readers follow.

    It is hashed as it is written, in the same thread job, and becomes a blob only when the digest holds. What
    an earlier process wrote is hashed again, piece by piece, as it goes on.

    A flock on the file tells other processes that it is being written and must not be removed. It is held on a
    descriptor of its own, so that it ends with the writer and its last thread job, whoever goes on reading.
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
        """`held` is the flock on the file, `space` the room on the disk."""
        self.digest = digest
        self.length = file.size()
        """Bytes that can be read."""
        self.resumed = self.length > 0
        """Whether it holds bytes that an earlier process wrote."""
        self.sound = True
        """Whether all that was written can be trusted to be in the file."""
        self._path = path
        self._note = note
        self._file = file
        self._held = held
        self._space = space
        self._files = files
        self._threads = threads
        self._hasher = digest.hasher()
        self._hashed = 0
        self._syncing: Deferred[None] = succeed(None)
        self._synced_at: float | None = None
        self._broken: OSError | None = None

    @classmethod
    def create(
        cls, digest: Digest, path: Path, size: int | None, source: str, space: Space, files: Files, threads: Threads
    ) -> Partial:
        """An empty partial at `path`. Blocks; raises `OSError`."""
        note = Note(0, files.boot(), size, source)
        file, held = create_held(path, files)
        try:
            # Not synced, as there is nothing yet that it could lose, and a client may be waiting.
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
        """What an earlier process left at `path`, or None. Blocks; raises `OSError`.

        After another boot of the machine, what was not surely on disk is cut off: the file may have grown there
        without getting its bytes.
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
        """Of the whole blob in bytes, as it was known when the partial was made."""
        return self._note.size

    def append(self, data: bytes) -> Deferred[None]:
        """Writes `data` at the end; when it fires `length` has grown. Fails with `OSError`."""
        return self._in_thread(self._append, data).addCallback(self._grown)

    def _append(self, data: bytes) -> int:
        if self._broken is not None:
            raise self._broken
        self._space.spend(len(data))
        try:
            self._files.write(self._file, data, self.length)
        except OSError as error:
            # When the disk is full, what was written before is good.
            self.sound = self.sound and is_full(error)
            raise
        if self._hashed == self.length:
            self._hasher.update(data)
            self._hashed += len(data)
        else:
            self._hash_more()
        return len(data)

    def _grown(self, count: int) -> None:
        self.length += count

    def _hash_more(self) -> None:
        data = os.pread(self._file.fileno(), _SLICE, self._hashed)
        if not data:
            raise DigestMismatch(f"the file ends at byte {self._hashed} of {self.length}")
        self._hasher.update(data)
        self._hashed += len(data)

    def checkpoint(self, clock: IReactorTime) -> None:
        """Begins to sync what is there, and to note it, when enough has come since the last time.

        The bytes that come meanwhile are not delayed. A sync that fails makes every later call fail.
        """
        now = clock.seconds()
        if self._synced_at is None:
            self._synced_at = now
        enough = self.length - self._note.durable >= _SYNC_BYTES or now - self._synced_at >= _SYNC_SECONDS
        if enough and self._syncing.called:
            self._synced_at = now
            self._syncing = self.sync()

    def sync(self) -> Deferred[None]:
        """Syncs what is there and notes its length; never fails, but then every later call does."""
        return self._in_thread(self._sync, self.length).addErrback(self._break)

    def _sync(self, length: int) -> None:
        self._sound_only_after(lambda: self._files.sync_data(self._file))
        note = replace(self._note, durable=length)
        write_note(self._path, note, self._files)
        self._note = note

    def _break(self, failure: object) -> None:
        error = getattr(failure, "value", None)
        self._broken = error if isinstance(error, OSError) else OSError(str(error))

    async def verify(self) -> None:
        """Returns when the digest is proven to hold; raises `DigestMismatch`, or `OSError` from reading."""
        while self._hashed < self.length:
            await self._in_thread(self._hash_more)
        if self._hasher.hexdigest() != self.digest.hex:
            raise DigestMismatch(f"the {self.length} bytes received do not have the digest {self.digest}")

    async def commit(self, target: Path) -> None:
        """Makes it the blob `target`, synced. To be called after `verify`. Raises `OSError`."""
        await self._settled()
        if self._broken is not None:
            raise self._broken
        await self._in_thread(self._commit, target)

    def _commit(self, target: Path) -> None:
        self._sound_only_after(lambda: self._files.commit(self._file, self._path, target))
        self._files.unlink(note_path(self._path))

    def _sound_only_after(self, syncing: Callable[[], None]) -> None:
        try:
            syncing()
        except OSError:
            # The kernel tells of bytes that it could not write once; the next sync would prove nothing.
            self.sound = False
            raise

    async def discard(self) -> None:
        """Removes what was written."""
        await self._settled()
        await self._in_thread(self._discard)

    def _discard(self) -> None:
        self._files.unlink(self._path)
        self._files.unlink(note_path(self._path))

    async def _settled(self) -> None:
        settled: Deferred[None] = Deferred()
        self._syncing.addCallback(settled.callback)
        await settled

    def reader(self) -> PartialReader:
        """A reader, which keeps its file when the partial becomes a blob or is removed."""
        return PartialReader(self._file.lease(), self._threads)

    def close(self) -> None:
        """The writer's end; readers may go on, and another process may resume."""
        self._file.release()
        self._held.release()

    def _in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        leases = self._file.lease(), self._held.lease()

        def run() -> T:
            try:
                return function(*args, **kwargs)
            finally:
                for lease in leases:
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
