"""Pruning: which image URLs, records and blobs are removed, by command or by the eviction policy, and how.

The decision is made from the files and carried out under the same lock as every rewriting of records, so that a
record that is written meanwhile loses no blob.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from ociregistry.manifests import Manifest
from ociregistry.names import Digest, by_digest, repository_of
from ociregistry.store.files import Files, is_full, note_time, read_regular, restore_time
from ociregistry.store.index import newest
from ociregistry.store.paths import (
    PRUNED_SUFFIX,
    blob_path,
    blobs_folder,
    pruned_path,
    pulls_folder,
    rewritten_record,
)
from ociregistry.store.records import Dates, Record, RecordInvalid
from ociregistry.store.snapshot import Row, Snapshot, StoredRecord
from ociregistry.store.workdir import store_locked

_AT_ONCE = 200
"""Number of blobs that are removed while the lock is held once."""

Choose = Callable[[Snapshot], "PruneSet"]
"""Selects what is to be removed from a store."""


@dataclass(frozen=True, slots=True)
class Withheld:
    """Images that are old enough to be pruned but stay, because their number suggests that the clock is wrong."""

    unused: int
    """Number of such images."""
    images: int
    """Number of all images; an index counts as one together with its images."""
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What is pruned."""

    rows: tuple[Row, ...]
    """The image URLs."""
    records: tuple[StoredRecord, ...]
    blobs: Mapping[Digest, int]
    """Blob -> its size in bytes."""
    bytes_of: Mapping[Digest, int]
    """Record -> bytes of its own blobs. A blob of several pruned records counts for the first of them."""
    metadata: tuple[StoredRecord, ...] = ()
    """Records of images that are here only because an index names them; they go with the index and are not listed."""
    metadata_blobs: Mapping[Digest, int] = field(default_factory=dict)
    withheld: Withheld | None = None

    @property
    def bytes(self) -> int:
        """The bytes that become free."""
        blobs = sum(self.blobs.values()) + sum(self.metadata_blobs.values())
        return blobs + sum(stored.size for stored in (*self.records, *self.metadata))


