"""The store: hits and misses follow the files on disk, including changes by other processes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.manifests import Manifest
from ociregistry.names import Digest
from ociregistry.store.lookups import Counts
from ociregistry.store.prune import Criteria
from ociregistry.store.records import Dates, Record
from ociregistry.store.store import Store
from tests.images import make_image, make_index
from tests.unit.support.common import image, manifest, on_reactor, open_descriptors, record, texts, until

BUILT = make_image("store")
IMAGE, OTHER = manifest(BUILT), manifest(make_image("other"))
INDEX = manifest(make_index("store"))
NGINX, APP = image("docker.io/library/nginx:1"), image("quay.io/app:1")
LAYER = BUILT.layers[0]
NOW = datetime(2026, 3, 1, tzinfo=UTC)


def put_blob(root: Path, digest: str, data: bytes) -> None:
    """Write a blob as another process does."""
    (root / "blobs" / Digest(digest).hex).write_bytes(data)


def test_folders_are_created(root: Path, store: Store) -> None:
    assert {path.name for path in root.iterdir()} == {"blobs", "fat", "img", "pulls"}
    assert store.counts == Counts(lists=0, images=0)


@on_reactor
async def test_kept_manifest_is_a_hit(store: Store) -> None:
    assert await store.manifest(NGINX) is None
    await store.keep(IMAGE, NGINX)
    await store.keep(INDEX, APP)
    assert await store.manifest(NGINX) == IMAGE
    assert await store.manifest(APP) == INDEX
    assert await store.manifest(image("docker.io/library/nginx:2")) is None
    assert await store.manifest(image(f"quay.io/app@{OTHER.digest}")) is None
    assert store.counts == Counts(lists=1, images=1)


@on_reactor
async def test_kept_manifests_survive_a_restart(store: Store, open_store: Callable[[], Store]) -> None:
    await store.keep(IMAGE, NGINX)
    await store.keep(INDEX, APP)
    again = open_store()
    assert again.counts == Counts(lists=1, images=1)
    assert await again.manifest(NGINX) == IMAGE
    assert await again.manifest(APP) == INDEX


@on_reactor
async def test_digest_is_a_hit_in_any_repository_without_being_noted(store: Store, root: Path) -> None:
    """A client may invent repositories: they would make the record so large that it cannot be read any more."""
    await store.keep(IMAGE, NGINX)
    before = record(root, IMAGE.digest).read_bytes()
    for number in range(300):
        assert await store.manifest(image(f"host-{number}.invalid/app@{IMAGE.digest}")) == IMAGE
    await store.keep(OTHER, APP)  # any pending write is done after this one
    assert record(root, IMAGE.digest).read_bytes() == before
    assert store.repositories(IMAGE.digest) == {NGINX.repository}


@on_reactor
async def test_child_of_an_index_is_noted_in_the_repository_of_the_index(store: Store, root: Path) -> None:
    listed = make_index("store")
    child = manifest(listed.images[0])
    await store.keep(child, NGINX)
    await store.keep(manifest(listed), APP)
    elsewhere = image(f"{APP.repository}@{child.digest}")
    assert await store.manifest(elsewhere) == child
    await until(lambda: str(elsewhere).encode() in record(root, child.digest).read_bytes())
    layer = listed.images[0].layers[0]
    await until(lambda: store.size_in(APP.repository, Digest(layer.digest)) == len(layer.data))


@on_reactor
async def test_digest_hit_in_same_repository_does_not_rewrite_the_record(store: Store, root: Path) -> None:
    await store.keep(IMAGE, NGINX)
    before = record(root, IMAGE.digest).stat().st_ino
    assert await store.manifest(image(f"docker.io/library/nginx@{IMAGE.digest}")) == IMAGE
    await store.keep(OTHER, APP)  # any pending write is done after this one
    assert record(root, IMAGE.digest).stat().st_ino == before


@on_reactor
async def test_tag_follows_the_latest_confirmation(store: Store) -> None:
    await store.keep(IMAGE, NGINX)
    await store.keep(OTHER, NGINX)
    assert await store.manifest(NGINX) == OTHER
    await store.keep(IMAGE, NGINX)
    assert await store.manifest(NGINX) == IMAGE
    assert store.tags(NGINX.repository) == ["1"]


@on_reactor
async def test_removed_record_is_a_miss_immediately(store: Store, root: Path) -> None:
    await store.keep(IMAGE, NGINX)
    record(root, IMAGE.digest).unlink()
    assert await store.manifest(NGINX) is None
    assert store.counts == Counts(lists=0, images=0)


@on_reactor
async def test_removing_the_newer_record_does_not_restore_the_older_tag(store: Store, root: Path) -> None:
    await store.keep(OTHER, NGINX)
    await store.keep(IMAGE, NGINX)
    record(root, IMAGE.digest).unlink()
    assert await store.manifest(NGINX) is None
    assert await store.manifest(image(f"docker.io/library/nginx@{OTHER.digest}")) == OTHER


@on_reactor
async def test_tag_removed_by_another_process_is_a_miss(store: Store, root: Path) -> None:
    await store.keep(IMAGE, NGINX)
    record(root, IMAGE.digest).write_bytes(Record(IMAGE, {}).confirm(APP, NOW).render())
    assert await store.manifest(NGINX) is None
    assert await store.manifest(image(f"docker.io/library/nginx@{IMAGE.digest}")) == IMAGE


@on_reactor
async def test_damaged_record_is_a_miss_and_logged(store: Store, root: Path, events: list[LogEvent]) -> None:
    await store.keep(IMAGE, NGINX)
    await store.keep(OTHER, APP)
    record(root, IMAGE.digest).write_bytes(b"{}")
    assert await store.manifest(NGINX) is None
    (line,) = texts(events, LogLevel.error)
    assert IMAGE.digest.hex in line
    assert await store.manifest(APP) == OTHER
    assert record(root, IMAGE.digest).read_bytes() == b"{}"


@on_reactor
async def test_pull_updates_mtime_of_the_record(root: Path, open_store: Callable[..., Store]) -> None:
    moment = [NOW]
    store = open_store(now=lambda: moment[0])
    await store.keep(IMAGE, NGINX)
    os.utime(record(root, IMAGE.digest), (0, 0))
    for minutes in (0, 5):
        moment[0] = NOW + timedelta(minutes=minutes)
        assert await store.manifest(NGINX) == IMAGE
        pulled = moment[0].timestamp()
        await until(lambda pulled=pulled: record(root, IMAGE.digest).stat().st_mtime == pulled)  # type: ignore[misc]  # value of this iteration


@on_reactor
async def test_blob_is_a_hit_once_a_manifest_gives_its_size(store: Store, root: Path) -> None:
    digest = Digest(LAYER.digest)
    assert await store.blob(digest) is None
    put_blob(root, digest, LAYER.data)
    assert await store.blob(digest) is None
    await store.keep(IMAGE, NGINX)
    blob = await store.blob(digest)
    assert blob is not None
    assert (blob.size, await blob.read(0, 20)) == (len(LAYER.data), LAYER.data[:20])
    blob.close()


@pytest.mark.parametrize("size", [0, 1, len(LAYER.data) - 1, len(LAYER.data) + 1])
@on_reactor
async def test_partly_copied_blob_is_a_miss(store: Store, root: Path, size: int) -> None:
    await store.keep(IMAGE, NGINX)
    put_blob(root, LAYER.digest, LAYER.data.ljust(size)[:size])
    before = open_descriptors()
    assert await store.blob(Digest(LAYER.digest)) is None
    await until(lambda: open_descriptors() <= before)


@on_reactor
async def test_committed_blob_is_a_hit_without_a_manifest(store: Store, root: Path) -> None:
    digest = Digest(LAYER.digest)
    partial = await store.new_partial(digest, None, NGINX.repository)
    await partial.append(LAYER.data)
    await partial.verify()
    await store.commit(partial)
    partial.close()
    blob = await store.blob(digest)
    assert blob is not None
    blob.close()
    put_blob(root, digest, LAYER.data[:100])
    assert await store.blob(digest) is None
    (root / "blobs" / digest.hex).unlink()
    assert await store.blob(digest) is None


@on_reactor
async def test_size_in_repository(store: Store) -> None:
    digest = Digest(LAYER.digest)
    assert store.size_in(NGINX.repository, digest) is None
    await store.keep(IMAGE, NGINX)
    assert store.size_in(NGINX.repository, digest) == len(LAYER.data)
    assert store.size_in(APP.repository, digest) is None
    assert store.size_in(NGINX.repository, Digest.of(b"another")) is None


@on_reactor
async def test_keep_with_dates(store: Store, root: Path) -> None:
    early, late = NOW - timedelta(days=2), NOW - timedelta(days=1)
    await store.keep(IMAGE, NGINX, Dates(early, late))
    kept = Record.parse(record(root, IMAGE.digest).read_bytes(), IMAGE.digest)
    assert kept.images == {str(NGINX): Dates(early, late)}


@on_reactor
async def test_keep_with_old_dates_does_not_move_a_tag_back(store: Store) -> None:
    await store.keep(IMAGE, NGINX)
    await store.keep(OTHER, NGINX, Dates(NOW - timedelta(days=9), NOW - timedelta(days=1)))
    assert await store.manifest(NGINX) == IMAGE
    assert await store.manifest(image(f"docker.io/library/nginx@{OTHER.digest}")) == OTHER


@on_reactor
async def test_missing_blobs_with_and_without_a_record(store: Store, root: Path) -> None:
    sizes = {Digest(blob.digest): len(blob.data) for blob in BUILT.blobs}
    assert await store.missing(IMAGE.digest) is None
    assert await store.missing_blobs(IMAGE) == sizes
    put_blob(root, LAYER.digest, LAYER.data)
    put_blob(root, BUILT.config.digest, BUILT.config.data[:-1])
    await store.keep(IMAGE, NGINX)
    del sizes[Digest(LAYER.digest)]
    assert await store.missing_blobs(IMAGE) == sizes == await store.missing(IMAGE.digest)
    assert await store.missing_blobs(INDEX) == {}


@on_reactor
async def test_holds_compares_the_size(store: Store, root: Path) -> None:
    digest, size = Digest(LAYER.digest), len(LAYER.data)
    assert not await store.holds(digest, size)
    put_blob(root, digest, LAYER.data)
    assert await store.holds(digest, size)
    assert not await store.holds(digest, size + 1)


@on_reactor
async def test_repositories_that_use_a_blob(store: Store) -> None:
    digest = Digest(LAYER.digest)
    assert (dict(store.uses(digest)), list(store.naming(digest))) == ({}, [])
    await store.keep(IMAGE, NGINX)
    await store.keep(IMAGE, APP)
    await store.keep(OTHER, APP)
    assert store.uses(digest) == {NGINX.repository: len(LAYER.data), APP.repository: len(LAYER.data)}
    assert list(store.naming(digest)) == [IMAGE.digest]


@on_reactor
async def test_pruned_image_is_a_miss_and_forgotten_at_next_scan(store: Store, root: Path, clock: Clock) -> None:
    await store.keep(IMAGE, NGINX)
    await store.keep(IMAGE, APP)
    await store.keep(INDEX, APP)
    put_blob(root, LAYER.digest, LAYER.data)
    await store.prune(Criteria(matches=lambda url: url == str(NGINX)))
    assert await store.manifest(NGINX) is None
    assert await store.manifest(APP) == INDEX
    assert await store.holds(Digest(LAYER.digest), len(LAYER.data))
    plan = await store.prune(Criteria(matches=lambda url: "app" in url))
    assert plan.blobs == {Digest(LAYER.digest): len(LAYER.data)}
    assert await store.blob(Digest(LAYER.digest)) is None
    clock.advance(1)
    await until(lambda: store.counts == Counts(lists=0, images=0))
    assert await store.manifest(APP) is None
    assert store.tags(APP.repository) == []
    await store.keep(IMAGE, NGINX)
    assert await store.manifest(NGINX) == IMAGE


@on_reactor
async def test_image_that_lacks_only_foreign_layers_is_not_incomplete(store: Store, root: Path) -> None:
    document = json.loads(IMAGE.data)
    foreign, *layers = document["layers"]
    foreign["urls"] = ["https://foreign.example/layer"]
    windows = Manifest.parse(json.dumps(document).encode(), IMAGE.media_type)
    await store.keep(windows, NGINX, wanted=True)
    required = {Digest(one["digest"]): one["size"] for one in (document["config"], *layers)}
    assert await store.missing_of_images({windows.digest}) == {windows.digest: required}
    for blob in BUILT.blobs:
        if blob.digest != foreign["digest"]:
            put_blob(root, blob.digest, blob.data)
    assert await store.missing_of_images({windows.digest}) == {}
