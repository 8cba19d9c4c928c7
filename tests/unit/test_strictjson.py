"""What is JSON: everywhere the same, and nothing that other programs do not take."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import ociregistry
from ociregistry.errors import RegistryError
from ociregistry.manifests import Manifest, ManifestInvalid
from ociregistry.names import Digest, Repository, Upstream
from ociregistry.store.partials import Note
from ociregistry.store.records import Record, RecordInvalid
from ociregistry.strictjson import parse_json
from ociregistry.upstream.registry import _tags

PACKAGE = Path(ociregistry.__file__).parent
PARSERS = {"load", "loads", "JSONDecoder"}

NO_JSON = {
    "nan": b"NaN",
    "infinity": b"Infinity",
    "minus_infinity": b"-Infinity",
    "too_large": b"1e999",
    "deep": b"[" * 100_000,
    "utf_16": '"\u00e4"'.encode("utf-16"),
    "byte_order_mark": b"\xef\xbb\xbf1",
    "not_utf_8": b'"\xff"',
    "single_quotes": b"'a'",
    "trailing": b"1 2",
    "nothing": b"",
}


@pytest.mark.parametrize("kind", NO_JSON)
def test_what_is_no_json(kind: str) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        parse_json(NO_JSON[kind])


def test_json() -> None:
    text = ' {"a": [1, -2.5e3, true, null, "\u00e4 NaN"], "b": {}} '
    assert parse_json(text.encode()) == {"a": [1, -2500.0, True, None, "\u00e4 NaN"], "b": {}}


@pytest.mark.parametrize("value", [b"NaN", b"-Infinity", b"1e999"])
def test_documents_with_no_numbers_are_invalid(value: bytes) -> None:
    """Of a manifest, a record, a note and a list of tags."""
    manifest = b'{"schemaVersion": 2, "manifests": [], "annotations": {"a": %s}}' % value
    with pytest.raises(ManifestInvalid, match="not JSON"):
        Manifest.parse(manifest, "application/vnd.oci.image.index.v1+json")
    with pytest.raises(RecordInvalid, match="not JSON"):
        Record.parse(b'{"digest": %s}' % value, Digest.of(b""))
    assert Note.parse(b'{"durable": 1, "boot": "b", "size": 1, "source": "s", "more": %s}' % value) is None
    with pytest.raises(RegistryError, match="no valid list of tags"):
        _tags(Repository(Upstream("quay.io"), "app"), b'{"tags": [], "a": %s}' % value)


def test_nothing_else_parses_json() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name == "strictjson.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "json":
                assert node.attr not in PARSERS, f"{path}:{node.lineno}"
            if isinstance(node, ast.ImportFrom):
                assert node.module != "json", f"{path}:{node.lineno}"
