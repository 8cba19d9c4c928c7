"""Exports: OCI layouts that bring the same images elsewhere, whole or not at all."""

from __future__ import annotations

import errno
import gzip
import json
import os
import tarfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ociregistry.archives.exporting import Exported, export_images
from ociregistry.archives.failures import ArchiveFailure, ArchiveInvalid, ExportFailed
from ociregistry.manifests import OCI_MANIFEST, Manifest
from ociregistry.names import Digest
from ociregistry.pullthrough.outcomes import Ended
from ociregistry.store.files import Files, SharedFile
from ociregistry.store.inventory import Inventory
from ociregistry.store.records import Dates
from ociregistry.store.store import Store
from tests.images import Image, Index, make_image, make_index
from tests.unit.archive_files import (
    NAME,
    blob_name,
    docker_saved,
    hex_of,
    image_blobs,
    kept,
    load,
    to_json,
    write_folder,
    write_tar,
)
from tests.unit.doubles import image, manifest, on_reactor

IMAGE = make_image("export", layer_size=1_500_000)
UPPER = make_image("upper", layers=1, base=IMAGE)
INDEX = make_index("export")
DOCKER = make_image("docker", docker=True)
APP, UP = "quay.io/team/app:1", "registry/up:2"
DAY = datetime(2026, 1, 1, 12, 30, 0, 123456, tzinfo=UTC)
DATES = Dates(DAY, DAY + timedelta(days=1))
LATER = Dates(DAY + timedelta(hours=1), DAY + timedelta(days=2))
BLOBS = sorted(blob.digest for one in (INDEX.images[0], UPPER, IMAGE, DOCKER) for blob in one.blobs)


def store_with(root: Path, urls: Mapping[str, Dates], *images: Image | Index) -> Path:
    """The folder of a store that has these images; the first has the names, the others but their digests."""
    for one in images:
        names = urls if one is images[0] else {f"docker.io/library/nginx@{one.manifest.digest}": DATES}
        folder = "fat" if isinstance(one, Index) else "img"
        blobs = {} if isinstance(one, Index) else image_blobs(one)
        write_folder(root, {f"{folder}/{hex_of(one.manifest.digest)}": kept(one, names), **blobs})
    return root


def export(source: Path, target: Path, pattern: str = "", **how: Any) -> Exported:
    """Exports the rows in whose name the pattern is."""
    inventory = Inventory.read(source)
    return export_images(inventory, [row for row in inventory.rows if pattern in row.url], target, **how)


def members(path: Path) -> list[str]:
    """The names of all members, in order."""
    with tarfile.open(path) as tar:
        return tar.getnames()


