"""An import is atomic: a damaged archive or a full disk leaves the store unchanged."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from twisted.internet.defer import CancelledError, Deferred

from ociregistry.archives.members import ArchiveInvalid, LoadFailed
from ociregistry.config.values import Reserve
from ociregistry.names import Digest
from ociregistry.store.files import Files, SharedFile
from ociregistry.store.records import Dates
from ociregistry.store.store import Store
from tests.images import Image, Manifest, digest_of, make_image, make_index
from tests.unit.support.archives import (
    IMAGE_NAME,
    NAME,
    RecordedProgress,
    blob_name,
    files_below,
    go_record,
    hex_of,
    image_blobs,
    kept,
    layout,
    load,
    named,
    to_json,
    write_folder,
    write_tar,
)
from tests.unit.support.common import image, on_reactor, open_descriptors, until

IMAGE = make_image("image", layer_size=300_000)
OTHER = make_image("other", layer_size=2_500_000)
INDEX = make_index("index")
APP = "quay.io/team/app:1"
DAY = datetime(2026, 1, 1, tzinfo=UTC)
DATES = Dates(DAY, DAY + timedelta(days=1))


def invalid_archives() -> dict[str, dict[str, bytes]]:
    """Return archives with one error each, behind much valid content."""
    files = layout((OTHER, {IMAGE_NAME: NAME}), (IMAGE, {IMAGE_NAME: APP}))
    last = max(blob_name(blob.digest) for blob in (*OTHER.blobs, *IMAGE.blobs))
    wrong = bytes([files[last][0] ^ 1]) + files[last][1:]
    image_folder = {
        f"img/{hex_of(OTHER.manifest.digest)}": kept(OTHER, {NAME: DATES}),
        f"img/{hex_of(IMAGE.manifest.digest)}": go_record(IMAGE.manifest, APP),
        **image_blobs(OTHER, IMAGE),
    }
    blob = f"blobs/{hex_of(IMAGE.layers[1].digest)}"
    document = json.loads(IMAGE.manifest.data)
    document["layers"][1]["size"] += 1
    sized = Manifest(digest_of(to_json(document)), to_json(document), IMAGE.manifest.media_type)
    return {
        "size in the manifest": layout(
            (OTHER, {IMAGE_NAME: NAME}), (Image(sized, IMAGE.blobs, ""), {IMAGE_NAME: APP})
        ),
        "digest": {**files, last: wrong},
        "longer": {**files, last: files[last] + b"x"},
        "shorter": {**files, last: files[last][:-1]},
        "image folder's digest": {**image_folder, blob: bytes(len(image_folder[blob]))},
        "image folder's size": {**image_folder, blob: b""},
    }


@pytest.mark.parametrize("write", [write_tar, write_folder])
@pytest.mark.parametrize("what", list(invalid_archives()))
@on_reactor
async def test_invalid_archive_leaves_store_unchanged(
    store: Store, root: Path, tmp_path: Path, what: str, write: Callable[..., Path]
) -> None:
    await load(store, write_tar(tmp_path / "first.tar", named(INDEX)))
    before = files_below(root)
    path = write(tmp_path / "archive", invalid_archives()[what])
    descriptors = open_descriptors()
    with pytest.raises(ArchiveInvalid, match=f"^{path}: it (has|does not have|ends)[^\n]*: blobs/"):
        await load(store, path)
    assert files_below(root) == before
    await until(lambda: open_descriptors() <= descriptors)


@pytest.mark.parametrize("compression", ["", "gz"])
@on_reactor
async def test_truncated_tar_leaves_store_unchanged(
    store: Store, root: Path, tmp_path: Path, compression: str
) -> None:
    path = write_tar(tmp_path / "a.tar", named(IMAGE), compression)
    data = path.read_bytes()
    before = files_below(root)
    for length in (700, len(data) // 3, len(data) // 2, len(data) - 12_000):
        path.write_bytes(data[:length])
        with pytest.raises(ArchiveInvalid):
            await load(store, path)
        assert files_below(root) == before


@on_reactor
async def test_tar_truncated_during_import_leaves_store_unchanged(store: Store, root: Path, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", named(OTHER))
    before = files_below(root)

    class TruncatingProgress(RecordedProgress):
        def advance(self, name: str, count: int) -> None:
            os.truncate(path, 10_000)

    with pytest.raises(ArchiveInvalid, match="it ends too early"):
        await load(store, path, TruncatingProgress())
    assert files_below(root) == before


@on_reactor
async def test_cancelled_import_leaves_no_files(store: Store, root: Path, tmp_path: Path) -> None:
    before = files_below(root)
    path = write_tar(tmp_path / "a.tar", named(OTHER))

    progress = RecordedProgress()
    loading = Deferred.fromCoroutine(load(store, path, progress))
    await until(lambda: progress.state)
    assert files_below(root) != before
    loading.cancel()
    with pytest.raises(CancelledError):
        await loading
    assert files_below(root) == before


class FullDisk(Files):
    """Fail writes of partials beyond `free` bytes, and the operations that the test forbids."""

    def __init__(self, room: int = 10**9, *, renames: int = 10**9) -> None:
        self.room, self.renames = room, renames

    def write(self, file: SharedFile, data: bytes, offset: int) -> None:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(file, data, offset)

    def rename(self, path: Path, target: Path) -> None:
        self.renames -= 1
        if self.renames < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().rename(path, target)


@pytest.mark.parametrize("room", [200, 1000, 200_000, 700_000])
@on_reactor
async def test_full_disk_leaves_store_unchanged(
    open_store: Callable[..., Store], root: Path, tmp_path: Path, room: int
) -> None:
    store = open_store(files=FullDisk(room))
    before = files_below(root)
    path = write_tar(tmp_path / "a.tar", layout((IMAGE, {IMAGE_NAME: NAME}), (OTHER, {IMAGE_NAME: APP})))
    with pytest.raises(LoadFailed) as caught:
        await load(store, path)
    assert str(caught.value) == f"{path}: cannot be stored: No space left on device"
    assert files_below(root) == before


@on_reactor
async def test_import_exceeding_reserve_is_refused(
    open_store: Callable[..., Store], root: Path, tmp_path: Path
) -> None:
    store = open_store(reserve=Reserve(1.0))
    before = files_below(root)
    path = write_tar(tmp_path / "a.tar", named(INDEX))
    with pytest.raises(LoadFailed, match=r"cannot be stored: the disk of .* has no room: [0-9]+ bytes"):
        await load(store, path)
    assert files_below(root) == before


@pytest.mark.parametrize("renames", range(9))
@on_reactor
async def test_failed_import_leaves_no_name_without_content(
    open_store: Callable[..., Store], root: Path, tmp_path: Path, renames: int
) -> None:
    store = open_store(files=FullDisk(renames=renames))
    path = write_tar(tmp_path / "a.tar", named(INDEX))
    with pytest.raises(LoadFailed, match="Input/output error"):
        await load(store, path)
    assert [name for name in files_below(root) if name.startswith("pulls/") and "lock" not in name] == []
    again = open_store()
    assert await again.manifest(image(NAME)) is None
    for one in INDEX.images:
        assert await again.missing(Digest(one.manifest.digest)) in (None, {})
