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

from ociregistry.names import Digest, is_hex_of_digest
from ociregistry.store.blobs import BlobFolder, is_settled
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


def signatures(folder: Path) -> dict[str, Signature]:
    """Return the paths of the files in `folder` that are named like a record, with their signatures. Blocks.

    Raises:
        OSError: the folder cannot be read.
    """
    # Paths as text, here and below: making a Path for each file takes longer than looking at it.
    found, inside = {}, f"{folder}/"
    with os.scandir(folder) as entries:
        for entry in entries:
            if not is_hex_of_digest(entry.name):
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            except OSError:
                # Reading it tells why.
                found[inside + entry.name] = UNREAD
                continue
            found[inside + entry.name] = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return found


_MANY = 1000
"""Foreign files, at least, in a folder that is not looked through every second."""
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
        self._files: dict[str, dict[str, Signature]] = {}
        """Folder -> the files, and the signatures with which they were read."""
        self._looked_through: dict[str, tuple[int, float]] = {}
        """Folder -> its mtime, and the time at which it was looked through."""
        self._gone: set[str] = set()

    def add(self, path: str, signature: Signature) -> None:
        """Add a file that was read and is no record."""
        self._files.setdefault(os.path.dirname(path), {})[path] = signature

    def take_gone(self) -> Set[str]:
        """Return the files that were removed since the last call."""
        gone, self._gone = self._gone, set()
        return gone

    def look(self, folder: Path, known: Iterable[str]) -> dict[str, Signature]:
        """Return the files in `folder`, as far as they were looked at, without the foreign ones.

        `known` are the files that are looked at in any case.

        Raises:
            OSError: the folder cannot be read.
        """
        key = str(folder)
        foreign = self._files.get(key, {})
        changed, now = folder.stat().st_mtime_ns, self._seconds()
        before, at = self._looked_through.get(key, (0, now))
        if len(foreign) >= _MANY and changed == before and now - at < _LOOKED_THROUGH_EVERY:
            return dict(_signatures_of(path for path in known if os.path.dirname(path) == key))
        self._looked_through[key] = (changed if is_settled(changed) else 0), now
        found = signatures(folder)
        if not foreign:
            return found
        left = {path: signature for path, signature in found.items() if foreign.get(path) != signature}
        gone = foreign.keys() - found.keys()
        self._gone |= gone
        for path in (*gone, *left):
            foreign.pop(path, None)
        return left


