"""Records: manifests as stored, one JSON file each, made for `grep`, `cat` and `jq`.

{"digest": …, "mediaType": …,
 "images": {"docker.io/library/nginx:1.25": {"created": "2026-03-01T22:17:30.000000Z", "confirmed": …}},
 "wanted": true,
 "manifest": "the exact bytes that the digest names, as a JSON string"}

`RecordFiles` reads and rewrites them, and finds what other processes changed. Everything in it blocks.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from ociregistry.errors import RegistryError
from ociregistry.manifests import LARGEST_MANIFEST, Descriptor, Manifest, ManifestInvalid
from ociregistry.names import Digest, ImageReference, Repository
from ociregistry.store.blobs import BlobFolder, missing_blobs, size_of_blob
from ociregistry.store.files import Files
from ociregistry.store.paths import (
    IMAGES_FOLDER,
    LISTS_FOLDER,
    blobs_folder,
    record_path,
    record_temporary,
)
from ociregistry.store.workdir import PullsFolder, store_locked

_KEYS = {"digest", "mediaType", "images", "manifest"}
_SLIP = 1
"""Keys that one of ours may lack for being damaged; a foreign one lacks more."""


class RecordInvalid(ValueError):
    """The file is damaged or in a foreign format; the message says what is wrong with it."""


class ForeignRecord(RecordInvalid):
    """The file is in a foreign format: it is whole, perhaps, but not ours."""


@dataclass(frozen=True, slots=True)
class Dates:
    """When an image URL was first and last seen to mean this manifest."""

    created: datetime
    confirmed: datetime

    @classmethod
    def parse(cls, created: str, confirmed: str) -> Dates:
        """The dates as a record spells them; raises `ValueError`."""
        return cls(_time(created), _time(confirmed))


@dataclass(frozen=True, slots=True)
class Record:
    """A manifest and the image URLs that it is known by."""

    manifest: Manifest
    images: Mapping[str, Dates]
    wanted: bool | None = None
    """Whether the layers of the image belong into the store; False for one that is kept as metadata alone.

    None where the record does not say, as in those of earlier versions.
    """

    def confirm(
        self,
        image: ImageReference,
        confirmed: datetime,
        created: datetime | None = None,
        *,
        wanted: bool | None = None,
    ) -> Record:
        """This record, where `image` was known to mean this manifest at `confirmed`, and since `created`.

        Of what is noted already, the first creation and the last confirmation stay; an image stays `wanted`.
        """
        known = self.images.get(str(image), Dates(created or confirmed, confirmed))
        merged = Dates(min(known.created, created or confirmed), max(known.confirmed, confirmed))
        return replace(self, images={**self.images, str(image): merged}, wanted=wanted or self.wanted)

    def means(self, image: ImageReference) -> bool:
        """Whether `image` is this manifest: a digest whatever the repository, a tag where it is noted."""
        return image.reference == self.manifest.digest or str(image) in self.images

    @property
    def has_tag(self) -> bool:
        """Whether some tag means this manifest."""
        return any("@" not in url for url in self.images)

    def render(self) -> bytes:
        """The bytes of the file."""
        document = {
            "digest": self.manifest.digest,
            "mediaType": self.manifest.media_type,
            "images": {
                url: {"created": _spell(dates.created), "confirmed": _spell(dates.confirmed)}
                for url, dates in sorted(self.images.items())
            },
            **({} if self.wanted is None else {"wanted": self.wanted}),
            "manifest": self.manifest.data.decode("utf-8"),
        }
        return json.dumps(document, indent=2).encode() + b"\n"

    @classmethod
    def parse(cls, data: bytes, digest: Digest) -> Record:
        """The record in a file named after `digest`; raises `RecordInvalid`."""
        try:
            document = json.loads(data)
            lacking = _KEYS - document.keys() if isinstance(document, dict) else _KEYS
            if len(lacking) > _SLIP:
                raise ForeignRecord(f"not a record of this program: it has no {', '.join(sorted(lacking))}")
            if document["digest"] != digest:
                raise RecordInvalid(f"it holds {document['digest']}, not what its name says")
            manifest = Manifest.parse(document["manifest"].encode("utf-8"), document["mediaType"], digest)
            images = {
                str(ImageReference.parse_whole(url)): Dates.parse(dates["created"], dates["confirmed"])
                for url, dates in document["images"].items()
            }
        except (RegistryError, ManifestInvalid) as error:
            raise RecordInvalid(str(error)) from None
        except RecordInvalid:
            raise
        except (ValueError, RecursionError) as error:
            raise RecordInvalid(f"not JSON, or cut off: {error}") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise RecordInvalid(f"not a record of this program: {type(error).__name__} {error}") from None
        wanted = document.get("wanted")
        return cls(manifest, images, wanted if isinstance(wanted, bool) else None)


def _spell(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise RecordInvalid(f"the time {text!r} has no time zone")
    return time


_FOR_REFERRERS = re.compile("sha(256|512)-[0-9a-f]{64}")


def is_referrers_tag(tag: str) -> bool:
    """Tell whether the specification sets this tag aside for a list of referrers; nobody pushed it."""
    return _FOR_REFERRERS.fullmatch(tag) is not None


@dataclass(frozen=True, slots=True)
class Entry:
    """What memory keeps of a record."""

    is_list: bool
    images: Mapping[str, datetime]
    """Image URL -> last confirmed."""
    blobs: Mapping[Digest, int]
    """What the manifest names, and its size in bytes."""
    config: Descriptor | None = None
    layers: frozenset[Digest] = frozenset()
    """The layers of an image."""
    children: tuple[Descriptor, ...] = ()
    """The manifests that an index names."""
    wanted: bool = True
    """Whether the layers of the image belong into the store."""

    @classmethod
    def of(cls, record: Record, *, wanted: bool = True) -> Entry:
        """Make the entry for `record`; `wanted` holds where the record does not say."""
        manifest = record.manifest
        return cls(
            is_list=manifest.is_list,
            images={url: dates.confirmed for url, dates in record.images.items()},
            blobs=manifest.blob_sizes,
            config=manifest.config,
            layers=manifest.layers,
            children=manifest.children,
            wanted=wanted if record.wanted is None else record.wanted,
        )

    @property
    def is_referrers(self) -> bool:
        """Whether it is known only as a list of referrers: its children are artifacts, not platforms."""
        return bool(self.images) and all(is_referrers_tag(url.rpartition(":")[2]) for url in self.images)

    @property
    def repositories(self) -> set[Repository]:
        """Where it is known."""
        return {ImageReference.parse_whole(url).repository for url in self.images}

    def known_in(self, repository: Repository) -> bool:
        """Whether some image URL of `repository` means this manifest."""
        prefix = str(repository)
        return any(url.startswith((f"{prefix}:", f"{prefix}@")) for url in self.images)


_LARGEST_RECORD = 8 * LARGEST_MANIFEST
"""Bytes; JSON spells one byte of a manifest with at most six, and the image URLs come on top."""

_NOTE_PULLS_EVERY = 60.0
"""Seconds."""

Signature = tuple[int, int, int, int]
"""Of a file: it changes when the file does."""

UNREAD: Signature = (0, 0, 0, 0)
"""Of a file that is known to be there, and is to be read at the next look."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What a look at the folders found to differ from what was known."""

    seen: Mapping[Path, Signature]
    read: Mapping[Path, Entry] = field(default_factory=dict)
    damaged: Mapping[Path, str] = field(default_factory=dict)
    """Path -> reason: new or changed files that are no records of ours."""
    gone: frozenset[Path] = frozenset()
    blobs_gone: frozenset[Digest] = frozenset()


