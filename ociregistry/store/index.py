"""The records in memory: kept fresh from the files for the daemon, and read once from the files for the commands.

Memory only says where to look: the file is still opened, and a request whose file is gone is a miss.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from ociregistry.manifests import Manifest
from ociregistry.names import Digest, ImageReference, Repository, Tag
from ociregistry.store.blobs import missing_blobs, size_of_blob
from ociregistry.store.files import Threads
from ociregistry.store.paths import IMAGES_FOLDER, LISTS_FOLDER, blob_path, blobs_folder, digest_of
from ociregistry.store.records import (
    UNREAD,
    Changes,
    Dates,
    Entry,
    Record,
    RecordFiles,
    RecordInvalid,
    Signature,
    is_referrers_tag,
    is_wanted,
    read_record,
    signatures,
)


class Catalogue:
    """The entries of all records, with the lookups by tag, repository, blob and child."""

    def __init__(self) -> None:
        self._entries: dict[Digest, Entry] = {}
        self._claims: dict[str, dict[Digest, datetime]] = {}
        self._naming: dict[Digest, dict[Digest, int]] = {}
        self._indexes: dict[Digest, set[Digest]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, digest: Digest, entry: Entry) -> None:
        """Set the entry of the record `digest`, replacing an earlier one."""
        self.drop(digest)
        self._entries[digest] = entry
        for url, confirmed in entry.images.items():
            self._claims.setdefault(url, {})[digest] = confirmed
        for blob, size in entry.blobs.items():
            self._naming.setdefault(blob, {})[digest] = size
        for child in entry.children:
            self._indexes.setdefault(child.digest, set()).add(digest)

    def drop(self, digest: Digest) -> None:
        """Remove the record `digest`, if it is there."""
        entry = self._entries.pop(digest, None)
        if entry is None:
            return
        for url in entry.images:
            claims = self._claims[url]
            del claims[digest]
            if not claims:
                del self._claims[url]
        for blob in entry.blobs:
            naming = self._naming[blob]
            del naming[digest]
            if not naming:
                del self._naming[blob]
        for child in {child.digest for child in entry.children}:
            self._indexes[child].discard(digest)
            if not self._indexes[child]:
                del self._indexes[child]

    def get(self, digest: Digest) -> Entry | None:
        """Return the entry of the record `digest`, or None."""
        return self._entries.get(digest)

    def resolve(self, image: ImageReference) -> Digest | None:
        """Return the digest that `image` means, or None. Of several records with a tag, the last confirmed counts."""
        if isinstance(image.reference, Digest):
            return image.reference if image.reference in self._entries else None
        claims = self._claims.get(str(image))
        return max(claims, key=lambda digest: (claims[digest], digest)) if claims else None

    def tags(self, repository: Repository) -> list[Tag]:
        """Return the tags of `repository`, sorted, without referrers tags."""
        prefix = f"{repository}:"
        tags = (Tag(url.removeprefix(prefix)) for url in self._claims if url.startswith(prefix))
        return sorted(tag for tag in tags if not is_referrers_tag(tag))

    def sizes(self, blob: Digest, repository: Repository | None = None) -> set[int]:
        """Return the sizes in bytes that manifests (of `repository`, if given) give `blob`."""
        return {
            size
            for manifest, size in self.naming(blob).items()
            if repository is None or self._entries[manifest].known_in(repository)
        }

    def uses(self, blob: Digest) -> Mapping[Repository, int]:
        """Return the repositories with a manifest that names `blob`, and the size in bytes that it gives the blob."""
        naming = self.naming(blob)
        return {at: size for manifest, size in naming.items() for at in self._entries[manifest].repositories}

    def naming(self, blob: Digest) -> Mapping[Digest, int]:
        """Return the manifests that name `blob`, and the size in bytes that each gives it."""
        return self._naming.get(blob, {})

    def digests(self) -> list[Digest]:
        """Return the digests of all records."""
        return list(self._entries)

    def indexes(self, child: Digest) -> list[Digest]:
        """Return the indexes that name the manifest `child`, directly or not, without lists of referrers."""
        found: dict[Digest, None] = {}
        ahead = [child]
        while ahead:
            for index in self._indexes.get(ahead.pop(), ()):
                if index not in found and not self._entries[index].is_referrers:
                    found[index] = None
                    ahead.append(index)
        return list(found)

    def counts(self) -> tuple[int, int]:
        """Return the number of indexes and the number of image manifests."""
        lists = sum(entry.is_list for entry in self._entries.values())
        return lists, len(self._entries) - lists


_LOOK_EVERY = 1.0
_LOOK_AT_BLOBS_EVERY = 10.0
"""Seconds. Each finished download changes the folder of blobs, which may be large, so it is scanned less often."""


class View:
    """Scans the files every second and updates its `catalogue`."""

    log = Logger(namespace="ociregistry.store")

    def __init__(self, records: RecordFiles, threads: Threads, clock: IReactorTime) -> None:
        self.catalogue = Catalogue()
        self._records = records
        self._threads = threads
        self._known: dict[Path, Signature] = {}
        self._written: set[Path] = set()
        """Records that this process wrote since the running scan began: they are newer than what the scan finds."""
        self._complaints: Mapping[Path, str] = {}
        """File that is not a record -> the reason that was logged, so that it is logged only once."""
        self._changed: set[Digest] = set()
        self.on_change: Callable[[Set[Digest]], object] = lambda changed: None
        """Called with the digests of the records that were written, changed or lost, or lost a blob."""
        self._clock = clock
        self._blobs_looked_at = float("-inf")
        self._looking = LoopingCall(self._look)
        self._looking.clock = clock

    def read(self) -> None:
        """Read all records. Blocks.

        Raises:
            OSError: a folder cannot be read.
        """
        self._take(self._records.look({}))

    def start(self) -> None:
        """Start the repeated scans."""
        self._looking.start(_LOOK_EVERY, now=False)

    def stop(self) -> None:
        """Stop the repeated scans."""
        self._looking.stop()

    def wrote(self, record: Record) -> None:
        """Take over `record`, which this process has just written."""
        digest = record.manifest.digest
        path = self._records.path(digest, is_list=record.manifest.is_list)
        self._written.add(path)
        self._known[path] = UNREAD
        self.update(record)
        self._tell()

    def update(self, record: Record) -> None:
        """Take over `record` as it was read from its file."""
        digest = record.manifest.digest
        before = self.catalogue.get(digest)
        # Where the record does not say, the next scan checks whether a layer is in the store.
        wanted = before.wanted if before else record.has_tag or not record.manifest.layers
        self._put(digest, Entry.of(record, wanted=wanted))

    def _put(self, digest: Digest, entry: Entry) -> None:
        before = self.catalogue.get(digest)
        # The blobs of a manifest never change, so only a new record or a new `wanted` changes what is missing.
        if before is None or before.wanted != entry.wanted:
            self._changed.add(digest)
        self.catalogue.put(digest, entry)

    def blob_arrived(self, blob: Digest) -> None:
        """Report the records that name a blob which this process has stored."""
        self._changed.update(self.catalogue.naming(blob))
        self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, set()
        if changed:
            self.on_change(changed)

    def lost(self, path: Path) -> None:
        """Drop the record at `path`, which could not be read; the next scan looks at the file again."""
        self._forget(path)
        self._known.pop(path, None)

    def _look(self) -> Deferred[None]:
        self._written.clear()
        now = self._clock.seconds()
        blobs = now - self._blobs_looked_at >= _LOOK_AT_BLOBS_EVERY
        self._blobs_looked_at = now if blobs else self._blobs_looked_at
        looked = self._threads.read(self._records.look, dict(self._known), blobs=blobs).addCallback(self._take)
        return looked.addErrback(lambda failure: self.log.error("cannot scan the store: {why}", why=failure.value))

    def _take(self, changes: Changes) -> None:
        # A record that this process wrote meanwhile is read again at the next scan.
        for path in changes.gone - self._written:
            self._forget(path)
        for path, why in changes.damaged.items():
            if path not in self._written:
                self._forget(path)
            if self._complaints.get(path) != why:
                self.log.warn("ignored, not a record that can be served: {path}: {why}", path=path, why=why)
        self._complaints = {
            **{path: why for path, why in self._complaints.items() if path not in changes.gone | changes.read.keys()},
            **changes.damaged,
        }
        for path, entry in changes.read.items():
            if path not in self._written:
                self._put(digest_of(path), entry)
        self._known = {**changes.seen, **dict.fromkeys(self._written, UNREAD)}
        for blob in changes.blobs_gone:
            self._changed.update(self.catalogue.naming(blob))
        self._tell()

    def _forget(self, path: Path) -> None:
        digest = digest_of(path)
        entry = self.catalogue.get(digest)
        if entry is not None and self._records.path(digest, is_list=entry.is_list) == path:
            self._changed.add(digest)
            self.catalogue.drop(digest)


_HEX = re.compile(rb"(?<![0-9a-f])(?:[0-9a-f]{128}|[0-9a-f]{64})(?![0-9a-f])")
_MOST_SEARCHED = 256 * 1024 * 1024
"""Bytes at the start of a file that is not a record, in which digests are searched for."""


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A record with its file and the time of its last pull."""

    record: Record
    path: Path
    pulled: datetime
    size: int
    """Size of the file in bytes."""

    @property
    def manifest(self) -> Manifest:
        """The manifest of the record."""
        return self.record.manifest


