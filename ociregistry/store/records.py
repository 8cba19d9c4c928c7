"""Records: manifests as stored, one JSON file each, readable with `grep`, `cat` and `jq`.

{"digest": …, "mediaType": …,
 "images": {"docker.io/library/nginx:1.25": {"created": "2026-03-01T22:17:30.000000Z", "confirmed": …}},
 "wanted": true,
 "manifest": "the exact bytes that the digest names, as a JSON string"}

`RecordFiles` reads and rewrites them. All of its methods block.
"""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from ociregistry.errors import RegistryError
from ociregistry.manifests import LARGEST_MANIFEST, Manifest, ManifestInvalid
from ociregistry.names import Digest, ImageReference
from ociregistry.store.blobs import missing_blobs, size_of_blob
from ociregistry.store.files import Files, is_of_the_file, note_time, read_regular, reason, restore_time
from ociregistry.store.paths import (
    LISTS_FOLDER,
    blobs_folder,
    record_path,
    record_temporary,
)
from ociregistry.store.threads import Threads
from ociregistry.store.workdir import PullsFolder, store_locked
from ociregistry.strictjson import parse_json

_KEYS = {"digest", "mediaType", "images", "manifest"}
_MAY_LACK = 1
"""Number of keys that a damaged record of ours may lack; a file that lacks more of them is foreign."""


class RecordInvalid(ValueError):
    """A file that is damaged or in a foreign format; the message says what is wrong with it."""


class ForeignRecord(RecordInvalid):
    """A file in a foreign format: it may be intact, but it is not a record of this program."""


@dataclass(frozen=True, slots=True)
class Dates:
    """The times at which an image URL was first and last seen to mean a manifest."""

    created: datetime
    confirmed: datetime

    @classmethod
    def parse(cls, created: str, confirmed: str) -> Dates:
        """Parse the dates as a record spells them.

        Raises:
            ValueError: a date is not in ISO 8601 form, or has no time zone.
        """
        return cls(_time(created), _time(confirmed))

    def merged(self, other: Dates) -> Dates:
        """Return the earlier creation and the later confirmation of the two."""
        return Dates(min(self.created, other.created), max(self.confirmed, other.confirmed))


@dataclass(frozen=True, slots=True)
class Record:
    """A manifest and the image URLs by which it is known."""

    manifest: Manifest
    images: Mapping[str, Dates]
    wanted: bool | None = None
    """Whether the layers of the image belong in the store; False for an image that is kept as metadata alone.

    None where the record does not say, as in records of earlier versions.
    """

    def confirm(
        self,
        image: ImageReference,
        confirmed: datetime,
        created: datetime | None = None,
        *,
        wanted: bool | None = None,
        current: bool = False,
    ) -> Record:
        """Return this record with `image` noted as meaning this manifest at `confirmed`, and since `created`.

        The earliest creation and the latest confirmation are kept. With `current`, `confirmed` is the time now, and a
        later one is dropped: a clock was wrong when it was noted. An image that is wanted stays wanted.
        """
        noted = Dates(created or confirmed, confirmed)
        merged = self.images.get(str(image), noted).merged(noted)
        if current:
            merged = replace(merged, confirmed=confirmed)
        images = _bounded({**self.images, str(image): merged}, str(image))
        return replace(self, images=images, wanted=wanted or self.wanted)

    def without_tag(self, tagged: ImageReference) -> Record:
        """Return this record with its own digest noted instead of a tag that means another manifest by now."""
        images = dict(self.images)
        dates = images.pop(str(tagged))
        untagged = replace(self, images=images)
        return untagged.confirm(replace(tagged, reference=self.manifest.digest), dates.confirmed, dates.created)

    def means(self, image: ImageReference) -> bool:
        """Tell whether `image` is this manifest: a digest in any repository, a tag only where it is noted."""
        return image.reference == self.manifest.digest or str(image) in self.images

    @property
    def has_tag(self) -> bool:
        """Whether a tag means this manifest."""
        return any("@" not in url for url in self.images)

    def render(self) -> bytes:
        """Return the content of the file."""
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
        """Parse the content of the file that is named after `digest`.

        Raises:
            RecordInvalid: it is damaged, or the record of another digest.
            ForeignRecord: it is not a record of this program.
        """
        try:
            document = parse_json(data)
            lacking = _KEYS - document.keys() if isinstance(document, dict) else _KEYS
            if len(lacking) > _MAY_LACK:
                raise ForeignRecord(f"not a record of this program: it has no {', '.join(sorted(lacking))}")
            if document["digest"] != digest:
                raise RecordInvalid(f"its digest {document['digest']} does not match the file name")
            manifest = Manifest.parse(document["manifest"].encode("utf-8"), document["mediaType"], digest)
            images = {
                str(ImageReference.parse_whole(url)): Dates.parse(dates["created"], dates["confirmed"])
                for url, dates in document["images"].items()
            }
        except (RegistryError, ManifestInvalid) as error:
            raise RecordInvalid(str(error)) from None
        except RecordInvalid:
            raise
        except ValueError as error:
            raise RecordInvalid(f"not JSON, or cut off: {error}") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise RecordInvalid(f"not a record of this program: {type(error).__name__} {error}") from None
        wanted = document.get("wanted")
        return cls(manifest, images, wanted if isinstance(wanted, bool) else None)


