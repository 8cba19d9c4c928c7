"""Scanning the folders of records: what is in them, what changed, and how the daemon's index is kept fresh.

The index only says where to look: the file is still opened, and a request whose file is gone is a miss.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from ociregistry.names import Digest
from ociregistry.store.blobs import TICK, BlobFolder
from ociregistry.store.files import reason
from ociregistry.store.index import Entry, Index
from ociregistry.store.paths import IMAGES_FOLDER, LISTS_FOLDER, blobs_folder, digest_of, record_path
from ociregistry.store.records import ForeignRecord, Record, RecordInvalid, is_wanted, read_record
from ociregistry.store.threads import Threads

_log = Logger(namespace="ociregistry.store")

Signature = tuple[int, int, int, int]
"""Inode, size in bytes, mtime and ctime in nanoseconds: changes when the file does."""

UNREAD: Signature = (0, 0, 0, 0)
"""The signature of a file that exists and has to be read at the next scan."""


def signatures(folder: Path) -> list[tuple[Path, Signature]]:
    """Return the files in `folder` that are named like a record, with their signatures. Blocks.

    Raises:
        OSError: the folder cannot be read.
    """
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if Digest.from_hex(entry.name) is None:
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            except OSError:
                # Reading it tells why.
                found.append((folder / entry.name, UNREAD))
                continue
            signature = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            found.append((folder / entry.name, signature))
    return found


_MANY = 1000
_LOOKED_THROUGH_EVERY = 60.0
"""Seconds."""


class ForeignFiles:
    """The files named like records that are none: each is read once, and again only when it changes.

    Looking at 100,000 of them each second would take a third of a core. So a folder with many is looked through only
    when its mtime has changed, as it does with every file that is added, removed or renamed, and once a minute for
    files that are overwritten in place. All methods block.
    """

    def __init__(self, seconds: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._files: dict[Path, dict[Path, Signature]] = {}
        """Folder -> the files, and the signatures with which they were read."""
        self._looked_through: dict[Path, tuple[int, float]] = {}
        """Folder -> its mtime, and the time at which it was looked through."""
        self._gone: set[Path] = set()

    def add(self, path: Path, signature: Signature) -> None:
        """Add a file that was read and is no record."""
        self._files.setdefault(path.parent, {})[path] = signature

    def take_gone(self) -> Set[Path]:
        """Return the files that were removed since the last call."""
        gone, self._gone = self._gone, set()
        return gone

    def look(self, folder: Path, known: Iterable[Path]) -> list[tuple[Path, Signature]]:
        """Return the files in `folder`, as far as they were looked at, without the foreign ones.

        `known` are the files that are looked at in any case.

        Raises:
            OSError: the folder cannot be read.
        """
        foreign = self._files.get(folder, {})
        changed, now = folder.stat().st_mtime_ns, self._seconds()
        before, at = self._looked_through.get(folder, (0, now))
        if len(foreign) >= _MANY and changed == before and now - at < _LOOKED_THROUGH_EVERY:
            return list(_signatures_of(path for path in known if path.parent == folder))
        self._looked_through[folder] = (changed if abs(time.time_ns() - changed) > TICK else 0), now
        found = signatures(folder)
        if not foreign:
            return found
        left = [(path, signature) for path, signature in found if foreign.get(path) != signature]
        gone = foreign.keys() - {path for path, _ in found}
        self._gone |= gone
        for path in (*gone, *(path for path, _ in left)):
            foreign.pop(path, None)
        return left


def _signatures_of(paths: Iterable[Path]) -> Iterator[tuple[Path, Signature]]:
    for path in paths:
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue
        except OSError:
            yield path, UNREAD
        else:
            yield path, (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


_FEW = 25


def unreadable_lines(files: Mapping[Path, str]) -> Iterator[str]:
    """Yield a line for each of the `files` that are no records, with the reason; one for all where a folder has many.

    A folder of another program may have a hundred thousand.
    """
    folders: dict[Path, list[Path]] = {}
    for path in sorted(files):
        folders.setdefault(path.parent, []).append(path)
    for folder, paths in folders.items():
        if len(paths) > _FEW:
            first = f"the first is {paths[0]}: {files[paths[0]]}"
            yield f"ignored, {len(paths)} files in {folder} are no records that can be served, {first}"
        else:
            yield from (f"ignored, not a record that can be served: {path}: {files[path]}" for path in paths)


@contextmanager
def collection_paused() -> Iterator[None]:
    """Pause Python's garbage collection while all records are read.

    What is read stays, so going through it again and again would find nothing and take half of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True, slots=True)
class ScannedFile:
    """A file that is named like a record."""

    path: Path
    signature: Signature
    record: Record | None = None
    """The content; None if the file was not read, as its signature is the known one, or could not be."""
    error: RecordInvalid | OSError | None = None
    """Why it could not be read."""


