"""Reading an archive: a single pass over compressed tars, off the reactor thread, file closed at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
from twisted.internet.defer import Deferred

from ociregistry.archives.members import ArchiveInvalid
from ociregistry.pullthrough.loader import LoadStatus
from ociregistry.store.store import Store
from tests.images import make_image
from tests.unit.support.archives import (
    IMAGE_NAME,
    NAME,
    blob_name,
    docker_saved,
    layout,
    load,
    named,
    opened,
    write_tar,
)
from tests.unit.support.common import on_reactor, open_descriptors, turn

IMAGE = make_image("image", layer_size=300_000)
OTHER = make_image("other", layer_size=2_500_000)


def bytes_read() -> int:
    """Return the number of bytes that this process has read so far."""
    with Path("/proc/self/io").open() as file:
        return int(file.readline().removeprefix("rchar: "))


def bytes_moved() -> int:
    """Return the number of bytes that this process has read and written so far."""
    read, written, *_ = Path("/proc/self/io").read_text().splitlines()
    return int(read.removeprefix("rchar: ")) + int(written.removeprefix("wchar: "))


@on_reactor
async def test_names_of_an_image_are_noted_at_once(store: Store, root: Path, tmp_path: Path) -> None:
    """Not one after the other, each by reading and writing the record with all earlier ones."""
    image = make_image("names", layer_size=1000)
    names = [f"quay.io/team/app:v{number}" for number in range(300)]
    path = write_tar(tmp_path / "a.tar", docker_saved(image, *names, packed=True))
    for ended in (LoadStatus.LOADED, LoadStatus.PRESENT):
        before = bytes_moved()
        outcomes = await load(store, path)
        assert [(one.name, one.ended) for one in outcomes] == [(name, ended) for name in names]
        (record,) = (root / "img").iterdir()
        assert bytes_moved() - before < 20 * (record.stat().st_size + path.stat().st_size)


@pytest.mark.parametrize("kind", ["layout", "docker save"])
@pytest.mark.parametrize("compression", ["gz", "bz2", "xz", "zst"])
@on_reactor
async def test_compressed_tar_is_read_in_one_pass(store: Store, tmp_path: Path, compression: str, kind: str) -> None:
    many = make_image("many", layers=12, layer_size=300_000)
    backwards = {blob_name(blob.digest): blob.data for blob in reversed(many.blobs)}
    files = {
        "layout": {**backwards, **layout((many, {IMAGE_NAME: NAME}))},
        "docker save": dict(reversed(docker_saved(many, NAME).items())),
    }
    path = write_tar(tmp_path / "a.tar", files[kind], compression)
    before = bytes_read()
    (loaded,) = await load(store, path)
    assert loaded.blobs == 13
    assert bytes_read() - before < 3.5 * path.stat().st_size


@on_reactor
async def test_import_does_not_block_reactor(store: Store, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", named(OTHER), "gz")
    loading = Deferred.fromCoroutine(load(store, path))
    turns = 0
    while not loading.called:
        await turn()
        turns += 1
    assert turns > 5
    await loading


def test_archive_is_closed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", named(IMAGE), "gz")
    before = open_descriptors()
    with opened(path):
        assert open_descriptors() <= before + 1
    assert open_descriptors() <= before
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ArchiveInvalid):
        opened(path)
    assert open_descriptors() <= before
