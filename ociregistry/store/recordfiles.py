"""The records' files in fat/ and img/: reading, rewriting, and finding what other processes changed.

Everything here blocks and runs in a thread.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from ociregistry.manifests import LARGEST_MANIFEST, Manifest
from ociregistry.names import Digest, ImageReference
from ociregistry.store.blobs import BlobFolder, missing_blobs, size_of_blob
from ociregistry.store.catalogue import Entry
from ociregistry.store.files import Files
from ociregistry.store.pulls import PullsFolder, store_locked
from ociregistry.store.records import Dates, ForeignRecord, Record, RecordInvalid

LISTS_FOLDER = "fat"
IMAGES_FOLDER = "img"

_LARGEST_RECORD = 8 * LARGEST_MANIFEST
"""Bytes; JSON spells one byte of a manifest with at most six, and the image URLs come on top."""

_NOTE_PULLS_EVERY = 60.0
"""Seconds."""

Signature = tuple[int, int, int, int]
"""Of a file: it changes when the file does."""

UNREAD: Signature = (0, 0, 0, 0)
"""Of a file that is known to be there, and is to be read at the next look."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What a look at the folders found to differ from what was known."""

    seen: Mapping[Path, Signature]
    read: Mapping[Path, Entry] = field(default_factory=dict)
    damaged: Mapping[Path, str] = field(default_factory=dict)
    """Path -> reason: new or changed files that are no records of ours."""
    gone: frozenset[Path] = frozenset()
    blobs_gone: frozenset[Digest] = frozenset()


def record_path(root: Path, digest: Digest, *, is_list: bool) -> Path:
    """Where the record of `digest` is kept in the store at `root`."""
    return root / (LISTS_FOLDER if is_list else IMAGES_FOLDER) / digest.hex


def digest_of(path: Path) -> Digest:
    """The digest that a file of the store is called by."""
    digest = Digest.from_hex(path.name)
    assert digest is not None
    return digest


def read_record(path: Path) -> Record:
    """The record at `path`; raises `RecordInvalid`, and `OSError` when it cannot be read. Blocks."""
    digest = Digest.from_hex(path.name)
    if digest is None:
        raise RecordInvalid("its name is not that of a record")
    try:
        status = path.stat()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ForeignRecord("it is a link to itself") from None
    if not stat.S_ISREG(status.st_mode):
        raise ForeignRecord("it is not a file")
    if status.st_size > _LARGEST_RECORD:
        raise ForeignRecord(f"larger than {_LARGEST_RECORD} bytes")
    with path.open("rb") as file:
        data = file.read()
    record = Record.parse(data, digest)
    if (path.parent.name == LISTS_FOLDER) != record.manifest.is_list:
        raise ForeignRecord(f"a {record.manifest.media_type} does not belong into {path.parent.name}/")
    return record


