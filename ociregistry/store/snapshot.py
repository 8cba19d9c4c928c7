"""What a command reads from the files of a store: an index of the records, and the records themselves."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Set
from datetime import UTC, datetime
from functools import reduce
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from ociregistry.manifests import Manifest
from ociregistry.names import Digest, by_digest
from ociregistry.store.blobs import missing_blobs, size_of_blob
from ociregistry.store.files import is_of_the_file, reason
from ociregistry.store.index import Entry, Index
from ociregistry.store.paths import blobs_folder, digest_of
from ociregistry.store.records import Dates, Record, is_wanted
from ociregistry.store.scan import Signature, collection_paused, look, read_changed

_HEX = re.compile(rb"(?<![0-9a-f])(?:[0-9a-f]{128}|[0-9a-f]{64})(?![0-9a-f])")
_MOST_SEARCHED = 256 * 1024 * 1024
"""Bytes at the start of a file that is not a record, in which digests are searched for."""


class StoredRecord(NamedTuple):
    """A record with its file and the time of its last pull."""

    record: Record
    file: str
    """Path of the file. As text: with tens of thousands of records, making a Path for each takes longer."""
    pulled: datetime
    size: int
    """Size of the file in bytes."""

    @property
    def path(self) -> Path:
        """Path of the file."""
        return Path(self.file)

    @property
    def manifest(self) -> Manifest:
        """The manifest of the record."""
        return self.record.manifest


class Row(NamedTuple):
    """An image URL of a record."""

    url: str
    """The image URL by which it can be pulled: by digest where a noted tag means another manifest by now."""
    notes: tuple[str, ...]
    """The image URLs as the record notes them, which this row stands for."""
    dates: Dates
    stored: StoredRecord

    @property
    def has_tag(self) -> bool:
        """Whether it can be pulled by a tag."""
        return "@" not in self.url


class Snapshot:
    """All records of a store as its files were at the last `refresh`, with their index.

    Of files that are not records, only their paths and the digests in them are known.
    """

    def __init__(self, root: Path, now: datetime | None = None) -> None:
        """Set up the snapshot of the store at `root`, without any record yet.

        `now` is the time for which it is taken, in place of the clock's.
        """
        self.root = root
        self.now = now or datetime.now(UTC)
        self.index = Index(lambda: self.now)
        self._blobs = blobs_folder(root)
        self.unreadable: Mapping[Path, str] = {}
        """Path -> what is wrong with the file."""
        self.unknown: tuple[OSError, ...] = ()
        """The errors of the unreadable files whose content is not known, so that they may need any blob."""
        self.mentioned: frozenset[str] = frozenset()
        """The digests, in hexadecimal, that occur in the unreadable files: these files may need the blobs."""
        self._records: dict[Digest, StoredRecord] = {}
        self._signatures: dict[str, Signature] = {}
        """File of a record -> its signature when it was read."""
        self._invalid: dict[str, tuple[Signature, str, frozenset[str]]] = {}
        """File that is no record -> its signature when it was read, what is wrong with it, the digests in it."""
        self._wanted: dict[Digest, bool] = {}
        self._missing: dict[Digest, Mapping[Digest, int]] = {}
        self._rows: tuple[Row, ...] | None = None
        self._all_rows: tuple[Row, ...] | None = None

    @classmethod
    def read(cls, root: Path, now: datetime | None = None) -> Snapshot:
        """Read all records of the store at `root`, for the time `now` in place of the clock's. Blocks.

        Raises:
            OSError: a folder cannot be read, or a record for a reason that is not the file's own.
        """
        snapshot = cls(root, now)
        with collection_paused():
            snapshot.refresh()
        return snapshot

    def refresh(self) -> None:
        """Read the records that have changed since the last time. Blocks.

        Raises:
            OSError: a folder cannot be read, or a record for a reason that is not the file's own.
        """
        unknown: list[OSError] = []
        unreadable: dict[Path, str] = {}
        invalid: dict[str, tuple[Signature, str, frozenset[str]]] = {}
        seen = look(self.root, missing_ok=True)
        known = self._signatures | {path: signature for path, (signature, _, _) in self._invalid.items()}
        for path, found in read_changed(seen, known):
            self._invalid.pop(path, None)
            if isinstance(found, Record):
                self._signatures[path] = seen[path]
                _, size, mtime, _ = seen[path]
                self.put(StoredRecord(found, path, datetime.fromtimestamp(mtime / 1e9, UTC), size))
                continue
            signature = seen.pop(path)
            if isinstance(found, FileNotFoundError):
                continue
            unreadable[Path(path)] = reason(found)
            try:
                if isinstance(found, OSError):
                    raise found
                invalid[path] = signature, reason(found), _mentioned(Path(path))
            except OSError as error:
                if not is_of_the_file(error):
                    raise
                unknown.append(error)
        for path in self._signatures.keys() - seen.keys():
            self._drop(path)
        self._invalid = {path: was for path, was in self._invalid.items() if path in seen} | invalid
        self.unreadable = unreadable | {Path(path): why for path, (_, why, _) in self._invalid.items()}
        self.unknown = tuple(unknown)
        self.mentioned = frozenset(digest for _, _, digests in self._invalid.values() for digest in digests)
        self._wanted.clear()
        self._missing.clear()
        self._rows = self._all_rows = None

    def put(self, stored: StoredRecord) -> None:
        """Add a record, or replace an earlier one with the same digest."""
        digest = stored.manifest.digest
        self._records[digest] = stored
        self.index.put(digest, Entry.of(stored.record))

    def _drop(self, path: str) -> None:
        del self._signatures[path]
        digest = digest_of(path)
        stored = self._records.get(digest)
        if stored is not None and stored.file == path:
            del self._records[digest]
            self.index.drop(digest)

    @property
    def records(self) -> Mapping[Digest, StoredRecord]:
        """All records."""
        return self._records

    @property
    def rows(self) -> tuple[Row, ...]:
        """Every image URL, sorted, without the URLs by digest of images that are kept as metadata alone. Blocks."""
        if self._rows is None:
            rows = self.all_rows
            self._rows = tuple(row for row in rows if row.has_tag or not self.is_metadata(row.stored.manifest.digest))
        return self._rows

    @property
    def all_rows(self) -> tuple[Row, ...]:
        """Every image URL, sorted."""
        if self._all_rows is None:
            self._all_rows = tuple(sorted(self._make_rows(), key=attrgetter("url")))
        return self._all_rows

    def _make_rows(self) -> Iterator[Row]:
        for digest, stored in self._records.items():
            images = stored.record.images
            notes: dict[str, tuple[str, ...]] = {}
            for noted in images:
                url = noted if self.index.meaning(noted) == digest else by_digest(noted, digest)
                notes[url] = (*notes.get(url, ()), noted)
            for url, of_url in notes.items():
                dates = images.get(url) or reduce(Dates.merged, (images[noted] for noted in of_url))
                yield Row(url, of_url, dates, stored)

    def is_metadata(self, digest: Digest) -> bool:
        """Tell whether an image is here only because an index names it: its layers are not wanted. Blocks."""
        if self.records[digest].manifest.is_list or not self.index.parents(digest):
            return False
        return not self.is_wanted(digest)

    def is_wanted(self, digest: Digest) -> bool:
        """Tell whether the layers of an image belong in the store. Blocks."""
        if digest not in self._wanted:
            self._wanted[digest] = is_wanted(self.records[digest].record, self._blobs)
        return self._wanted[digest]

    def pulled(self, digest: Digest) -> datetime:
        """Return the last pull of the image `digest`, of an index that names it, or of a manifest that it names.

        A time in the future, noted while the clock was wrong, counts as now.
        """
        return min(max(self.pulls(digest)), self.now)

    def pulls(self, digest: Digest) -> list[datetime]:
        """Return when the image `digest`, the indexes that name it, and the manifests that it names were pulled."""
        related = {digest} | self.index.ancestors(digest) | self.index.descendants(digest)
        return [self.records[one].pulled for one in related]

    def since(self, row: Row) -> datetime:
        """Return the creation time of the image URL; for the child of an index, no earlier than its index's.

        A time in the future, noted while the clock was wrong, counts as now.
        """
        indexes = (self.records[index].record for index in self.index.ancestors(row.stored.manifest.digest))
        created = (dates.created for record in indexes for dates in record.images.values())
        return min(max([row.dates.created, *created]), self.now)

    def missing(self, digest: Digest) -> Mapping[Digest, int]:
        """Return the required blobs that the image `digest` lacks, with their sizes in bytes. Blocks."""
        if digest not in self._missing:
            self._missing[digest] = missing_blobs(self._blobs, self.records[digest].manifest.required)
        return self._missing[digest]

    def missing_foreign(self, digest: Digest) -> Mapping[Digest, int]:
        """Return the foreign layers that the image `digest` lacks, with their sizes in bytes. Blocks."""
        return missing_blobs(self._blobs, self.records[digest].manifest.foreign_layers)

    def blobs(self) -> Set[Digest]:
        """Return the blobs after which files in the store are named. Blocks.

        Raises:
            OSError: the folder cannot be read.
        """
        try:
            names = os.listdir(self._blobs)
        except FileNotFoundError:
            return frozenset()
        return {digest for name in names if (digest := Digest.from_hex(name)) is not None}

    def blob_size(self, digest: Digest) -> int | None:
        """Return the size of a blob in bytes, or None if it is missing. Blocks."""
        # A path as text: making a Path takes longer than the stat.
        return size_of_blob(f"{self._blobs}/{digest.hex}")


def _mentioned(path: Path) -> frozenset[str]:
    if not path.is_file():
        return frozenset()
    with path.open("rb") as file:
        return frozenset(found.decode("ascii") for found in _HEX.findall(file.read(_MOST_SEARCHED)))