class PruneSet:
    """The image URLs that are to be pruned, and the records that go with them.

    A record that stays may have an image URL replaced:
    - When a tag is pruned, an older record that notes the same tag would become its meaning again. That record notes
      its own digest instead of the tag.
    - When an index leaves a repository, so do its children, where they are noted by digest. A child without another
      image URL is noted in another repository that has an index with it, if there is one.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._index = snapshot.index
        self._images: dict[Digest, dict[str, Dates]] = {}
        """Record -> the image URLs that it is to note, for records that change."""
        self.gone: dict[Digest, StoredRecord] = {}
        """The records that are left without an image URL, in the order in which they lost the last one."""
        self.withheld: Withheld | None = None
        self.misdated: list[StoredRecord] = []
        """Records whose last pull is in the future: from now on, now is its time, so that they are unused one day."""

    def take(self, row: Row) -> None:
        """Prune this image URL."""
        for noted in {*row.notes, row.url}:
            self._drop(row.stored.manifest.digest, noted)

    def take_record(self, digest: Digest) -> None:
        """Prune all image URLs of a record."""
        for noted in list(self._noted(digest)):
            self._drop(digest, noted)

    def _noted(self, digest: Digest) -> dict[str, Dates]:
        if digest not in self._images:
            self._images[digest] = dict(self._snapshot.records[digest].record.images)
        return self._images[digest]

    def _drop(self, digest: Digest, noted: str) -> None:
        images = self._noted(digest)
        if images.pop(noted, None) is None:
            return
        if self._index.meaning(noted) == digest:
            for stale in self._index.claimants(noted) - {digest}:
                self._rename(stale, noted, by_digest(noted, stale))
        if not images:
            self.gone[digest] = self._snapshot.records[digest]
        repository = repository_of(noted)
        if not any(repository_of(other) == repository for other in images):
            for child in self._index.children(digest):
                self._leave(child, repository)

    def _rename(self, digest: Digest, noted: str, url: str) -> None:
        images = self._noted(digest)
        dates = images.pop(noted, None)
        if dates is not None:
            images[url] = images.get(url, dates).merged(dates)

    def _leave(self, digest: Digest, repository: str) -> None:
        """Remove the image URL by digest of a child from `repository`, if no index with it is left there.

        If this is the child's only image URL, and an index with it is in another repository, the URL is moved there.
        A child that an unreadable file mentions keeps its URLs.
        """
        images, noted = self._noted(digest), f"{repository}@{digest}"
        if noted not in images or digest.hex in self._snapshot.mentioned:
            return
        others = [repository_of(url) for index in self._index.parents(digest) for url in self._noted(index)]
        if repository in others:
            return
        if others and len(images) == 1:
            self._rename(digest, noted, f"{min(others)}@{digest}")
        else:
            self._drop(digest, noted)

    @property
    def plan(self) -> Plan:
        """The plan for everything taken so far. Blocks, as it looks at the blobs.

        Raises:
            OSError: a blob cannot be looked at.
        """
        records: list[StoredRecord] = []
        metadata: list[StoredRecord] = []
        for digest, stored in self.gone.items():
            (metadata if self._snapshot.is_metadata(digest) else records).append(stored)
        own: dict[Digest, dict[Digest, int]] = {}
        unnamed = self._unnamed()
        for stored in (*records, *metadata):
            own[stored.manifest.digest] = self._sizes(stored.manifest, unnamed)
            unnamed.difference_update(own[stored.manifest.digest])
        return Plan(
            rows=tuple(row for row in self._snapshot.rows if self._takes(row)),
            records=tuple(records),
            blobs=_all_of(own, records),
            bytes_of={stored.manifest.digest: sum(own[stored.manifest.digest].values()) for stored in records},
            metadata=tuple(metadata),
            metadata_blobs=_all_of(own, metadata),
            withheld=self.withheld,
        )

    def _takes(self, row: Row) -> bool:
        digest = row.stored.manifest.digest
        return digest in self._images and not self._images[digest].keys() & {*row.notes, row.url}

    def _unnamed(self) -> set[Digest]:
        """Return the blobs in the store that no record will name."""
        if not self.gone:
            return set()
        named = {blob.digest for stored in self.gone.values() for blob in stored.manifest.blobs}
        # Most blobs of an index's other platforms are not there: to look for each would take longer.
        there = self._snapshot.blobs() & named
        gone, mentioned = self.gone.keys(), self._snapshot.mentioned
        return {blob for blob in there if self._index.named_only_by(blob, gone) and blob.hex not in mentioned}

    def _sizes(self, manifest: Manifest, blobs: Set[Digest]) -> dict[Digest, int]:
        """Return those of `blobs` that `manifest` names and the store has, with their sizes in bytes."""
        found = {
            blob.digest: self._snapshot.blob_size(blob.digest) for blob in manifest.blobs if blob.digest in blobs
        }
        return {digest: size for digest, size in found.items() if size is not None}

    def renamed(self) -> Iterator[tuple[StoredRecord, Record]]:
        """Yield each record with a tag that would mean it again, and the record with its digest instead of the tag.

        These are to be written before anything is removed. Records that are to be removed are included.
        """
        for digest in list(self._images):
            stored = self._snapshot.records[digest]
            images: dict[str, Dates] = {}
            for noted, dates in stored.record.images.items():
                meaning = self._index.meaning(noted)
                back = meaning is not None and meaning != digest and noted not in self._noted(meaning)
                images[by_digest(noted, digest) if back else noted] = dates
            if images.keys() != stored.record.images.keys():
                yield stored, replace(stored.record, images=images)

    def rewritten(self) -> Iterator[tuple[StoredRecord, Record]]:
        """Yield the records that stay and change, and their final contents."""
        for digest, images in self._images.items():
            stored = self._snapshot.records[digest]
            if images and images != stored.record.images:
                yield stored, replace(stored.record, images=images)

    def before_rewriting(self) -> Iterator[list[StoredRecord]]:
        """Yield records that can be removed before anything is rewritten, in batches to be removed record by record.

        Their removal makes no tag mean again what it meant before, and takes no image away from an index that is
        there. Indexes with an image that is to be rewritten after the index has gone are not among them.
        """
        left = set(self._snapshot.records)
        changing = {stored.manifest.digest for stored, _ in self.rewritten()}
        able = {digest for digest in self.gone if not self._index.descendants(digest) & changing}
        while batch := [digest for digest in able & left if self._may_go_next(digest, left)]:
            yield [self.gone[digest] for digest in batch]
            left.difference_update(batch)

    def _may_go_next(self, digest: Digest, left: Set[Digest]) -> bool:
        """Tell whether a record may be removed next while the records `left` are there."""
        if self._index.ancestors(digest) & self.gone.keys() & left:
            return False
        for noted in self._snapshot.records[digest].record.images:
            claims = [claim for claim in self._index.claims(noted) if claim[1] in left]
            if len(claims) > 1 and newest(claims, self._snapshot.now) == digest:
                return False
        return True


def _all_of(own: Mapping[Digest, Mapping[Digest, int]], records: Iterable[StoredRecord]) -> Mapping[Digest, int]:
    return {blob: size for stored in records for blob, size in own[stored.manifest.digest].items()}


def planned(root: Path, choose: Choose) -> Plan:
    """Return what would be pruned from the store at `root`, without changing anything. Blocks.

    Raises:
        OSError: the store cannot be read.
    """
    return _chosen(Snapshot.read(root), choose).plan


def choose_nothing(snapshot: Snapshot) -> PruneSet:
    """Select nothing, so that `prune` only finishes what an earlier prune was killed at."""
    return PruneSet(snapshot)


def _chosen(snapshot: Snapshot, choose: Choose) -> PruneSet:
    """Return what `choose` selects, together with what an earlier prune was killed at."""
    unfinished = list(_unfinished(snapshot))
    for stored in unfinished:
        snapshot.put(stored)
    prune_set = choose(snapshot)
    for stored in unfinished:
        prune_set.take_record(stored.manifest.digest)
    return prune_set


def _unfinished(snapshot: Snapshot) -> Iterator[StoredRecord]:
    """Yield the indexes that an earlier prune took out of fat/, and whose images it may have left. Blocks.

    One that is in fat/ again is not among them, nor is one with an image that was pulled since.
    """
    for path in pulls_folder(snapshot.root).glob(f"*{PRUNED_SUFFIX}"):
        digest = Digest.from_hex(path.stem)
        if digest is None or digest in snapshot.records:
            continue
        try:
            record = Record.parse(read_regular(path), digest)
            status = path.stat()
        except (RecordInvalid, OSError):
            continue
        images = (snapshot.records.get(child.digest) for child in record.manifest.children)
        if not any(image is not None and image.pulled.timestamp() > status.st_ctime for image in images):
            pulled = datetime.fromtimestamp(status.st_mtime, UTC)
            yield StoredRecord(record, str(path), pulled, status.st_size)


def prune(root: Path, choose: Choose, files: Files, now: datetime | None = None) -> Plan:
    """Prune what `choose` selects from the store at `root`; return the plan that was carried out. Blocks.

    `now` is the time in place of the clock's.

    Killing it at any time leaves no record without its blobs, and no tag with an earlier meaning. The order is: tags,
    indexes, the images that they name, and then the blobs that no record on the disk names any more. The record of an
    index is kept beside the pulls/<n>/ until the images have gone, so that the next prune can finish a killed one.
    On a disk without space to rewrite a record, what can be removed before that is removed first, with its blobs.

    Raises:
        OSError: a file cannot be read, written or removed, also when there is still no space. What was removed until
            then stays removed.
    """
    snapshot = Snapshot.read(root, now)
    with store_locked(root):
        snapshot.refresh()
        prune_set = _chosen(snapshot, choose)
        plan = prune_set.plan
        rewriting = [*prune_set.renamed(), *prune_set.rewritten()]
        going = (*plan.records, *plan.metadata)
        from_the_top = sorted(going, key=lambda stored: len(snapshot.index.ancestors(stored.manifest.digest)))
        blobs = [*plan.blobs, *plan.metadata_blobs]
        try:
            _rewrite(root, rewriting, files)
        except OSError as error:
            if not is_full(error):
                raise
            gone = _remove_first(prune_set, going, snapshot, files)
            _remove_unnamed(blobs, snapshot, files)
            files.sync_folder(blobs_folder(root))
            _rewrite(root, [one for one in rewriting if one[1].manifest.digest not in gone], files)
        for stored in prune_set.misdated:
            with suppress(FileNotFoundError):
                note_time(stored.path, snapshot.now.timestamp())
        for lists in (True, False):
            _remove_records(root, [stored for stored in from_the_top if stored.manifest.is_list is lists], files)
        for path in pulls_folder(root).glob(f"*{PRUNED_SUFFIX}"):
            files.unlink(path)
    _remove_blobs(blobs, snapshot, files)
    return plan


def _remove_first(
    prune_set: PruneSet, going: Collection[StoredRecord], snapshot: Snapshot, files: Files
) -> Set[Digest]:
    """Remove those of the records `going` that can go before others are rewritten; return them.

    The snapshot is fresh then.
    """
    gone: set[Digest] = set()
    for batch in prune_set.before_rewriting():
        _remove_records(snapshot.root, batch, files)
        gone |= {stored.manifest.digest for stored in batch}
    left = {stored.manifest.digest for stored in going} - gone
    removed = [stored.manifest for stored in going if stored.manifest.digest in gone]
    _forget_pruned(snapshot.root, removed, left, files)
    snapshot.refresh()
    return gone


def _rewrite(root: Path, records: Iterable[tuple[StoredRecord, Record]], files: Files) -> None:
    """Replace the files of records, under the store's lock, keeping the times of their last pulls."""
    temporary = rewritten_record(root)
    for stored, record in records:
        temporary.parent.mkdir(exist_ok=True)
        files.put(stored.path, record.render(), temporary)
        restore_time(stored.path, round(stored.pulled.timestamp() * 1e9))


