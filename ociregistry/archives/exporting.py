"""Export images of the store to an OCI image layout in a tar, which `load`, skopeo and containerd can read.

All functions block and run in a thread.
"""

from __future__ import annotations

import io
import json
import secrets
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC
from pathlib import Path
from typing import BinaryIO, cast

from ociregistry.archives.compression import write_zstd
from ociregistry.archives.layout import CONFIRMED, CREATED, IMAGE_NAME, INDEX, MARK, METADATA, REF_NAME, blob_name
from ociregistry.archives.members import PIECE, ArchiveInvalid, ExportFailed
from ociregistry.archives.opening import open_archive, read_contents
from ociregistry.config.values import count_text
from ociregistry.manifests import OCI_INDEX, Manifest
from ociregistry.names import Digest
from ociregistry.pullthrough.loader import without_foreign_layers
from ociregistry.store.blobs import open_blob
from ociregistry.store.files import Files, hold, is_of_the_file, open_regular, reason
from ociregistry.store.partials import create_held
from ociregistry.store.paths import blob_path
from ociregistry.store.snapshot import Row, Snapshot, StoredRecord


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An image that was not exported; `missing` is the number of bytes that the store lacks of it."""

    name: str
    why: str
    missing: int = 0

    def __str__(self) -> str:
        """Return one line for the operator."""
        return f"left out: {self.name}: {self.why}"


@dataclass(frozen=True, slots=True)
class Exported:
    """The result of an export: the numbers of image names, blobs, and bytes of blobs."""

    images: int = 0
    blobs: int = 0
    bytes: int = 0
    had: int = 0
    """Blobs that were left out because the earlier export refers to them."""
    had_bytes: int = 0
    """The bytes of those blobs."""
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    """One line for each image that was exported without foreign layers."""


def export_images(
    snapshot: Snapshot,
    rows: Iterable[Row],
    target: Path,
    *,
    since: Path | None = None,
    zstd: bool = False,
    advance: Callable[[int], None] = lambda count: None,
    files: Files | None = None,
) -> Exported:
    """Write the images of these rows of `snapshot` to the file `target`, completely or not at all.

    Of an index, the children in the store are exported with it. Blobs that a manifest in the earlier export `since`
    refers to are left out; manifests are always written, so that this export can be the `since` of the next. An
    incomplete image is left out, with the indexes that name it, but not for want of foreign layers; if no image
    remains, no file is written. With `zstd`, the file is compressed. `advance` is called with the number of bytes of
    blobs as they are written. Blocks.

    Raises:
        ArchiveInvalid: `since` is not a valid archive.
        ExportFailed: the file cannot be written, or a blob is missing or damaged.
    """
    had = _blobs_named_in(since) if since is not None else frozenset()
    try:
        selected, left_out = _select(snapshot, rows, had)
        if selected.rows:
            with _whole(target, files or Files()) as file, (write_zstd if zstd else nullcontext)(file) as stream:
                _Writer(target, stream, snapshot.root, advance).write(selected)
    except OSError as error:
        raise ExportFailed(f"{target}: {error.strerror or error}") from error
    return Exported(
        images=len(selected.rows),
        blobs=len(selected.blobs),
        bytes=sum(selected.blobs.values()),
        had=len(selected.had),
        had_bytes=sum(selected.had.values()),
        left_out=tuple(left_out),
        notes=tuple(selected.notes),
    )


def _blobs_named_in(since: Path) -> frozenset[Digest]:
    """Return the blobs that the manifests in the archive `since` refer to, whether it has them or not.

    Raises:
        ArchiveInvalid: it is not a valid archive.
    """
    archive = open_archive(since)
    if archive is None:
        raise ArchiveInvalid(since, "not an archive")
    with archive:
        contents = read_contents(archive)
    return frozenset(blob.digest for manifest in contents.manifests.values() for blob in contents.needed(manifest))


@dataclass(frozen=True, slots=True)
class _Selected:
    """The images to write."""

    rows: list[Row] = field(default_factory=list)
    manifests: dict[Digest, Manifest] = field(default_factory=dict)
    blobs: dict[Digest, int] = field(default_factory=dict)
    """The blobs to write: digest -> size in bytes."""
    had: dict[Digest, int] = field(default_factory=dict)
    """The blobs that the earlier export refers to: digest -> size in bytes."""
    metadata: dict[str, list[Digest]] = field(default_factory=dict)
    """Image URL of an index -> its images that are exported as metadata, without their layers."""
    notes: list[str] = field(default_factory=list)


def _select(snapshot: Snapshot, rows: Iterable[Row], had: frozenset[Digest]) -> tuple[_Selected, list[LeftOut]]:
    selected = _Selected()
    left_out: list[LeftOut] = []
    for row in sorted(rows, key=lambda row: row.url):
        manifests = _tree(snapshot, row.stored.manifest)
        metadata = [
            one
            for digest, one in manifests.items()
            if digest != row.stored.manifest.digest and snapshot.is_metadata(digest)
        ]
        images = [one for one in manifests.values() if one not in metadata]
        described = [blob for one in images for blob in one.blobs] + [
            blob for one in metadata for blob in one.blobs[:1]
        ]
        named = {blob.digest: blob.size for blob in described}
        foreign: dict[Digest, int] = {}
        for one in images:
            foreign |= {
                digest: size
                for digest, size in one.foreign_layers.items()
                if digest not in had and snapshot.blob_size(digest) != size
            }
        blobs = {digest: size for digest, size in named.items() if digest not in had and digest not in foreign}
        missing = [size for digest, size in blobs.items() if not _can_be_opened(snapshot, digest, size)]
        if all(image.is_list for image in images):
            left_out.append(LeftOut(row.url, "the store has none of the images that it lists"))
        elif missing:
            why = f"the store lacks {len(missing)} of its blobs, {count_text(sum(missing), 'byte')}"
            left_out.append(LeftOut(row.url, why, sum(missing)))
        else:
            selected.rows.append(row)
            if foreign:
                selected.notes.append(f"{row.url}: {without_foreign_layers(foreign)}")
            selected.metadata[row.url] = [one.digest for one in metadata]
            selected.manifests.update(manifests)
            selected.blobs.update(blobs)
            selected.had.update({digest: size for digest, size in named.items() if digest in had})
    return selected, left_out


def _can_be_opened(snapshot: Snapshot, digest: Digest, size: int) -> bool:
    """Tell whether the store has the blob with this size, and it can be opened.

    Raises:
        OSError: it cannot be opened for a reason that is not the file's own.
    """
    try:
        opened = open_blob(blob_path(snapshot.root, digest))
    except OSError as error:
        if not is_of_the_file(error):
            raise
        return False
    if opened is None:
        return False
    file, found = opened
    file.release()
    return found.size == size


def _tree(snapshot: Snapshot, root: Manifest) -> dict[Digest, Manifest]:
    """Return the manifest and all its descendants in the store that are exported with it."""
    found: dict[Digest, Manifest] = {}
    wanted = [root]
    while wanted:
        manifest = wanted.pop()
        if manifest.digest not in found:
            found[manifest.digest] = manifest
            children = (snapshot.records[digest] for digest in snapshot.index.children(manifest.digest))
            wanted += [child.manifest for child in children if _is_exported(child, snapshot)]
    return found


def _is_exported(child: StoredRecord, snapshot: Snapshot) -> bool:
    """Tell whether a child of an index is exported with it; one stored as metadata only if its config is stored."""
    config = child.manifest.config
    if config is None or not snapshot.is_metadata(child.manifest.digest):
        return True
    return snapshot.blob_size(config.digest) == config.size


_UNFINISHED = ".ociregistry-export-"
"""The beginning of the names of archives that are being written, and of what killed exports left."""


@contextmanager
def _whole(target: Path, files: Files) -> Iterator[BinaryIO]:
    """Yield a file that becomes `target` once everything is written and on disk; remove it on an error.

    Each export holds a lock on its file while it writes. Unlocked ones were left by exports that were killed, and
    are removed.
    """
    for left in target.parent.glob(f"{_UNFINISHED}*"):
        _remove_unlocked(left, files)
    temporary = target.with_name(f"{_UNFINISHED}{secrets.token_hex(8)}")
    file, held = create_held(temporary, files)
    try:
        with open(file.fileno(), "wb", closefd=False) as stream:
            yield stream
        files.commit(file, temporary, target)
    except BaseException:
        files.unlink(temporary)
        raise
    finally:
        file.release()
        held.release()


def _remove_unlocked(path: Path, files: Files) -> None:
    # A file that cannot be removed does not prevent the export.
    with suppress(OSError):
        held = hold(path, writes=False)
        if held is not None:
            try:
                files.unlink(path)
            finally:
                held.release()


_MEND = "run verify --repair, or leave its images out by --pattern"


class _Writer:
    """Writes an image layout; the same images give the same bytes."""

    def __init__(self, target: Path, stream: BinaryIO, root: Path, advance: Callable[[int], None]) -> None:
        self._target = target
        self._tar = tarfile.TarFile(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT, copybufsize=PIECE)
        self._root = root
        self._advance = advance

    def write(self, selected: _Selected) -> None:
        """Write the whole layout.

        Raises:
            ExportFailed: a blob is damaged or cannot be read.
            OSError: the file cannot be written.
        """
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
            file = open_regular(blob_path(self._root, digest))
        except OSError as error:
            raise ExportFailed(f"{what} cannot be read: {reason(error)}: {_MEND}") from error
        try:
            with open(file.fileno(), "rb", closefd=False) as stream:
                hashed = _Hashed(stream, digest, size, what, self._advance)
                self._tar.addfile(_header(blob_name(digest), size), cast("BinaryIO", hashed))
        finally:
            file.release()
        if not hashed.holds:
            raise ExportFailed(f"{what} is damaged: {_MEND}")


class _Hashed:
    """A blob of `size` bytes that is hashed while it is read."""

    def __init__(self, file: BinaryIO, digest: Digest, size: int, what: str, advance: Callable[[int], None]) -> None:
        self._file = file
        self._left = size
        self._digest = digest
        self._what = what
        self._hasher = digest.hasher()
        self._advance = advance

    @property
    def holds(self) -> bool:
        """Whether the bytes read so far have the digest."""
        return self._hasher.hexdigest() == self._digest.hex

    def read(self, count: int) -> bytes:
        """Read at most `count` bytes.

        Raises:
            ExportFailed: they cannot be read, or the file ends before.
        """
        try:
            data = self._file.read(count)
        except OSError as error:
            raise ExportFailed(f"{self._what} cannot be read: {reason(error)}: {_MEND}") from error
        self._left -= len(data)
        if len(data) < count:
            raise ExportFailed(f"{self._what} ends {count_text(self._left, 'byte')} too early: {_MEND}")
        self._hasher.update(data)
        self._advance(len(data))
        return data


def _header(name: str, size: int) -> tarfile.TarInfo:
    # Zero times and owners, so that archives are reproducible.
    header = tarfile.TarInfo(name)
    header.size = size
    return header


def _index(selected: _Selected) -> dict[str, object]:
    descriptors = [_descriptor(row, selected.metadata[row.url]) for row in selected.rows]
    return {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": descriptors}


def _descriptor(row: Row, metadata: Sequence[Digest]) -> dict[str, object]:
    manifest = row.stored.manifest
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
