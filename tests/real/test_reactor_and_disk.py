"""The reactor makes no call on the store that may wait for the disk; only threads do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disk_faults import ext4_disk, traced
from tests.images import MIB, Image
from tests.real.caches import Cache, blob_file, daemon_in, plain_image, pull, short_body, wait_scanned_twice
from tests.real.stores import command
from tests.upstream import ScriptedRegistry
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
    """A cache for this test alone, on a file system that tells what it has in memory."""
    with (
        ext4_disk(tmp_path / "disk", 128 * MIB, 1000) as disk,
        ScriptedRegistry() as upstream,
        daemon_in(tmp_path, upstream, image_path=disk.path / "images") as daemon,
    ):
        yield Cache(daemon, upstream)


def publish(cache: Cache, repository: str, size: int = LARGE) -> Image:
    """Publish an image at the upstream; its layer has `size` bytes."""
    image = plain_image(repository, size)
    cache.upstream.add(repository, image, "1")
    return image


def layer_of(repository: str, image: Image) -> str:
    """Return the path of its layer."""
    return f"{repository}/blobs/{image.layers[0].digest}"


def test_no_call_of_the_reactor_waits_for_the_disk(cache: Cache, tmp_path: Path) -> None:
    pid, root = cache.daemon.process.pid, str(cache.daemon.image_path)
    small = publish(cache, "small", SMALL)
    large, cut, wrong, left = (publish(cache, repository) for repository in ("large", "cut", "wrong", "left"))
    with traced(pid, "%file,%desc", tmp_path / "strace") as trace:
        for _ in range(2):
            pull(cache, "small", small)
            pull(cache, "large", large)
        assert cache.ask(layer_of("large", large), headers={"Range": "bytes=5000000-"}).status == 206
        with cache.scripted(f"/v2/{layer_of('cut', cut)}", Cut(LARGE * 2 // 3)):
            # The connection ends, and the download goes on with another.
            pull(cache, "cut", cut)
        # The download fails, and leaves a partial for the next.
        path = layer_of("left", left)
        with cache.scripted(f"/v2/{path}", Cut(LARGE // 2), WhenRanged((Reply(404),))), cache.opened(path) as answer:
            short_body(answer)
        pull(cache, "left", left)
        # The digest is wrong: the partial is removed.
        path = layer_of("wrong", wrong)
        with cache.scripted(f"/v2/{path}", Flip(LARGE - 1)), cache.opened(path) as answer:
            short_body(answer)
        pull(cache, "wrong", wrong)
        # Another program removes a blob that is open.
        blob_file(cache.daemon, small.layers[0].digest).unlink()
        wait_scanned_twice(cache)
        pull(cache, "small", small)
        command(cache.daemon, "prune", "--pattern", "/large:")
        wait_scanned_twice(cache)
        pull(cache, "large", large)
        assert json.loads(cache.ask("large/tags/list").body)["tags"]
    calls = [call for call in trace.calls_of(pid) if root in call]
    assert any(call.startswith("sendfile(") for call in calls)
    assert [call for call in calls if not _WAITS_FOR_NOTHING.match(call)] == []