_MOST_IMAGES = 1000
"""Image URLs in a record: an upstream may show one manifest under any number of names."""


def _bounded(images: Mapping[str, Dates], confirmed: str) -> Mapping[str, Dates]:
    """Return at most `_MOST_IMAGES` of `images`, with the URL that was just `confirmed`.

    The upstreams have equal shares, so that none takes the place of the others' names. Of one upstream, URLs by
    digest, which are served without being noted, go first, then those confirmed least recently.
    """
    if len(images) <= _MOST_IMAGES:
        return images
    order = sorted(images, key=lambda url: (url != confirmed, "@" in url, -images[url].confirmed.timestamp(), url))
    counts: Counter[str] = Counter()
    ranks: dict[str, int] = {}
    for url in order:
        upstream = url.partition("/")[0]
        counts[upstream] += 1
        ranks[url] = counts[upstream]
    kept = sorted(order, key=ranks.__getitem__)[:_MOST_IMAGES]
    return {url: images[url] for url in kept}


@dataclass(frozen=True, slots=True)
class Confirmation:
    """An image URL that is to be noted in a record, as meaning its manifest at `confirmed`, and since `created`."""

    image: ImageReference
    confirmed: datetime
    created: datetime | None = None
    rivals: Mapping[Digest, bool] | None = None
    """The other records that have the tag, and whether each is that of an index; given if `confirmed` is now."""


