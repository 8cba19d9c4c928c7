"""Foreign, damaged and incomplete files among the records: left unchanged, logged once, without effect on others."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from tests.images import OCI_MANIFEST, Image, Index
from tests.processes import wait_until
from tests.real.caches import SEEN, Cache, counts, pull, record, wait_scanned_twice
from tests.upstream_rules import Reply

GONE = Reply(503)


GO = {
    "created": "2024-03-01T22:17:30",
    "pulled": "2024-03-01T22:17:30",
    "Url": "docker.io/library/nginx:1.25",
    "V1ociManifest": {"schemaVersion": 2, "mediaType": OCI_MANIFEST},
}


def damages(good: bytes) -> dict[str, bytes]:
    """Return files that may replace a record, by their defect."""
    document = json.loads(good)
    return {
        "go": json.dumps(GO).encode(),
        "garbage": b"\x00\xff\xfe" * 1000,
        "empty": b"",
        "truncated": good[: len(good) // 2],
        "another": good,
        "list": b"[]",
        "null": b"null",
        "deep": b"[" * 100_000,
        "no_images": json.dumps({**document, "images": 7}).encode(),
        "no_dates": json.dumps({**document, "images": {url: {} for url in document["images"]}}).encode(),
        "traversal": json.dumps({**document, "images": {"../../etc/passwd:1": {}}}).encode(),
    }


def test_foreign_records_are_unchanged_and_hide_no_others(
    cache: Cache, repository: str, image: Image, index: Index
) -> None:
    pull(cache, repository, image)
    pull(cache, repository, index)
    folder = cache.daemon.image_path / "img"
    good = record(cache, image.manifest).read_bytes()
    before, since = counts(cache.daemon), cache.log_size
    foreign = {
        folder.parent / place / hashlib.sha256(f"{repository}/{place}/{kind}".encode()).hexdigest(): data
        for place in ("img", "fat")
        for kind, data in damages(good).items()
    }
    # An index among the images, and an image among the indexes.
    foreign[folder / record(cache, index.manifest).name] = record(cache, index.manifest).read_bytes()
    foreign[folder.parent / "fat" / record(cache, image.manifest).name] = good
    for path, data in foreign.items():
        path.write_bytes(data)
    unreadable, loop, directory = (folder / (digit * 64) for digit in "789")
    unreadable.touch(0o000)
    loop.symlink_to(loop)
    directory.mkdir()
    strange = {*foreign, unreadable, loop, directory}
    hexadecimal = record(cache, image.manifest).name
    others = (
        "x.tmp",
        ".syncthing.x.tmp",
        f".syncthing.{hexadecimal}.tmp",
        f".{hexadecimal}.Ab3dEf",
        hexadecimal.upper(),
    )
    for name in others:
        (folder / name).write_bytes(good)

    def times_logged(path: Path) -> int:
        return sum(f"{path}: " in line for line in cache.daemon.log[since:].splitlines())

    wait_until(lambda: all(map(times_logged, strange)), SEEN, "each is logged")
    wait_scanned_twice(cache)
    assert {path: times_logged(path) for path in strange} == dict.fromkeys(strange, 1)
    assert not re.search(r"syncthing|Ab3dEf", cache.daemon.log[since:])
    assert counts(cache.daemon) == before
    assert {path: path.read_bytes() for path in foreign} == foreign
    assert directory.is_dir()
    assert loop.is_symlink()
    with cache.scripted(f"/v2/{repository}/*", GONE):
        pull(cache, repository, image)
        pull(cache, repository, index)


@pytest.mark.parametrize("kind", [*damages(b'{"images": {"x": {}}}'), "loop", "directory"])
def test_damaged_record_is_not_served_and_can_be_replaced(
    cache: Cache, repository: str, image: Image, index: Index, kind: str
) -> None:
    pull(cache, repository, image)
    good, manifest = record(cache, image.manifest).read_bytes(), index.images[0].manifest
    place, path = record(cache, manifest), f"{repository}/manifests/{manifest.digest}"
    if kind == "loop":
        place.symlink_to(place)
    elif kind == "directory":
        place.mkdir()
    else:
        place.write_bytes(damages(good)[kind])
    with cache.scripted(f"/v2/{repository}/*", GONE):
        cache.refused(path, 503, "UNAVAILABLE")
    assert cache.ask(path).body == manifest.data
    if place.is_file():
        with cache.scripted(f"/v2/{repository}/*", GONE):
            assert cache.ask(path).body == manifest.data
