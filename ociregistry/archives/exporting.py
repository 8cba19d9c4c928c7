"""Writes images of the store into an OCI image layout, in a tar: what `load`, skopeo and containerd read.

Everything here blocks and runs in a thread.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC
from pathlib import Path
from typing import BinaryIO, cast

from ociregistry.archives.layout import CONFIRMED, CREATED, IMAGE_NAME, INDEX, MARK, METADATA, REF_NAME, blob_name
from ociregistry.archives.members import PIECE, ArchiveInvalid, ExportFailed
from ociregistry.archives.opening import open_archive, read_contents
from ociregistry.manifests import OCI_INDEX, Manifest
from ociregistry.names import Digest
from ociregistry.store.files import Files
from ociregistry.store.index import Inventory, Row, StoredRecord


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An image that was not exported: the store lacks `missing` bytes of it."""

    name: str
    why: str
    missing: int = 0

    def __str__(self) -> str:
        """One line."""
        return f"left out: {self.name}: {self.why}"


@dataclass(frozen=True, slots=True)
class Exported:
    """What was exported: image names, blobs, and bytes of blobs."""

    images: int = 0
    blobs: int = 0
    bytes: int = 0
    had: int = 0
    """Blobs that were not written because the earlier export tells of them, and below their bytes."""
    had_bytes: int = 0
    left_out: tuple[LeftOut, ...] = ()


def export_images(
    inventory: Inventory,
    rows: Iterable[Row],
    target: Path,
    *,
    since: Path | None = None,
    advance: Callable[[int], None] = lambda count: None,
    files: Files | None = None,
) -> Exported:
    """Writes the images of these rows of `inventory` to the file `target`, which is whole or not there.

    Of a list, what the store has of it comes along. Blobs that a manifest in the earlier export `since` refers to
    are left out; manifests never are, so that this export can be the next one's `since`. An image that is not
    whole is left out with the lists that it is in; when nothing is left, nothing is written. `came` is told of
    the bytes of blobs as they are written.

    Blocks. Raises `ArchiveInvalid` for a bad `since`, else `ExportFailed`, also for a blob that is damaged.
    """
    had = _told_of(since) if since is not None else frozenset()
    try:
        selected, left_out = _select(inventory, rows, had)
        if selected.rows:
            with _whole(target, files or Files()) as stream:
                _Writer(target, stream, inventory.root, advance).write(selected)
    except OSError as error:
        raise ExportFailed(f"{target}: {error.strerror or error}") from error
    return Exported(
        images=len(selected.rows),
        blobs=len(selected.blobs),
        bytes=sum(selected.blobs.values()),
        had=len(selected.had),
        had_bytes=sum(selected.had.values()),
        left_out=tuple(left_out),
    )


def _told_of(since: Path) -> frozenset[Digest]:
    """The blobs that the manifests in the archive `since` refer to, be they in it or not."""
    archive = open_archive(since)
    if archive is None:
        raise ArchiveInvalid(since, "it is no archive")
    with archive:
        contents = read_contents(archive)
    return frozenset(blob.digest for manifest in contents.manifests.values() for blob in contents.needed(manifest))


@dataclass(frozen=True, slots=True)
class _Selected:
    """What is to be written."""

    rows: list[Row] = field(default_factory=list)
    manifests: dict[Digest, Manifest] = field(default_factory=dict)
    blobs: dict[Digest, int] = field(default_factory=dict)
    """Digest -> size in bytes."""
    had: dict[Digest, int] = field(default_factory=dict)
    """Of those that need not be written."""
    metadata: dict[str, list[Digest]] = field(default_factory=dict)
    """Image URL of an index -> the images of it that come without their layers."""


def _select(inventory: Inventory, rows: Iterable[Row], had: frozenset[Digest]) -> tuple[_Selected, list[LeftOut]]:
    selected = _Selected()
    left_out: list[LeftOut] = []
    for row in sorted(rows, key=lambda row: row.url):
        manifests = _tree(inventory, row.kept.manifest)
        metadata = [
            one
            for digest, one in manifests.items()
            if digest != row.kept.manifest.digest and inventory.is_metadata(digest)
        ]
        images = [one for one in manifests.values() if one not in metadata]
        described = [blob for one in images for blob in one.blobs] + [
            blob for one in metadata for blob in one.blobs[:1]
        ]
        named = {blob.digest: blob.size for blob in described}
        blobs = {digest: size for digest, size in named.items() if digest not in had}
        missing = [size for digest, size in blobs.items() if inventory.blob_size(digest) != size]
        if all(image.is_list for image in images):
            left_out.append(LeftOut(row.url, "the store has none of the images that it lists"))
        elif missing:
            why = f"the store lacks {len(missing)} of its blobs, {sum(missing)} bytes"
            left_out.append(LeftOut(row.url, why, sum(missing)))
        else:
            selected.rows.append(row)
            selected.metadata[row.url] = [one.digest for one in metadata]
            selected.manifests.update(manifests)
            selected.blobs.update(blobs)
            selected.had.update({digest: size for digest, size in named.items() if digest in had})
    return selected, left_out