class RecordFiles:
    """The folders fat/ and img/ below `root`; `pulls` is this process's own folder, for temporary files."""

    def __init__(
        self, root: Path, pulls: PullsFolder, files: Files, spend: Callable[[int], object] = lambda count: None
    ) -> None:
        """`spend` is called with the bytes of a new record, and raises `OSError` where there is no room for it."""
        self._spend = spend
        self._root = root
        self._pulls = pulls
        self._files = files
        self._blobs = BlobFolder(root / "blobs")

    def path(self, digest: Digest, *, is_list: bool) -> Path:
        """Where the record of `digest` is kept."""
        return record_path(self._root, digest, is_list=is_list)

    def confirm(
        self,
        manifest: Manifest,
        image: ImageReference,
        confirmed: datetime,
        created: datetime | None = None,
        *,
        wanted: bool | None = None,
        whole: bool = False,
        known: bool = False,
    ) -> Record | None:
        """Writes that `image` means `manifest` as `Record.confirm` has it; returns the record as it is on disk then.

        Returns None, and writes nothing, where it is to be `whole` and lacks a blob, or `known` and has no record; no
        prune comes between the look and the writing. What another process wrote in between is kept. A file there that
        is no record of ours is moved aside into bad/ of the pulls folder, if there is space for that.
        """
        path = self.path(manifest.digest, is_list=manifest.is_list)
        with store_locked(self._root):
            if whole and missing_blobs(self._root / "blobs", manifest.blob_sizes):
                return None
            existing = self._existing(path)
            if known and existing is None:
                return None
            before = existing or Record(manifest, {}, wanted)
            record = before.confirm(image, confirmed, created, wanted=wanted)
            self._put(path, record, new=existing is None)
        return record

    def want(self, digest: Digest, wanted: bool) -> Record | None:
        """Note that the layers of the image `digest` belong into the store, or do not, where its record does not say.

        What it says is changed from False to True alone. Returns the record, None if there is none.
        """
        path = self.path(digest, is_list=False)
        with store_locked(self._root):
            record = self._existing(path)
            if record is not None and not record.wanted and record.wanted is not wanted:
                record = replace(record, wanted=wanted)
                self._put(path, record)
        return record

    def restore(
        self, manifest: Manifest, images: Mapping[str, Dates], fetched: str, wanted: bool | None = None
    ) -> Record:
        """Writes that `images` mean `manifest`, as a lost record had it; it was `fetched` anew by another image URL.

        `wanted` is what the lost record said. Returns the record as it is on disk then.
        """
        path = self.path(manifest.digest, is_list=manifest.is_list)
        with store_locked(self._root):
            existing = self._existing(path) or Record(manifest, {})
            others = {url: dates for url, dates in existing.images.items() if url != fetched}
            record = Record(manifest, {**others, **images}, existing.wanted or wanted)
            self._put(path, record)
        return record

    def _put(self, path: Path, record: Record, *, new: bool = False) -> None:
        data = record.render()
        if new:
            self._spend(len(data))
        self._files.put(path, data, self._pulls.path / f"{path.name}.record")

    def _existing(self, path: Path) -> Record | None:
        try:
            return read_record(path)
        except FileNotFoundError:
            return None
        except RecordInvalid:
            self._pulls.put_aside(path)
            return None

    def read_for_pull(self, path: Path, now: float) -> tuple[Record, bool]:
        """The record, as `read_record` gives it, and whether `note_pull` has something to note at `now`."""
        return read_record(path), now - path.stat().st_mtime >= _NOTE_PULLS_EVERY

    def note_pull(self, path: Path, now: float) -> None:
        """Lets the file's mtime tell, to the minute, that the manifest was pulled at `now`."""
        # A store that can only be read still serves.
        with suppress(OSError):
            if now - path.stat().st_mtime >= _NOTE_PULLS_EVERY:
                os.utime(path, (now, now))

    def look(self, known: Mapping[Path, Signature], *, blobs: bool = False) -> Changes:
        """Compares the folders with what is `known` and reads what is new or changed; looks at `blobs` too."""
        seen: dict[Path, Signature] = {}
        read: dict[Path, Entry] = {}
        damaged: dict[Path, str] = {}
        for folder in (LISTS_FOLDER, IMAGES_FOLDER):
            for path, signature in signatures(self._root / folder):
                seen[path] = signature
                if known.get(path) == signature:
                    continue
                try:
                    read[path] = self._entry(read_record(path))
                except FileNotFoundError:
                    del seen[path]
                except RecordInvalid as error:
                    damaged[path] = str(error)
                except OSError as error:
                    # Nothing that will show on the file may end this: it is tried again at the next look.
                    damaged[path] = error.strerror or str(error)
                    seen[path] = UNREAD
        blobs_gone = self._blobs.gone() if blobs else frozenset()
        return Changes(seen, read, damaged, frozenset(known.keys() - seen.keys()), blobs_gone)

    def _entry(self, record: Record) -> Entry:
        wanted = is_wanted(record, self._root / "blobs")
        return Entry.of(record, wanted=wanted)


def is_wanted(record: Record, blobs: Path) -> bool:
    """Tell whether the layers of the image belong into the store, whose blobs are in the folder `blobs`.

    One whose record does not say is wanted when it is known by a tag, or when a layer of it is here; one that is not
    wanted counts as wanted when all its layers are here, as other caches have pulled it through this one. Blocks.
    """
    if record.wanted:
        return True
    layers = record.manifest.layers
    here = (size_of_blob(f"{blobs}/{layer.hex}") is not None for layer in layers)
    if record.wanted is None:
        return record.has_tag or not layers or any(here)
    return bool(layers) and all(here)


def signatures(folder: Path) -> list[tuple[Path, Signature]]:
    """The files in `folder` that have a record's name. Blocks; raises `OSError`."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if Digest.from_hex(entry.name) is None:
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            signature = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            found.append((folder / entry.name, signature))
    return found
