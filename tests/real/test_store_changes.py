"""The daemon follows changes that other programs make to the store's files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from http.client import IncompleteRead

import pytest

from tests.client import fetch
from tests.images import Image, Index
from tests.processes import run, wait_until
from tests.real.caches import (
    SEEN,
    Cache,
    blob_file,
    blob_paths,
    counts,
    daemon_in,
    manifest_paths,
    plain_image,
    pull,
    record,
    wait_scanned_twice,
)
from tests.upstream_rules import Reply

GONE = Reply(503)


@pytest.fixture(scope="module")
def other(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cache]:
    """Another daemon with a separate store, for the same upstream."""
    with daemon_in(tmp_path_factory.mktemp("there"), cache.upstream) as daemon:
        yield replace(cache, daemon=daemon)


def copy_records(source: Cache, target: Cache, what: Image | Index) -> None:
    """Copy the records of its manifests from store to store."""
    for manifest in what.manifests:
        run(["cp", str(record(source, manifest)), str(record(target, manifest))])


def copy_blobs(source: Cache, target: Cache, what: Image | Index) -> None:
    """Copy its blobs from store to store."""
    for blob in what.blobs:
        run(["cp", str(blob_file(source.daemon, blob.digest)), str(blob_file(target.daemon, blob.digest))])


def wait_hit(cache: Cache, path: str) -> None:
    """Return as soon as the daemon serves this, without the upstream."""
    wait_until(lambda: cache.ask(path).status == 200, SEEN, f"{path} is served")


def wait_miss(cache: Cache, path: str) -> None:
    """Return as soon as this blob is a miss; for a moment, the download that brought it may still serve it."""

    def missed() -> bool:
        try:
            return cache.ask(path).status == 503
        except IncompleteRead:
            return False  # never more than the rest of it

    wait_until(missed, SEEN, f"{path} is a miss")


@pytest.mark.parametrize("at_once", [True, False])
def test_removed_record_is_a_miss(cache: Cache, repository: str, image: Image, index: Index, at_once: bool) -> None:
    before = counts(cache.daemon)
    pull(cache, repository, image)
    pull(cache, repository, index)
    assert counts(cache.daemon) == (before[0] + 1, before[1] + 3)
    if not at_once:
        wait_scanned_twice(cache)
    for what in (image, index):
        for manifest in what.manifests:
            run(["rm", str(record(cache, manifest))])
    wait_until(lambda: counts(cache.daemon) == before, SEEN, "no record is counted")
    manifests = manifest_paths(repository, image) | manifest_paths(repository, index)
    with cache.scripted(f"/v2/{repository}/*", GONE):
        for path in (*manifests, f"{repository}/tags/list"):
            cache.refused(path, 503, "UNAVAILABLE")
    asked = cache.sent(f"{repository}/manifests/")
    for path, data in manifests.items():
        assert cache.ask(path).body == data
    # Two tags, and the index's two children; after a pull by tag they are available by digest.
    assert cache.sent(f"{repository}/manifests/") == asked + 4


def test_removed_blob_is_a_miss(cache: Cache, repository: str, image: Image) -> None:
    pull(cache, repository, image)
    for path, data in blob_paths(repository, image).items():
        blob_file(cache.daemon, path.rpartition("/")[2]).unlink(missing_ok=True)
        with cache.scripted(f"/v2/{repository}/*", GONE):
            wait_miss(cache, path)
            cache.refused(path, 503, "UNAVAILABLE")
        assert cache.ask(path).body == data


@pytest.mark.parametrize("blobs_first", [True, False], ids=["blobs_first", "records_first"])
def test_copied_records_and_blobs_are_hits(
    cache: Cache, other: Cache, repository: str, image: Image, index: Index, blobs_first: bool
) -> None:
    for what in (image, index):
        pull(other, repository, what)
        with cache.scripted(f"/v2/{repository}/*", GONE):
            first, second = (copy_blobs, copy_records) if blobs_first else (copy_records, copy_blobs)
            first(other, cache, what)
            if blobs_first:
                layer = what.blobs[-1].digest
                cache.refused(f"{repository}/blobs/{layer}", 503, "UNAVAILABLE")  # complete or not: unknown
            else:
                for path, data in manifest_paths(repository, what).items():
                    wait_hit(cache, path)
                    assert cache.ask(path).body == data
            second(other, cache, what)
            for path, data in (manifest_paths(repository, what) | blob_paths(repository, what)).items():
                wait_hit(cache, path)
                assert cache.ask(path).body == data


def test_newest_confirmation_of_a_tag_wins(cache: Cache, other: Cache, repository: str, image: Image) -> None:
    """Replicas with each other's records agree."""
    tag = f"{repository}/manifests/1"
    assert cache.ask(tag).body == image.manifest.data
    newer = plain_image(f"{repository}/newer", 10)
    cache.upstream.add(repository, newer, "1")
    assert other.ask(tag).body == newer.manifest.data
    with cache.scripted(f"/v2/{repository}/*", GONE):
        copy_records(other, cache, newer)
        copy_records(cache, other, image)
        wait_until(lambda: cache.ask(tag).body == newer.manifest.data, SEEN, "the newer one")
        by_digest = f"{repository}/manifests/{image.manifest.digest}"
        wait_hit(other, by_digest)
        assert other.ask(tag).body == newer.manifest.data
        assert cache.ask(by_digest).body == image.manifest.data
        # Without the newer record the older one counts.
        run(["rm", str(record(cache, newer.manifest))])
        wait_until(lambda: cache.ask(tag).body == image.manifest.data, SEEN, "the older one")


