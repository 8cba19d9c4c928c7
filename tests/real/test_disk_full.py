"""A store on a disk that is too small: hits are served, a miss ends short, and nothing is fetched twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.client import fetch
from tests.disk_faults import SmallDisk, small_disk
from tests.images import MIB, Image, digest_of
from tests.processes import wait_until
from tests.real.caches import SOON, Cache, daemon_in, plain_image, short_body
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Drip, NoLength

DISK = 24 * MIB
RESERVE = DISK // 20
"""Bytes that downloads leave free by default; other files of the daemon may use them."""
SIZE = 40 * MIB
RATE = 20 * MIB
"""Bytes per second, so slow that little is in flight when the disk is full."""
FULL = "has no room"
REPOSITORY = "full/image"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk too small for a blob of `SIZE` bytes."""
    with small_disk(tmp_path / "disk", DISK) as disk:
        yield disk


@pytest.fixture
def cache(disk: SmallDisk, tmp_path: Path) -> Iterator[Cache]:
    """A daemon whose store is on that disk."""
    with ScriptedRegistry() as upstream, daemon_in(tmp_path, upstream, image_path=disk.path / "images") as daemon:
        yield Cache(daemon, upstream)


@pytest.fixture(scope="module")
def small() -> Image:
    """An image that is cached before the disk is full."""
    return plain_image("small", MIB)


@pytest.fixture(scope="module")
def large() -> Image:
    """An image whose only layer does not fit."""
    return plain_image("large", SIZE)


@pytest.fixture(scope="module")
def third() -> Image:
    """An image that is requested when the disk is full."""
    return plain_image("third", 100_000)


def blob_of(image: Image) -> str:
    """Return the path of its layer."""
    return f"{REPOSITORY}/blobs/{image.layers[0].digest}"


def publish(cache: Cache, small: Image, large: Image, third: Image) -> None:
    """Publish all images at the upstream; cache the small one."""
    for image, tag in ((small, "small"), (large, "large"), (third, "third")):
        cache.upstream.add(REPOSITORY, image, tag)
    assert cache.ask(f"{REPOSITORY}/manifests/small").body == small.manifest.data
    assert digest_of(cache.ask(blob_of(small)).body) == small.layers[0].digest
    cache.wait_stored(small.layers[0].digest)


def assert_hits_are_served(cache: Cache, small: Image) -> None:
    """Assert that cached content is served without a request to the upstream."""
    asked = len(cache.upstream.requests)
    assert cache.ask(f"{REPOSITORY}/manifests/small").body == small.manifest.data
    assert digest_of(cache.ask(blob_of(small)).body) == small.layers[0].digest
    assert cache.ask(blob_of(small), headers={"Range": "bytes=-7"}).body == small.layers[0].data[-7:]
    assert len(cache.upstream.requests) == asked


def partial(cache: Cache, image: Image) -> Path:
    """Return the partial of its layer."""
    return cache.daemon.image_path / "pulls" / "0" / image.layers[0].digest.partition(":")[2]


def disk_health(cache: Cache) -> dict[str, int]:
    """Return the disk's state in /health."""
    disk: dict[str, int] = json.loads(fetch(f"{cache.daemon.url}/health").body)["disk"]
    return disk


RESUMED = 1.25 * SIZE
"""Bytes that the upstream sends at most: what sockets hold when a connection ends is lost, the partial is not."""


@contextmanager
def disk_full(cache: Cache, disk: SmallDisk, large: Image) -> Iterator[None]:
    """Begin a pull of the large image while there is room, then fill the disk; the pull continues slowly."""
    layer = large.layers[0]
    disk.resize(4 * SIZE)
    assert cache.ask(f"{REPOSITORY}/manifests/large").status == 200
    since = cache.log_size
    with cache.scripted(f"*{layer.digest}", Drip(RATE)):
        with cache.opened(blob_of(large)) as answer:
            assert (answer.status, answer.length) == (200, SIZE)
            disk.resize(DISK)
            got = short_body(answer)
        assert layer.data.startswith(got)
        assert len(got) > DISK // 2
        assert disk.free > RESERVE - MIB // 10
        line = cache.one_error(since)
        assert FULL in line
        assert cache.upstream.host in line
        yield


