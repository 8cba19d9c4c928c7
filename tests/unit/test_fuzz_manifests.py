"""Any bytes sent as a manifest are parsed, or refused with ManifestInvalid."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ociregistry.manifests import IMAGES, LISTS, MEDIA_TYPES, Descriptor, Manifest, ManifestInvalid
from ociregistry.names import Digest
from ociregistry.store.records import Record, RecordInvalid
from tests.images import make_artifact, make_image, make_index

REAL = tuple(
    (document.data, document.media_type)
    for docker in (False, True)
    for what in (make_index("fuzz", docker=docker), make_image("fuzz", docker=docker))
    for document in what.manifests
) + tuple((image.data, image.media_type) for image in make_artifact("fuzz", make_image("fuzz").manifest).manifests)

DIGEST = f"sha256:{'0' * 64}"
KEYS = (
    *("schemaVersion", "mediaType", "config", "layers", "manifests", "fsLayers", "subject", "digest", "size", "urls"),
    *("platform", "os", "architecture", "variant", "annotations", "artifactType", ""),
)

Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def cases(number: int) -> Decorator:
    """Run the test with `number` examples, the same at every run."""
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        # Generating nested documents is slow on a slow machine.
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def check(data: bytes, media_type: str) -> Manifest | None:
    """Parse a manifest and check its properties; return None if it was refused."""
    problem = ""
    manifest = None
    try:
        manifest = Manifest.parse(data, media_type)
    except ManifestInvalid as error:
        problem = str(error)
    if manifest is None:
        # The text goes into a log line and to the client.
        assert 0 < len(problem) < 2000
        return None
    assert manifest.data == data
    assert manifest.digest == Digest.of(data)
    assert manifest.media_type == media_type
    assert media_type in MEDIA_TYPES
    document = json.loads(data)
    assert document["schemaVersion"] == 2
    assert document.get("mediaType") in (None, media_type)
    assert not manifest.blobs if media_type in LISTS else not manifest.children
    assert not document.keys() & ({"layers", "config"} if media_type in LISTS else {"manifests"})
    for named in (*manifest.children, *manifest.blobs):
        check_descriptor(named)
    return manifest


def check_descriptor(named: Descriptor) -> None:
    """Check that digest, size and media type are safe to use as file name, byte count and text."""
    assert Digest.parse(str(named.digest)) == named.digest
    assert type(named.size) is int
    assert named.size >= 0
    assert isinstance(named.media_type, str)
    assert isinstance(named.platform, str)


media_types = st.sampled_from((*MEDIA_TYPES, "", "text/html", "application/json")) | st.text(max_size=10)

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=20)
    | st.sampled_from(
        (DIGEST, "sha256:..", "../../etc/passwd", "\ud800", "\0", *MEDIA_TYPES, 2, 2.0, True, -1, 10**400)
    )
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), inner, max_size=5)
        | st.fixed_dictionaries({"digest": inner, "size": inner, "mediaType": inner})
    ),
    max_leaves=6,
)


def paths(value: Any) -> list[tuple[Any, ...]]:
    """Return the path to every value in a JSON document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(), *((key, *path) for key, child in inner for path in paths(child))]


def test_real_manifests_are_parsed() -> None:
    for data, media_type in REAL:
        manifest = check(data, media_type)
        assert manifest is not None
        assert manifest.children if media_type in LISTS else manifest.blobs
    assert {media_type for _, media_type in REAL} == LISTS | IMAGES


spoiling = st.tuples(
    st.integers(0, 200), st.sampled_from(("replace", "remove", "add")), st.sampled_from(KEYS), values
)


def spoil(document: Any, edits: list[tuple[int, str, str, Any]]) -> Any:
    """Return the document with some values replaced, removed or added."""
    for number, how, name, value in edits:
        everywhere = paths(document)
        path = everywhere[number % len(everywhere)]
        if not path:
            continue
        go_record = document
        for key in path[:-1]:
            go_record = go_record[key]
        if how == "remove":
            del go_record[path[-1]]
        elif how == "add" and isinstance(go_record, dict):
            go_record[name] = value
        else:
            go_record[path[-1]] = value
    return document