def read_record(path: Path) -> Record:
    """The record at `path`; raises `RecordInvalid`, and `OSError` when it cannot be read. Blocks."""
    digest = Digest.from_hex(path.name)
    if digest is None:
        raise RecordInvalid("its name is not that of a record")
    try:
        status = path.stat()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ForeignRecord("it is a link to itself") from None
    if not stat.S_ISREG(status.st_mode):
        raise ForeignRecord("it is not a file")
    if status.st_size > _LARGEST_RECORD:
        raise ForeignRecord(f"larger than {_LARGEST_RECORD} bytes")
    with path.open("rb") as file:
        data = file.read()
    record = Record.parse(data, digest)
    if (path.parent.name == LISTS_FOLDER) != record.manifest.is_list:
        raise ForeignRecord(f"a {record.manifest.media_type} does not belong into {path.parent.name}/")
    return record


class RecordFiles:
    """The folders fat/ and img/ below `root`; `pulls` is this process's own folder, for temporary files."""

    def __init__(
        self, root: Path, pulls: PullsFolder, files: Files, spend: Callable[[int], object] = lambda count: None
    ) -> None:
        """`spend` is called with the bytes of a new record, and raises `OSError` where there is no room for it."""
        self._spend = spend
        self._root = root
        self._pulls = pulls
        self._files = files
        self._blobs = BlobFolder(blobs_folder(root))

    def path(self, digest: Digest, *, is_list: bool) -> Path:
        """Where the record of `digest` is kept."""
        return record_path(self._root, digest, is_list=is_list)

    def confirm(
        self,
        manifest: Manifest,
        image: ImageReference,
        confirmed: datetime,
        created: datetime | None = None,
        *,
        wanted: bool | None = None,
        whole: bool = False,
        known: bool = False,
    ) -> Record | None:
        """Writes that `image` means `manifest` as `Record.confirm` has it; returns the record as it is on disk then.

        Returns None, and writes nothing, where it is to be `whole` and lacks a blob, or `known` and has no record; no
        prune comes between the look and the writing. What another process wrote in between is kept. A file there that
        is no record of ours is moved aside into bad/ of the pulls folder, if there is space for that.
        """
        path = self.path(manifest.digest, is_list=manifest.is_list)
        with store_locked(self._root):
            if whole and missing_blobs(blobs_folder(self._root), manifest.blob_sizes):
                return None
            existing = self._existing(path)
            if known and existing is None:
                return None
            before = existing or Record(manifest, {}, wanted)
            record = before.confirm(image, confirmed, created, wanted=wanted)
            self._put(path, record, new=existing is None)
        return record

    def want(self, digest: Digest, wanted: bool) -> Record | None:
        """Note that the layers of the image `digest` belong into the store, or do not, where its record does not say.

        What it says is changed from False to True alone. Returns the record, None if there is none.
        """
        path = self.path(digest, is_list=False)
        with store_locked(self._root):
            record = self._existing(path)
            if record is not None and not record.wanted and record.wanted is not wanted:
                record = replace(record, wanted=wanted)
                self._put(path, record)
        return record

    def restore(
        self, manifest: Manifest, images: Mapping[str, Dates], fetched: str, wanted: bool | None = None
    ) -> Record:
        """Writes that `images` mean `manifest`, as a lost record had it; it was `fetched` anew by another image URL.

        `wanted` is what the lost record said. Returns the record as it is on disk then.
        """
        path = self.path(manifest.digest, is_list=manifest.is_list)
        with store_locked(self._root):
            existing = self._existing(path) or Record(manifest, {})
            others = {url: dates for url, dates in existing.images.items() if url != fetched}
            record = Record(manifest, {**others, **images}, existing.wanted or wanted)
            self._put(path, record)
        return record

    def _put(self, path: Path, record: Record, *, new: bool = False) -> None:
        data = record.render()
        if new:
            self._spend(len(data))
        self._files.put(path, data, record_temporary(self._pulls.path, path))

    def _existing(self, path: Path) -> Record | None:
        try:
            return read_record(path)
        except FileNotFoundError:
            return None
        except RecordInvalid:
            self._pulls.put_aside(path)
            return None

    def read_for_pull(self, path: Path, now: float) -> tuple[Record, bool]:
        """The record, as `read_record` gives it, and whether `note_pull` has something to note at `now`."""
        return read_record(path), now - path.stat().st_mtime >= _NOTE_PULLS_EVERY

    def note_pull(self, path: Path, now: float) -> None:
        """Lets the file's mtime tell, to the minute, that the manifest was pulled at `now`."""
        # A store that can only be read still serves.
        with suppress(OSError):
            if now - path.stat().st_mtime >= _NOTE_PULLS_EVERY:
                os.utime(path, (now, now))

    def look(self, known: Mapping[Path, Signature], *, blobs: bool = False) -> Changes:
        """Compares the folders with what is `known` and reads what is new or changed; looks at `blobs` too."""
        seen: dict[Path, Signature] = {}
        read: dict[Path, Entry] = {}
        damaged: dict[Path, str] = {}
        for folder in (LISTS_FOLDER, IMAGES_FOLDER):
            for path, signature in signatures(self._root / folder):
                seen[path] = signature
                if known.get(path) == signature:
                    continue
                try:
                    read[path] = self._entry(read_record(path))
                except FileNotFoundError:
                    del seen[path]
                except RecordInvalid as error:
                    damaged[path] = str(error)
                except OSError as error:
                    # Nothing that will show on the file may end this: it is tried again at the next look.
                    damaged[path] = error.strerror or str(error)
                    seen[path] = UNREAD
        blobs_gone = self._blobs.gone() if blobs else frozenset()
        return Changes(seen, read, damaged, frozenset(known.keys() - seen.keys()), blobs_gone)

    def _entry(self, record: Record) -> Entry:
        wanted = is_wanted(record, blobs_folder(self._root))
        return Entry.of(record, wanted=wanted)


def is_wanted(record: Record, blobs: Path) -> bool:
    """Tell whether the layers of the image belong into the store, whose blobs are in the folder `blobs`.

    One whose record does not say is wanted when it is known by a tag, or when a layer of it is here; one that is not
    wanted counts as wanted when all its layers are here, as other caches have pulled it through this one. Blocks.
    """
    if record.wanted:
        return True
    layers = record.manifest.layers
    here = (size_of_blob(f"{blobs}/{layer.hex}") is not None for layer in layers)
    if record.wanted is None:
        return record.has_tag or not layers or any(here)
    return bool(layers) and all(here)


def signatures(folder: Path) -> list[tuple[Path, Signature]]:
    """The files in `folder` that have a record's name. Blocks; raises `OSError`."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if Digest.from_hex(entry.name) is None:
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            signature = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            found.append((folder / entry.name, signature))
    return found
