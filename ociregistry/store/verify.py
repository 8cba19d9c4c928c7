"""Verifying: every record and blob is read and hashed again; damaged ones are quarantined."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater

from ociregistry.errors import RegistryError
from ociregistry.manifests import LARGEST_CONFIG
from ociregistry.names import Digest, ImageReference
from ociregistry.store.blobs import missing_blobs
from ociregistry.store.files import Files, SharedFile, Threads, is_full
from ociregistry.store.paths import IMAGES_FOLDER, LISTS_FOLDER, blobs_folder, digest_of, is_blob_path, verified_stamp
from ociregistry.store.records import Dates, ForeignRecord, Record, RecordInvalid, is_wanted, read_record, signatures
from ociregistry.store.workdir import PullsFolder, store_locked

Found = Callable[["Damaged"], Coroutine[Deferred[Any], Any, None]]

_SLICE = 4 * 1024 * 1024
"""Bytes that are read and hashed in one go of a thread."""
_BAD_DISK = frozenset({errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.ENODATA})
"""Errors of a file that are of the file alone, whoever reads it and when."""
_NOTED = re.compile(
    r'"(?P<url>[^"\\\s]{3,600})":\s*\{\s*"created":\s*"(?P<created>[^"]{1,40})",'
    r'\s*"confirmed":\s*"(?P<confirmed>[^"]{1,40})"\s*\}'
)
"""An image URL in a record, also in what is left of one."""
_NOTED_WANTED = re.compile(r'^  "wanted": (?P<wanted>true|false),$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Damaged:
    """A file that is not what its name says."""

    path: Path
    digest: Digest
    why: str
    images: tuple[tuple[ImageReference, Dates], ...] = ()
    """Of a record: the image URLs that still stand in it."""
    wanted: bool | None = None
    """Of a record: what still stands in it of whether the layers of the image are wanted."""
    kept: bool = True
    """Whether it was put aside; else it was removed, as there was no space to put it aside."""

    @property
    def is_blob(self) -> bool:
        """Whether it is a blob, not a record."""
        return is_blob_path(self.path)


@dataclass(slots=True)
class Findings:
    """What was found so far."""

    records: int = 0
    blobs: int = 0
    bytes: int = 0
    """Of blobs, hashed."""
    damaged: list[Damaged] = field(default_factory=list)
    foreign: dict[Path, str] = field(default_factory=dict)
    """Files among the records that are not of this program, and why."""
    missing: dict[Digest, Mapping[Digest, int]] = field(default_factory=dict)
    """Wanted images that lack blobs, each with these and their sizes in bytes."""
    missing_metadata: dict[Digest, Mapping[Digest, int]] = field(default_factory=dict)
    """Images that are kept as metadata of an index and lack their config, in the same form."""


class Verifier:
    """Goes through the store at `root`, slice by slice, in threads."""

    def __init__(
        self, root: Path, pulls: PullsFolder, files: Files, threads: Threads, clock: IReactorTime, found: Found
    ) -> None:
        """`found` is awaited with what is damaged, as soon as it was put aside."""
        self._root = root
        self._pulls = pulls
        self._files = files
        self._threads = threads
        self._clock = clock
        self._found = found

    async def verify(self, max_rate: float | None, advance: Callable[[int, int], object]) -> Findings:
        """What is damaged, which is put aside; `max_rate` is in bytes a second.

        `came` is called with how many bytes of blobs were hashed, and how many there are in all. Raises `OSError`.
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
            wanted, lacking = await self._threads.read(_lacking, blobs_folder(self._root), record)
            if lacking and wanted:
                findings.missing[digest] = lacking
            elif lacking and digest in children:
                findings.missing_metadata[digest] = lacking
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
            if isinstance(error, OSError) and error.errno not in _BAD_DISK:
                raise
            damaged = await self._threads.write_in_turn(self._put_record_aside, path, str(error))
            if damaged is not None:
                findings.damaged.append(damaged)
                await self._found(damaged)
            return None
        findings.records += 1
        return record

    def _put_record_aside(self, path: Path, why: str) -> Damaged | None:
        with store_locked(self._root):
            try:
                # Another process may have written it anew.
                read_record(path)
                return None
            except FileNotFoundError:
                return None
            except (RecordInvalid, OSError) as error:
                if isinstance(error, OSError) and error.errno not in _BAD_DISK:
                    raise
                noted = _still_noted(path)
                kept = self._put_aside(path)
        return Damaged(path, digest_of(path), why, *noted, kept)

    async def _verify_blob(
        self, path: Path, findings: Findings, max_rate: float | None, advance: Callable[[], object]
    ) -> None:
        began, at_first = self._clock.seconds(), findings.bytes
        try:
            file = SharedFile(await self._threads.read(os.open, path, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            return
        try:
            checked = _Checked(path, file)
            while count := await self._threads.read(_and_release, file.lease(), checked.hash_more):
                findings.bytes += count
                advance()
                if max_rate is not None:
                    due = began + (findings.bytes - at_first) / max_rate
                    await deferLater(self._clock, max(0.0, due - self._clock.seconds()))
            findings.blobs += 1
            if checked.why:
                damaged = await self._threads.write(self._put_blob_aside, checked)
                if damaged is not None:
                    findings.damaged.append(damaged)
                    await self._found(damaged)
        finally:
            file.release()

    def _put_blob_aside(self, checked: _Checked) -> Damaged | None:
        """None if it is not there any more: another process may have brought it anew, or be copying it."""
        if not checked.is_unchanged():
            return None
        kept = self._put_aside(checked.path)
        return Damaged(checked.path, digest_of(checked.path), checked.why, kept=kept)

    def _put_aside(self, path: Path) -> bool:
        kept = self._pulls.put_aside(path)
        self._files.sync_folder(path.parent)
        return kept


class _Checked:
    """A blob that is read through once; everything blocks."""

    def __init__(self, path: Path, file: SharedFile) -> None:
        self.path = path
        self.why = ""
        """What is wrong with it."""
        self._file = file
        self._digest = digest_of(path)
        self._hasher = self._digest.hasher()
        self._before = os.fstat(file.fileno())
        self._at = 0

    def hash_more(self) -> int:
        """How many bytes were read and hashed; none at the end."""
        try:
            data = os.pread(self._file.fileno(), _SLICE, self._at)
        except OSError as error:
            if error.errno not in _BAD_DISK:
                raise
            self.why = f"cannot be read at byte {self._at}: {error.strerror}"
            return 0
        self._hasher.update(data)
        self._at += len(data)
        if not data and self._hasher.hexdigest() != self._digest.hex:
            self.why = f"its {self._at} bytes do not have the digest {self._digest}"
        return len(data)

    def is_unchanged(self) -> bool:
        """Whether its name still leads to what was read."""
        try:
            now = self.path.stat()
        except FileNotFoundError:
            return False
        before = self._before
        return (now.st_ino, now.st_size, now.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)


def _and_release(lease: SharedFile, work: Callable[[], int]) -> int:
    """What `work` gives: who waits for it may have gone, and must not close the file under it."""
    try:
        return work()
    finally:
        lease.release()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path, _ in signatures(folder))


def _sizes(folder: Path) -> dict[Path, int]:
    return {path: signature[1] for path, signature in sorted(signatures(folder))}


def _lacking(blobs: Path, record: Record) -> tuple[bool, Mapping[Digest, int]]:
    """Tell whether an image is wanted, and which blobs the folder `blobs` lacks of it.

    Of one that is not wanted these are its config alone, which belongs to the metadata of an index. Blocks.
    """
    manifest = record.manifest
    if is_wanted(record, blobs):
        return True, missing_blobs(blobs, manifest.blob_sizes)
    config = manifest.config
    if config is None or config.size > LARGEST_CONFIG:
        return False, {}
    return False, missing_blobs(blobs, {config.digest: config.size})


def _still_noted(path: Path) -> tuple[tuple[tuple[ImageReference, Dates], ...], bool | None]:
    """Return the image URLs of a damaged record, and whether it is wanted, as far as they can be made out."""
    found = []
    try:
        text = path.read_bytes().decode("utf-8", "replace")
    except OSError:
        return (), None
    for noted in _NOTED.finditer(text):
        with suppress(RegistryError, ValueError):
            dates = Dates.parse(noted["created"], noted["confirmed"])
            found.append((ImageReference.parse_whole(noted["url"]), dates))
    wanted = _NOTED_WANTED.search(text)
    return tuple(found), wanted["wanted"] == "true" if wanted else None


def last_verified(root: Path, now: datetime) -> datetime:
    """Give when the store at `root` was verified last; if it never was, `now` counts as that from now on. Blocks.

    Raises: `OSError`.
    """
    path = _stamp(root)
    if not path.exists() and not note_verified(root, now):
        return now
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)


def note_verified(root: Path, now: datetime) -> bool:
    """Note that the store at `root` was verified at `now`, unless there is no space for a note. Blocks.

    Returns: whether there was space.

    Raises: `OSError`.
    """
    path = _stamp(root)
    try:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    except OSError as error:
        if not is_full(error):
            raise
        return False
    os.utime(path, (now.timestamp(), now.timestamp()))
    return True


def _stamp(root: Path) -> Path:
    return verified_stamp(root)
