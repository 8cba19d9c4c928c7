"""Pruning: which image URLs, records and blobs go, and how they are taken away.

What is decided on is read from the files, and it is decided and carried out under the lock under which records are
rewritten: no record that comes meanwhile loses a blob.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ociregistry.manifests import Manifest
from ociregistry.names import Digest, ImageReference, Repository
from ociregistry.store.files import Files, locked
from ociregistry.store.inventory import Inventory, Kept, Row
from ociregistry.store.pulls import PullsFolder
from ociregistry.store.records import Dates, Record

_AT_ONCE = 200
"""Blobs that are removed under one lock."""

Choose = Callable[[Inventory], "Doomed"]
"""What is to go of an inventory."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What goes."""

    rows: tuple[Row, ...]
    """The image URLs."""
    records: tuple[Kept, ...]
    blobs: Mapping[Digest, int]
    """With their sizes in bytes."""
    bytes_of: Mapping[Digest, int]
    """Record -> what its own blobs take, each counted once: with the first of those that go and name it."""
    metadata: tuple[Kept, ...] = ()
    """The records of images that are only here since an index names them, and go with it without a word."""
    metadata_blobs: Mapping[Digest, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """What becomes free by it."""
        blobs = sum(self.blobs.values()) + sum(self.metadata_blobs.values())
        return blobs + sum(kept.size for kept in (*self.records, *self.metadata))


class Doomed:
    """The image URLs that are to go, with what they take with them.

    A record that stays may get another URL in place of one that goes: by its digest for a tag that has meant
    something else since, and would mean this again; of another repository for what is the part of a list there.
    """

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self._images: dict[Digest, dict[str, Dates]] = {}
        """Record -> what it shall note, where that changes."""
        self.gone: dict[Digest, Kept] = {}
        """The records that are to note nothing, in the order in which they came to that."""

    def take(self, row: Row) -> None:
        """This image URL goes."""
        for noted in {*row.notes, row.url}:
            self._drop(row.kept.manifest.digest, noted)

    def take_record(self, digest: Digest) -> None:
        """All image URLs of a record go."""
        for noted in list(self._noted(digest)):
            self._drop(digest, noted)

    def _noted(self, digest: Digest) -> dict[str, Dates]:
        if digest not in self._images:
            self._images[digest] = dict(self._inventory.records[digest].record.images)
        return self._images[digest]

    def _drop(self, digest: Digest, noted: str) -> None:
        images = self._noted(digest)
        if images.pop(noted, None) is None:
            return
        claims = self._inventory.claims(noted)
        if claims and self._inventory.holder(noted) == digest:
            for stale in claims.keys() - {digest}:
                self._rename(stale, noted, _by_digest(noted, stale))
        if not images:
            self.gone[digest] = self._inventory.records[digest]
        repository = _repository(noted)
        if not any(_repository(other) == repository for other in images):
            for child in self._inventory.children(digest):
                self._part(child.manifest.digest, repository)

    def _rename(self, digest: Digest, noted: str, url: str) -> None:
        images = self._noted(digest)
        dates = images.pop(noted, None)
        if dates is not None:
            known = images.get(url, dates)
            images[url] = Dates(min(known.created, dates.created), max(known.confirmed, dates.confirmed))

    def _part(self, digest: Digest, repository: Repository) -> None:
        """A list has left `repository`: what it names goes from there too, if it is known only as a part of lists."""
        images, part = self._noted(digest), str(ImageReference(repository, digest))
        if part not in images or digest.hex in self._inventory.mentioned:
            return
        homes = [_repository(url) for above in self._inventory.lists_of[digest] for url in self._noted(above)]
        if repository in homes:
            return
        if homes and len(images) == 1:
            self._rename(digest, part, str(ImageReference(min(homes), digest)))
        else:
            self._drop(digest, part)

    @property
    def plan(self) -> Plan:
        """What all this comes to. Blocks, looking at the blobs; raises `OSError`."""
        stay = {
            blob.digest
            for digest, kept in self._inventory.records.items()
            if digest not in self.gone
            for blob in kept.manifest.blobs
        }
        records: list[Kept] = []
        metadata: list[Kept] = []
        for digest, kept in self.gone.items():
            (metadata if self._inventory.is_metadata(digest) else records).append(kept)
        own: dict[Digest, dict[Digest, int]] = {}
        for kept in (*records, *metadata):
            own[kept.manifest.digest] = self._sizes(kept.manifest, stay)
            stay.update(own[kept.manifest.digest])
        return Plan(
            rows=tuple(row for row in self._inventory.rows if self._takes(row)),
            records=tuple(records),
            blobs=_all_of(own, records),
            bytes_of={kept.manifest.digest: sum(own[kept.manifest.digest].values()) for kept in records},
            metadata=tuple(metadata),
            metadata_blobs=_all_of(own, metadata),
        )

    def _takes(self, row: Row) -> bool:
        digest = row.kept.manifest.digest
        return digest in self._images and not self._images[digest].keys() & {*row.notes, row.url}

    def _sizes(self, manifest: Manifest, stay: set[Digest]) -> dict[Digest, int]:
        """The blobs of `manifest` that are there, without those that `stay`."""
        found = {
            blob.digest: self._inventory.blob_size(blob.digest)
            for blob in manifest.blobs
            if blob.digest not in stay and blob.digest.hex not in self._inventory.mentioned
        }
        return {digest: size for digest, size in found.items() if size is not None}

    def renamed(self) -> Iterator[tuple[Kept, Record]]:
        """The records with tags that would mean them again, those that go included, and how they are to be first."""
        for digest in list(self._images):
            kept = self._inventory.records[digest]
            images: dict[str, Dates] = {}
            for noted, dates in kept.record.images.items():
                holder = self._inventory.holder(noted)
                back = holder != digest and noted not in self._noted(holder)
                images[_by_digest(noted, digest) if back else noted] = dates
            if images.keys() != kept.record.images.keys():
                yield kept, replace(kept.record, images=images)

    def rewritten(self) -> Iterator[tuple[Kept, Record]]:
        """The records that stay and change, and how they are to be in the end."""
        for digest, images in self._images.items():
            kept = self._inventory.records[digest]
            if images and images != kept.record.images:
                yield kept, replace(kept.record, images=images)


def _all_of(own: Mapping[Digest, Mapping[Digest, int]], records: Iterable[Kept]) -> Mapping[Digest, int]:
    return {blob: size for kept in records for blob, size in own[kept.manifest.digest].items()}


def _repository(noted: str) -> Repository:
    return ImageReference.parse_whole(noted).repository


def _by_digest(noted: str, digest: Digest) -> str:
    return str(ImageReference(_repository(noted), digest))


def planned(root: Path, choose: Choose) -> Plan:
    """What would go of the store at `root`; nothing is changed. Blocks; raises `OSError`."""
    return choose(Inventory.read(root)).plan


def prune(root: Path, choose: Choose, pulls: PullsFolder, files: Files) -> Plan:
    """Takes away what `choose` says, and gives what that was. Blocks; raises `OSError`.

    Killed at any instant it leaves no record without what it had, and no tag with a meaning of before: tags first,
    then lists, what they list, and blobs when no record on the disk names them any more.
    """
    before = Inventory.read(root)
    with locked(root / "pulls" / "lock"):
        inventory = Inventory.read(root, before)
        doomed = choose(inventory)
        plan = doomed.plan
        for kept, record in [*doomed.renamed(), *doomed.rewritten()]:
            files.put(kept.path, record.render(), pulls.path / f"{kept.path.name}.record")
            os.utime(kept.path, (kept.pulled.timestamp(), kept.pulled.timestamp()))
        from_the_top = sorted(
            (*plan.records, *plan.metadata), key=lambda kept: len(inventory.above(kept.manifest.digest))
        )
        for lists in (True, False):
            going = [kept for kept in from_the_top if kept.manifest.is_list is lists]
            for kept in going:
                files.unlink(kept.path)
            for folder in {kept.path.parent for kept in going}:
                files.sync_folder(folder)
    _remove_blobs(root, [*plan.blobs, *plan.metadata_blobs], inventory, files)
    return plan


def _remove_blobs(root: Path, blobs: list[Digest], before: Inventory, files: Files) -> None:
    """A few at a time: who writes a record meanwhile waits for the lock, and may need one of them again."""
    while blobs:
        some, blobs = blobs[:_AT_ONCE], blobs[_AT_ONCE:]
        with locked(root / "pulls" / "lock"):
            before = Inventory.read(root, before)
            for digest in some:
                if digest not in before.named and digest.hex not in before.mentioned:
                    files.unlink(root / "blobs" / digest.hex)
    files.sync_folder(root / "blobs")
