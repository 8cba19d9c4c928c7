"""The view of the records in memory, kept up with the files: other processes write them, too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from pathlib import Path

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from ociregistry.names import Digest
from ociregistry.store.catalogue import Catalogue, Entry
from ociregistry.store.recordfiles import UNREAD, Changes, RecordFiles, Signature, digest_of
from ociregistry.store.records import Record
from ociregistry.store.threads import Threads

_LOOK_EVERY = 1.0
_LOOK_AT_BLOBS_EVERY = 10.0
"""Seconds: every download that ends changes their folder, which may hold many."""


class View:
    """Looks at the files every second, and puts what it finds into its `catalogue`."""

    log = Logger(namespace="ociregistry.store")

    def __init__(self, records: RecordFiles, threads: Threads, clock: IReactorTime) -> None:
        self.catalogue = Catalogue()
        self._records = records
        self._threads = threads
        self._known: dict[Path, Signature] = {}
        self._written: set[Path] = set()
        """Records that this process wrote since the look that is under way began: newer than what it found."""
        self._complaints: Mapping[Path, str] = {}
        """What was logged of files that are no records, so that it is logged once."""
        self._changed: set[Digest] = set()
        self.on_change: Callable[[Set[Digest]], object] = lambda changed: None
        """Called with the records that were written, changed, lost, or lost a blob."""
        self._clock = clock
        self._blobs_looked_at = float("-inf")
        self._looking = LoopingCall(self._look)
        self._looking.clock = clock

    def read(self) -> None:
        """Reads all records. Blocks; raises `OSError`."""
        self._take(self._records.look({}))

    def start(self) -> None:
        """Looks again and again."""
        self._looking.start(_LOOK_EVERY, now=False)

    def stop(self) -> None:
        """Looks no more."""
        self._looking.stop()

    def wrote(self, record: Record) -> None:
        """This process wrote `record`."""
        digest = record.manifest.digest
        path = self._records.path(digest, is_list=record.manifest.is_list)
        self._written.add(path)
        self._known[path] = UNREAD
        self.update(record)
        self._tell()

    def update(self, record: Record) -> None:
        """Take `record` as it was read from its file."""
        digest = record.manifest.digest
        before = self.catalogue.get(digest)
        # Where the record does not say, the next look sees whether a layer is here.
        wanted = before.wanted if before else record.has_tag or not record.manifest.layers
        self._put(digest, Entry.of(record, wanted=wanted))

    def _put(self, digest: Digest, entry: Entry) -> None:
        before = self.catalogue.get(digest)
        # Its digest says what it names: nothing else about it can change what it lacks.
        if before is None or before.wanted != entry.wanted:
            self._changed.add(digest)
        self.catalogue.put(digest, entry)

    def _tell(self) -> None:
        changed, self._changed = self._changed, set()
        if changed:
            self.on_change(changed)

    def lost(self, path: Path) -> None:
        """The record could not be read."""
        self._forget(path)
        self._known.pop(path, None)

    def _look(self) -> Deferred[None]:
        self._written.clear()
        now = self._clock.seconds()
        blobs = now - self._blobs_looked_at >= _LOOK_AT_BLOBS_EVERY
        self._blobs_looked_at = now if blobs else self._blobs_looked_at
        looked = self._threads.read(self._records.look, dict(self._known), blobs=blobs).addCallback(self._take)
        return looked.addErrback(lambda failure: self.log.error("cannot look at the store: {why}", why=failure.value))

    def _take(self, changes: Changes) -> None:
        # A record that we wrote meanwhile is read again at the next look.
        for path in changes.gone - self._written:
            self._forget(path)
        for path, why in changes.damaged.items():
            if path not in self._written:
                self._forget(path)
            if self._complaints.get(path) != why:
                self.log.warn("left alone, it is not a record that can be served: {path}: {why}", path=path, why=why)
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