def _spell(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise RecordInvalid(f"the time {text!r} has no time zone")
    return time


_LARGEST_RECORD = 8 * LARGEST_MANIFEST
"""Bytes. JSON takes at most six bytes for one byte of a manifest; the image URLs need the rest."""

_NOTE_PULLS_EVERY = 60.0
"""Seconds."""


def read_record(path: Path | str) -> Record:
    """Read the record at `path`. Blocks.

    Raises:
        RecordInvalid: it is damaged, foreign, or in the wrong folder.
        OSError: it cannot be read, or is no regular file.
    """
    # As text: with tens of thousands of records, making a Path for each takes as long as reading them.
    parent, _, name = os.fspath(path).rpartition("/")
    digest = Digest.from_hex(name)
    if digest is None:
        raise RecordInvalid("its name is not that of a record")
    try:
        data = read_regular(path, _LARGEST_RECORD)
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        raise ForeignRecord(reason(error)) from None
    record = Record.parse(data, digest)
    folder = parent.rpartition("/")[2]
    if (folder == LISTS_FOLDER) != record.manifest.is_list:
        raise ForeignRecord(f"a {record.manifest.media_type} does not belong in {folder}/")
    return record


class RecordFiles:
    """The folders fat/ and img/ below `root`.

    `pulls` is this process's own folder, for temporary files and for quarantine.
    """

    def __init__(self, root: Path, pulls: PullsFolder, files: Files, spend: Callable[[int], object]) -> None:
        """Set up the folders; `spend` is called with the size in bytes of each new record, before it is written.

        `spend` raises `OSError` when there is no room for the record.
        """
        self._spend = spend
        self._root = root
        self._pulls = pulls
        self._files = files

    def path(self, digest: Digest, *, is_list: bool) -> Path:
        """Return where the record of `digest` is kept."""
        return record_path(self._root, digest, is_list=is_list)

    def confirm(
        self,
        manifest: Manifest,
        names: Sequence[Confirmation],
        *,
        wanted: bool | None = None,
        whole: bool = False,
        known: bool = False,
    ) -> Sequence[Record]:
        """Write that the `names` mean `manifest`, as `Record.confirm` does, all by one write.

        What another process wrote meanwhile is kept. What is in that place and is not a record of this program, or
        cannot be read, is quarantined in bad/ of the pulls folder, or removed if there is no space for that.

        The rivals of a name lose it, so that it keeps its new meaning even if a date is wrong.

        The conditions are checked under the store's lock, so that no prune comes between the check and the write.

        Returns:
            The records that were written, as they are then on disk, that of `manifest` first. None is written with
            `whole`, if a blob is missing, and with `known`, if there is no record.

        Raises:
            OSError: the record cannot be read or written.
        """
        path = self.path(manifest.digest, is_list=manifest.is_list)
        with store_locked(self._root):
            if whole and missing_blobs(blobs_folder(self._root), manifest.required):
                return ()
            existing = self._existing(path)
            if known and existing is None:
                return ()
            before = existing or Record(manifest, {}, wanted)
            record = before
            for one in names:
                current = one.rivals is not None
                record = record.confirm(one.image, one.confirmed, one.created, wanted=wanted, current=current)
            self._put(path, record, new=existing is None)
            losing: dict[Path, list[ImageReference]] = {}
            for one in names:
                for rival, is_list in (one.rivals or {}).items():
                    losing.setdefault(self.path(rival, is_list=is_list), []).append(one.image)
            taken = [self._take_tags(rival, images) for rival, images in losing.items()]
        return [record, *(rival for rival in taken if rival is not None)]

    def _take_tags(self, path: Path, tagged: Sequence[ImageReference]) -> Record | None:
        """Take tags from the record at `path`, which keeps the time of its last pull.

        Returns:
            The record as it is then on disk. None if it was not written: it may not have the tags any more, or the
            disk is full, and then the newer date has to decide.
        """
        with suppress(RecordInvalid, OSError):
            record, pulled = read_record(path), path.stat().st_mtime_ns
            taken = [image for image in tagged if str(image) in record.images]
            for image in taken:
                record = record.without_tag(image)
            if taken:
                self._put(path, record)
                restore_time(path, pulled)
                return record
        return None

    def want(self, digest: Digest, wanted: bool) -> Record | None:
        """Note whether the layers of the image `digest` belong in the store, where its record does not say it yet.

        A record that says False can be changed to True, but one that says True is never changed.

        Returns:
            The record as it is then on disk, or None if there is none.

        Raises:
            OSError: the record cannot be read or written.
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
        """Write that `images` mean `manifest`, as a lost record did.

        `fetched` is the image URL by which the manifest was fetched since then; it is noted only if `images` has it.
        `wanted` is what the lost record said.

        Returns:
            The record as it is then on disk.

        Raises:
            OSError: the record cannot be read or written.
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
        except (RecordInvalid, OSError) as error:
            if isinstance(error, OSError) and not is_of_the_file(error):
                raise
            self._pulls.quarantine(path)
            return None

    def read_for_pull(self, path: Path, now: float) -> tuple[Record, bool]:
        """Read the record as `read_record` does, and tell whether `note_pull` has anything to note at time `now`."""
        return read_record(path), now - path.stat().st_mtime >= _NOTE_PULLS_EVERY


class PullTimes:
    """Notes when records were pulled, in threads for writing: this may wait for the disk, which must not delay a hit.

    At most one thread for each record: a disk that hangs must not take them all.
    """

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._being_noted: set[Path] = set()

    def note(self, path: Path, now: float) -> None:
        """Set the mtime of the record at `path` to `now`, unless it is less than a minute old."""
        if path not in self._being_noted:
            self._being_noted.add(path)
            noted = self._threads.write(note_pull, path, now)
            noted.addBoth(lambda _: self._being_noted.discard(path))


def note_pull(path: Path, now: float) -> None:
    """Set the mtime of the file to `now`, the time of a pull, unless it is less than a minute old. Blocks."""
    # A read-only store still serves hits.
    with suppress(OSError):
        if now - path.stat().st_mtime >= _NOTE_PULLS_EVERY:
            note_time(path, now)


def is_wanted(record: Record, blobs: Path) -> bool:
    """Tell whether the layers of an image belong in the store, whose blobs are in the folder `blobs`. Blocks.

    Foreign layers do not count. If the record does not say, the image is wanted when it is known by a tag, has no
    layers, or has a layer in the store. If the record says that it is not wanted, it counts as wanted once all its
    layers are in the store: other caches have pulled it through this one.
    """
    if record.wanted or (record.wanted is None and record.has_tag):
        return True
    config = {blob.digest for blob in record.manifest.blobs[:1]}
    layers = (blob.digest for blob in record.manifest.blobs if not blob.foreign and blob.digest not in config)
    here = (size_of_blob(f"{blobs}/{layer.hex}") is not None for layer in layers)
    if record.wanted is None:
        return next(here, True) or any(here)
    return next(here, False) and all(here)