def scan(
    root: Path, known: Mapping[Path, Signature], foreign: ForeignFiles | None = None, *, missing_ok: bool = False
) -> Iterator[ScannedFile]:
    """Yield the files of records of the store at `root`; those whose signatures are `known` are not read. Blocks.

    Files that are `foreign` already are left out, and others that are no records added there.

    With `missing_ok`, a folder that is missing counts as empty: the store is new, or is still being copied.

    Raises:
        OSError: a folder cannot be read, or `root` is missing.
    """
    for folder in (root / LISTS_FOLDER, root / IMAGES_FOLDER):
        try:
            found = signatures(folder) if foreign is None else foreign.look(folder, known)
        except FileNotFoundError:
            if not missing_ok:
                raise
            root.stat()
            continue
        for path, signature in found:
            if signature != UNREAD and known.get(path) == signature:
                yield ScannedFile(path, signature)
                continue
            try:
                record = read_record(path)
            except FileNotFoundError:
                continue
            except (RecordInvalid, OSError) as error:
                if foreign is not None and isinstance(error, RecordInvalid) and signature != UNREAD:
                    foreign.add(path, signature)
                yield ScannedFile(path, signature, error=error)
            else:
                yield ScannedFile(path, signature, record)


@dataclass(frozen=True, slots=True)
class ScanResult:
    """The differences that a scan of the folders found from what was known."""

    seen: Mapping[Path, Signature]
    read: Mapping[Path, Entry] = field(default_factory=dict)
    """The new and changed records."""
    unreadable: Mapping[Path, str] = field(default_factory=dict)
    """Path -> reason, for new or changed files that are not records of this program."""
    damaged: frozenset[Path] = frozenset()
    """Those of the unreadable files that may be records of this program."""
    gone: frozenset[Path] = frozenset()
    blobs_gone: frozenset[Digest] = frozenset()


def _scan_or_nothing(root: Path, known: Mapping[Path, Signature], foreign: ForeignFiles) -> Iterator[ScannedFile]:
    """Scan the store at `root`; what is gone is made anew by `Folders`, and counts as empty until then."""
    # Raised for `root` alone, which may be there again by now.
    with suppress(FileNotFoundError):
        yield from scan(root, known, foreign, missing_ok=True)


def scan_changes(
    root: Path,
    known: Mapping[Path, Signature],
    foreign: ForeignFiles,
    blobs: BlobFolder | None = None,
) -> ScanResult:
    """Compare the folders with what is `known` and read new and changed records; find the removed `blobs`. Blocks.

    Files that are `foreign` already are not looked at again while nothing has changed.

    Raises:
        OSError: a folder cannot be read.
    """
    seen: dict[Path, Signature] = {}
    read: dict[Path, Entry] = {}
    unreadable: dict[Path, str] = {}
    damaged: set[Path] = set()
    for file in _scan_or_nothing(root, known, foreign):
        seen[file.path] = file.signature
        if file.record is not None:
            read[file.path] = Entry.of(file.record, wanted=is_wanted(file.record, blobs_folder(root)))
        elif isinstance(file.error, OSError):
            # The cause may end without a change to the file, so the file is read again at the next scan.
            unreadable[file.path] = reason(file.error)
            seen[file.path] = UNREAD
        elif file.error is not None:
            unreadable[file.path] = str(file.error)
            del seen[file.path]
        if file.error is not None and not isinstance(file.error, ForeignRecord):
            damaged.add(file.path)
    blobs_gone = blobs.gone() if blobs is not None else frozenset()
    gone = (known.keys() - seen.keys() - unreadable.keys()) | foreign.take_gone()
    return ScanResult(seen, read, unreadable, frozenset(damaged), frozenset(gone), blobs_gone)


_SCAN_EVERY = 1.0
_SCAN_BLOBS_EVERY = 10.0
"""Seconds. Each finished download changes the folder of blobs, which may be large, so it is scanned less often."""


