"""A store on a disk that is too small: hits go on, a miss ends honestly, and nothing is fetched twice for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.disk_faults import SmallDisk, small_disk
from tests.images import MIB, Image, digest_of
from tests.processes import wait_until
from tests.real.scripted import SOON, Cache, daemon_in, plain_image, short_body
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Drip, NoLength

DISK = 24 * MIB
SIZE = 40 * MIB
RATE = 20 * MIB
"""So slow, in bytes a second, that not much is on its way when the disk is full."""
FULL = "No space left on device"
REPOSITORY = "full/image"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Too small for a blob of `SIZE` bytes."""
    with small_disk(tmp_path / "disk", DISK) as disk:
        yield disk


@pytest.fixture
def cache(disk: SmallDisk, tmp_path: Path) -> Iterator[Cache]:
    """A daemon whose store is on that disk."""
    with ScriptedRegistry() as upstream, daemon_in(tmp_path, upstream, image_path=disk.path / "images") as daemon:
        yield Cache(daemon, upstream)


@pytest.fixture(scope="module")
def small() -> Image:
    """An image that is in the cache before the disk is full."""
    return plain_image("small", MIB)


@pytest.fixture(scope="module")
def large() -> Image:
    """An image whose one layer does not fit."""
    return plain_image("large", SIZE)


@pytest.fixture(scope="module")
def third() -> Image:
    """An image that comes when the disk is full."""
    return plain_image("third", 100_000)


def blob_of(image: Image) -> str:
    """The path of its layer."""
    return f"{REPOSITORY}/blobs/{image.layers[0].digest}"


def publish(cache: Cache, small: Image, large: Image, third: Image) -> None:
    """All are there upstream, and the small one in the cache too."""
    for image, tag in ((small, "small"), (large, "large"), (third, "third")):
        cache.upstream.add(REPOSITORY, image, tag)
    assert cache.ask(f"{REPOSITORY}/manifests/small").body == small.manifest.data
    assert digest_of(cache.ask(blob_of(small)).body) == small.layers[0].digest
    cache.wait_stored(small.layers[0].digest)


def hits_go_on(cache: Cache, small: Image) -> None:
    """What is in the cache is served, without a word to the upstream."""
    asked = len(cache.upstream.requests)
    assert cache.ask(f"{REPOSITORY}/manifests/small").body == small.manifest.data
    assert digest_of(cache.ask(blob_of(small)).body) == small.layers[0].digest
    assert cache.ask(blob_of(small), headers={"Range": "bytes=-7"}).body == small.layers[0].data[-7:]
    assert len(cache.upstream.requests) == asked


def partial(cache: Cache, image: Image) -> Path:
    """The file of what there is of its layer."""
    return cache.daemon.image_path / "pulls" / "0" / image.layers[0].digest.partition(":")[2]


@contextmanager
def full(cache: Cache, large: Image) -> Iterator[None]:
    """The first pull of the large image has filled the disk; it goes on to come slowly."""
    layer = large.layers[0]
    assert cache.ask(f"{REPOSITORY}/manifests/large").status == 200
    since = cache.log_size
    with cache.scripted(f"*{layer.digest}", Drip(RATE)):
        with cache.opened(blob_of(large)) as answer:
            assert (answer.status, answer.length) == (200, SIZE)
            got = short_body(answer)
        assert layer.data.startswith(got)
        assert len(got) > DISK // 2
        line = cache.one_error(since)
        assert FULL in line
        assert cache.upstream.host in line
        yield


def test_the_miss_ends_short_and_resumes_when_there_is_room(
    cache: Cache, disk: SmallDisk, small: Image, large: Image, third: Image
) -> None:
    publish(cache, small, large, third)
    with full(cache, large):
        kept = partial(cache, large).stat().st_size
        assert kept > DISK // 2
        hits_go_on(cache, small)

        since = cache.log_size
        with cache.opened(blob_of(large)) as answer:
            assert answer.status in (200, 503)
            if answer.status == 200:
                assert large.layers[0].data.startswith(short_body(answer))
        assert FULL in cache.one_error(since)
        assert partial(cache, large).stat().st_size >= kept
        hits_go_on(cache, small)

        disk.resize(4 * SIZE)
        assert digest_of(cache.ask(blob_of(large)).body) == large.layers[0].digest
    cache.wait_stored(large.layers[0].digest)
    assert cache.upstream.bytes_sent(large.layers[0].digest) <= 1.05 * SIZE
    wait_until(lambda: cache.partials == set(), SOON, "no partial is left")


def test_what_cannot_even_begin_gets_503(
    cache: Cache, disk: SmallDisk, small: Image, large: Image, third: Image
) -> None:
    publish(cache, small, large, third)
    with full(cache, large):
        for path in (f"{REPOSITORY}/manifests/third", f"{REPOSITORY}/manifests/{third.manifest.digest}"):
            since = cache.log_size
            cache.refused(path, 503, "UNAVAILABLE")
            assert FULL in cache.one_error(since)
        since = cache.log_size
        cache.refused(blob_of(third), 503, "UNAVAILABLE")
        assert FULL in cache.one_error(since)
        hits_go_on(cache, small)
        assert not cache.stored(third.layers[0].digest)

        disk.resize(4 * SIZE)
        assert cache.ask(f"{REPOSITORY}/manifests/third").body == third.manifest.data
        assert digest_of(cache.ask(blob_of(third)).body) == third.layers[0].digest


def test_a_blob_that_nobody_tells_the_size_of(
    cache: Cache, disk: SmallDisk, small: Image, large: Image, third: Image
) -> None:
    """It is downloaded before the headers go out, so that it can be refused."""
    publish(cache, small, large, third)
    layer = large.layers[0]
    with cache.scripted(f"*{layer.digest}", Drip(RATE), NoLength()):
        since = cache.log_size
        cache.refused(blob_of(large), 503, "UNAVAILABLE")
        assert FULL in cache.one_error(since)
        assert partial(cache, large).stat().st_size > DISK // 2
        hits_go_on(cache, small)
        disk.resize(4 * SIZE)
        assert digest_of(cache.ask(blob_of(large)).body) == layer.digest
    assert cache.upstream.bytes_sent(layer.digest) <= 1.05 * SIZE


@pytest.mark.parametrize("kill", [False, True], ids=["terminated", "killed"])
def test_the_daemon_starts_on_a_full_disk(
    cache: Cache, disk: SmallDisk, small: Image, large: Image, third: Image, kill: bool
) -> None:
    publish(cache, small, large, third)
    with full(cache, large):
        if kill:
            cache.daemon.kill()
        else:
            cache.daemon.terminate()
        cache.daemon.start()
        hits_go_on(cache, small)
        disk.resize(4 * SIZE)
        assert digest_of(cache.ask(blob_of(large)).body) == large.layers[0].digest
    assert cache.upstream.bytes_sent(large.layers[0].digest) <= 1.05 * SIZE
    wait_until(lambda: cache.partials == set(), SOON, "no partial is left")
