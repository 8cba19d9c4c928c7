"""Manifest parsing: children, blobs, and refusal with ManifestInvalid."""

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
# Stands for an absent key.
MISSING = object()


def parse(document: object, media_type: str = OCI_MANIFEST) -> Manifest:
    """Parse a JSON document as a manifest."""
    return Manifest.parse(json.dumps(document).encode(), media_type)


def changed(document: dict[str, Any], **keys: object) -> dict[str, Any]:
    """Return the document with other values, or without those that are MISSING."""
    return {key: value for key, value in {**document, **keys}.items() if value is not MISSING}


@pytest.mark.parametrize("docker", [False, True])
def test_image_manifest_names_config_and_layers(docker: bool) -> None:
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
def test_index_names_images_by_platform(docker: bool) -> None:
    index = make_index("manifests", docker=docker, platforms=("linux/amd64", "linux/arm/v7"))
    manifest = Manifest.parse(index.manifest.data, index.manifest.media_type)
    assert manifest.media_type == (DOCKER_LIST if docker else OCI_INDEX)
    assert [child.digest for child in manifest.children] == [image.manifest.digest for image in index.images]
    assert [child.platform for child in manifest.children] == ["linux/amd64", "linux/arm/v7"]
    assert manifest.blobs == ()
    assert manifest.is_list


def test_artifact_is_an_image_manifest() -> None:
    artifact = make_artifact("signature", make_image("manifests").manifest)
    manifest = Manifest.parse(artifact.manifest.data, OCI_MANIFEST)
    assert [blob.digest for blob in manifest.blobs] == [blob.digest for blob in artifact.blobs]


def test_empty_index() -> None:
    assert parse({"schemaVersion": 2, "manifests": []}, OCI_INDEX).children == ()


def test_accept_header_has_all_media_types() -> None:
    assert set(MEDIA_TYPES) == LISTS | IMAGES
    assert not LISTS & IMAGES


def test_foreign_layers_are_optional_blobs() -> None:
    foreign = {**LAYER, "digest": Digest.of(b"foreign"), "urls": ["https://microsoft.example/layer"]}
    manifest = parse(changed(IMAGE, layers=[LAYER, foreign]))
    assert [blob.digest for blob in manifest.blobs] == [CONFIG["digest"], DIGEST, foreign["digest"]]
    assert manifest.blob_sizes == {**manifest.required, **manifest.foreign_layers}
    assert [*manifest.required] == [CONFIG["digest"], DIGEST]
    assert manifest.foreign_layers == {foreign["digest"]: LAYER["size"]}
    assert manifest.layers == {DIGEST, foreign["digest"]}
    # An empty list of URLs says that it comes from the registry, and so does another layer that is the same blob.
    for layers in ([{**LAYER, "urls": []}], [LAYER, {**LAYER, "urls": ["https://microsoft.example/layer"]}]):
        assert parse(changed(IMAGE, layers=layers)).foreign_layers == {}
    # A config is never left out.
    assert not parse(changed(IMAGE, config={**CONFIG, "urls": ["https://a.example"]})).foreign_layers


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_expected_digest_is_verified(algorithm: str) -> None:
    data = json.dumps(IMAGE).encode()
    digest = Digest.of(data, algorithm)
    assert Manifest.parse(data, OCI_MANIFEST, digest).digest == digest
    with pytest.raises(ManifestInvalid, match="digest"):
        Manifest.parse(data + b" ", OCI_MANIFEST, digest)


def test_default_digest_is_sha256() -> None:
    data = json.dumps(IMAGE, indent=7).encode() + b"\n"
    manifest = Manifest.parse(data, OCI_MANIFEST)
    assert manifest.digest == Digest.of(data)
    assert manifest.data == data


@pytest.mark.parametrize(
    ("document", "media_type"),
    [
        (changed(IMAGE, mediaType=DOCKER_MANIFEST), OCI_MANIFEST),
        (changed(IMAGE, mediaType=OCI_INDEX), OCI_MANIFEST),
        (changed(IMAGE, mediaType=" "), OCI_MANIFEST),
        (changed(IMAGE, mediaType=[OCI_MANIFEST]), OCI_MANIFEST),
        (changed(IMAGE, mediaType=5), OCI_MANIFEST),
        (changed(INDEX, mediaType=OCI_MANIFEST), OCI_INDEX),
        (IMAGE, "application/json"),
        (IMAGE, ""),
        (IMAGE, "application/vnd.docker.distribution.manifest.v1+prettyjws"),
    ],
)
def test_media_type_mismatch_is_refused(document: object, media_type: str) -> None:
    with pytest.raises(ManifestInvalid):
        parse(document, media_type)


@pytest.mark.parametrize(
    "spelled",
    [
        OCI_MANIFEST.upper(),
        f"{OCI_MANIFEST}; charset=utf-8",
        f" {OCI_MANIFEST} ;charset=UTF-8",
        "Application/Vnd.OCI.image.Manifest.V1+JSON",
    ],
)
def test_media_types_are_compared_without_case_and_parameters(spelled: str) -> None:
    """Wherever they stand: in the Content-Type, in mediaType, and in descriptors."""
    for document, sent in ((IMAGE, spelled), (changed(IMAGE, mediaType=spelled), OCI_MANIFEST)):
        manifest = parse(document, sent)
        assert manifest.media_type == OCI_MANIFEST
        assert manifest.data == json.dumps(document).encode()
    (child,) = parse(changed(INDEX, manifests=[{**LAYER, "mediaType": spelled}]), OCI_INDEX.upper()).children
    assert child.media_type == OCI_MANIFEST


