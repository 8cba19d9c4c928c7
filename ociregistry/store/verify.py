"""Verification: every record and blob is read and hashed again; damaged files are quarantined."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater

from ociregistry.errors import RegistryError
from ociregistry.manifests import LARGEST_CONFIG
from ociregistry.names import Digest, ImageReference
from ociregistry.store.blobs import missing_blobs
from ociregistry.store.files import (
    Files,
    SharedFile,
    is_full,
    is_gone,
    is_of_the_file,
    note_time,
    open_regular,
    read_regular,
    reason,
)
from ociregistry.store.paths import IMAGES_FOLDER, LISTS_FOLDER, blobs_folder, digest_of, is_blob_path, verified_stamp
from ociregistry.store.records import Dates, ForeignRecord, Record, RecordInvalid, is_wanted, read_record
from ociregistry.store.scan import signatures
from ociregistry.store.threads import Threads
from ociregistry.store.workdir import PullsFolder, store_locked

Found = Callable[["Damaged"], Coroutine[Deferred[Any], Any, None]]

_SLICE = 4 * 1024 * 1024
"""Bytes that a thread reads and hashes in one job."""
_NOTED = re.compile(
    r'"(?P<url>[^"\\\s]{3,600})":\s*\{\s*"created":\s*"(?P<created>[^"]{1,40})",'
    r'\s*"confirmed":\s*"(?P<confirmed>[^"]{1,40})"\s*\}'
)
"""An image URL in a record, also in the remains of a damaged one."""
_NOTED_WANTED = re.compile(r'^  "wanted": (?P<wanted>true|false),$', re.MULTILINE)


class DamagedOutcome(Enum):
    """What became of a damaged file; the values are those of log lines."""

    QUARANTINED = "quarantined"
    REMOVED = "removed, no space to quarantine it"
    IN_PLACE = "still in place"


@dataclass(frozen=True, slots=True)
class Damaged:
    """A file that cannot be read, or whose content is not what its name says."""

    path: Path
    digest: Digest
    why: str
    images: tuple[tuple[ImageReference, Dates], ...] = ()
    """For a record: the image URLs that can still be read from it."""
    wanted: bool | None = None
    """For a record: whether the layers of the image are wanted, if that can still be read from it."""
    outcome: DamagedOutcome = DamagedOutcome.QUARANTINED
    place: Path | None = None
    """Where the file was moved to, if it is in quarantine."""

    @property
    def is_blob(self) -> bool:
        """Whether the file is a blob, not a record."""
        return is_blob_path(self.path)


@dataclass(slots=True)
class Findings:
    """The result of a verification so far."""

    records: int = 0
    blobs: int = 0
    bytes: int = 0
    """Bytes of blobs that were hashed."""
    damaged: list[Damaged] = field(default_factory=list)
    foreign: dict[Path, str] = field(default_factory=dict)
    """File among the records that is not a record of this program -> reason."""
    missing: dict[Digest, Mapping[Digest, int]] = field(default_factory=dict)
    """Wanted image that lacks blobs -> the missing blobs and their sizes in bytes."""
    missing_metadata: dict[Digest, Mapping[Digest, int]] = field(default_factory=dict)
    """Image that is kept as metadata of an index and lacks its config -> the config and its size in bytes."""


class Verifier:
    """Verifies the store at `root`, slice by slice, in threads."""

    def __init__(
        self, root: Path, pulls: PullsFolder, files: Files, threads: Threads, clock: IReactorTime, found: Found
    ) -> None:
        """Set up the verification; `found` is awaited with each damaged file as soon as it is quarantined."""
        self._root = root
        self._pulls = pulls
        self._files = files
        self._threads = threads
        self._clock = clock
        self._found = found

    async def verify(self, max_rate: float | None, advance: Callable[[int, int], object]) -> Findings:
        """Verify everything and quarantine damaged files; `max_rate` is in bytes a second.

        `advance` is called with the number of bytes of blobs hashed so far, and the number of bytes of all blobs.

        Returns:
            What was found. Missing blobs are determined at the end, after damaged ones were quarantined.

        Raises:
            OSError: a file cannot be read for a reason that is not its own.
        """
        findings = Findings()
        images: dict[Digest, Record] = {}
        for folder in (LISTS_FOLDER, IMAGES_FOLDER):
            for path in await self._threads.read(_files, self._root / folder):
                record = await self._verify_record(path, findings)
                if record is not None:
                    images[record.manifest.digest] = record
        sizes = await self._threads.read(_sizes, blobs_folder(self._root))
        total = sum(sizes.values())
        for path in sizes:
            await self._verify_blob(path, findings, max_rate, lambda: advance(findings.bytes, total))
        children = {child.digest for record in images.values() for child in record.manifest.children}
        for digest, record in images.items():
            wanted, missing = await self._threads.read(_missing, blobs_folder(self._root), record)
            if missing and wanted:
                findings.missing[digest] = missing
            elif missing and digest in children:
                findings.missing_metadata[digest] = missing
        return findings

    async def _verify_record(self, path: Path, findings: Findings) -> Record | None:
        try:
            record = await self._threads.read(read_record, path)
        except FileNotFoundError:
            return None
        except ForeignRecord as error:
            findings.foreign[path] = str(error)
            return None
        except (RecordInvalid, OSError) as error:
            if isinstance(error, OSError) and not is_of_the_file(error):
                raise
            await self._note(
                findings, await self._threads.write_in_turn(self._quarantine_record, path, reason(error))
            )
            return None
        findings.records += 1
        return record

    def _quarantine_record(self, path: Path, why: str) -> Damaged | None:
        with store_locked(self._root):
            try:
                # Another process may have replaced the record.
                read_record(path)
                return None
            except FileNotFoundError:
                return None
            except (RecordInvalid, OSError) as error:
                if isinstance(error, OSError) and not is_of_the_file(error):
                    raise
                salvaged = _salvage(path)
                return self._quarantine(Damaged(path, digest_of(path), why, *salvaged))

    async def _verify_blob(
        self, path: Path, findings: Findings, max_rate: float | None, advance: Callable[[], object]
    ) -> None:
        began, at_first = self._clock.seconds(), findings.bytes
        try:
            file = await self._threads.read(open_regular, path)
        except FileNotFoundError:
            return
        except OSError as error:
            if not is_of_the_file(error):
                raise
            findings.blobs += 1
            await self._note(findings, await self._threads.write(self._quarantine_unopened, path))
            return
        try:
            checked = _Checked(path, file)
            while count := await self._threads.read(_and_release, file.lease(), checked.hash_more):
                findings.bytes += count
                advance()
                if max_rate is not None:
                    due = began + (findings.bytes - at_first) / max_rate
                    await deferLater(self._clock, max(0.0, due - self._clock.seconds()))
            if checked.gone:
                return
            findings.blobs += 1
            if checked.why:
                await self._note(findings, await self._threads.write(self._quarantine_blob, checked))
        finally:
            file.release()

    async def _note(self, findings: Findings, damaged: Damaged | None) -> None:
        if damaged is not None:
            findings.damaged.append(damaged)
            await self._found(damaged)

    def _quarantine_unopened(self, path: Path) -> Damaged | None:
        """Quarantine a blob that cannot be opened; return None if it can be now: it may have been replaced."""
        try:
            open_regular(path).release()
        except FileNotFoundError:
            return None
        except OSError as error:
            if not is_of_the_file(error):
                raise
            return self._quarantine(Damaged(path, digest_of(path), f"cannot be opened: {reason(error)}"))
        return None

    def _quarantine_blob(self, checked: _Checked) -> Damaged | None:
        """Quarantine a damaged blob; return None if its file has changed: another process may have replaced it."""
        if not checked.is_unchanged():
            return None
        return self._quarantine(Damaged(checked.path, digest_of(checked.path), checked.why))

    def _quarantine(self, damaged: Damaged) -> Damaged:
        """Quarantine the file, and return what is known of it then. One that cannot be moved does not end all."""
        try:
            place = self._pulls.quarantine(damaged.path)
            self._files.sync_folder(damaged.path.parent)
        except OSError as error:
            if not os.path.lexists(damaged.path):
                return damaged
            why = f"{damaged.why}; it cannot be moved: {reason(error)}"
            return replace(damaged, why=why, outcome=DamagedOutcome.IN_PLACE)
        return replace(damaged, place=place) if place else replace(damaged, outcome=DamagedOutcome.REMOVED)


class _Checked:
    """A blob that is read through once. All methods block."""

    def __init__(self, path: Path, file: SharedFile) -> None:
        self.path = path
        self.why = ""
        """What is wrong with the blob."""
        self.gone = False
        """Whether another machine has removed or replaced it."""
        self._file = file
        self._digest = digest_of(path)
        self._hasher = self._digest.hasher()
        self._before = os.fstat(file.fileno())
        self._at = 0

    def hash_more(self) -> int:
        """Read and hash the next slice; return its size in bytes, 0 at the end and where that fails."""
        try:
            data = os.pread(self._file.fileno(), _SLICE, self._at)
        except OSError as error:
            self.gone = is_gone(error)
            if self.gone:
                return 0
            if not is_of_the_file(error):
                raise
            self.why = f"cannot be read at byte {self._at}: {error.strerror}"
            return 0
        self._hasher.update(data)
        self._at += len(data)
        if not data and self._hasher.hexdigest() != self._digest.hex:
            self.why = f"its {self._at} bytes do not have the digest {self._digest}"
        return len(data)

    def is_unchanged(self) -> bool:
        """Tell whether the path still leads to the file that was read, unchanged."""
        try:
            now = self.path.lstat()
        except FileNotFoundError:
            return False
        before = self._before
        return (now.st_ino, now.st_size, now.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)


def _and_release(lease: SharedFile, work: Callable[[], int]) -> int:
    """Return the result of `work`, holding the lease: a cancelled caller must not close the file while it is read."""
    try:
        return work()
    finally:
        lease.release()


def _files(folder: Path) -> list[Path]:
    return sorted(map(Path, signatures(folder)))


def _sizes(folder: Path) -> dict[Path, int]:
    return {Path(path): size for path, (_, size, _, _) in sorted(signatures(folder).items())}


def _missing(blobs: Path, record: Record) -> tuple[bool, Mapping[Digest, int]]:
    """Tell whether an image is wanted, and which of its blobs are missing from the folder `blobs`. Blocks.

    Foreign layers do not count. For an image that is not wanted only its config counts, which belongs to the metadata
    of an index.
    """
    manifest = record.manifest
    if is_wanted(record, blobs):
        return True, missing_blobs(blobs, manifest.required)
    config = manifest.config
    if config is None or config.size > LARGEST_CONFIG:
        return False, {}
    return False, missing_blobs(blobs, {config.digest: config.size})


def _salvage(path: Path) -> tuple[tuple[tuple[ImageReference, Dates], ...], bool | None]:
    """Return the image URLs of a damaged record, and whether it is wanted, as far as they can be read."""
    found = []
    try:
        text = read_regular(path).decode("utf-8", "replace")
    except OSError:
        return (), None
    for noted in _NOTED.finditer(text):
        with suppress(RegistryError, ValueError):
            dates = Dates.parse(noted["created"], noted["confirmed"])
            found.append((ImageReference.parse_whole(noted["url"]), dates))
    wanted = _NOTED_WANTED.search(text)
    return tuple(found), wanted["wanted"] == "true" if wanted else None


def last_verified(root: Path, now: datetime) -> datetime:
    """Return when the store at `root` was verified last. If it never was, note `now` as that time. Blocks.

    The same holds if the noted time is later than `now`, as the clock was wrong then or is wrong now.

    Raises:
        OSError: the time cannot be read or noted.
    """
    path = verified_stamp(root)
    noted = datetime.fromtimestamp(path.stat().st_mtime, UTC) if path.exists() else None
    if noted is not None and noted <= now:
        return noted
    note_verified(root, now)
    return now


def note_verified(root: Path, now: datetime) -> bool:
    """Note that the store at `root` was verified at `now`, unless there is no space for a note. Blocks.

    Returns:
        Whether there was space.

    Raises:
        OSError: the time cannot be noted for another reason.
    """
    path = verified_stamp(root)
    try:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    except OSError as error:
        if not is_full(error):
            raise
        return False
    note_time(path, now.timestamp())
    return True
