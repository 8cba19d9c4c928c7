"""Exports and imports of an index of which some images are present as metadata only."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from ociregistry.archives.exporting import Exported, LeftOut
from ociregistry.pullthrough.loader import LoadStatus
from ociregistry.store.records import Record
from ociregistry.store.snapshot import Snapshot
from ociregistry.store.store import Store
from tests.images import Image, make_index
from tests.unit.support.archives import (
    NAME,
    blob_name,
    contents,
    hex_of,
    image_blobs,
    invalid,
    kept,
    layout,
    load,
    write_folder,
    write_tar,
)
from tests.unit.support.common import manifest, on_reactor
from tests.unit.support.exports import DATES, export, members

INDEX = make_index("metadata", platforms=("linux/amd64", "linux/arm64", "linux/s390x"))
AMD64, ARM64, S390X = INDEX.images
REPOSITORY = "docker.io/library/nginx"
METADATA = "ociregistry.metadata"


def record_of(image: Image, wanted: bool | None, *names: str) -> dict[str, bytes]:
    """Return the path of the manifest's record."""
    urls = dict.fromkeys(names or (f"{REPOSITORY}@{image.manifest.digest}",), DATES)
    return {f"img/{hex_of(image.manifest.digest)}": Record(manifest(image), urls, wanted).render()}


def config_of(image: Image) -> dict[str, bytes]:
    """Return the path of the manifest's config blob."""
    return {f"blobs/{hex_of(image.config.digest)}": image.config.data}


