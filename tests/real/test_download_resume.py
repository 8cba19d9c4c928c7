"""A download is resumed after a broken connection or a killed process: no byte crosses the link twice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

import pytest

from tests.images import MIB, Blob, Image, digest_of
from tests.processes import wait_until
from tests.real.caches import SOON, Cache, blob_file, cache_in, plain_image
from tests.upstream_rules import Cut, Drip

SIZE = 100 * MIB


@pytest.fixture(scope="module")
def image() -> Image:
    """An image whose only layer takes a while."""
    return plain_image("survival", SIZE)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    """A cache for this test alone, since it is killed."""
    with cache_in(tmp_path) as cache:
        yield cache


def pull(cache: Cache, layer: Blob) -> None:
    """GET the layer over one connection: 200 and the correct bytes."""
    hasher = hashlib.sha256()
    with cache.opened(f"survival/blobs/{layer.digest}") as answer:
        assert answer.status == 200
        assert answer.headers["Content-Length"] == str(SIZE)
        while data := answer.read(MIB):
            hasher.update(data)
    assert f"sha256:{hasher.hexdigest()}" == layer.digest


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
@pytest.mark.parametrize("known", [False, True], ids=["size_from_upstream", "size_from_manifest"])
def test_download_cut_every_20_mb_is_resumed(cache: Cache, image: Image, reset: bool, known: bool) -> None:
    """One client connection, one 200, the correct digest; at most 1.01 times the blob's bytes from the upstream."""
    (layer,) = image.layers
    cache.upstream.add("survival", image, "v1")
    if known:
        assert cache.ask("survival/manifests/v1").status == 200
    with cache.scripted(f"*{layer.digest}", Cut(20 * MIB, reset=reset)):
        pull(cache, layer)
    assert cache.upstream.bytes_sent(layer.digest) <= 1.01 * SIZE
    assert cache.sent(f"survival/blobs/{layer.digest}", "GET") == 5
    cache.wait_stored(layer.digest)
    wait_until(lambda: cache.partials == set(), SOON, "no partial is left")


def test_download_resumes_after_five_kills(cache: Cache, image: Image) -> None:
    """`kill -9`, start, pull, five times: at most 1.02 times the blob's bytes, and the correct content."""
    (layer,) = image.layers
    cache.upstream.add("survival", image, "v1")
    assert cache.ask("survival/manifests/v1").status == 200
    path = f"survival/blobs/{layer.digest}"
    partial = cache.daemon.image_path / "pulls" / "0" / layer.digest.partition(":")[2]
    # Slow enough that the kernel holds little at the moment of the kill.
    with cache.scripted(f"*{layer.digest}", Drip(10 * MIB)):
        for instant in (3, 17, 31, 58, 90):
            with suppress(OSError, HTTPException), cache.opened(path) as answer:
                answer.read(instant * MIB)
                cache.daemon.kill()
            assert partial.stat().st_size >= (instant - 1) * MIB
            cache.daemon.start()
        pull(cache, layer)
    assert cache.upstream.bytes_sent(layer.digest) <= 1.02 * SIZE
    wait_until(lambda: blob_file(cache.daemon, layer.digest).exists(), SOON, "the blob is in the store")
    assert digest_of(blob_file(cache.daemon, layer.digest).read_bytes()) == layer.digest
    wait_until(lambda: cache.partials == set(), SOON, "no partial is left")


def test_partial_of_an_ended_process_is_adopted(cache: Cache, image: Image) -> None:
    """The new process, with pulls/0, continues what an ended one left in pulls/7."""
    (layer,) = image.layers
    cache.upstream.add("survival", image, "v1")
    pulls = cache.daemon.image_path / "pulls"
    slowly = cache.scripted(f"*{layer.digest}", Drip(20 * MIB))
    with slowly, suppress(OSError, HTTPException), cache.opened(f"survival/blobs/{layer.digest}") as answer:
        answer.read(10 * MIB)
        cache.daemon.kill()
    (pulls / "0").rename(pulls / "7")
    cache.daemon.start()
    pull(cache, layer)
    assert cache.upstream.bytes_sent(layer.digest) <= 1.02 * SIZE
