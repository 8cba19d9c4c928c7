"""OCI layouts that lie, or are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ociregistry.archives import members
from tests.images import Image, Manifest, digest_of, make_image, make_index
from tests.unit.support.archives import (
    NAME,
    REF_NAME,
    Files,
    blob_name,
    contents,
    failures,
    invalid,
    layout,
    named,
    parts,
    to_json,
    write_tar,
)

IMAGE, OTHER = make_image("layout"), make_image("other")
INDEX = make_index("layout")


def test_what_is_no_blob(tmp_path: Path) -> None:
    name = blob_name(IMAGE.config.digest)
    others = [name.replace("256", "512"), name[:-1], name.replace("blobs/", ""), f"x/{name}", f"{name}/x"]
    path = write_tar(tmp_path / "a.tar", {**named(IMAGE), **dict.fromkeys(others, b"")})
    assert {digest: member.size for digest, member in contents(path).blobs.items()} == {
        digest: len(data) for digest, data in parts(IMAGE).items()
    }


def test_an_image_whose_manifest_is_not_there(tmp_path: Path) -> None:
    files = layout((IMAGE, {REF_NAME: NAME}), (OTHER, {REF_NAME: "other:1"}), sparse=[OTHER.manifest.digest])
    path = write_tar(tmp_path / "a.tar", files)
    assert failures(path) == {f"{path}: {OTHER.manifest.digest}": "its manifest is not in the archive"}


def test_what_is_no_image(tmp_path: Path) -> None:
    helm = Image(Manifest(OTHER.manifest.digest, OTHER.manifest.data, "application/x-other"), (), "")
    path = write_tar(tmp_path / "a.tar", layout((IMAGE, {REF_NAME: NAME}), (helm, {REF_NAME: "other:1"})))
    assert failures(path) == {f"{path}: {OTHER.manifest.digest}": "not an image but 'application/x-other'"}


@pytest.mark.parametrize("what", [INDEX.manifest, INDEX.images[1].manifest])
def test_a_manifest_that_has_not_its_digest(tmp_path: Path, what: Manifest) -> None:
    files = {**named(INDEX), blob_name(what.digest): what.data.replace(b"2", b"3", 1)}
    told = invalid(write_tar(tmp_path / "a.tar", files))
    assert told.endswith(f"the bytes do not have the digest {what.digest}: {blob_name(what.digest)}")


def test_a_manifest_of_another_size(tmp_path: Path) -> None:
    files = {**named(IMAGE), blob_name(IMAGE.manifest.digest): IMAGE.manifest.data + b" "}
    size = len(IMAGE.manifest.data)
    told = invalid(write_tar(tmp_path / "a.tar", files))
    assert told == f"it has {size + 1} bytes, expected {size}: {blob_name(IMAGE.manifest.digest)}"


def index_of(change: Callable[[Any], object]) -> Files:
    """The layout, with index.json changed."""
    files = named(IMAGE)
    index = json.loads(files["index.json"])
    change(index)
    return {**files, "index.json": to_json(index)}


@pytest.mark.parametrize(
    "files",
    [
        {**named(IMAGE), "index.json": b"{"},
        {**named(IMAGE), "index.json": b"[]"},
        {**named(IMAGE), "index.json": b"{}"},
        {**named(IMAGE), "index.json": b"\xff"},
        {**named(IMAGE), "index.json": b"[" * 100_000},
        index_of(lambda index: index.update(manifests={})),
        index_of(lambda index: index.update(manifests=[1])),
        index_of(lambda index: index["manifests"][0].pop("size")),
        index_of(lambda index: index["manifests"][0].update(digest="sha256:../../x")),
        index_of(lambda index: index["manifests"][0].update(size=-1)),
    ],
)
def test_an_index_that_is_none(tmp_path: Path, files: Files) -> None:
    assert invalid(write_tar(tmp_path / "a.tar", files)).endswith(": index.json")


@pytest.mark.parametrize("compression", ["", "gz"])
def test_json_without_end_is_not_read(tmp_path: Path, compression: str) -> None:
    files = {**named(IMAGE), "index.json": b" " * (8 * 1024 * 1024 + 1)}
    assert "more than 8388608: index.json" in invalid(write_tar(tmp_path / "a.tar", files, compression))


def test_manifests_without_end_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "_MOST_METADATA", 2000)
    assert "more than 2000 bytes of manifests" in invalid(write_tar(tmp_path / "a.tar", named(INDEX)))


def test_a_manifest_that_can_be_read_as_two_things(tmp_path: Path) -> None:
    data = to_json({**json.loads(IMAGE.manifest.data), "manifests": []})
    image = Image(Manifest(digest_of(data), data, IMAGE.manifest.media_type), IMAGE.blobs, IMAGE.platform)
    assert "must not have manifests" in invalid(write_tar(tmp_path / "a.tar", named(image)))


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"README": b"hello"},
        {"oci-layout": b"{}"},
        {"index.json": b"{}"},
        {"fat/README": b"", "blobs/aa": b""},
    ],
)
def test_what_holds_no_images(tmp_path: Path, files: Files) -> None:
    assert invalid(write_tar(tmp_path / "a.tar", files)).startswith("not an image archive")


def test_a_layout_without_images(tmp_path: Path) -> None:
    assert invalid(write_tar(tmp_path / "a.tar", layout())) == "there is no image in it"