def test_download_stops_at_the_reserve_and_resumes_when_there_is_room(
    cache: Cache, disk: SmallDisk, small: Image, large: Image, third: Image
) -> None:
    """Until there is room, requests are refused at once, and the partial is kept."""
    publish(cache, small, large, third)
    with disk_full(cache, disk, large):
        kept = partial(cache, large).stat().st_size
        assert kept > DISK // 2
        assert_hits_are_served(cache, small)

        since = cache.log_size
        asked = cache.sent(blob_of(large))
        cache.refused(blob_of(large), 503, "UNAVAILABLE")
        line = cache.one_error(since)
        assert f"{FULL}: {SIZE - kept} bytes are needed" in line
        assert str(disk.path) in line
        assert cache.sent(blob_of(large)) == asked
        assert partial(cache, large).stat().st_size == kept
        assert_hits_are_served(cache, small)

        disk.resize(4 * SIZE)
        assert digest_of(cache.ask(blob_of(large)).body) == large.layers[0].digest
    cache.wait_stored(large.layers[0].digest)
    assert cache.upstream.bytes_sent(large.layers[0].digest) <= RESUMED
    wait_until(lambda: cache.partials == set(), SOON, "no partial is left")


def test_blob_of_known_size_without_room_is_refused_before_an_upstream_request(
    cache: Cache, disk: SmallDisk, small: Image, large: Image, third: Image
) -> None:
    publish(cache, small, large, third)
    assert cache.ask(f"{REPOSITORY}/manifests/large").status == 200
    for _ in range(2):
        since = cache.log_size
        cache.refused(blob_of(large), 503, "UNAVAILABLE")
        assert f"{FULL}: {SIZE} bytes are needed" in cache.one_error(since)
    assert cache.sent(blob_of(large), "GET") == 0
    assert cache.partials == set()
    assert_hits_are_served(cache, small)
    assert digest_of(cache.ask(blob_of(third)).body) == third.layers[0].digest


def test_unwanted_partial_is_removed_for_another_blob(
    cache: Cache, disk: SmallDisk, small: Image, large: Image, third: Image
) -> None:
    publish(cache, small, large, third)
    # A download stops less than 2 MiB above the reserve.
    another = plain_image("another", 3 * MIB)
    cache.upstream.add(REPOSITORY, another, "another")
    with disk_full(cache, disk, large):
        wait_until(lambda: disk_health(cache)["full"], SOON, "the state is reported")
        assert disk_health(cache)["reserve"] == RESERVE
        assert abs(disk_health(cache)["free"] - disk.free) < MIB
        assert cache.ask(f"{REPOSITORY}/manifests/another").body == another.manifest.data
        assert digest_of(cache.ask(blob_of(another)).body) == another.layers[0].digest
        assert not partial(cache, large).exists()
        wait_until(lambda: "has room again" in cache.daemon.log, SOON, "the state is reported")
    assert cache.daemon.log.count("so no larger download fits") == 1


def test_blob_of_unknown_size_without_room_is_refused(
    cache: Cache, disk: SmallDisk, small: Image, large: Image, third: Image
) -> None:
    """It is downloaded before the headers are sent, so that it can be refused."""
    publish(cache, small, large, third)
    layer = large.layers[0]
    with cache.scripted(f"*{layer.digest}", Drip(RATE), NoLength()):
        since = cache.log_size
        cache.refused(blob_of(large), 503, "UNAVAILABLE")
        assert FULL in cache.one_error(since)
        assert partial(cache, large).stat().st_size > DISK // 2
        assert disk.free > RESERVE - MIB // 10
        assert_hits_are_served(cache, small)
        disk.resize(4 * SIZE)
        assert digest_of(cache.ask(blob_of(large)).body) == layer.digest
    assert cache.upstream.bytes_sent(layer.digest) <= RESUMED


@pytest.mark.parametrize("kill", [False, True], ids=["terminated", "killed"])
def test_daemon_starts_on_a_full_disk(
    cache: Cache, disk: SmallDisk, small: Image, large: Image, third: Image, kill: bool
) -> None:
    publish(cache, small, large, third)
    with disk_full(cache, disk, large):
        if kill:
            cache.daemon.kill()
        else:
            cache.daemon.terminate()
        cache.daemon.start()
        assert_hits_are_served(cache, small)
        disk.resize(4 * SIZE)
        assert digest_of(cache.ask(blob_of(large)).body) == large.layers[0].digest
    assert cache.upstream.bytes_sent(large.layers[0].digest) <= RESUMED
    wait_until(lambda: cache.partials == set(), SOON, "no partial is left")