@pytest.mark.parametrize("absent", [None, "", MISSING])
def test_manifest_without_media_type(absent: object) -> None:
    assert parse(changed(IMAGE, mediaType=absent)).media_type == OCI_MANIFEST
    assert parse(changed(IMAGE, config=changed(CONFIG, mediaType=absent))).blobs[0].media_type == ""


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
def test_ambiguous_manifest_is_refused(document: object, media_type: str) -> None:
    """See CVE-2021-41190."""
    with pytest.raises(ManifestInvalid):
        parse(document, media_type)


@pytest.mark.parametrize("version", [1, 3, "2", True, None, [2], MISSING])
def test_schema_version_must_be_2(version: object) -> None:
    with pytest.raises(ManifestInvalid, match="schemaVersion"):
        parse(changed(IMAGE, schemaVersion=version))


@pytest.mark.parametrize("size", [-1, 5.0, "5", True, None, [], MISSING])
def test_malformed_size_is_refused(size: object) -> None:
    with pytest.raises(ManifestInvalid, match="size"):
        parse(changed(IMAGE, layers=[changed(LAYER, size=size)]))
    with pytest.raises(ManifestInvalid, match="size"):
        parse(changed(INDEX, manifests=[changed(LAYER, size=size)]), OCI_INDEX)


@pytest.mark.parametrize("size", [0, 2**63])
def test_any_valid_size_is_kept(size: int) -> None:
    assert parse(changed(IMAGE, layers=[changed(LAYER, size=size)])).blobs[1].size == size


@pytest.mark.parametrize("digest", ["", "sha256:0", "md5:" + "0" * 32, "sha256:../../etc/passwd", 5, None, MISSING])
def test_malformed_digest_is_refused(digest: object) -> None:
    with pytest.raises(ManifestInvalid, match="digest"):
        parse(changed(IMAGE, config=changed(CONFIG, digest=digest)))


def test_null_is_an_empty_list() -> None:
    """Programs in Go write it; docker, containerd, crane and skopeo read it. The bytes stay as they are."""
    for data, media_type in (
        (json.dumps({**IMAGE, "layers": None}).encode(), OCI_MANIFEST),
        (json.dumps({**INDEX, "manifests": None}).encode(), OCI_INDEX),
    ):
        manifest = Manifest.parse(data, media_type)
        assert (manifest.data, manifest.digest) == (data, Digest.of(data))
        assert manifest.children == ()
        assert manifest.layers == frozenset()


@pytest.mark.parametrize("value", [None, [], {}, "", False, "text", 5, [None], [5], ["text"], [[]], MISSING])
def test_layers_and_manifests_must_be_lists_of_descriptors(value: object) -> None:
    if value not in ([], None):
        with pytest.raises(ManifestInvalid):
            parse(changed(IMAGE, layers=value))
        with pytest.raises(ManifestInvalid):
            parse(changed(INDEX, manifests=value), OCI_INDEX)
    with pytest.raises(ManifestInvalid):
        parse(changed(IMAGE, config=value))


@pytest.mark.parametrize(
    ("platform", "expected"),
    [
        ({"os": "linux", "architecture": "arm64", "variant": "v8"}, "linux/arm64"),
        ({"os": "Linux", "architecture": "x86_64", "variant": None}, "linux/amd64"),
        ({"os": "linux", "architecture": "arm"}, "linux/arm/v7"),
        ({"architecture": "aarch64"}, "linux/arm64"),
        ({"os": "linux"}, "linux"),
        ({"os": "windows", "architecture": "amd\n64"}, "windows/amd?64"),
        ({"os": "linux", "architecture": "amd64", "os.version": "1"}, "linux/amd64"),
        ({"os": "unknown", "architecture": "unknown"}, "unknown/unknown"),
        ({}, ""),
        (None, ""),
        ("linux/amd64", ""),
    ],
)
def test_platform(platform: object, expected: str) -> None:
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
def test_other_json_is_refused(data: bytes) -> None:
    for media_type in MEDIA_TYPES:
        with pytest.raises(ManifestInvalid):
            Manifest.parse(data, media_type)


@pytest.mark.parametrize("depth", [1, 100, 400, 900, 940, 960, 980, 990, 1000, 10_000])
def test_deep_nesting_is_refused(depth: int) -> None:
    """Also JSON that can just be parsed, but not printed."""
    nested = b"[" * depth + b"]" * depth
    for where in (
        b'{"schemaVersion":2,"layers":[%b]}',
        b'{"schemaVersion":%b}',
        b'{"schemaVersion":2,"mediaType":%b}',
    ):
        with pytest.raises(ManifestInvalid):
            Manifest.parse(where % nested, OCI_MANIFEST)


def test_very_long_number_is_refused() -> None:
    document = b'{"schemaVersion":2,"layers":[],"config":{"size":%b}}' % (b"9" * 5000)
    with pytest.raises(ManifestInvalid):
        Manifest.parse(document, OCI_MANIFEST)


def test_size_limit() -> None:
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
def test_error_text_is_bounded(document: object) -> None:
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
def test_any_document_is_parsed_or_refused(document: dict[str, object], media_type: str, good: bool) -> None:
    try:
        manifest = parse({**document, "schemaVersion": 2} if good else document, media_type)
    except ManifestInvalid:
        return
    assert manifest.is_list == (media_type in LISTS)
    for named in (*manifest.children, *manifest.blobs):
        assert Digest.parse(named.digest) == named.digest
        assert named.size >= 0


@given(st.binary(), st.text())
def test_any_bytes_are_parsed_or_refused(data: bytes, media_type: str) -> None:
    with pytest.raises(ManifestInvalid):
        Manifest.parse(data, media_type)
