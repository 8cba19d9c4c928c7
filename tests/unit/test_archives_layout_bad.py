"""Invalid OCI layouts."""

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


def test_files_with_other_names_are_no_blobs(tmp_path: Path) -> None:
    name = blob_name(IMAGE.config.digest)
    others = [name.replace("256", "512"), name[:-1], name.replace("blobs/", ""), f"x/{name}", f"{name}/x"]
    path = write_tar(tmp_path / "a.tar", {**named(IMAGE), **dict.fromkeys(others, b"")})
    assert {digest: member.size for digest, member in contents(path).blobs.items()} == {
        digest: len(data) for digest, data in parts(IMAGE).items()
    }


def test_missing_manifest_is_a_failure(tmp_path: Path) -> None:
    files = layout((IMAGE, {REF_NAME: NAME}), (OTHER, {REF_NAME: "other:1"}), sparse=[OTHER.manifest.digest])
    path = write_tar(tmp_path / "a.tar", files)
    assert failures(path) == {f"{path}: {OTHER.manifest.digest}": "its manifest is not in the archive"}


def test_unknown_media_type_is_a_failure(tmp_path: Path) -> None:
    helm = Image(Manifest(OTHER.manifest.digest, OTHER.manifest.data, "application/x-other"), (), "")
    path = write_tar(tmp_path / "a.tar", layout((IMAGE, {REF_NAME: NAME}), (helm, {REF_NAME: "other:1"})))
    assert failures(path) == {f"{path}: {OTHER.manifest.digest}": "not an image but 'application/x-other'"}


@pytest.mark.parametrize("what", [INDEX.manifest, INDEX.images[1].manifest])
def test_manifest_digest_mismatch_is_refused(tmp_path: Path, what: Manifest) -> None:
    files = {**named(INDEX), blob_name(what.digest): what.data.replace(b"2", b"3", 1)}
    error = invalid(write_tar(tmp_path / "a.tar", files))
    assert error.endswith(f"the bytes do not have the digest {what.digest}: {blob_name(what.digest)}")


def test_manifest_size_mismatch_is_refused(tmp_path: Path) -> None:
    files = {**named(IMAGE), blob_name(IMAGE.manifest.digest): IMAGE.manifest.data + b" "}
    size = len(IMAGE.manifest.data)
    error = invalid(write_tar(tmp_path / "a.tar", files))
    assert error == f"it has {size + 1} bytes, expected {size}: {blob_name(IMAGE.manifest.digest)}"


def index_of(change: Callable[[Any], object]) -> Files:
    """Return the layout with fields of index.json replaced."""
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
def test_malformed_index_json_is_refused(tmp_path: Path, files: Files) -> None:
    assert invalid(write_tar(tmp_path / "a.tar", files)).endswith(": index.json")


@pytest.mark.parametrize("compression", ["", "gz"])
def test_oversized_json_is_not_read(tmp_path: Path, compression: str) -> None:
    files = {**named(IMAGE), "index.json": b" " * (8 * 1024 * 1024 + 1)}
    assert "more than 8388608: index.json" in invalid(write_tar(tmp_path / "a.tar", files, compression))


def test_number_of_manifests_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "_MOST_METADATA", 2000)
    assert "more than 2000 bytes of manifests" in invalid(write_tar(tmp_path / "a.tar", named(INDEX)))


def test_ambiguous_manifest_is_refused(tmp_path: Path) -> None:
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
def test_archive_of_something_else_is_refused(tmp_path: Path, files: Files) -> None:
    assert invalid(write_tar(tmp_path / "a.tar", files)).startswith("not an image archive")


def test_layout_without_images(tmp_path: Path) -> None:
    assert invalid(write_tar(tmp_path / "a.tar", layout())) == "there is no image in it"


def test_null_is_an_empty_list(tmp_path: Path) -> None:
    """Programs in Go write it for a layout without images."""
    files = {**layout(), "index.json": to_json({"schemaVersion": 2, "manifests": None})}
    assert invalid(write_tar(tmp_path / "a.tar", files)) == "there is no image in it"
