"""What is in the store, read from its files: for listing, exporting and pruning, whether a daemon runs or not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from ociregistry.manifests import Manifest
from ociregistry.names import Digest, ImageReference
from ociregistry.store.blobs import missing_blobs, size_of_blob
from ociregistry.store.recordfiles import (
    IMAGES_FOLDER,
    LISTS_FOLDER,
    Signature,
    digest_of,
    is_wanted,
    read_record,
    signatures,
)
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
    """As it can be pulled: by digest where a tag that is noted means another manifest by now."""
    notes: tuple[str, ...]
    """What the record notes, and this stands for."""
    dates: Dates
    kept: Kept

    @property
    def url(self) -> str:
        """The image URL by which it can be pulled."""
        return str(self.image)

    @property
    def has_tag(self) -> bool:
        """Whether it can be pulled by a tag."""
        return not isinstance(self.image.reference, Digest)


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
                known = before.records.get(digest_of(path)) if before and before.seen.get(path) == signature else None
                try:
                    record = known.record if known and known.path == path else read_record(path)
                except FileNotFoundError:
                    continue
                except RecordInvalid as error:
                    unreadable[path] = str(error)
                    mentioned |= _mentioned(path)
                    continue
                pulled = datetime.fromtimestamp(signature[2] / 1e9, UTC)
                records[digest_of(path)] = Kept(record, path, pulled, signature[1])
        return cls(root, records, unreadable, frozenset(mentioned), seen)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """Every image URL, sorted, without those by digest of what is here as metadata alone. Blocks."""
        return tuple(row for row in self.all_rows if row.has_tag or not self.is_metadata(row.kept.manifest.digest))

    @cached_property
    def all_rows(self) -> tuple[Row, ...]:
        """Every image URL, sorted."""
        return tuple(sorted(self._rows(), key=lambda row: row.url))

    def is_metadata(self, digest: Digest) -> bool:
        """Tell whether an image is only here since an index names it: its layers are not wanted. Blocks."""
        return digest in self.lists_of and not self.records[digest].manifest.is_list and not self.is_wanted(digest)

    def is_wanted(self, digest: Digest) -> bool:
        """Tell whether the layers of an image belong into the store. Blocks."""
        if digest not in self._wanted:
            self._wanted[digest] = is_wanted(self.records[digest].record, self.root / "blobs")
        return self._wanted[digest]

    @cached_property
    def _wanted(self) -> dict[Digest, bool]:
        return {}

    def _rows(self) -> Iterator[Row]:
        for digest, kept in self.records.items():
            notes: dict[ImageReference, dict[str, Dates]] = {}
            for noted, dates in kept.record.images.items():
                notes.setdefault(self._meant(noted, digest), {})[noted] = dates
            for image, noted_dates in notes.items():
                first = min(one.created for one in noted_dates.values())
                last = max(one.confirmed for one in noted_dates.values())
                yield Row(image, tuple(noted_dates), noted_dates.get(str(image), Dates(first, last)), kept)

    def _meant(self, noted: str, digest: Digest) -> ImageReference:
        image = ImageReference.parse_whole(noted)
        return image if self.holder(noted) == digest else ImageReference(image.repository, digest)

    @cached_property
    def _claims(self) -> Mapping[str, Mapping[Digest, datetime]]:
        found: dict[str, dict[Digest, datetime]] = {}
        for digest, kept in self.records.items():
            for noted, dates in kept.record.images.items():
                found.setdefault(noted, {})[digest] = dates.confirmed
        return found

    def claims(self, noted: str) -> Mapping[Digest, datetime]:
        """The records that note this image URL, and when each was confirmed."""
        return self._claims.get(noted, {})

    @cached_property
    def _holders(self) -> Mapping[str, Digest]:
        return {
            noted: max((confirmed, digest) for digest, confirmed in claims.items())[1]
            for noted, claims in self._claims.items()
        }

    def holder(self, noted: str) -> Digest:
        """The record that a noted image URL means: the last confirmed."""
        return self._holders[noted]

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

    def above(self, digest: Digest) -> frozenset[Digest]:
        """The lists that have the manifest `digest`, and those that have these."""
        return _reached(digest, lambda one: self.lists_of.get(one, ()))

    def below(self, digest: Digest) -> frozenset[Digest]:
        """What the manifest `digest` names, and what that names, as far as it is there."""
        return _reached(digest, lambda one: (child.manifest.digest for child in self.children(one)))

    def pulled(self, digest: Digest) -> datetime:
        """When the image `digest` was pulled last: itself, a list that has it, or what it lists."""
        return max(self.records[one].pulled for one in {digest} | self.above(digest) | self.below(digest))

    def since(self, row: Row) -> datetime:
        """Since when the image URL is there: a part of a list not before the list."""
        lists = (self.records[above].record for above in self.above(row.kept.manifest.digest))
        return max([row.dates.created, *(dates.created for record in lists for dates in record.images.values())])

    def missing(self, digest: Digest) -> Mapping[Digest, int]:
        """The blobs that the image `digest` lacks, and their sizes in bytes. Blocks."""
        return missing_blobs(self.root / "blobs", self.records[digest].manifest.blob_sizes)

    def blob_size(self, digest: Digest) -> int | None:
        """The size in bytes of a blob, or None if there is none. Blocks."""
        return size_of_blob(self.root / "blobs" / digest.hex)

    @cached_property
    def named(self) -> frozenset[Digest]:
        """All blobs that records name."""
        return frozenset(blob.digest for kept in self.records.values() for blob in kept.manifest.blobs)


def _reached(start: Digest, following: Callable[[Digest], Iterable[Digest]]) -> frozenset[Digest]:
    found: set[Digest] = set()
    ahead = [start]
    while ahead:
        new = set(following(ahead.pop())) - found
        found |= new
        ahead += new
    return frozenset(found)


def _mentioned(path: Path) -> set[str]:
    if not path.is_file():
        return set()
    with path.open("rb") as file:
        return {found.decode("ascii") for found in _HEX.findall(file.read(_MOST_SEARCHED))}


def _signatures(root: Path, folder: str) -> list[tuple[Path, Signature]]:
    try:
        return signatures(root / folder)
    except FileNotFoundError:
        # A store that is new, or one of which only half was copied yet.
        root.stat()
        return []
