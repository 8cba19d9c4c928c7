"""Pruning: which image URLs, records and blobs go, and how they are taken away.

What is decided on is read from the files, and it is decided and carried out under the lock under which records are
rewritten: no record that comes meanwhile loses a blob.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ociregistry.manifests import Manifest
from ociregistry.names import Digest, ImageReference
from ociregistry.store.files import Files, locked
from ociregistry.store.inventory import Inventory, Kept, Row, blob_size
from ociregistry.store.pulls import PullsFolder
from ociregistry.store.recordfiles import IMAGES_FOLDER, LISTS_FOLDER
from ociregistry.store.records import Record

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

    @property
    def bytes(self) -> int:
        """What becomes free by it."""
        return sum(self.blobs.values()) + sum(kept.size for kept in self.records)


class Doomed:
    """The image URLs that are to go, with what they take with them."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self._noted: dict[Digest, set[str]] = {}
        """Record -> those of its image URLs that go."""
        self.gone: dict[Digest, Kept] = {}
        """The records of which no image URL stays, in the order in which they went."""

    def take(self, row: Row) -> None:
        """This image URL goes. Where a record has it of a time before, it goes there too, or it would come back."""
        self._drop(row.kept.manifest.digest, row.noted)
        if row.noted == row.url:
            for digest in self._inventory.claims(row.noted):
                self._drop(digest, row.noted)

    def take_record(self, digest: Digest) -> None:
        """All image URLs of a record go."""
        for noted in self._inventory.records[digest].record.images:
            self._drop(digest, noted)

    def _drop(self, digest: Digest, noted: str) -> None:
        kept = self._inventory.records[digest]
        dropped = self._noted.setdefault(digest, set())
        dropped.add(noted)
        if digest not in self.gone and dropped >= kept.record.images.keys():
            self.gone[digest] = kept
            for child in self._inventory.children(digest):
                self._drop_with_lists(child)

    def _drop_with_lists(self, child: Kept) -> None:
        """What a list names goes with it, as far as it is known only as a part of lists that go."""
        digest = child.manifest.digest
        lists = self._inventory.lists_of[digest]
        if not lists <= self.gone.keys():
            return
        noted = {noted for above in lists for noted in self.gone[above].record.images}
        for repository in {ImageReference.parse_whole(url).repository for url in noted}:
            part = str(ImageReference(repository, digest))
            if part in child.record.images:
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
        blobs: dict[Digest, int] = {}
        bytes_of: dict[Digest, int] = {}
        for digest, kept in self.gone.items():
            own = self._sizes(kept.manifest, stay)
            stay |= own.keys()
            blobs |= own
            bytes_of[digest] = sum(own.values())
        rows = (row for row in self._inventory.rows if row.noted in self._noted.get(row.kept.manifest.digest, ()))
        return Plan(tuple(rows), tuple(self.gone.values()), blobs, bytes_of)

    def _sizes(self, manifest: Manifest, stay: set[Digest]) -> dict[Digest, int]:
        """The blobs of `manifest` that are there, without those that `stay`."""
        found = {
            blob.digest: blob_size(self._inventory.root, blob.digest)
            for blob in manifest.blobs
            if blob.digest not in stay and blob.digest.hex not in self._inventory.mentioned
        }
        return {digest: size for digest, size in found.items() if size is not None}

    def rewritten(self) -> list[tuple[Kept, Record]]:
        """The records that stay with fewer image URLs: as they are, and as they shall be."""
        found = []
        for digest in self._noted.keys() - self.gone.keys():
            kept, dropped = self._inventory.records[digest], self._noted[digest]
            images = {noted: dates for noted, dates in kept.record.images.items() if noted not in dropped}
            found.append((kept, Record(kept.manifest, images)))
        return found


def planned(root: Path, choose: Choose) -> Plan:
    """What would go of the store at `root`; nothing is changed. Blocks; raises `OSError`."""
    return choose(Inventory.read(root)).plan


def prune(root: Path, choose: Choose, pulls: PullsFolder, files: Files) -> Plan:
    """Takes away what `choose` says, and gives what that was. Blocks; raises `OSError`.

    Killed at any instant it leaves records without a lack: they go first, lists before what they list, and blobs when
    no record on the disk names them any more.
    """
    before = Inventory.read(root)
    with locked(root / "pulls" / "lock"):
        doomed = choose(Inventory.read(root, before))
        plan = doomed.plan
        for old, new in doomed.rewritten():
            files.put(old.path, new.render(), pulls.path / f"{old.path.name}.record")
            pulled = old.pulled.timestamp()
            os.utime(old.path, (pulled, pulled))
        for kept in sorted(plan.records, key=lambda kept: not kept.manifest.is_list):
            files.unlink(kept.path)
        if plan.records:
            for folder in (LISTS_FOLDER, IMAGES_FOLDER):
                if (root / folder).is_dir():
                    files.sync_folder(root / folder)
        for digest in plan.blobs:
            files.unlink(root / "blobs" / digest.hex)
        if plan.blobs:
            files.sync_folder(root / "blobs")
    return plan