@dataclass(frozen=True, slots=True)
class Row:
    """An image URL of a record."""

    image: ImageReference
    """The reference by which it can be pulled: by digest where a noted tag means another manifest by now."""
    notes: tuple[str, ...]
    """The image URLs as the record notes them, which this row stands for."""
    dates: Dates
    kept: StoredRecord

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
    """All records of a store, read from its files.

    Of files that are not records, only their paths and the digests in them are known.
    """

    root: Path
    records: Mapping[Digest, StoredRecord]
    unreadable: Mapping[Path, str] = field(default_factory=dict)
    """Path -> what is wrong with the file."""
    mentioned: frozenset[str] = frozenset()
    """The digests, in hexadecimal, that occur in the unreadable files: these files may need the blobs."""
    seen: Mapping[Path, Signature] = field(default_factory=dict)

    @classmethod
    def read(cls, root: Path, before: Inventory | None = None) -> Inventory:
        """Read the records of the store at `root`. Blocks.

        Records whose files have not changed are taken from the inventory `before`.

        Raises:
            OSError: a record or a folder cannot be read.
        """
        records: dict[Digest, StoredRecord] = {}
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
                records[digest_of(path)] = StoredRecord(record, path, pulled, signature[1])
        return cls(root, records, unreadable, frozenset(mentioned), seen)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """Every image URL, sorted, without the URLs by digest of images that are kept as metadata alone. Blocks."""
        return tuple(row for row in self.all_rows if row.has_tag or not self.is_metadata(row.kept.manifest.digest))

    @cached_property
    def all_rows(self) -> tuple[Row, ...]:
        """Every image URL, sorted."""
        return tuple(sorted(self._rows(), key=lambda row: row.url))

    def is_metadata(self, digest: Digest) -> bool:
        """Tell whether an image is here only because an index names it: its layers are not wanted. Blocks."""
        return digest in self.lists_of and not self.records[digest].manifest.is_list and not self.is_wanted(digest)

    def is_wanted(self, digest: Digest) -> bool:
        """Tell whether the layers of an image belong in the store. Blocks."""
        if digest not in self._wanted:
            self._wanted[digest] = is_wanted(self.records[digest].record, blobs_folder(self.root))
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
        """Return the records that note this image URL, and when each was last confirmed."""
        return self._claims.get(noted, {})

    @cached_property
    def _holders(self) -> Mapping[str, Digest]:
        return {
            noted: max((confirmed, digest) for digest, confirmed in claims.items())[1]
            for noted, claims in self._claims.items()
        }

    def holder(self, noted: str) -> Digest:
        """Return the record that a noted image URL means: the last confirmed."""
        return self._holders[noted]

    @cached_property
    def lists_of(self) -> Mapping[Digest, frozenset[Digest]]:
        """Manifest -> the indexes that name it."""
        found: dict[Digest, set[Digest]] = {}
        for digest, kept in self.records.items():
            for child in kept.manifest.children:
                found.setdefault(child.digest, set()).add(digest)
        return {child: frozenset(lists) for child, lists in found.items()}

    def children(self, digest: Digest) -> Iterator[StoredRecord]:
        """Return the records of the manifests that the index `digest` names, without those that are missing."""
        for child in self.records[digest].manifest.children:
            if child.digest in self.records:
                yield self.records[child.digest]

    def above(self, digest: Digest) -> frozenset[Digest]:
        """Return the indexes that name the manifest `digest`, directly or through other indexes."""
        return _reached(digest, lambda one: self.lists_of.get(one, ()))

    def below(self, digest: Digest) -> frozenset[Digest]:
        """Return the manifests with records that the manifest `digest` names, directly or through other indexes."""
        return _reached(digest, lambda one: (child.manifest.digest for child in self.children(one)))

    def pulled(self, digest: Digest) -> datetime:
        """Return the last pull of the image `digest`, of an index that names it, or of a manifest that it names."""
        return max(self.records[one].pulled for one in {digest} | self.above(digest) | self.below(digest))

    def since(self, row: Row) -> datetime:
        """Return the creation time of the image URL; for the child of an index, no earlier than its index's."""
        lists = (self.records[above].record for above in self.above(row.kept.manifest.digest))
        return max([row.dates.created, *(dates.created for record in lists for dates in record.images.values())])

    def missing(self, digest: Digest) -> Mapping[Digest, int]:
        """Return the required blobs that the image `digest` lacks, with their sizes in bytes. Blocks."""
        return missing_blobs(blobs_folder(self.root), self.records[digest].manifest.required)

    def missing_foreign(self, digest: Digest) -> Mapping[Digest, int]:
        """Return the foreign layers that the image `digest` lacks, with their sizes in bytes. Blocks."""
        return missing_blobs(blobs_folder(self.root), self.records[digest].manifest.foreign_layers)

    def blob_size(self, digest: Digest) -> int | None:
        """Return the size of a blob in bytes, or None if it is missing. Blocks."""
        return size_of_blob(blob_path(self.root, digest))

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
        # The store is new, or is still being copied.
        root.stat()
        return []
