"""OCI layouts: image names, manifests and blobs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ociregistry.archives import members
from ociregistry.store.records import Dates
from tests.images import OCI_INDEX, Image, Index, Manifest, digest_of, make_image, make_index
from tests.unit.support.archives import (
    IMAGE_NAME,
    NAME,
    REF_NAME,
    Files,
    blob_name,
    contents,
    descriptor,
    docker_saved,
    failures,
    invalid,
    layout,
    meanings,
    named,
    parts,
    to_json,
    write_folder,
    write_tar,
)

IMAGE, OTHER = make_image("layout"), make_image("other")
INDEX = make_index("layout")
DOCKER = make_index("layout", docker=True)
CREATED = datetime(2026, 1, 1, tzinfo=UTC)
DATES = {"ociregistry.created": "2026-01-01T00:00:00Z", "ociregistry.confirmed": "2026-02-01T00:00:00.000001+00:00"}


@pytest.mark.parametrize("write", [write_tar, write_folder])
@pytest.mark.parametrize("what", [IMAGE, INDEX, DOCKER, make_image("docker", docker=True)])
def test_all_manifests_and_blobs_are_found(
    tmp_path: Path, what: Image | Index, write: Callable[[Path, Files], Path]
) -> None:
    path = write(tmp_path / "archive", named(what))
    found = contents(path)
    assert meanings(path) == {NAME: what.manifest.digest}
    assert {digest: manifest.data for digest, manifest in found.manifests.items()} == {
        manifest.digest: manifest.data for manifest in what.manifests
    }
    assert {digest: member.size for digest, member in found.blobs.items()} == {
        digest: len(data) for digest, data in parts(what).items()
    }
    assert found.failed == ()


@pytest.mark.parametrize(
    ("annotations", "name"),
    [
        ({IMAGE_NAME: NAME, REF_NAME: "1.25"}, NAME),
        ({IMAGE_NAME: "quay.io/app:1", REF_NAME: NAME}, "quay.io/app:1"),
        ({REF_NAME: NAME}, NAME),
        ({REF_NAME: "nginx:1.25"}, NAME),
        ({REF_NAME: "localhost/app:1"}, "localhost/app:1"),
        ({REF_NAME: "registry/app:1", **DATES}, "registry/app:1"),
        ({REF_NAME: "team/app:1"}, "docker.io/team/app:1"),
        ({REF_NAME: "reg.example:5000/app:1"}, "reg.example:5000/app:1"),
        ({IMAGE_NAME: f"sha256:{'a' * 64}", REF_NAME: NAME}, NAME),
        ({IMAGE_NAME: f"nginx@{IMAGE.manifest.digest}"}, f"docker.io/library/nginx@{IMAGE.manifest.digest}"),
        ({IMAGE_NAME: f"reg:5000/nginx:1@{IMAGE.manifest.digest}"}, f"reg:5000/nginx@{IMAGE.manifest.digest}"),
    ],
)
def test_name_from_annotations(tmp_path: Path, annotations: Mapping[str, str], name: str) -> None:
    path = write_tar(tmp_path / "a.tar", layout((IMAGE, annotations)))
    assert meanings(path) == {name: IMAGE.manifest.digest}
    assert failures(path) == {}


@pytest.mark.parametrize(
    "annotations",
    [
        None,
        {REF_NAME: "1.25"},
        {REF_NAME: "latest"},
        {REF_NAME: "nginx"},
        {REF_NAME: "reg.example:5000/app"},
        {REF_NAME: "Not A Name:1"},
        {IMAGE_NAME: f"sha256:{'a' * 64}"},
    ],
)
def test_unnamed_image_fails_with_hint(tmp_path: Path, annotations: Mapping[str, str] | None) -> None:
    path = write_tar(tmp_path / "a.tar", layout((IMAGE, annotations), (OTHER, {REF_NAME: NAME})))
    assert meanings(path) == {NAME: OTHER.manifest.digest}
    (failure,) = failures(path).items()
    assert failure[0] == f"{path}: {IMAGE.manifest.digest}"
    assert failure[1].endswith(": give it its name, such as --name docker.io/library/nginx:1.25")


@pytest.mark.parametrize("what", [IMAGE, Index(INDEX.manifest, (INDEX.images[0],))])
def test_names_from_docker_manifest_json(tmp_path: Path, what: Image | Index) -> None:
    image = what if isinstance(what, Image) else what.images[0]
    saved = {
        "Config": blob_name(image.config.digest),
        "RepoTags": ["nginx:1.25", "quay.io/app:1"],
        "Layers": [blob_name(layer.digest) for layer in image.layers],
    }
    other = {"Config": blob_name(OTHER.config.digest), "RepoTags": ["other:1"], "Layers": []}
    files = {**layout((what, {REF_NAME: "1.25"})), "manifest.json": to_json([other, saved])}
    path = write_tar(tmp_path / "a.tar", files)
    assert meanings(path) == dict.fromkeys([NAME, "quay.io/app:1"], what.manifest.digest)


def test_index_json_takes_precedence_over_manifest_json(tmp_path: Path) -> None:
    files = {**docker_saved(OTHER, "other:1"), **named(IMAGE)}
    assert meanings(write_tar(tmp_path / "a.tar", files)) == {NAME: IMAGE.manifest.digest}


@pytest.mark.parametrize("what", [IMAGE, INDEX])
def test_media_types_in_any_spelling(tmp_path: Path, what: Image | Index) -> None:
    entry = descriptor(what.manifest) | {
        "mediaType": f"{what.manifest.media_type.upper()}; charset=utf-8",
        "annotations": {REF_NAME: NAME},
    }
    files = {**named(what), "index.json": to_json({"schemaVersion": 2, "manifests": [entry]})}
    found = contents(write_tar(tmp_path / "a.tar", files))
    assert [one.media_type for one in found.manifests.values() if one.digest == what.manifest.digest] == [
        what.manifest.media_type
    ]


def test_index_with_one_platform_only(tmp_path: Path) -> None:
    image, other = INDEX.images
    sparse = [other.manifest.digest, *(blob.digest for blob in other.blobs)]
    found = contents(write_tar(tmp_path / "a.tar", layout((INDEX, {REF_NAME: NAME}), sparse=sparse)))
    assert set(found.manifests) == {INDEX.manifest.digest, image.manifest.digest}


def nested(*inner: Image | Index) -> Index:
    """Return a layout with an index of indexes."""
    data = to_json({"schemaVersion": 2, "manifests": [descriptor(one.manifest) for one in inner]})
    return Index(Manifest(digest_of(data), data, OCI_INDEX), ())


def test_index_of_indexes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = nested(INDEX, IMAGE)
    outer = nested(inner, INDEX, IMAGE)
    files = layout((outer, {REF_NAME: NAME}), (inner, None), (INDEX, None), (IMAGE, None))
    # Each manifest is read once.
    read = [manifest.data for one in (outer, inner, INDEX, IMAGE) for manifest in one.manifests]
    monkeypatch.setattr(members, "_MOST_METADATA", sum(map(len, [*read, files["index.json"]])))
    found = contents(write_tar(tmp_path / "a.tar", files))
    tree: list[str] = [manifest.digest for manifest in found.tree(found.images[0].manifest)]
    assert len(tree) == len(set(tree)) == 6
    place = tree.index
    assert tree[-1] == outer.manifest.digest
    assert place(inner.manifest.digest) == 4
    assert place(INDEX.manifest.digest) > max(place(image.manifest.digest) for image in INDEX.images)


def test_nesting_depth_of_indexes_is_limited(tmp_path: Path) -> None:
    row: list[Image | Index] = [IMAGE]
    for _ in range(2000):
        row.append(nested(row[-1]))
    files = layout((row[-1], {REF_NAME: NAME}))
    files |= {blob_name(one.manifest.digest): one.manifest.data for one in row}
    found = contents(write_folder(tmp_path / "folder", files))
    assert len(found.tree(found.images[0].manifest)) == 2001


def test_dates_of_own_exports(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", layout((IMAGE, {REF_NAME: NAME, **DATES}), (OTHER, {REF_NAME: "other:1"})))
    dates = {str(one.image): one.dates for one in contents(path).images}
    assert dates == {
        NAME: Dates(CREATED, datetime(2026, 2, 1, 0, 0, 0, 1, tzinfo=UTC)),
        "docker.io/library/other:1": None,
    }


@pytest.mark.parametrize("created", ["yesterday", "2026-01-01T00:00:00"])
def test_malformed_dates_are_refused(tmp_path: Path, created: str) -> None:
    annotations = {REF_NAME: NAME, **DATES, "ociregistry.created": created}
    assert invalid(write_tar(tmp_path / "a.tar", layout((IMAGE, annotations)))).endswith(": index.json")


def test_one_name_for_two_images_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", layout((IMAGE, {REF_NAME: NAME}), (OTHER, {IMAGE_NAME: NAME})))
    assert meanings(path) == {}
    assert failures(path) == {NAME: "the archive has 2 images of this name"}


def test_repeated_name_of_one_image(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", layout((IMAGE, {REF_NAME: NAME}), (IMAGE, {IMAGE_NAME: NAME})))
    assert meanings(path) == {NAME: IMAGE.manifest.digest}
    assert failures(path) == {}


def test_newer_of_two_dated_images_keeps_the_name(tmp_path: Path) -> None:
    newer = {**DATES, "ociregistry.confirmed": (CREATED + timedelta(days=99)).isoformat()}
    path = write_tar(
        tmp_path / "a.tar", layout((IMAGE, {REF_NAME: NAME, **newer}), (OTHER, {REF_NAME: NAME, **DATES}))
    )
    by_digest = f"docker.io/library/nginx@{OTHER.manifest.digest}"
    assert meanings(path) == {NAME: IMAGE.manifest.digest, by_digest: OTHER.manifest.digest}


def test_name_with_mismatching_digest_is_a_failure(tmp_path: Path) -> None:
    name = f"docker.io/library/nginx@{INDEX.manifest.digest}"
    path = write_tar(tmp_path / "a.tar", layout((IMAGE, {REF_NAME: name})))
    assert meanings(path) == {}
    assert IMAGE.manifest.digest in failures(path)[name]
