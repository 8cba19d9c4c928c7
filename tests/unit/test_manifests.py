"""Manifests: what they name, and what is refused, which is told by ManifestInvalid alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ociregistry.manifests import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    IMAGES,
    LARGEST_MANIFEST,
    LISTS,
    MEDIA_TYPES,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Manifest,
    ManifestInvalid,
)
from ociregistry.names import Digest
from tests.images import make_artifact, make_image, make_index

DIGEST = Digest.of(b"layer")
LAYER = {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": DIGEST, "size": 5}
CONFIG = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": Digest.of(b"config"), "size": 6}
IMAGE: dict[str, Any] = {"schemaVersion": 2, "config": CONFIG, "layers": [LAYER]}
INDEX: dict[str, Any] = {"schemaVersion": 2, "manifests": [{**LAYER, "mediaType": OCI_MANIFEST}]}
# Stands in for "the key is not there".
MISSING = object()


def parse(document: object, media_type: str = OCI_MANIFEST) -> Manifest:
    """What is made of a document."""
    return Manifest.parse(json.dumps(document).encode(), media_type)


def changed(document: dict[str, Any], **keys: object) -> dict[str, Any]:
    """The document with other keys."""
    return {key: value for key, value in {**document, **keys}.items() if value is not MISSING}


@pytest.mark.parametrize("docker", [False, True])
def test_an_image_manifest_names_its_config_and_layers(docker: bool) -> None:
    image = make_image("manifests", docker=docker, layers=3)
    manifest = Manifest.parse(image.manifest.data, image.manifest.media_type)
    assert manifest.digest == image.manifest.digest
    assert (manifest.data, manifest.size) == (image.manifest.data, len(image.manifest.data))
    assert manifest.media_type == image.manifest.media_type
    assert manifest.media_type == (DOCKER_MANIFEST if docker else OCI_MANIFEST)
    assert [(blob.digest, blob.size, blob.media_type) for blob in manifest.blobs] == [
        (blob.digest, len(blob.data), blob.media_type) for blob in image.blobs
    ]
    assert manifest.children == ()
    assert not manifest.is_list


@pytest.mark.parametrize("docker", [False, True])
def test_an_index_names_its_images_by_platform(docker: bool) -> None:
    index = make_index("manifests", docker=docker, platforms=("linux/amd64", "linux/arm/v7"))
    manifest = Manifest.parse(index.manifest.data, index.manifest.media_type)
    assert manifest.media_type == (DOCKER_LIST if docker else OCI_INDEX)
    assert [child.digest for child in manifest.children] == [image.manifest.digest for image in index.images]
    assert [child.platform for child in manifest.children] == ["linux/amd64", "linux/arm/v7"]
    assert manifest.blobs == ()
    assert manifest.is_list


def test_an_artifact_is_an_image_manifest() -> None:
    artifact = make_artifact("signature", make_image("manifests").manifest)
    manifest = Manifest.parse(artifact.manifest.data, OCI_MANIFEST)
    assert [blob.digest for blob in manifest.blobs] == [blob.digest for blob in artifact.blobs]


def test_an_empty_index_is_one() -> None:
    assert parse({"schemaVersion": 2, "manifests": []}, OCI_INDEX).children == ()


def test_all_media_types_are_asked_for() -> None:
    assert set(MEDIA_TYPES) == LISTS | IMAGES
    assert not LISTS & IMAGES


def test_foreign_layers_are_not_ours_to_fetch() -> None:
    foreign = {**LAYER, "digest": Digest.of(b"foreign"), "urls": ["https://microsoft.example/layer"]}
    manifest = parse(changed(IMAGE, layers=[LAYER, foreign]))
    assert [blob.digest for blob in manifest.blobs] == [CONFIG["digest"], DIGEST]
    # An empty list of URLs says that it comes from the registry.
    assert len(parse(changed(IMAGE, layers=[{**LAYER, "urls": []}])).blobs) == 2


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_the_digest_that_was_asked_for_must_hold(algorithm: str) -> None:
    data = json.dumps(IMAGE).encode()
    digest = Digest.of(data, algorithm)
    assert Manifest.parse(data, OCI_MANIFEST, digest).digest == digest
    with pytest.raises(ManifestInvalid, match="digest"):
        Manifest.parse(data + b" ", OCI_MANIFEST, digest)


def test_without_a_digest_it_is_the_sha256_of_the_bytes() -> None:
    data = json.dumps(IMAGE, indent=7).encode() + b"\n"
    manifest = Manifest.parse(data, OCI_MANIFEST)
    assert manifest.digest == Digest.of(data)
    assert manifest.data == data


@pytest.mark.parametrize(
    ("document", "media_type"),
    [
        (changed(IMAGE, mediaType=DOCKER_MANIFEST), OCI_MANIFEST),
        (changed(IMAGE, mediaType=OCI_INDEX), OCI_MANIFEST),
        (changed(IMAGE, mediaType=""), OCI_MANIFEST),
        (changed(IMAGE, mediaType=5), OCI_MANIFEST),
        (changed(INDEX, mediaType=OCI_MANIFEST), OCI_INDEX),
        (IMAGE, "application/json"),
        (IMAGE, ""),
        (IMAGE, "application/vnd.docker.distribution.manifest.v1+prettyjws"),
    ],
)
def test_the_content_type_and_the_media_type_agree(document: object, media_type: str) -> None:
    with pytest.raises(ManifestInvalid):
        parse(document, media_type)


@pytest.mark.parametrize(
    ("document", "media_type"),
    [
        (IMAGE | INDEX, OCI_MANIFEST),
        (IMAGE | INDEX, OCI_INDEX),
        (INDEX | {"layers": []}, DOCKER_LIST),
        (INDEX | {"config": None}, OCI_INDEX),
        (INDEX | {"fsLayers": []}, OCI_INDEX),
        (IMAGE | {"manifests": []}, DOCKER_MANIFEST),
        (IMAGE | {"fsLayers": []}, OCI_MANIFEST),
        (IMAGE, OCI_INDEX),
        (INDEX, OCI_MANIFEST),
    ],
)
def test_what_could_be_read_as_two_things_is_refused(document: object, media_type: str) -> None:
    """CVE-2021-41190."""
    with pytest.raises(ManifestInvalid):
        parse(document, media_type)


@pytest.mark.parametrize("version", [1, 3, "2", True, None, [2], MISSING])
def test_only_schema_2_is_served(version: object) -> None:
    with pytest.raises(ManifestInvalid, match="schemaVersion"):
        parse(changed(IMAGE, schemaVersion=version))


@pytest.mark.parametrize("size", [-1, 5.0, "5", True, None, [], MISSING])
def test_a_size_is_a_number_of_bytes(size: object) -> None:
    with pytest.raises(ManifestInvalid, match="size"):
        parse(changed(IMAGE, layers=[changed(LAYER, size=size)]))
    with pytest.raises(ManifestInvalid, match="size"):
        parse(changed(INDEX, manifests=[changed(LAYER, size=size)]), OCI_INDEX)


@pytest.mark.parametrize("size", [0, 2**63])
def test_sizes_are_kept_as_they_are(size: int) -> None:
    assert parse(changed(IMAGE, layers=[changed(LAYER, size=size)])).blobs[1].size == size


@pytest.mark.parametrize("digest", ["", "sha256:0", "md5:" + "0" * 32, "sha256:../../etc/passwd", 5, None, MISSING])
def test_a_descriptor_has_a_digest(digest: object) -> None:
    with pytest.raises(ManifestInvalid, match="digest"):
        parse(changed(IMAGE, config=changed(CONFIG, digest=digest)))


@pytest.mark.parametrize("value", [None, [], {}, "text", 5, [None], [5], ["text"], [[]], MISSING])
def test_layers_and_manifests_are_lists_of_descriptors(value: object) -> None:
    if value != []:
        with pytest.raises(ManifestInvalid):
            parse(changed(IMAGE, layers=value))
        with pytest.raises(ManifestInvalid):
            parse(changed(INDEX, manifests=value), OCI_INDEX)
    with pytest.raises(ManifestInvalid):
        parse(changed(IMAGE, config=value))


@pytest.mark.parametrize(
    ("platform", "expected"),
    [
        ({"os": "linux", "architecture": "arm64", "variant": "v8"}, "linux/arm64/v8"),
        ({"os": "linux", "architecture": "amd64", "os.version": "1"}, "linux/amd64"),
        ({"os": "unknown", "architecture": "unknown"}, "unknown/unknown"),
        ({}, ""),
        (None, ""),
        ("linux/amd64", ""),
    ],
)
def test_a_platform(platform: object, expected: str) -> None:
    assert Descriptor.parse({**LAYER, "platform": platform}).platform == expected


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"5",
        b'"text"',
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b"<html>",
        b"[" * 100_000,
        b'{"a":' * 50_000,
    ],
)
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    for media_type in MEDIA_TYPES:
        with pytest.raises(ManifestInvalid):
            Manifest.parse(data, media_type)


@pytest.mark.parametrize("depth", [1, 100, 400, 900, 940, 960, 980, 990, 1000, 10_000])
def test_deep_nesting_is_no_way_to_break_it(depth: int) -> None:
    """Also where the JSON is just not too deep to be read, but is to be printed."""
    nested = b"[" * depth + b"]" * depth
    for where in (
        b'{"schemaVersion":2,"layers":[%b]}',
        b'{"schemaVersion":%b}',
        b'{"schemaVersion":2,"mediaType":%b}',
    ):
        with pytest.raises(ManifestInvalid):
            Manifest.parse(where % nested, OCI_MANIFEST)


def test_numbers_of_any_length_are_no_way_to_break_it() -> None:
    document = b'{"schemaVersion":2,"layers":[],"config":{"size":%b}}' % (b"9" * 5000)
    with pytest.raises(ManifestInvalid):
        Manifest.parse(document, OCI_MANIFEST)


def test_the_largest_manifest() -> None:
    bare = json.dumps(IMAGE).encode()
    data = bare.ljust(LARGEST_MANIFEST)
    assert LARGEST_MANIFEST == 8 * 1024 * 1024
    assert Manifest.parse(data, OCI_MANIFEST).size == LARGEST_MANIFEST
    with pytest.raises(ManifestInvalid, match="larger"):
        Manifest.parse(data + b" ", OCI_MANIFEST)


@pytest.mark.parametrize(
    "document",
    [
        changed(IMAGE, mediaType="x" * 100_000),
        changed(IMAGE, config=changed(CONFIG, digest="x" * 100_000)),
        changed(IMAGE, config=changed(CONFIG, size="x" * 100_000)),
        changed(IMAGE, config="x" * 100_000),
        changed(IMAGE, schemaVersion="x" * 100_000),
    ],
)
def test_an_upstream_cannot_fill_the_log_with_what_it_sends(document: object) -> None:
    with pytest.raises(ManifestInvalid) as refused:
        parse(document)
    assert len(str(refused.value)) < 1000


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([DIGEST, *MEDIA_TYPES, 2]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["digest", "size", "mediaType", "urls", "platform", "os"]) | st.text(), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from(["schemaVersion", "mediaType", "config", "layers", "manifests"]), JSON),
    st.sampled_from(MEDIA_TYPES),
    st.booleans(),
)
def test_a_document_is_a_manifest_or_invalid(document: dict[str, object], media_type: str, good: bool) -> None:
    try:
        manifest = parse({**document, "schemaVersion": 2} if good else document, media_type)
    except ManifestInvalid:
        return
    assert manifest.is_list == (media_type in LISTS)
    for named in (*manifest.children, *manifest.blobs):
        assert Digest.parse(named.digest) == named.digest
        assert named.size >= 0


@given(st.binary(), st.text())
def test_bytes_are_a_manifest_or_invalid(data: bytes, media_type: str) -> None:
    with pytest.raises(ManifestInvalid):
        Manifest.parse(data, media_type)
