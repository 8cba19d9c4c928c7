"""The thread of the reactor makes no call that waits for the disk with the store, whatever the daemon does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disk_faults import traced
from tests.images import MIB, Image, digest_of
from tests.real.caches import Cache, blob_file, cache_in, plain_image, short_body, wait_scanned_twice
from tests.real.stores import command
from tests.upstream_resumed import WhenRanged
from tests.upstream_rules import Cut, Flip, Reply

SMALL = 1000
LARGE = 8 * MIB
"""Bytes: several pieces, and several slices."""

_WAITS_FOR_NOTHING = re.compile(
    r"""fcntl\(\d+<[^>]*>,\ F_GETFL\)
    | preadv2\(.*,\ RWF_NOWAIT\)\ =\ 0
    | newfstatat\(\d+<[^>]*>,\ "",.*,\ AT_EMPTY_PATH\)
    | fstat\(
    | mmap\(NULL,
    | sendfile\(
    """,
    re.VERBOSE,
)
"""Calls on an open file: what the kernel has of it in memory is asked for, and then sent."""


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    """A cache for this test alone, which is traced."""
    with cache_in(tmp_path) as cache:
        yield cache


def publish(cache: Cache, tag: str, size: int = LARGE) -> Image:
    """Publish an image at the upstream; its layer has `size` bytes."""
    image = plain_image(tag, size)
    cache.upstream.add("traced", image, tag)
    return image


def blob_of(image: Image) -> str:
    """Return the path of its layer."""
    return f"traced/blobs/{image.layers[0].digest}"


def pull(cache: Cache, tag: str, image: Image) -> None:
    """Pull the image."""
    assert cache.ask(f"traced/manifests/{tag}").body == image.manifest.data
    assert digest_of(cache.ask(blob_of(image)).body) == image.layers[0].digest
    cache.wait_stored(image.layers[0].digest)


def test_no_call_of_the_reactor_waits_for_the_disk(cache: Cache, tmp_path: Path) -> None:
    pid, root = cache.daemon.process.pid, str(cache.daemon.image_path)
    small, large, cut, wrong, left = (
        publish(cache, tag, size)
        for tag, size in (("small", SMALL), ("large", LARGE), ("cut", LARGE), ("wrong", LARGE), ("left", LARGE))
    )
    with traced(pid, "%file,%desc", tmp_path / "strace") as trace:
        for _ in range(2):
            pull(cache, "small", small)
            pull(cache, "large", large)
        assert cache.ask(blob_of(large), headers={"Range": "bytes=5000000-"}).status == 206
        with cache.scripted(f"/v2/{blob_of(cut)}", Cut(LARGE * 2 // 3)):
            # The connection ends, and the download goes on with another.
            pull(cache, "cut", cut)
        # The download fails, and leaves a partial for the next.
        rules = Cut(LARGE // 2), WhenRanged((Reply(404),))
        with cache.scripted(f"/v2/{blob_of(left)}", *rules), cache.opened(blob_of(left)) as answer:
            short_body(answer)
        pull(cache, "left", left)
        # The digest is wrong: the partial is removed.
        with cache.scripted(f"/v2/{blob_of(wrong)}", Flip(LARGE - 1)), cache.opened(blob_of(wrong)) as answer:
            short_body(answer)
        pull(cache, "wrong", wrong)
        # Another program removes a blob that is open.
        blob_file(cache.daemon, small.layers[0].digest).unlink()
        wait_scanned_twice(cache)
        pull(cache, "small", small)
        command(cache.daemon, "prune", "--pattern", "/traced:large")
        wait_scanned_twice(cache)
        pull(cache, "large", large)
        assert json.loads(cache.ask("traced/tags/list").body)["tags"]
    calls = [call for call in trace.calls_of(pid) if root in call]
    assert any(call.startswith("sendfile(") for call in calls)
    assert [call for call in calls if not _WAITS_FOR_NOTHING.match(call)] == []