def rows(root: Path) -> dict[str, tuple[str, Dates]]:
    """What each image URL of a store means, and its dates."""
    return {row.url: (row.kept.manifest.digest, row.dates) for row in Inventory.read(root).rows}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The folder of a store with a list, of which one platform is cached, and two images with the same layers."""
    root = tmp_path / "source"
    store_with(root, {NAME: DATES}, INDEX, INDEX.images[0])
    store_with(root, {APP: LATER, "localhost:5000/a/b/c:x": DATES}, IMAGE)
    store_with(root, {UP: DATES}, UPPER)
    return store_with(root, {"quay.io/docker:1": DATES}, DOCKER)


@pytest.mark.parametrize("packed", [False, True])
@on_reactor
async def test_there_and_back(store: Store, root: Path, source: Path, tmp_path: Path, packed: bool) -> None:
    target = tmp_path / "out.tar"
    exported = export(source, target)
    assert exported.images == len(rows(source)) == 6
    assert exported.left_out == ()
    if packed:
        target = tmp_path / "packed"
        target.write_bytes(gzip.compress((tmp_path / "out.tar").read_bytes()))
    outcomes = await load(store, target)
    assert [outcome.ended for outcome in outcomes] == [Ended.LOADED] * 6
    assert sum(outcome.blobs for outcome in outcomes) == exported.blobs
    assert sum(outcome.bytes for outcome in outcomes) == exported.bytes
    assert rows(root) == rows(source)
    assert {path.name for path in (root / "blobs").iterdir()} == {path.name for path in (source / "blobs").iterdir()}
    assert {path.name: path.read_bytes() for path in (root / "fat").iterdir()} == {
        path.name: path.read_bytes() for path in (source / "fat").iterdir()
    }
    export(root, tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == (tmp_path / "out.tar").read_bytes()


def test_what_is_in_it(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.tar"
    exported = export(source, target, "nginx:")
    child = INDEX.images[0]
    assert exported == Exported(images=1, blobs=3, bytes=sum(len(blob.data) for blob in child.blobs))
    manifests = sorted(blob_name(one.manifest.digest) for one in (INDEX, child))
    blobs = sorted(blob_name(blob.digest) for blob in child.blobs)
    assert members(target) == ["oci-layout", "index.json", *manifests, *blobs]
    with tarfile.open(target) as tar:
        assert {(entry.mtime, entry.uid, entry.gid, entry.uname, entry.mode) for entry in tar} == {
            (0, 0, 0, "", 0o644)
        }
        index = tar.extractfile("index.json")
        mark = tar.extractfile("oci-layout")
        assert index is not None
        assert mark is not None
        assert json.load(mark) == {"imageLayoutVersion": "1.0.0"}
        assert json.load(index) == {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [
                {
                    "mediaType": INDEX.manifest.media_type,
                    "digest": INDEX.manifest.digest,
                    "size": len(INDEX.manifest.data),
                    "annotations": {
                        "io.containerd.image.name": NAME,
                        "org.opencontainers.image.ref.name": NAME,
                        "ociregistry.created": "2026-01-01T12:30:00.123456+00:00",
                        "ociregistry.confirmed": "2026-01-02T12:30:00.123456+00:00",
                    },
                }
            ],
        }


def test_it_can_be_read_by_others(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "out.tar")
    assert (tmp_path / "out.tar").stat().st_mode & 0o777 == 0o644


def test_the_same_images_give_the_same_bytes(source: Path, tmp_path: Path) -> None:
    inventory = Inventory.read(source)
    export_images(inventory, inventory.rows, tmp_path / "one.tar")
    export_images(inventory, reversed(inventory.rows), tmp_path / "other.tar")
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "other.tar").read_bytes()
    _, _, *names = members(tmp_path / "one.tar")
    count = len(inventory.records)
    assert names == sorted(names[:count]) + sorted(names[count:])


@on_reactor
async def test_longer_digests(store: Store, root: Path, tmp_path: Path) -> None:
    data = b"a layer"
    layer = Digest.of(data, "sha512")
    config = Digest.of(b"{}")
    described = [{"mediaType": "x", "digest": config, "size": 2}, {"mediaType": "x", "digest": layer, "size": 7}]
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": described[0], "layers": [described[1]]}
    made = Manifest.parse(to_json(document), OCI_MANIFEST, Digest.of(to_json(document), "sha512"))
    await store.keep(made, image(NAME), DATES)
    write_folder(root, {f"blobs/{layer.hex}": data, f"blobs/{config.hex}": b"{}"})
    target = tmp_path / "out.tar"
    export(root, target)
    assert {f"blobs/sha512/{layer.hex}", f"blobs/sha512/{made.digest.hex}"} < set(members(target))
    (root / "blobs" / layer.hex).unlink()
    (outcome,) = await load(store, target)
    assert (outcome.ended, outcome.blobs) == (Ended.LOADED, 1)


@on_reactor
async def test_an_old_name_goes_by_its_digest(store: Store, root: Path, tmp_path: Path) -> None:
    source = store_with(tmp_path / "source", {NAME: DATES}, IMAGE)
    store_with(source, {NAME: LATER}, DOCKER)
    export(source, tmp_path / "out.tar")
    await load(store, tmp_path / "out.tar")
    assert await store.manifest(image(NAME)) == manifest(DOCKER)
    assert rows(root) == rows(source)
    assert f"docker.io/library/nginx@{IMAGE.manifest.digest}" in rows(root)


def test_progress(source: Path, tmp_path: Path) -> None:
    came: list[int] = []
    exported = export(source, tmp_path / "out.tar", came=came.append)
    assert sum(came) == exported.bytes
    assert max(came) == 1024 * 1024


# Only what is new


@on_reactor
async def test_a_delta_and_its_delta(store: Store, root: Path, source: Path, tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"{number}.tar" for number in range(3))
    export(source, first, "team/app")
    delta = export(source, second, "/up:", since=first)
    own = len(UPPER.config.data) + len(UPPER.layers[-1].data)
    shared = sum(len(layer.data) for layer in IMAGE.layers)
    assert delta == Exported(images=1, blobs=2, bytes=own, had=2, had_bytes=shared)
    nothing = export(source, third, "/up:", since=second)
    assert nothing == Exported(images=1, had=4, had_bytes=own + shared)
    assert members(third) == ["oci-layout", "index.json", blob_name(UPPER.manifest.digest)]
    for path in (second, third):
        (failed,) = await load(store, path)
        assert (failed.name, failed.ended) == (UP, Ended.FAILED)
    for path in (first, second, third):
        for outcome in await load(store, path):
            assert outcome.ended is (Ended.THERE if path is third else Ended.LOADED)
    assert rows(root) == {url: row for url, row in rows(source).items() if url in (APP, UP)}


def test_what_the_earlier_one_had_need_not_be_there(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "first.tar", "team/app")
    (source / "blobs" / hex_of(IMAGE.layers[0].digest)).unlink()
    assert export(source, tmp_path / "delta.tar", "/up:", since=tmp_path / "first.tar").images == 1


def test_a_bad_earlier_one(source: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{NAME}\n")
    for since in (tmp_path / "list.txt", tmp_path / "nothing"):
        with pytest.raises(ArchiveInvalid, match=f"^{since}: "):
            export(source, tmp_path / "out.tar", since=since)
    assert not (tmp_path / "out.tar").exists()


def test_another_kind_of_earlier_one(source: Path, tmp_path: Path) -> None:
    saved = write_tar(tmp_path / "saved.tar", docker_saved(IMAGE, APP, packed=True))
    assert export(source, tmp_path / "out.tar", "team/app", since=saved).blobs == 0


# What is not whole


def test_an_image_that_is_not_whole_is_left_out(source: Path, tmp_path: Path) -> None:
    (source / "blobs" / hex_of(UPPER.layers[-1].digest)).write_bytes(b"half")
    (source / "blobs" / hex_of(UPPER.config.digest)).unlink()
    exported = export(source, tmp_path / "out.tar")
    (left_out,) = exported.left_out
    missing = len(UPPER.config.data) + len(UPPER.layers[-1].data)
    assert (left_out.name, left_out.missing) == (UP, missing)
    assert str(left_out) == f"left out: {UP}: the store lacks 2 of its blobs, {missing} bytes"
    assert exported.images == 5
    assert blob_name(UPPER.manifest.digest) not in members(tmp_path / "out.tar")


def test_the_lists_with_it_are_left_out_too(source: Path, tmp_path: Path) -> None:
    child = INDEX.images[0]
    (source / "blobs" / hex_of(child.layers[0].digest)).unlink()
    exported = export(source, tmp_path / "out.tar")
    by_digest = f"docker.io/library/nginx@{child.manifest.digest}"
    size = len(child.layers[0].data)
    assert {one.name: one.missing for one in exported.left_out} == {NAME: size, by_digest: size}


def test_a_list_of_which_nothing_is_there_is_left_out(source: Path, tmp_path: Path) -> None:
    (source / "img" / hex_of(INDEX.images[0].manifest.digest)).unlink()
    exported = export(source, tmp_path / "out.tar", "nginx")
    assert [str(one) for one in exported.left_out] == [
        f"left out: {NAME}: the store has none of the images that it lists"
    ]


def test_when_nothing_is_left_nothing_is_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.tar").write_bytes(b"an earlier one")
    (source / "blobs" / hex_of(UPPER.config.digest)).unlink()
    assert export(source, tmp_path / "out.tar", "/up:").images == 0
    assert export(source, tmp_path / "out.tar", "none of them") == Exported()
    assert (tmp_path / "out.tar").read_bytes() == b"an earlier one"


# Whole or not there


class Failing(Files):
    """Fails at one of these."""

    def __init__(self, what: str) -> None:
        self._what = what

    def create(self, path: Path) -> SharedFile:
        self._fail("create")
        return super().create(path)

    def sync(self, file: SharedFile) -> None:
        self._fail("sync")
        super().sync(file)

    def rename(self, path: Path, target: Path) -> None:
        self._fail("rename")
        super().rename(path, target)

    def _fail(self, what: str) -> None:
        if what == self._what:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def damaged(source: Path) -> None:
    """One byte is another."""
    path = source / "blobs" / hex_of(UPPER.layers[-1].digest)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def pruned(source: Path) -> Mapping[str, Callable[[int], None]]:
    """Blobs go while others are written."""

    def came(count: int) -> None:
        for blob in (source / "blobs").iterdir():
            blob.unlink()

    return {"came": came}


def full(source: Path) -> Mapping[str, Callable[[int], None]]:
    """The disk gets full."""

    def came(count: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return {"came": came}


@pytest.mark.parametrize(
    ("prepare", "why"),
    [
        (damaged, f"the store's blob {UPPER.layers[-1].digest} is damaged"),
        (pruned, f"the store's blob {BLOBS[1]} cannot be read: No such file or directory"),
        (full, "No space left on device"),
        (lambda source: {"files": Failing("create")}, "No space left on device"),
        (lambda source: {"files": Failing("sync")}, "No space left on device"),
        (lambda source: {"files": Failing("rename")}, "No space left on device"),
    ],
)
@pytest.mark.parametrize("earlier", [None, b"an earlier one"])
def test_it_is_whole_or_not_there(
    source: Path, tmp_path: Path, prepare: Callable[[Path], Any], why: str, earlier: bytes | None
) -> None:
    target = tmp_path / "target" / "out.tar"
    target.parent.mkdir()
    if earlier is not None:
        target.write_bytes(earlier)
    how = prepare(source) or {}
    with pytest.raises(ExportFailed) as caught:
        export(source, target, **how)
    assert str(caught.value) == f"{target}: {why}"
    assert isinstance(caught.value, ArchiveFailure)
    left = {path.name: path.read_bytes() for path in target.parent.iterdir()}
    assert left == ({} if earlier is None else {"out.tar": earlier})


def test_no_such_folder(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportFailed, match=r"out\.tar: No such file or directory$"):
        export(source, tmp_path / "nowhere" / "out.tar")
