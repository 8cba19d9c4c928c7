"""The files of a partial: its bytes, which a flock protects while they are written, and the note beside them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ociregistry.store.files import Files, SharedFile, hold
from ociregistry.store.pulls import NOTE_SUFFIX


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


def note_path(path: Path) -> Path:
    """Return where the note of the partial at `path` is."""
    return path.with_name(path.name + NOTE_SUFFIX)


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
    files.put(note_path(path), note.render(), path.with_name(path.name + ".new"))
