"""Why a store does not work as it should, in sentences for the operator."""

from __future__ import annotations

import os.path
from collections.abc import Iterable

from ociregistry.config.values import printable, size_text
from ociregistry.names import Digest
from ociregistry.store.blobs import Blobs
from ociregistry.store.folders import Folders
from ociregistry.store.index import Index
from ociregistry.store.scan import IndexRefresh
from ociregistry.store.space import Space
from ociregistry.store.threads import Threads
from ociregistry.store.verify import Damaged, DamagedOutcome


class Faults:
    """Collects what the parts of a store know; hits go on in spite of it."""

    def __init__(
        self, threads: Threads, folders: Folders, space: Space, refresh: IndexRefresh, index: Index, blobs: Blobs
    ) -> None:
        self._threads = threads
        self._folders = folders
        self._space = space
        self._refresh = refresh
        self._index = index
        self._blobs = blobs
        self._lost_records: set[Digest] = set()
        """Damaged records that could not be fetched again."""
        self._in_place: set[Digest] = set()
        """Damaged files that cannot be moved."""

    def note_lost(self, damaged: Damaged) -> None:
        """Note that a damaged file could not be fetched again; it counts until it is there again.

        One that is still in its place counts until the next verification.
        """
        if damaged.outcome is DamagedOutcome.IN_PLACE:
            self._in_place.add(damaged.digest)
        elif damaged.is_blob:
            self._blobs.lost.add(damaged.digest)
        else:
            self._lost_records.add(damaged.digest)

    def forget_lost(self) -> None:
        """Forget what was lost, as a verification finds anew what is damaged."""
        self._blobs.lost.clear()
        self._lost_records.clear()
        self._in_place.clear()

    @property
    def scan_fails(self) -> bool:
        """Whether the records could not be looked at last time, so that memory may hold more than the files."""
        return bool(self._refresh.why)

    @property
    def has_no_room(self) -> bool:
        """Whether something that is wanted does not fit on the disk, so that it will not be here."""
        return self._space.room.full or bool(self._space.refused)

    @property
    def sentences(self) -> list[str]:
        """The faults; empty if there are none."""
        space, folders, refresh = self._space.why, self._folders.why, self._refresh.why
        found = (
            self._threads.hung,
            folders and f"the store cannot be written, nothing new is kept in it: {folders}",
            refresh and f"the store cannot be scanned: {refresh}",
            space and f"the free disk space cannot be read: {space}",
            self._full,
            self._refused,
            _damaged("record", map(os.path.basename, self._refresh.damaged), "damaged or unreadable"),
            _damaged("blob", (blob.hex for blob in self._blobs.unreadable if self._index.sizes(blob)), "unreadable"),
            _damaged("record", (one.hex for one in self._lost_records if self._index.get(one) is None), _LOST),
            _damaged("blob", (one.hex for one in self._blobs.lost if self._index.sizes(one)), _LOST),
            _damaged("file", (one.hex for one in self._in_place), "damaged, and cannot be moved to bad/"),
        )
        return [printable(sentence) for sentence in found if sentence]

    @property
    def _full(self) -> str:
        room = self._space.room
        if not room.full:
            return ""
        return f"the disk is full: {size_text(room.left)} are free beside the reserve, so no larger download fits"

    @property
    def _refused(self) -> str:
        room, refused = self._space.room, self._space.refused
        if room.full or not refused:
            return ""
        left = size_text(room.left)
        return f"the disk has no room for a download of {size_text(refused)}: {left} are free beside the reserve"


_LOST = "damaged and could not be fetched again"


def _damaged(kind: str, names: Iterable[str], what: str) -> str:
    found = sorted(names)
    if not found:
        return ""
    many = f"1 {kind} is" if len(found) == 1 else f"{len(found)} {kind}s are"
    return f"{many} {what}: {found[0]}{', …' if len(found) > 1 else ''}"