def _tree(inventory: Inventory, root: Manifest) -> dict[Digest, Manifest]:
    """The manifest, and what the store has of those that it leads to."""
    found: dict[Digest, Manifest] = {}
    wanted = [root]
    while wanted:
        manifest = wanted.pop()
        if manifest.digest not in found:
            found[manifest.digest] = manifest
            wanted += [
                child.manifest for child in inventory.children(manifest.digest) if _comes_along(child, inventory)
            ]
    return found


def _comes_along(child: StoredRecord, inventory: Inventory) -> bool:
    """Tell whether a child of an index is exported with it: what is here as metadata, only with its config."""
    config = child.manifest.config
    if config is None or not inventory.is_metadata(child.manifest.digest):
        return True
    return inventory.blob_size(config.digest) == config.size


@contextmanager
def _whole(target: Path, files: Files) -> Iterator[BinaryIO]:
    """A file that appears as `target` when all is written and on disk, or not at all."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    file = files.create(temporary)
    try:
        with open(file.fileno(), "wb", closefd=False) as stream:
            yield stream
        files.commit(file, temporary, target)
    except BaseException:
        files.unlink(temporary)
        raise
    finally:
        file.release()


class _Writer:
    """Writes a layout: the same images give the same bytes."""

    def __init__(self, target: Path, stream: BinaryIO, root: Path, advance: Callable[[int], None]) -> None:
        self._target = target
        self._tar = tarfile.TarFile(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT, copybufsize=PIECE)
        self._blobs = root / "blobs"
        self._advance = advance

    def write(self, selected: _Selected) -> None:
        """Writes all of it; raises `ExportFailed` for a blob that is damaged, and `OSError`."""
        self._add(MARK, _json({"imageLayoutVersion": "1.0.0"}))
        self._add(INDEX, _json(_index(selected)))
        for digest, manifest in sorted(selected.manifests.items()):
            self._add(blob_name(digest), manifest.data)
        for digest, size in sorted(selected.blobs.items()):
            self._add_blob(digest, size)
        self._tar.close()

    def _add(self, name: str, data: bytes) -> None:
        self._tar.addfile(_header(name, len(data)), io.BytesIO(data))

    def _add_blob(self, digest: Digest, size: int) -> None:
        what = f"{self._target}: the store's blob {digest}"
        try:
            file = (self._blobs / digest.hex).open("rb")
        except OSError as error:
            raise ExportFailed(f"{what} cannot be read: {error.strerror}") from error
        with file:
            hashed = _Hashed(file, digest, self._advance)
            self._tar.addfile(_header(blob_name(digest), size), cast("BinaryIO", hashed))
        if not hashed.holds:
            raise ExportFailed(f"{what} is damaged")


class _Hashed:
    """A file that is hashed as it is read."""

    def __init__(self, file: BinaryIO, digest: Digest, advance: Callable[[int], None]) -> None:
        self._file = file
        self._digest = digest
        self._hasher = digest.hasher()
        self._advance = advance

    @property
    def holds(self) -> bool:
        """Whether what was read has the digest."""
        return self._hasher.hexdigest() == self._digest.hex

    def read(self, count: int) -> bytes:
        """At most `count` bytes."""
        data = self._file.read(count)
        self._hasher.update(data)
        self._advance(len(data))
        return data


def _header(name: str, size: int) -> tarfile.TarInfo:
    # Its dates and owners are those of nobody.
    header = tarfile.TarInfo(name)
    header.size = size
    return header


def _index(selected: _Selected) -> dict[str, object]:
    descriptors = [_descriptor(row, selected.metadata[row.url]) for row in selected.rows]
    return {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": descriptors}


def _descriptor(row: Row, metadata: Sequence[Digest]) -> dict[str, object]:
    manifest = row.kept.manifest
    annotations = {
        IMAGE_NAME: row.url,
        REF_NAME: row.url,
        CREATED: row.dates.created.astimezone(UTC).isoformat(),
        CONFIRMED: row.dates.confirmed.astimezone(UTC).isoformat(),
        **({METADATA: " ".join(sorted(metadata))} if metadata else {}),
    }
    return {
        "mediaType": manifest.media_type,
        "digest": manifest.digest,
        "size": manifest.size,
        "annotations": annotations,
    }


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