def _remove_records(root: Path, records: Collection[StoredRecord], files: Files) -> None:
    """Remove the files of records; those of indexes are kept beside the pulls/<n>/ where there is space for that."""
    for stored in records:
        if stored.manifest.is_list:
            _take_out(stored.path, pruned_path(root, stored.manifest.digest), files)
        else:
            files.unlink(stored.path)
    folders = {stored.path.parent for stored in records}
    if any(stored.manifest.is_list for stored in records) and pulls_folder(root).exists():
        folders.add(pulls_folder(root))
    for folder in folders:
        files.sync_folder(folder)


def _take_out(path: Path, kept: Path, files: Files) -> None:
    try:
        files.rename(path, kept)
    except OSError as error:
        if not (is_full(error) or isinstance(error, FileNotFoundError)):
            raise
        files.unlink(path)


def _forget_pruned(root: Path, removed: Iterable[Manifest], left: Set[Digest], files: Files) -> None:
    """Remove the kept records of those removed indexes that name none of the records that are `left` to remove."""
    for manifest in removed:
        if manifest.is_list and not left & {child.digest for child in manifest.children}:
            files.unlink(pruned_path(root, manifest.digest))


def _remove_blobs(blobs: list[Digest], snapshot: Snapshot, files: Files) -> None:
    """Remove blobs in batches, so that a process that writes a record meanwhile does not wait long for the lock.

    The records are read again for each batch, as such a record may name one of the remaining blobs.
    """
    while blobs:
        some, blobs = blobs[:_AT_ONCE], blobs[_AT_ONCE:]
        with store_locked(snapshot.root):
            snapshot.refresh()
            _remove_unnamed(some, snapshot, files)
    files.sync_folder(blobs_folder(snapshot.root))