def store_files() -> dict[str, bytes]:
    """Return a store with amd64 pulled, arm64 as metadata, and s390x as metadata without config."""
    return {
        f"fat/{hex_of(INDEX.manifest.digest)}": kept(INDEX, {NAME: DATES}),
        **record_of(AMD64, True),
        **record_of(ARM64, False),
        **record_of(S390X, False),
        **image_blobs(AMD64),
        **config_of(ARM64),
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return the folder of that store."""
    return write_folder(tmp_path / "source", store_files())


def wanted(root: Path) -> dict[str, bool | None]:
    """Return `wanted` of the records, by platform."""
    records = Snapshot.read(root).records
    return {
        one.platform: records[manifest(one).digest].record.wanted
        for one in INDEX.images
        if manifest(one).digest in records
    }


def blobs(root: Path) -> set[str]:
    """Return the digests of the blobs in a store."""
    return {f"sha256:{path.name}" for path in (root / "blobs").iterdir()}


def annotations_of(path: Path) -> Mapping[str, str]:
    """Return the annotations of the index in index.json."""
    with_index = contents(path).images
    assert [str(one.image) for one in with_index] == [NAME]
    with tarfile.open(path) as tar:
        file = tar.extractfile("index.json")
        assert file is not None
        noted: Mapping[str, str] = json.load(file)["manifests"][0]["annotations"]
        return noted


def digests(*images: Image) -> set[str]:
    """Return the digests of the blobs of images."""
    return {blob.digest for image in images for blob in image.blobs}


def test_export_includes_metadata_of_index(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.tar"
    exported = export(source, target, NAME)
    expected = digests(AMD64) | {ARM64.config.digest}
    size = sum(len(blob.data) for blob in (*AMD64.blobs, ARM64.config))
    assert exported == Exported(images=1, blobs=4, bytes=size)
    # s390x lacks its config, so it is left out.
    manifests = {one.manifest.digest for one in (INDEX, AMD64, ARM64)}
    assert set(members(target)) == {"oci-layout", "index.json", *map(blob_name, expected | manifests)}
    assert annotations_of(target)[METADATA] == ARM64.manifest.digest


def test_index_without_metadata_has_no_annotation(source: Path, tmp_path: Path) -> None:
    for image in (ARM64, S390X):
        (source / "img" / hex_of(image.manifest.digest)).unlink()
    export(source, tmp_path / "out.tar", NAME)
    assert METADATA not in annotations_of(tmp_path / "out.tar")


def test_index_with_metadata_only_is_left_out(source: Path, tmp_path: Path) -> None:
    (source / "img" / hex_of(AMD64.manifest.digest)).unlink()
    exported = export(source, tmp_path / "out.tar", NAME)
    assert exported.left_out == (LeftOut(NAME, "the store has none of the images that it lists"),)
    assert not (tmp_path / "out.tar").exists()


@on_reactor
async def test_import_keeps_metadata_as_metadata(store: Store, root: Path, source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "out.tar", NAME)
    (outcome,) = await load(store, tmp_path / "out.tar")
    assert (outcome.name, outcome.ended, outcome.blobs) == (NAME, LoadStatus.LOADED, 4)
    assert wanted(root) == {"linux/amd64": True, "linux/arm64": False}
    assert blobs(root) == digests(AMD64) | {ARM64.config.digest}
    assert [row.url for row in Snapshot.read(root).rows] == [NAME, f"{REPOSITORY}@{AMD64.manifest.digest}"]
    # A second export and import yields the same.
    again = export(root, tmp_path / "again.tar", NAME)
    assert again.images == 1
    assert (tmp_path / "again.tar").read_bytes() == (tmp_path / "out.tar").read_bytes()
    (outcome,) = await load(store, tmp_path / "out.tar")
    assert outcome.ended is LoadStatus.PRESENT


@on_reactor
async def test_import_does_not_demote_wanted_image(store: Store, root: Path, source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "out.tar", NAME)
    await load(store, write_folder(tmp_path / "arm64", {**record_of(ARM64, True), **image_blobs(ARM64)}))
    await load(store, tmp_path / "out.tar")
    assert wanted(root) == {"linux/amd64": True, "linux/arm64": True}


@on_reactor
async def test_later_export_includes_layers_of_newly_wanted_image(
    store: Store, root: Path, source: Path, tmp_path: Path
) -> None:
    export(source, tmp_path / "first.tar", NAME)
    write_folder(source, {**record_of(ARM64, True), **image_blobs(ARM64)})
    later = export(source, tmp_path / "later.tar", NAME, since=tmp_path / "first.tar")
    layers = {layer.digest for layer in ARM64.layers}
    assert (later.blobs, later.had) == (len(layers), 4)
    assert {blob_name(layer) for layer in layers} <= set(members(tmp_path / "later.tar"))
    await load(store, tmp_path / "first.tar")
    (outcome,) = await load(store, tmp_path / "later.tar")
    assert outcome.ended is LoadStatus.LOADED
    assert wanted(root) == {"linux/amd64": True, "linux/arm64": True}
    assert blobs(root) == digests(AMD64, ARM64)


@on_reactor
async def test_delta_since_export_without_metadata_includes_metadata(
    store: Store, root: Path, source: Path, tmp_path: Path
) -> None:
    record = source / "img" / hex_of(ARM64.manifest.digest)
    before = record.read_bytes()
    record.unlink()
    export(source, tmp_path / "first.tar", NAME)
    record.write_bytes(before)
    later = export(source, tmp_path / "later.tar", NAME, since=tmp_path / "first.tar")
    assert (later.blobs, later.bytes, later.had) == (1, len(ARM64.config.data), 3)
    await load(store, tmp_path / "first.tar")
    await load(store, tmp_path / "later.tar")
    assert wanted(root) == {"linux/amd64": True, "linux/arm64": False}


@pytest.mark.parametrize("noted", ["", "nonsense", f"{S390X.manifest.digest} x", "sha256:12"])
@on_reactor
async def test_annotation_naming_other_images_is_ignored(
    store: Store, root: Path, tmp_path: Path, noted: str
) -> None:
    files = layout((INDEX, {"io.containerd.image.name": NAME, METADATA: noted}))
    lacking = [blob_name(layer.digest) for layer in S390X.layers] if S390X.manifest.digest in noted else []
    path = write_tar(tmp_path / "a.tar", {name: data for name, data in files.items() if name not in lacking})
    (outcome,) = await load(store, path)
    assert outcome.ended is LoadStatus.LOADED
    assert wanted(root) == {"linux/amd64": True, "linux/arm64": True, "linux/s390x": not lacking}


# Image folders


@on_reactor
async def test_store_folder_import_keeps_wanted_state(store: Store, root: Path, source: Path) -> None:
    outcomes = await load(store, source)
    assert {(outcome.name, outcome.ended) for outcome in outcomes} == {
        (NAME, LoadStatus.LOADED),
        (f"{REPOSITORY}@{AMD64.manifest.digest}", LoadStatus.LOADED),
    }
    # s390x lacks its config, so it is left out.
    assert wanted(root) == {"linux/amd64": True, "linux/arm64": False}
    assert blobs(root) == digests(AMD64) | {ARM64.config.digest}


@pytest.mark.parametrize("name", [f"{REPOSITORY}@{AMD64.manifest.digest}", "docker.io/library/nginx:single"])
@on_reactor
async def test_unwanted_image_without_index_is_imported(store: Store, root: Path, tmp_path: Path, name: str) -> None:
    """Applies to images that other caches pull through this one, where the client cache wants them."""
    path = write_folder(tmp_path / "cache", {**record_of(AMD64, False, name), **image_blobs(AMD64)})
    assert [(outcome.name, outcome.ended) for outcome in await load(store, path)] == [(name, LoadStatus.LOADED)]
    assert wanted(root) == {"linux/amd64": True}
    assert blobs(root) == digests(AMD64)


@on_reactor
async def test_unwanted_image_with_tag_is_imported(store: Store, root: Path, tmp_path: Path) -> None:
    files = {**store_files(), **record_of(ARM64, False, f"{REPOSITORY}:arm64"), **image_blobs(ARM64)}
    await load(store, write_folder(tmp_path / "cache", files))
    assert wanted(root) == {"linux/amd64": True, "linux/arm64": True}


def test_folder_with_metadata_only_has_no_image(tmp_path: Path) -> None:
    index = {f"fat/{hex_of(INDEX.manifest.digest)}": kept(INDEX, {})}
    path = write_folder(tmp_path / "cache", {**index, **record_of(ARM64, False), **config_of(ARM64)})
    assert invalid(path) == "there is no image in it"