def _signatures_of(paths: Iterable[str]) -> Iterator[tuple[str, Signature]]:
    for path in paths:
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            continue
        except OSError:
            yield path, UNREAD
        else:
            yield path, (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


_FEW = 25
"""Files of a folder, at most, that get a line each."""


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
def collection_paused(*, for_good: bool = False) -> Iterator[None]:
    """Pause Python's garbage collection while all records are read.

    What is read stays, so going through it again and again would find nothing and take half of the time. With
    `for_good`, what is there at the end is never gone through, not even when the process ends.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if for_good:
            gc.freeze()
        if enabled:
            gc.enable()


def look(
    root: Path, known: Iterable[str] = (), foreign: ForeignFiles | None = None, *, missing_ok: bool = False
) -> dict[str, Signature]:
    """Return the files of records of the store at `root` with their signatures, without `foreign` ones. Blocks.

    With `foreign`, the files that are `known` are looked at in any case. With `missing_ok`, a folder that is missing
    counts as empty: the store is new, or is still being copied.

    Raises:
        OSError: a folder cannot be read, or `root` is missing.
    """
    found: dict[str, Signature] = {}
    for folder in (root / LISTS_FOLDER, root / IMAGES_FOLDER):
        try:
            found |= signatures(folder) if foreign is None else foreign.look(folder, known)
        except FileNotFoundError:
            if not missing_ok:
                raise
            root.stat()
    return found


def read_changed(
    seen: Mapping[str, Signature], known: Mapping[str, Signature]
) -> Iterator[tuple[str, Record | RecordInvalid | OSError]]:
    """Read the files that were `seen` with other signatures than the `known` ones. Blocks.

    Yields:
        Path and record, or the error because of which it could not be read; FileNotFoundError if it is gone by now.
    """
    # All at once, so that the caller may change `seen` meanwhile.
    changed = [path for path, now in seen.items() if known.get(path) != now or now == UNREAD]
    for path in changed:
        try:
            yield path, read_record(path)
        except (RecordInvalid, OSError) as error:
            yield path, error


@dataclass(frozen=True, slots=True)
class ScanResult:
    """The differences that a scan of the folders found from what was known. Paths are text."""

    seen: Mapping[str, Signature]
    read: Mapping[str, tuple[Digest, Entry]] = field(default_factory=dict)
    """Path -> digest and entry, for new and changed records."""
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """Path -> reason, for new or changed files that are not records of this program."""
    damaged: frozenset[str] = frozenset()
    """Those of the unreadable files that may be records of this program."""
    gone: frozenset[str] = frozenset()
    blobs_gone: frozenset[Digest] = frozenset()


def scan_changes(
    root: Path,
    known: Mapping[str, Signature],
    foreign: ForeignFiles,
    blobs: BlobFolder | None = None,
) -> ScanResult:
    """Compare the folders with what is `known` and read new and changed records; find the removed `blobs`. Blocks.

    Files that are `foreign` already are not looked at again while nothing has changed.

    Raises:
        OSError: a folder cannot be read.
    """
    seen: dict[str, Signature] = {}
    # What is gone is made anew by `Folders`, and counts as empty until then; the store may be there again by now.
    with suppress(FileNotFoundError):
        seen = look(root, known, foreign, missing_ok=True)
    read: dict[str, tuple[Digest, Entry]] = {}
    unreadable: dict[str, str] = {}
    damaged: set[str] = set()
    blobs_at = blobs_folder(root)
    for path, found in read_changed(seen, known):
        if isinstance(found, Record):
            read[path] = found.manifest.digest, Entry.of(found, wanted=is_wanted(found, blobs_at))
        elif isinstance(found, FileNotFoundError):
            del seen[path]
        elif isinstance(found, OSError):
            # The cause may end without a change to the file, so the file is read again at the next scan.
            unreadable[path] = reason(found)
            seen[path] = UNREAD
            damaged.add(path)
        else:
            unreadable[path] = reason(found)
            signature = seen.pop(path)
            if signature != UNREAD:
                foreign.add(path, signature)
            if not isinstance(found, ForeignRecord):
                damaged.add(path)
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
        self._known: Mapping[str, Signature] = {}
        """What the last scan found, which a thread may be reading."""
        self._foreign = ForeignFiles(clock.seconds)
        self._newer: set[str] = set()
        """Records that this process wrote, or could not read, since the last scan began.

        The index is newer than what that scan finds, and the next one reads these files again.
        """
        self._unreadable: dict[str, str] = {}
        """File that is not a record -> the reason that was logged, so that it is logged only once."""
        self.damaged: Set[str] = frozenset()
        """The paths of damaged or unreadable records, without foreign files."""
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

    @property
    def seen(self) -> Mapping[str, Signature]:
        """The files of records in the last scan, and their signatures; the next scan makes another mapping."""
        return self._known

    def record_written(self, record: Record) -> None:
        """Take over `record`, which this process has just written."""
        path = record_path(self._root, record.manifest.digest, is_list=record.manifest.is_list)
        self._newer.add(str(path))
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
        self._unreadable[str(path)] = why
        self._drop(str(path))
        self._newer.add(str(path))

    def blob_stored(self, blob: Digest) -> None:
        """Report, with the next scan, the records that name a blob which this process has stored."""
        self._changed.update(self._index.naming(blob))

    def scan(self) -> Deferred[None]:
        """Scan the files for changes, after a scan that is running has ended; fire when they are in the index."""
        return self._one_scan.run(self._scan)

    def _scan(self) -> Deferred[None]:
        newer, self._newer = self._newer, set()
        known = {**self._known, **dict.fromkeys(newer, UNREAD)} if newer else self._known
        now = self._clock.seconds()
        blobs = self._blobs if now - self._blobs_scanned >= _SCAN_BLOBS_EVERY else None
        self._blobs_scanned = self._blobs_scanned if blobs is None else now
        scanned = self._threads.read(scan_changes, self._root, known, self._foreign, blobs)
        return scanned.addCallback(self._apply).addErrback(self._failed, newer)

    def _failed(self, failure: Failure, newer: Set[str]) -> None:
        self._newer |= newer
        why = str(failure.value)
        if why != self.why:
            _log.error("cannot scan the store: {why}", why=why)
        self.why = why

    def _apply(self, result: ScanResult) -> None:
        if self.why:
            _log.warn("the store can be scanned again")
        self.why = ""
        for path in (result.gone | result.unreadable.keys()) - self._newer:
            self._drop(path)
        new = {Path(path): why for path, why in result.unreadable.items() if self._unreadable.get(path) != why}
        for line in unreadable_lines(new):
            _log.warn("{why}", why=line)
        for path in (result.gone | result.read.keys()) - result.unreadable.keys():
            self._unreadable.pop(path, None)
        self._unreadable |= result.unreadable
        damaged = (self.damaged - result.unreadable.keys()) & self._unreadable.keys()
        self.damaged = damaged | result.damaged
        for path, (digest, entry) in result.read.items():
            if path not in self._newer:
                self._put(digest, entry)
        self._known = result.seen
        if result.blobs_gone:
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

    def _drop(self, path: str) -> None:
        digest = digest_of(path)
        entry = self._index.get(digest)
        if entry is not None and str(record_path(self._root, digest, is_list=entry.is_list)) == path:
            self._changed.add(digest)
            self._index.drop(digest)

    def _notify(self) -> None:
        changed, self._changed = self._changed, set()
        if changed:
            self.on_change(changed)