def _remove_unnamed(blobs: Iterable[Digest], snapshot: Snapshot, files: Files) -> None:
    """Remove those of `blobs` that no record of the `snapshot` names."""
    for digest in blobs:
        if digest not in snapshot.index.blobs and digest.hex not in snapshot.mentioned:
            files.unlink(blob_path(snapshot.root, digest))


_ENOUGH = 0.9
"""Fraction of the maximum size to which an exceeded store is pruned, so that not every pull leads to a prune."""
_A_FEW = 3
"""Number of images that may always be pruned by age, even if they are a large share of a small store."""


@dataclass(frozen=True, slots=True)
class Criteria:
    """Selects the image URLs that meet all of the criteria that are given."""

    matches: Callable[[str], bool] | None = None
    created_before: datetime | None = None
    pulled_before: datetime | None = None

    def __call__(self, snapshot: Snapshot) -> PruneSet:
        """Return what is to be pruned from `snapshot`."""
        prune_set = PruneSet(snapshot)
        for row in snapshot.rows:
            if self._takes(row, snapshot):
                prune_set.take(row)
        return prune_set

    def _takes(self, row: Row, snapshot: Snapshot) -> bool:
        if self.matches is not None and not any(map(self.matches, {row.url, *row.notes})):
            return False
        if self.created_before is not None and not snapshot.since(row) < self.created_before:
            return False
        return self.pulled_before is None or snapshot.pulled(row.stored.manifest.digest) < self.pulled_before


