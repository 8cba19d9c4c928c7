"""What is in the store, read from its files: for listing, exporting and pruning, whether a daemon runs or not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from ociregistry.manifests import Manifest
from ociregistry.names import Digest, ImageReference
from ociregistry.store.recordfiles import IMAGES_FOLDER, LISTS_FOLDER, Signature, read_record, signatures
from ociregistry.store.records import Dates, Record, RecordInvalid

_HEX = re.compile(rb"(?<![0-9a-f])(?:[0-9a-f]{128}|[0-9a-f]{64})(?![0-9a-f])")
_MOST_SEARCHED = 256 * 1024 * 1024
"""Bytes of a file that is no record, which are searched for digests."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A record, where it is kept, and when it was pulled last."""

    record: Record
    path: Path
    pulled: datetime
    size: int
    """Of its file, in bytes."""

    @property
    def manifest(self) -> Manifest:
        """Its manifest."""
        return self.record.manifest


@dataclass(frozen=True, slots=True)
class Row:
    """One image URL of a record."""

    image: ImageReference
    """As it can be pulled: by digest where the tag that is noted means another manifest by now."""
    noted: str
    """The image URL in the record."""
    dates: Dates
    kept: Kept

    @property
    def url(self) -> str:
        """The image URL by which it can be pulled."""
        return str(self.image)


@dataclass(frozen=True)
class Inventory:
    """All records. Files that are no records of ours are only known to be there."""

    root: Path
    records: Mapping[Digest, Kept]
    unreadable: Mapping[Path, str] = field(default_factory=dict)
    """Path -> what is wrong with the file."""
    mentioned: frozenset[str] = frozenset()
    """The digests, in hexadecimal, that stand in the unreadable files: their blobs may belong to them."""
    seen: Mapping[Path, Signature] = field(default_factory=dict)

    @classmethod
    def read(cls, root: Path, before: Inventory | None = None) -> Inventory:
        """The records of the store at `root`; those that have not changed are taken from the one `before`.

        Blocks; raises `OSError` when a record, or a folder, cannot be read.
        """
        records: dict[Digest, Kept] = {}
        unreadable: dict[Path, str] = {}
        mentioned: set[str] = set()
        seen: dict[Path, Signature] = {}
        for folder in (LISTS_FOLDER, IMAGES_FOLDER):
            for path, signature in _signatures(root, folder):
                seen[path] = signature
                known = before.records.get(_digest(path)) if before and before.seen.get(path) == signature else None
                try:
                    record = known.record if known else read_record(path)
                except FileNotFoundError:
                    continue
                except RecordInvalid as error:
                    unreadable[path] = str(error)
                    mentioned |= _mentioned(path)
                    continue
                pulled = datetime.fromtimestamp(signature[2] / 1e9, UTC)
                records[_digest(path)] = Kept(record, path, pulled, signature[1])
        return cls(root, records, unreadable, frozenset(mentioned), seen)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """Every image URL, sorted."""
        return tuple(sorted(self._rows(), key=lambda row: row.url))

    def _rows(self) -> Iterator[Row]:
        newest: dict[str, tuple[datetime, Digest]] = {}
        for digest, kept in self.records.items():
            for noted, dates in kept.record.images.items():
                newest[noted] = max(newest.get(noted, (dates.confirmed, digest)), (dates.confirmed, digest))
        for digest, kept in self.records.items():
            current: dict[ImageReference, Row] = {}
            for noted, dates in kept.record.images.items():
                image = ImageReference.parse_whole(noted)
                if newest[noted][1] != digest:
                    image = ImageReference(image.repository, digest)
                row = current.get(image)
                if row is None or row.noted != row.url:
                    current[image] = Row(image, noted, dates, kept)
            yield from current.values()

    @cached_property
    def _claims(self) -> Mapping[str, tuple[Digest, ...]]:
        found: dict[str, tuple[Digest, ...]] = {}
        for digest, kept in self.records.items():
            for noted in kept.record.images:
                found[noted] = (*found.get(noted, ()), digest)
        return found

    def claims(self, noted: str) -> tuple[Digest, ...]:
        """The records that note this image URL; the last confirmed of them is what it means."""
        return self._claims.get(noted, ())

    @cached_property
    def lists_of(self) -> Mapping[Digest, frozenset[Digest]]:
        """Manifest -> the lists that have it."""
        found: dict[Digest, set[Digest]] = {}
        for digest, kept in self.records.items():
            for child in kept.manifest.children:
                found.setdefault(child.digest, set()).add(digest)
        return {child: frozenset(lists) for child, lists in found.items()}

    def children(self, digest: Digest) -> Iterator[Kept]:
        """The records of what the list `digest` names, as far as they are there."""
        for child in self.records[digest].manifest.children:
            if child.digest in self.records:
                yield self.records[child.digest]

    def pulled(self, digest: Digest) -> datetime:
        """When the image `digest` was pulled last: itself, a list that has it, or what it lists."""
        lists = [self.records[above].pulled for above in self.lists_of.get(digest, ())]
        return max([self.records[digest].pulled, *lists, *(child.pulled for child in self.children(digest))])

    def missing(self, digest: Digest) -> Mapping[Digest, int]:
        """The blobs that the image `digest` lacks, and their sizes in bytes. Blocks."""
        return {
            blob.digest: blob.size
            for blob in self.records[digest].manifest.blobs
            if blob_size(self.root, blob.digest) != blob.size
        }


def _mentioned(path: Path) -> set[str]:
    if not path.is_file():
        return set()
    with path.open("rb") as file:
        return {found.decode("ascii") for found in _HEX.findall(file.read(_MOST_SEARCHED))}


def blob_size(root: Path, digest: Digest) -> int | None:
    """The size in bytes of a blob of the store at `root`, or None if there is none. Blocks."""
    try:
        return (root / "blobs" / digest.hex).stat().st_size
    except FileNotFoundError:
        return None


def _signatures(root: Path, folder: str) -> list[tuple[Path, Signature]]:
    try:
        return signatures(root / folder)
    except FileNotFoundError:
        # A store that is new, or one of which only half was copied yet.
        root.stat()
        return []


def _digest(path: Path) -> Digest:
    digest = Digest.from_hex(path.name)
    assert digest is not None
    return digest
