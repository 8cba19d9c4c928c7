"""`docker save` archives: a manifest is generated for each image, and config and layers are verified."""

from __future__ import annotations

import gzip
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from ociregistry.manifests import OCI_MANIFEST
from tests.images import Image, digest_of, make_image
from tests.unit.support.archives import (
    NAME,
    Files,
    contents,
    docker_saved,
    hex_of,
    invalid,
    to_json,
    write_folder,
    write_tar,
)

BASE = make_image("base")
IMAGE = make_image("image", base=BASE)
CONFIG = f"{hex_of(IMAGE.config.digest)}.json"


def generated_manifest(path: Path) -> dict[str, Any]:
    """Return the only manifest that was generated."""
    (manifest,) = contents(path).manifests.values()
    assert manifest.media_type == OCI_MANIFEST
    document: dict[str, Any] = json.loads(manifest.data)
    return document


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("write", [write_tar, write_folder])
def test_generated_manifest(tmp_path: Path, packed: bool, write: Callable[[Path, Files], Path]) -> None:
    path = write(tmp_path / "archive", docker_saved(IMAGE, "nginx:1.25", packed=packed))
    layers = [layer.data if packed else gzip.decompress(layer.data) for layer in IMAGE.layers]
    suffix = "+gzip" if packed else ""
    expected = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": IMAGE.config.digest,
            "size": len(IMAGE.config.data),
        },
        "layers": [
            {
                "mediaType": f"application/vnd.oci.image.layer.v1.tar{suffix}",
                "digest": digest_of(layer),
                "size": len(layer),
            }
            for layer in layers
        ],
    }
    found = contents(path)
    (image,) = found.images
    assert generated_manifest(path) == expected
    assert found.manifests[image.manifest].data == json.dumps(expected, separators=(",", ":")).encode()
    assert str(image.image) == NAME
    assert image.dates is None
    assert "digest is not the registry's" in image.notes[0]
    assert {digest: member.size for digest, member in found.blobs.items()} == {
        IMAGE.config.digest: len(IMAGE.config.data),
        **{digest_of(layer): len(layer) for layer in layers},
    }


def test_generated_manifest_is_deterministic(tmp_path: Path) -> None:
    files = docker_saved(IMAGE, "nginx:1.25")
    one = contents(write_tar(tmp_path / "a.tar", files))
    other = contents(write_tar(tmp_path / "b.tar", dict(reversed(files.items())), "gz"))
    assert one.manifests == other.manifests


def test_several_tags_and_images(tmp_path: Path) -> None:
    one, other = (docker_saved(image, *tags) for image, tags in ((IMAGE, ["a:1", "quay.io/b:2"]), (BASE, ["base:1"])))
    index = json.loads(one["manifest.json"]) + json.loads(other["manifest.json"])
    found = contents(write_tar(tmp_path / "a.tar", {**other, **one, "manifest.json": to_json(index)}))
    names = [str(image.image) for image in found.images]
    assert names == ["docker.io/library/a:1", "quay.io/b:2", "docker.io/library/base:1"]
    assert len({image.manifest for image in found.images}) == 2


def test_repeated_layers_as_links(tmp_path: Path) -> None:
    files = docker_saved(IMAGE, "nginx:1.25")
    first, second, *_ = (name for name in files if name.endswith("layer.tar"))
    kept = {name: data for name, data in files.items() if name != second}
    moved = {**kept, "x/layer.tar": files[second]}
    path = write_tar(tmp_path / "a.tar", moved, links={second: (tarfile.SYMTYPE, "../x/layer.tar")})
    assert generated_manifest(path) == generated_manifest(write_tar(tmp_path / "b.tar", files))
    assert invalid(write_tar(tmp_path / "c.tar", kept, links={second: (tarfile.SYMTYPE, f"../{first}")})).endswith(
        f"it does not have the digest {json.loads(IMAGE.config.data)['rootfs']['diff_ids'][1]}: {first}"
    )


@pytest.mark.parametrize("target", ["../../x/layer.tar", "/x/layer.tar", "layer.tar"])
def test_link_outside_archive_is_refused(tmp_path: Path, target: str) -> None:
    files = docker_saved(IMAGE, "nginx:1.25")
    layer = next(name for name in files if name.endswith("layer.tar"))
    kept = {name: data for name, data in files.items() if name != layer}
    path = write_tar(tmp_path / "a.tar", kept, links={layer: (tarfile.SYMTYPE, target)})
    assert invalid(path) == f"it names {layer!r}, which is not there: manifest.json"


@pytest.mark.parametrize("missing", [CONFIG, f"{0:064x}/layer.tar"])
def test_missing_member_is_refused(tmp_path: Path, missing: str) -> None:
    files = {name: data for name, data in docker_saved(IMAGE, NAME).items() if name != missing}
    assert invalid(write_tar(tmp_path / "a.tar", files)) == f"it names {missing!r}, which is not there: manifest.json"


