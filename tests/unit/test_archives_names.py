"""Archives that do not say what their images are called, and the name that the operator gives to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from ociregistry.archives.members import ArchiveInvalid, GivenName
from ociregistry.pullthrough.loader import LoadStatus
from ociregistry.store.store import Store
from tests.images import Image, Index, make_artifact, make_image, make_index
from tests.unit.support.archives import (
    IMAGE_NAME,
    NAME,
    REF_NAME,
    Files,
    contents,
    failures,
    hex_of,
    invalid,
    layout,
    load,
    named,
    skopeo_dir,
    write_folder,
    write_tar,
)
from tests.unit.support.common import image, manifest, on_reactor

IMAGE, OTHER, INDEX = make_image("names"), make_image("other"), make_index("names")
SIGNATURE = make_artifact("signature", IMAGE.manifest)


def names(path: Path, name: str) -> dict[str, str]:
    """Return what each image name means with this name given."""
    found = contents(path, name)
    assert found.failed == ()
    return {str(one.image): one.manifest for one in found.images}


@pytest.mark.parametrize(
    ("name", "annotations", "called"),
    [
        (NAME, None, NAME),
        (NAME, {REF_NAME: "v1"}, NAME),
        ("nginx:1.25", {REF_NAME: "nginx"}, NAME),
        ("nginx", None, "docker.io/library/nginx:latest"),
        ("ghcr.io/team/app", {REF_NAME: "v1"}, "ghcr.io/team/app:v1"),
        ("reg.example:5000/app", {REF_NAME: "v1"}, "reg.example:5000/app:v1"),
        (f"app@{IMAGE.manifest.digest}", {REF_NAME: "v1"}, f"docker.io/library/app@{IMAGE.manifest.digest}"),
    ],
)
def test_given_name(tmp_path: Path, name: str, annotations: Mapping[str, str] | None, called: str) -> None:
    """A tag alone is what oras writes into a layout."""
    path = write_folder(tmp_path / "layout", layout((IMAGE, annotations)))
    assert names(path, name) == {called: IMAGE.manifest.digest}


def test_given_repository_with_tags_in_the_archive(tmp_path: Path) -> None:
    """As `oras copy --recursive` writes them: the signature has no tag."""
    files = layout((IMAGE, {REF_NAME: "v1"}), (OTHER, {REF_NAME: "v2"}), (SIGNATURE, None))
    path = write_tar(tmp_path / "a.tar", files)
    assert names(path, "ghcr.io/team/app") == {
        "ghcr.io/team/app:v1": IMAGE.manifest.digest,
        "ghcr.io/team/app:v2": OTHER.manifest.digest,
        f"ghcr.io/team/app@{SIGNATURE.manifest.digest}": SIGNATURE.manifest.digest,
    }
    with pytest.raises(ArchiveInvalid, match="2 images in it have no name: give --name without a tag, for all of"):
        contents(path, "ghcr.io/team/app:v1")


@pytest.mark.parametrize("name", ["ghcr.io/team/app", "ghcr.io/team/app:v1"])
def test_index_and_signature_in_an_oras_layout(tmp_path: Path, name: str) -> None:
    """oras lists every manifest: the index by its tag, and without one its images and what refers to it."""
    files = layout((INDEX, {REF_NAME: "v1"}), *((one, None) for one in INDEX.images), (SIGNATURE, None))
    path = write_folder(tmp_path / "layout", files)
    assert names(path, name) == {
        "ghcr.io/team/app:v1": INDEX.manifest.digest,
        f"ghcr.io/team/app@{SIGNATURE.manifest.digest}": SIGNATURE.manifest.digest,
    }
    assert failures(path).keys() == {f"{path}: {one.manifest.digest}" for one in (INDEX, SIGNATURE)}


def test_unnamed_images_of_a_named_index(tmp_path: Path) -> None:
    files = layout((INDEX, {REF_NAME: NAME}), *((one, None) for one in INDEX.images))
    path = write_folder(tmp_path / "layout", files)
    assert (failures(path), len(contents(path).images)) == ({}, 1)


def test_given_name_is_for_unnamed_images(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", layout((IMAGE, {IMAGE_NAME: NAME}), (OTHER, None)))
    assert names(path, "quay.io/app:1") == {NAME: IMAGE.manifest.digest, "quay.io/app:1": OTHER.manifest.digest}
    with pytest.raises(ArchiveInvalid, match="its images have names of their own: --name is for those without"):
        contents(write_tar(tmp_path / "b.tar", named(IMAGE)), "quay.io/app:1")


def test_given_name_with_another_digest_fails(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", layout((IMAGE, None)))
    (failure,) = contents(path, f"app@{OTHER.manifest.digest}").failed
    assert f"the archive has {IMAGE.manifest.digest} under this name" in failure.why


@pytest.mark.parametrize("text", ["", "https://quay.io/app", "app:", "App:1", "app@sha256:5", "a:b:c"])
def test_invalid_name(text: str) -> None:
    with pytest.raises(ValueError, match="is not"):
        GivenName.parse(text)


# skopeo's dir:


@pytest.mark.parametrize("write", [write_tar, write_folder])
@pytest.mark.parametrize("what", [IMAGE, INDEX, make_index("docker", docker=True)])
@on_reactor
async def test_skopeo_dir_with_given_name(
    store: Store, tmp_path: Path, what: Image | Index, write: Callable[[Path, Files], Path]
) -> None:
    path = write(tmp_path / "dir", skopeo_dir(what))
    (outcome,) = await load(store, path, name=NAME)
    assert (outcome.name, outcome.ended, outcome.blobs) == (NAME, LoadStatus.LOADED, len(what.blobs))
    assert await store.manifest(image(NAME)) == manifest(what)


def test_skopeo_dir_without_name_fails_with_hint(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "dir", skopeo_dir(IMAGE))
    assert failures(path) == {
        f"{path}: {IMAGE.manifest.digest}": (
            "what skopeo's dir: writes does not say what image it is: give it its name, such as --name "
            "docker.io/library/nginx:1.25"
        )
    }


def test_skopeo_dir_without_media_type(tmp_path: Path) -> None:
    document = json.loads(IMAGE.manifest.data)
    del document["mediaType"]
    path = write_folder(tmp_path / "dir", {**skopeo_dir(IMAGE), "manifest.json": json.dumps(document).encode()})
    assert [one.media_type for one in contents(path).manifests.values()] == [IMAGE.manifest.media_type]


def test_damaged_skopeo_dir(tmp_path: Path) -> None:
    child = f"{hex_of(INDEX.images[0].manifest.digest)}.manifest.json"
    for name, data in (("manifest.json", b"[]"), ("manifest.json", b"{"), (child, b"{}")):
        assert invalid(write_tar(tmp_path / "a.tar", {**skopeo_dir(INDEX), name: data})).endswith(f": {name}")


def test_other_file_called_version(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "dir", {**skopeo_dir(IMAGE), "version": b"1.0"})
    assert invalid(path) == "it is not a list of images: manifest.json"
