"""Reading an archive: few passes over compressed tars, off the reactor thread, file closed at the end."""

from __future__ import annotations

from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any

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


class CountedFile(FileIO):
    """A file for reading that counts the bytes that are read from it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.count = 0

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer) or 0
        self.count += count
        return count


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
async def test_compressed_tar_is_read_in_few_passes(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str, kind: str
) -> None:
    """Once for its list of files, once for the digests where it lacks them, and once for all blobs together."""
    many = make_image("many", layers=12, layer_size=300_000)
    backwards = {blob_name(blob.digest): blob.data for blob in reversed(many.blobs)}
    files = {
        "layout": {**backwards, **layout((many, {IMAGE_NAME: NAME}))},
        "docker save": dict(reversed(docker_saved(many, NAME).items())),
    }
    path = write_tar(tmp_path / "a.tar", files[kind], compression)
    file = CountedFile(path)
    really_open = Path.open

    def open_counted(one: Path, *args: Any, **options: Any) -> Any:
        return BufferedReader(file) if one == path else really_open(one, *args, **options)

    monkeypatch.setattr(Path, "open", open_counted)
    (loaded,) = await load(store, path)
    assert loaded.blobs == 13
    times = {"layout": 2, "docker save": 3}[kind]
    assert file.count == pytest.approx(times * path.stat().st_size, rel=0.01)


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