def test_image_without_tags(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", docker_saved(IMAGE))
    found = contents(path)
    (failure,) = found.failed
    assert failure.name == f"{path}: {next(iter(found.manifests))}"
    assert failure.why == (
        f"docker save was given its id, {IMAGE.config.digest}, not its name: give it its name, such as --name "
        "docker.io/library/nginx:1.25"
    )
    given = contents(path, "nginx:1.25")
    assert given.failed == ()
    (image,) = given.images
    assert str(image.image) == NAME
    assert "digest is not the registry's" in image.notes[0]


def test_config_digest_mismatch_is_refused(tmp_path: Path) -> None:
    files = {**docker_saved(IMAGE, NAME), CONFIG: IMAGE.config.data + b" "}
    assert invalid(write_tar(tmp_path / "a.tar", files)).endswith(
        f"it does not have the digest {IMAGE.config.digest}: {CONFIG}"
    )


def test_config_file_name_is_arbitrary(tmp_path: Path) -> None:
    files = docker_saved(IMAGE, NAME)
    index = json.loads(files["manifest.json"])
    index[0]["Config"] = "config.json"
    files |= {"config.json": files.pop(CONFIG), "manifest.json": to_json(index)}
    assert generated_manifest(write_tar(tmp_path / "a.tar", files))["config"]["digest"] == IMAGE.config.digest


@pytest.mark.parametrize("packed", [False, True])
def test_layer_diff_id_mismatch_is_refused(tmp_path: Path, packed: bool) -> None:
    files = docker_saved(IMAGE, NAME, packed=packed)
    name = f"{2:064x}/layer.tar"
    changed = gzip.compress(gzip.decompress(files[name]) + b"x") if packed else files[name] + b"x"
    error = invalid(write_tar(tmp_path / "a.tar", {**files, name: changed}))
    assert error == f"it does not have the digest {json.loads(IMAGE.config.data)['rootfs']['diff_ids'][2]}: {name}"


def test_truncated_layer_is_refused(tmp_path: Path) -> None:
    files = docker_saved(IMAGE, NAME, packed=True)
    name = f"{2:064x}/layer.tar"
    error = invalid(write_tar(tmp_path / "a.tar", {**files, name: files[name][:-100]}))
    assert error.startswith("it is cut off")
    assert error.endswith(name)


@pytest.mark.parametrize("cut", [0, 5])
def test_zstd_layer(tmp_path: Path, cut: int) -> None:
    """As BuildKit writes them; it has the media type that nodes decompress it by."""
    files = {
        name: zstandard.compress(data) if name.endswith("layer.tar") else data
        for name, data in docker_saved(IMAGE, "nginx:1.25").items()
    }
    layers = [name for name in files if name.endswith("layer.tar")]
    files[layers[0]] = files[layers[0]][: len(files[layers[0]]) - cut]
    path = write_tar(tmp_path / "a.tar", files)
    if cut:
        assert "it does not have the digest" in invalid(path)
        return
    assert generated_manifest(path)["layers"] == [
        {
            "mediaType": "application/vnd.oci.image.layer.v1.tar+zstd",
            "digest": digest_of(files[name]),
            "size": len(files[name]),
        }
        for name in layers
    ]


def test_layer_of_several_gzip_members(tmp_path: Path) -> None:
    files = docker_saved(IMAGE, NAME, packed=True)
    name = f"{2:064x}/layer.tar"
    tar = gzip.decompress(files[name])
    two = gzip.compress(tar[:700]) + gzip.compress(tar[700:])
    assert generated_manifest(write_tar(tmp_path / "a.tar", {**files, name: two}))["layers"][2][
        "digest"
    ] == digest_of(two)


def changed(image: Image, **changes: object) -> Files:
    """Return the files of a `docker save` archive with fields of manifest.json replaced."""
    files = docker_saved(image, NAME)
    (entry,) = json.loads(files["manifest.json"])
    return {**files, "manifest.json": to_json([{**entry, **changes}])}


@pytest.mark.parametrize(
    "files",
    [
        {"manifest.json": b"{"},
        {"manifest.json": b"{}"},
        {"manifest.json": b"[1]"},
        {"manifest.json": b"[" * 100_000},
        {"manifest.json": b" " * (8 * 1024 * 1024 + 1)},
        changed(IMAGE, Config=1),
        changed(IMAGE, Layers="x"),
        changed(IMAGE, Layers=[1]),
        changed(IMAGE, RepoTags="x"),
        changed(IMAGE, RepoTags=[1]),
        changed(IMAGE, Config="../config.json"),
        changed(IMAGE, Layers=["../../etc/passwd"]),
        changed(IMAGE, Layers=["/etc/passwd"]),
    ],
)
def test_malformed_manifest_json_is_refused(tmp_path: Path, files: Files) -> None:
    assert invalid(write_tar(tmp_path / "a.tar", files)).endswith(": manifest.json")


@pytest.mark.parametrize("layers", [[], [f"{0:064x}/layer.tar"]])
def test_layer_count_mismatch_is_refused(tmp_path: Path, layers: list[str]) -> None:
    error = invalid(write_tar(tmp_path / "a.tar", changed(IMAGE, Layers=layers)))
    assert error == f"it names 4 layers, but there are {len(layers)}: {CONFIG}"


@pytest.mark.parametrize("config", [b"{}", b"[]", b"{", b'{"rootfs": {"diff_ids": "x"}}'])
def test_malformed_config_is_refused(tmp_path: Path, config: bytes) -> None:
    files = {**changed(IMAGE, Config="config.json"), "config.json": config}
    assert invalid(write_tar(tmp_path / "a.tar", files)).endswith(": config.json")


def test_null_is_an_empty_list(tmp_path: Path) -> None:
    """docker save writes it for an image without layers, one that is built from scratch."""
    config = to_json({"rootfs": {"type": "layers", "diff_ids": None}})
    index = [{"Config": "config.json", "RepoTags": ["nginx:1.25"], "Layers": None}]
    document = generated_manifest(
        write_tar(tmp_path / "a.tar", {"config.json": config, "manifest.json": to_json(index)})
    )
    assert document["layers"] == []
    empty = write_tar(tmp_path / "b.tar", {"manifest.json": to_json(None)})
    assert invalid(empty) == "there is no image in it"