class IndexRefresh:
    """Keeps an index fresh: scans the files every second, and takes over what this process itself writes or reads."""

    def __init__(self, root: Path, index: Index, threads: Threads, clock: IReactorTime) -> None:
        """Set up the refresh of `index` from the store at `root`; `read` and `start` begin it."""
        self.why = ""
        """Why the last scan failed; empty if it did not."""
        self._root = root
        self._index = index
        self._threads = threads
        self._blobs = BlobFolder(blobs_folder(root))
        self._known: dict[Path, Signature] = {}
        self._foreign = ForeignFiles(clock.seconds)
        self._written: set[Path] = set()
        """Records that this process wrote since the running scan began: they are newer than what the scan finds."""
        self._unreadable: dict[Path, str] = {}
        """File that is not a record -> the reason that was logged, so that it is logged only once."""
        self.damaged: Set[Path] = frozenset()
        """The damaged or unreadable records, without foreign files."""
        self._changed: set[Digest] = set()
        """The digests with which `on_change` is to be called next."""
        self.on_change: Callable[[Set[Digest]], object] = lambda changed: None
        """Called with the digests of records that are new, gone or now (un)wanted, or that gained or lost a blob."""
        self.on_blobs_gone: Callable[[Set[Digest]], object] = lambda gone: None
        """Called with the blobs that were removed from the store."""
        self._clock = clock
        self._blobs_scanned = float("-inf")
        self._one_scan = DeferredLock()
        self._loop = LoopingCall(self.scan)
        self._loop.clock = clock

    def read(self) -> None:
        """Read all records. Blocks.

        Raises:
            OSError: a folder cannot be read.
        """
        with collection_paused():
            self._apply(scan_changes(self._root, {}, self._foreign))

    def start(self) -> None:
        """Start the repeated scans."""
        self._loop.start(_SCAN_EVERY, now=False)

    def stop(self) -> None:
        """Stop the repeated scans."""
        self._loop.stop()

    def record_written(self, record: Record) -> None:
        """Take over `record`, which this process has just written."""
        path = record_path(self._root, record.manifest.digest, is_list=record.manifest.is_list)
        self._written.add(path)
        self._known[path] = UNREAD
        self.record_read(record)
        self._notify()

    def record_read(self, record: Record) -> None:
        """Take over `record` as it was read from its file."""
        digest = record.manifest.digest
        before = self._index.get(digest)
        # Where the record does not say, the next scan checks whether a layer is in the store.
        wanted = before.wanted if before else record.has_tag or not record.manifest.layers
        self._put(digest, Entry.of(record, wanted=wanted))

    def record_unreadable(self, path: Path, why: str) -> None:
        """Drop the record at `path`, which could not be read; the next scan reads the file again.

        `why` is what was logged, so that the scan does not log it a second time.
        """
        self._unreadable[path] = why
        self._drop(path)
        self._known[path] = UNREAD

    def blob_stored(self, blob: Digest) -> None:
        """Report the records that name a blob which this process has stored."""
        self._changed.update(self._index.naming(blob))
        self._notify()

    def scan(self) -> Deferred[None]:
        """Scan the files for changes, after a scan that is running has ended; fire when they are in the index."""
        return self._one_scan.run(self._scan)

    def _scan(self) -> Deferred[None]:
        self._written.clear()
        now = self._clock.seconds()
        blobs = self._blobs if now - self._blobs_scanned >= _SCAN_BLOBS_EVERY else None
        self._blobs_scanned = self._blobs_scanned if blobs is None else now
        scanned = self._threads.read(scan_changes, self._root, dict(self._known), self._foreign, blobs)
        return scanned.addCallback(self._apply).addErrback(self._failed)

    def _failed(self, failure: Failure) -> None:
        why = str(failure.value)
        if why != self.why:
            _log.error("cannot scan the store: {why}", why=why)
        self.why = why

    def _apply(self, result: ScanResult) -> None:
        if self.why:
            _log.warn("the store can be scanned again")
        self.why = ""
        # A record that this process wrote meanwhile is read again at the next scan.
        for path in result.gone - self._written:
            self._drop(path)
        for path in result.unreadable.keys() - self._written:
            self._drop(path)
        new = {path: why for path, why in result.unreadable.items() if self._unreadable.get(path) != why}
        for line in unreadable_lines(new):
            _log.warn("{line}", line=line)
        for path in (result.gone | result.read.keys()) - result.unreadable.keys():
            self._unreadable.pop(path, None)
        self._unreadable |= result.unreadable
        damaged = (self.damaged - result.unreadable.keys()) & self._unreadable.keys()
        self.damaged = damaged | result.damaged
        for path, entry in result.read.items():
            if path not in self._written:
                self._put(digest_of(path), entry)
        self._known = {**result.seen, **dict.fromkeys(self._written, UNREAD)}
        if result.blobs_gone:
            self._index.blobs_removed()
            self.on_blobs_gone(result.blobs_gone)
        for blob in result.blobs_gone:
            self._changed.update(self._index.naming(blob))
        self._notify()

    def _put(self, digest: Digest, entry: Entry) -> None:
        before = self._index.get(digest)
        # The blobs of a manifest never change, so only a new record or a new `wanted` changes what is missing.
        if before is None or before.wanted != entry.wanted:
            self._changed.add(digest)
        self._index.put(digest, entry)

    def _drop(self, path: Path) -> None:
        digest = digest_of(path)
        entry = self._index.get(digest)
        if entry is not None and record_path(self._root, digest, is_list=entry.is_list) == path:
            self._changed.add(digest)
            self._index.drop(digest)

    def _notify(self) -> None:
        changed, self._changed = self._changed, set()
        if changed:
            self.on_change(changed)
