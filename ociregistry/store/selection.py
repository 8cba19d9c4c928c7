"""What is to be pruned: what an operator names, and what goes by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Set
from dataclasses import dataclass
from datetime import datetime
from itertools import islice

from ociregistry.names import Digest
from ociregistry.store.inventory import Inventory, Row
from ociregistry.store.pruning import Doomed, Spared

_ENOUGH = 0.9
"""Of the largest size: what is pruned down to when it is exceeded, so that it is not done at every pull."""
_A_FEW = 3
"""Images that may always go by age, whatever share of a small store they are."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Image URLs to which everything applies that is given."""

    matches: Callable[[str], bool] | None = None
    created_before: datetime | None = None
    pulled_before: datetime | None = None

    def __call__(self, inventory: Inventory) -> Doomed:
        """The image URLs of `inventory` that go."""
        doomed = Doomed(inventory)
        for row in inventory.rows:
            if self._takes(row, inventory):
                doomed.take(row)
        return doomed

    def _takes(self, row: Row, inventory: Inventory) -> bool:
        if self.matches is not None and not any(map(self.matches, {row.url, *row.notes})):
            return False
        if self.created_before is not None and not inventory.since(row) < self.created_before:
            return False
        return self.pulled_before is None or inventory.pulled(row.kept.manifest.digest) < self.pulled_before


@dataclass(frozen=True, slots=True)
class Surplus:
    """Whole images, those first that were pulled least recently: what nobody has pulled since `pulled_before`, and
    what is more than `max_size` bytes of a store.

    A clock that is wrong makes everything look old. So nothing goes by age when more than `max_share` per cent of the
    images would, unless they are just a few, or when no image at all was pulled since `pulled_before`.
    """

    pulled_before: datetime | None
    max_size: int | None
    keeps: Callable[[str], bool]
    """Whether an image URL must stay."""
    busy: Set[Digest]
    """Manifests that are being pulled."""
    rests_before: datetime
    """What was pulled later than this is being pulled, perhaps."""
    believed_until: datetime
    """A pull that is dated later than this says nothing: the clock was wrong then."""
    max_share: int

    def __call__(self, inventory: Inventory) -> Doomed:
        """The image URLs of `inventory` that go. Blocks, looking at the blobs."""
        doomed = Doomed(inventory)
        freed = _Freed(inventory, doomed)
        size = size_of(inventory) if self.max_size is not None else 0
        excess = size - _ENOUGH * self.max_size if self.max_size is not None and size > self.max_size else 0
        candidates = sorted(self._candidates(inventory), key=lambda one: (inventory.pulled(one), one))
        unused = self._unused(candidates, inventory)
        doomed.spared = self._spared(unused, inventory)
        for digest in candidates:
            if (digest in unused and doomed.spared is None) or freed.bytes() < excess:
                doomed.take_record(digest)
        return doomed

    def _unused(self, candidates: Collection[Digest], inventory: Inventory) -> Set[Digest]:
        if self.pulled_before is None:
            return frozenset()
        return {digest for digest in candidates if inventory.pulled(digest) < self.pulled_before}

    def _spared(self, unused: Collection[Digest], inventory: Inventory) -> Spared | None:
        """Tell why the `unused` ones stay; None if they go."""
        if self.pulled_before is None or not unused or self.max_share == 100:
            return None
        images = sum(digest not in inventory.lists_of for digest in inventory.records)
        if len(unused) > max(_A_FEW, images * self.max_share // 100):
            return Spared(len(unused), images, "which is more than max_share")
        pulls = (kept.pulled for kept in inventory.records.values())
        if not any(self.pulled_before <= pulled <= self.believed_until for pulled in pulls):
            return Spared(len(unused), images, "and none at all was pulled since")
        return None

    def _candidates(self, inventory: Inventory) -> Iterator[Digest]:
        """The images that may go: those that no list has, each with all that it lists."""
        kept = {row.kept.manifest.digest for row in inventory.rows if any(map(self.keeps, {row.url, *row.notes}))}
        for digest in inventory.records:
            if digest in inventory.lists_of or digest.hex in inventory.mentioned:
                continue
            whole = {digest} | inventory.below(digest)
            if whole & kept or whole & self.busy:
                continue
            if self.rests_before <= inventory.pulled(digest) <= self.believed_until:
                continue
            yield digest


class _Freed:
    """Counts what becomes free, as more and more goes."""

    def __init__(self, inventory: Inventory, doomed: Doomed) -> None:
        self._naming = Counter(blob for kept in inventory.records.values() for blob in kept.manifest.blob_sizes)
        self._inventory = inventory
        self._doomed = doomed
        self._counted = 0
        self._bytes = 0

    def bytes(self) -> int:
        """Of all that goes by now."""
        gone = list(islice(self._doomed.gone.values(), self._counted, None))
        self._counted += len(gone)
        for kept in gone:
            self._bytes += kept.size
            for blob in kept.manifest.blob_sizes:
                self._naming[blob] -= 1
                if not self._naming[blob] and blob.hex not in self._inventory.mentioned:
                    self._bytes += self._inventory.blob_size(blob) or 0
        return self._bytes


def size_of(inventory: Inventory) -> int:
    """Bytes that the records and their blobs take. What no record names is not theirs to make room for."""
    records = sum(kept.size for kept in inventory.records.values())
    return records + sum(inventory.blob_size(blob) or 0 for blob in inventory.named)