@pytest.mark.parametrize("known", [True, False], ids=["manifest", "no_manifest"])
@pytest.mark.parametrize("size", [0, 1, 4096, 4999, 5001])
def test_half_copied_blob_is_not_served(cache: Cache, repository: str, image: Image, size: int, known: bool) -> None:
    if known:
        assert cache.ask(f"{repository}/manifests/1").status == 200
    layer = image.blobs[1]
    path = f"{repository}/blobs/{layer.digest}"
    file = blob_file(cache.daemon, layer.digest)
    for _ in ("never here", "here before"):
        file.write_bytes(layer.data[:size].ljust(size, b"\0"))
        with cache.scripted(f"/v2/{repository}/*", GONE):
            wait_miss(cache, path)
            cache.refused(path, 503, "UNAVAILABLE")
            cache.refused(path, 503, "UNAVAILABLE", "HEAD")
        asked = cache.sent(path, "GET")
        assert cache.ask(path).body == layer.data
        assert cache.sent(path, "GET") == asked + 1
        wait_until(lambda: file.read_bytes() == layer.data, SEEN, "the whole blob")
        assert cache.ask(path).body == layer.data
        assert cache.sent(path, "GET") == asked + 1


@pytest.mark.parametrize("same_times", [True, False])
def test_record_with_an_altered_manifest_is_not_served(
    cache: Cache, repository: str, image: Image, same_times: bool
) -> None:
    pull(cache, repository, image)
    file = record(cache, image.manifest)
    written, when = file.read_text(), file.stat()
    layer = image.blobs[1].digest
    altered = written.replace(layer, f"sha256:{'0' * 64}")
    assert len(altered) == len(written)
    assert altered != written
    file.write_text(altered)
    if same_times:
        os.utime(file, ns=(when.st_atime_ns, when.st_mtime_ns))
    with cache.scripted(f"/v2/{repository}/*", GONE):
        for path in manifest_paths(repository, image):
            answer = fetch(cache.url(path))
            assert (answer.status, b"UNAVAILABLE" in answer.body) == (503, True)
    for path, data in manifest_paths(repository, image).items():
        assert cache.ask(path).body == data
    assert json.loads(file.read_text())["manifest"] == image.manifest.data.decode()
