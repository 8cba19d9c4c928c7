"""A pending image is a file: it survives the process and an outage, and goes with the image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.images import Image
from tests.processes import wait_until
from tests.real.caches import SOON, Cache, plain_image, record, wait_scanned_twice
from tests.real.completions import completing_in, incomplete, log_lines, pending_file, wait_complete
from tests.upstream_rules import Hold, Reply

LAYER = 300_000
BEGUN = 100_000


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    """A cache for this test alone, since it is killed."""
    with completing_in(tmp_path) as cache:
        yield cache


@pytest.fixture
def image(cache: Cache) -> Image:
    """An image at the upstream."""
    image = plain_image("pending", LAYER)
    cache.upstream.add("team/pending", image, "1")
    return image


def begin(cache: Cache, image: Image, hold: Hold) -> None:
    """Pull the manifest alone; return when completion has fetched a part of the layer."""
    assert cache.ask("team/pending/manifests/1").body == image.manifest.data
    assert hold.reached.wait(SOON)
    partial = cache.daemon.image_path / "pulls" / "0" / image.layers[0].digest.partition(":")[2]
    wait_until(lambda: partial.exists() and partial.stat().st_size >= BEGUN, SOON, "a part of the layer")


def complete_another(cache: Cache, name: str) -> Image:
    """Pull another image, which makes the daemon check all pending images."""
    another = plain_image(name, 100)
    cache.upstream.add(f"team/{name}", another, "1")
    assert cache.ask(f"team/{name}/manifests/1").status == 200
    return another


@pytest.mark.parametrize("number", [0, 7], ids=["its_own", "of_another_process"])
def test_pending_image_survives_a_kill(cache: Cache, image: Image, number: int) -> None:
    """`kill -9` in the middle: the next process completes the image without a client, and fetches no byte twice."""
    (layer,) = image.layers
    hold = Hold(BEGUN)
    with cache.scripted(f"*/{layer.digest}", hold):
        begin(cache, image, hold)
        cache.daemon.kill()
        cache.upstream.disconnect()
    assert pending_file(cache.daemon, image.manifest).is_file()
    if number:
        pulls = cache.daemon.image_path / "pulls"
        (pulls / "0").rename(pulls / str(number))
        assert pending_file(cache.daemon, image.manifest, number).is_file()
    cache.daemon.start()
    wait_complete(cache.daemon, image.blobs)
    assert cache.upstream.bytes_sent(layer.digest) <= 1.02 * LAYER
    assert cache.upstream.count("GET", "/v2/team/pending/manifests/") == 1
    wait_until(lambda: cache.partials == set(), SOON, "nothing is incomplete")


def test_health_and_log_report_missing_blobs(cache: Cache, image: Image) -> None:
    size = sum(len(blob.data) for blob in image.blobs)
    assert incomplete(cache.daemon) == (0, 0)
    hold = Hold(None)
    with cache.scripted(f"*/{image.config.digest}", hold):
        assert cache.ask("team/pending/manifests/1").status == 200
        assert hold.reached.wait(SOON)
        assert incomplete(cache.daemon) == (1, size)
        (line,) = log_lines(cache.daemon, "info", "completing", image.manifest.digest)
        assert f"{len(image.blobs)} blobs with {size} bytes" in line
        # The next process reports it too, before it has fetched anything.
        cache.daemon.kill()
        cache.upstream.disconnect()
        hold.reached.clear()
        cache.daemon.start()
        assert hold.reached.wait(SOON)
        assert incomplete(cache.daemon) == (1, size)
    wait_complete(cache.daemon, image.blobs)
    assert len(log_lines(cache.daemon, "info", "completion finished", image.manifest.digest)) == 1


@pytest.mark.parametrize("restarted", [False, True])
def test_removed_image_is_not_completed(cache: Cache, image: Image, restarted: bool) -> None:
    """Removing an image's record cancels its completion, whether or not the daemon is running."""
    with cache.scripted("*/team/pending/blobs/*", Reply(500)):
        assert cache.ask("team/pending/manifests/1").status == 200
        wait_until(lambda: "is not complete yet" in cache.daemon.log, SOON, "completion was tried")
        assert incomplete(cache.daemon)[0] == 1
        if restarted:
            cache.daemon.kill()
        record(cache, image.manifest).unlink()
        if restarted:
            cache.daemon.start()
        else:
            wait_scanned_twice(cache)
    another = complete_another(cache, "other")
    wait_complete(cache.daemon, another.blobs)
    assert not any(cache.stored(blob.digest) for blob in image.blobs)
    assert log_lines(cache.daemon, "error") == []


def test_pending_image_is_retried_after_an_upstream_failure(cache: Cache, image: Image) -> None:
    """The image stays pending, although the upstream had none of the blobs, and the daemon is restarted meanwhile."""
    with cache.scripted("*/team/pending/blobs/*", Reply(503)):
        assert cache.ask("team/pending/manifests/1").status == 200
        wait_until(lambda: "is not complete yet" in cache.daemon.log, SOON, "completion was tried")
        cache.daemon.terminate()
        assert pending_file(cache.daemon, image.manifest).is_file()
    cache.daemon.start()
    wait_complete(cache.daemon, image.blobs)
    assert log_lines(cache.daemon, "warn", "stays incomplete") == []


def test_malformed_pending_images_are_removed(cache: Cache, image: Image) -> None:
    """Damaged files, and files with other names, do no harm."""
    cache.daemon.kill()
    folder = cache.daemon.image_path / "pulls" / "0"
    for name in ("0" * 64, "nothing", "wish"):
        for number, content in enumerate(("", "[]", '{"upstream": "a b", "repository": "../.."}', "{" * 5000)):
            (folder / f"{name[number:]}.wish").write_text(content)
    cache.daemon.start()
    assert cache.ask("team/pending/manifests/1").status == 200
    wait_complete(cache.daemon, image.blobs)


def test_complete_pull_leaves_no_pending_image(cache: Cache, image: Image) -> None:
    """The client and completion share the download of each blob."""
    assert cache.ask("team/pending/manifests/1").status == 200
    for blob in image.blobs:
        assert cache.ask(f"team/pending/blobs/{blob.digest}").body == blob.data
    wait_complete(cache.daemon, image.blobs)
    assert [cache.sent(f"team/pending/blobs/{blob.digest}") for blob in image.blobs] == [1, 1]