@dataclass(frozen=True, slots=True)
class EvictionPolicy:
    """Selects whole images, those pulled least recently first.

    These are the images that were not pulled since `pulled_before`, and as many more as needed to bring a store of
    more than `max_size` bytes below it.

    A wrong clock makes everything look old. So nothing is pruned by age when more than `max_share` per cent of the
    images would be, unless they are just a few, or when no image at all was pulled since `pulled_before`.
    """

    pulled_before: datetime | None
    max_size: int | None
    keeps: Callable[[str], bool]
    """Whether an image URL must stay."""
    busy: Set[Digest]
    """Manifests that are being pulled."""
    keep_pulled_since: datetime
    """Images that were pulled at this time or later may still be in the middle of a pull, and stay."""
    ignore_pulled_after: datetime
    """Pulls with a later time than this are ignored: the clock was wrong when they were noted."""
    max_share: int

    def __call__(self, snapshot: Snapshot) -> PruneSet:
        """Return what is to be pruned from `snapshot`. Blocks, as it looks at the blobs."""
        prune_set = PruneSet(snapshot)
        freed, excess = _Freed(snapshot, prune_set), self._excess(snapshot)
        candidates = sorted(self._candidates(snapshot), key=lambda one: (snapshot.pulled(one), one))
        unused = self._unused(candidates, snapshot)
        prune_set.withheld = self._withheld(unused, snapshot)
        if prune_set.withheld is None:
            prune_set.misdated = self._misdated(snapshot)
        else:
            unused = frozenset()
        for digest in candidates:
            if digest in unused or freed.bytes() < excess:
                prune_set.take_record(digest)
        return prune_set

    def _excess(self, snapshot: Snapshot) -> float:
        """Return the bytes that have to become free because the store is larger than its maximum; 0 if it is not."""
        if self.max_size is None:
            return 0
        size = size_of(snapshot)
        return size - _ENOUGH * self.max_size if size > self.max_size else 0

    def _unused(self, candidates: Collection[Digest], snapshot: Snapshot) -> Set[Digest]:
        if self.pulled_before is None:
            return frozenset()
        return {digest for digest in candidates if snapshot.pulled(digest) < self.pulled_before}

    def _withheld(self, unused: Collection[Digest], snapshot: Snapshot) -> Withheld | None:
        """Return why the `unused` images stay, or None if they may be pruned."""
        if self.pulled_before is None or not unused or self.max_share == 100:
            return None
        images = sum(not snapshot.index.parents(digest) for digest in snapshot.records)
        if len(unused) > max(_A_FEW, images * self.max_share // 100):
            return Withheld(len(unused), images, "which is more than max_share")
        pulls = (stored.pulled for stored in snapshot.records.values())
        if not any(self.pulled_before <= pulled <= self.ignore_pulled_after for pulled in pulls):
            return Withheld(len(unused), images, "and none at all was pulled since")
        return None

    def _misdated(self, snapshot: Snapshot) -> list[StoredRecord]:
        """Return the records whose last pulls are ignored, unless these are most: then the clock is wrong now."""
        ignored = [stored for stored in snapshot.records.values() if stored.pulled > self.ignore_pulled_after]
        return ignored if len(ignored) <= len(snapshot.records) / 2 else []

    def _candidates(self, snapshot: Snapshot) -> Iterator[Digest]:
        """Yield the images that may be pruned: those that no index names, each standing for all that it names."""
        kept = {row.stored.manifest.digest for row in snapshot.rows if any(map(self.keeps, {row.url, *row.notes}))}
        for digest in snapshot.records:
            if snapshot.index.parents(digest) or digest.hex in snapshot.mentioned:
                continue
            whole = {digest} | snapshot.index.descendants(digest)
            if whole & kept or whole & self.busy:
                continue
            if any(self.keep_pulled_since <= at <= self.ignore_pulled_after for at in snapshot.pulls(digest)):
                continue
            yield digest


class _Freed:
    """Counts the bytes that become free while a PruneSet grows."""

    def __init__(self, snapshot: Snapshot, prune_set: PruneSet) -> None:
        self._snapshot = snapshot
        self._naming: dict[Digest, int] = {}
        """Blob of a pruned record -> how many records will still name it."""
        self._prune_set = prune_set
        self._counted = 0
        self._bytes = 0

    def bytes(self) -> int:
        """Return the number of bytes that become free with the records pruned so far."""
        gone = list(islice(self._prune_set.gone.values(), self._counted, None))
        self._counted += len(gone)
        for stored in gone:
            self._bytes += stored.size
            for blob in stored.manifest.blob_sizes:
                left = self._naming.get(blob, len(self._snapshot.index.naming(blob))) - 1
                self._naming[blob] = left
                if not left and blob.hex not in self._snapshot.mentioned:
                    self._bytes += self._snapshot.blob_size(blob) or 0
        return self._bytes


def size_of(snapshot: Snapshot) -> int:
    """Return the bytes that the records and their blobs take. Blobs that no record names do not count."""
    records = sum(stored.size for stored in snapshot.records.values())
    return records + sum(snapshot.blob_size(blob) or 0 for blob in snapshot.index.blobs)