@cases(600)
@given(st.sampled_from(REAL), st.lists(spoiling, min_size=1, max_size=3))
def test_mutated_values(original: tuple[bytes, str], edits: list[tuple[int, str, str, Any]]) -> None:
    data, media_type = original
    document = spoil(json.loads(data), edits)
    check(json.dumps(document).encode(), media_type)
    check(json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass"), media_type)


@cases(600)
@given(st.sampled_from(REAL), st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 8), st.binary(max_size=4))))
def test_mutated_bytes(original: tuple[bytes, str], edits: list[tuple[int, int, bytes]]) -> None:
    data, media_type = original
    for at, removed, added in edits:
        data = data[:at] + added + data[at + removed :]
    check(data, media_type)


@cases(300)
@given(values, media_types)
@example({"schemaVersion": 2, "config": {"digest": DIGEST, "size": True}, "layers": []}, MEDIA_TYPES[1])
def test_any_json(document: Any, media_type: str) -> None:
    check(json.dumps(document).encode(), media_type)


@cases(300)
@given(st.dictionaries(st.sampled_from(KEYS), values), st.sampled_from(MEDIA_TYPES))
def test_any_object_with_schema_version_2(document: dict[str, Any], media_type: str) -> None:
    document |= {"schemaVersion": 2, "mediaType": media_type}
    check(json.dumps(document).encode(), media_type)


@cases(300)
@given(st.binary() | st.text().map(str.encode), media_types)
@example(b"\xff\xfe{\x00}\x00", MEDIA_TYPES[0])
@example(b'{"schemaVersion": ' + b"9" * 5000 + b"}", MEDIA_TYPES[0])
@example(b'{"schemaVersion": 1e999}', MEDIA_TYPES[0])
@example(b'{"schemaVersion": NaN}', MEDIA_TYPES[0])
def test_any_bytes(data: bytes, media_type: str) -> None:
    check(data, media_type)


@pytest.mark.parametrize(
    "template",
    [
        "%s",
        '{"schemaVersion": %s}',
        '{"schemaVersion": 2, "manifests": [], "annotations": %s}',
        '{"schemaVersion": 2, "manifests": %s}',
        '{"schemaVersion": 2, "manifests": [{"size": 1, "digest": %s}]}',
        '{"schemaVersion": 2, "manifests": [{"size": 1, "digest": "' + DIGEST + '", "platform": {"os": %s}}]}',
        '{"schemaVersion": 2, "manifests": [{"size": 1, "digest": "' + DIGEST + '", "mediaType": %s}]}',
    ],
)
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_nesting_around_the_recursion_limit(template: str, opening: str, closing: str) -> None:
    """A document that json can just parse may be too deep to print in an error."""
    for depth in (*range(100, 1100, 7), 10_000, 1_000_000):
        value = opening * depth + ("1" if closing == "}" else "") + closing * depth
        check((template % value).encode(), MEDIA_TYPES[0])


LONG = "x" * 100_000


@pytest.mark.parametrize(
    "document",
    [
        {"schemaVersion": LONG},
        {"schemaVersion": 2, "mediaType": LONG},
        {"schemaVersion": 2, "manifests": LONG},
        {"schemaVersion": 2, "manifests": [LONG]},
        {"schemaVersion": 2, "manifests": [{"size": LONG}]},
        {"schemaVersion": 2, "manifests": [{"size": 1, "digest": LONG}]},
        {"schemaVersion": 2, "manifests": [{"size": 1, "digest": [LONG]}]},
    ],
    ids=["version", "type", "list", "entry", "size", "digest", "digest_in_a_list"],
)
def test_error_is_short_for_long_documents(document: object) -> None:
    assert check(json.dumps(document).encode(), MEDIA_TYPES[0]) is None


@cases(600)
@given(st.sampled_from(REAL), st.lists(spoiling, min_size=1, max_size=2))
def test_mutated_records(original: tuple[bytes, str], edits: list[tuple[int, str, str, Any]]) -> None:
    """Files in the store may come from other programs."""
    data, media_type = original
    digest = Digest.of(data)
    image = {"docker.io/library/nginx:1.25": {"created": "2026-03-01T22:17:30Z", "confirmed": "2026-03-02T22:17:30Z"}}
    document = {"digest": digest, "mediaType": media_type, "images": image, "manifest": data.decode()}
    assert Record.parse(json.dumps(document).encode(), digest).manifest.data == data
    spoiled = json.dumps(spoil(document, edits)).encode()
    with suppress(RecordInvalid):
        record = Record.parse(spoiled, digest)
        assert record.manifest.digest == digest
        assert Record.parse(record.render(), digest) == record
