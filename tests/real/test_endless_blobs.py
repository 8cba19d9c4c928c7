"""Endless or oversized blobs, requested by clients that disconnect: other images can still be cached."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.client import fetch
from tests.disk_faults import SmallDisk, small_disk
from tests.images import MIB, Image, digest_of
from tests.processes import wait_until
from tests.real.caches import SOON, Cache, daemon_in, plain_image, pull, scripted, short_body
from tests.real.shells import shell_in
from tests.real.stores import command
from tests.upstream import ScriptedRegistry
from tests.upstream_http import Answer, Handler, Request, Rule
from tests.upstream_rules import Hold

DISK = 32 * MIB
RESERVE = 4_000_000
SLACK = MIB // 4
"""Bytes that records and notes may take out of the reserve."""
REPOSITORY = "endless/image"
NEVER = digest_of(b"what the endless bytes are not")
BLOB = f"{REPOSITORY}/blobs/{NEVER}"
ZEROS = bytes(2 * DISK)
FULL = "has no room"
ENDS = "download abandoned, no client is waiting"


@dataclass(frozen=True)
class Endless(Rule):
    """Send more bytes than the disk holds, for any request; at `rate` bytes per second, with the size `declared`."""

    rate: float | None = None
    declared: int | None = None

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Return the answer without calling the handler."""
        answer = Answer(200, (("Content-Type", "application/octet-stream"),), ZEROS, rate=self.rate)
        return replace(answer, declared=self.declared) if self.declared else replace(answer, framing="chunked")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A small disk."""
    with small_disk(tmp_path / "disk", DISK) as disk:
        yield disk


@pytest.fixture
def cache(disk: SmallDisk, tmp_path: Path) -> Iterator[Cache]:
    """A daemon whose store is on that disk, and whose clients wait longer than a busy machine takes for a test."""
    options = ("--reserve", "4MB", "--pull-timeout", "600000")
    with (
        ScriptedRegistry() as upstream,
        daemon_in(tmp_path, upstream, *options, image_path=disk.path / "images") as daemon,
    ):
        yield Cache(daemon, upstream)


@pytest.fixture(scope="module")
def other() -> Image:
    """An image that fits only while nothing else takes its room."""
    return plain_image("other", 20 * MIB)


def partial(cache: Cache, path: str) -> Path:
    """Return the partial of a blob."""
    return cache.daemon.image_path / "pulls" / "0" / path.rpartition(":")[2]


def disk_health(cache: Cache) -> dict[str, object]:
    """Return the disk's state in /health."""
    disk: dict[str, object] = json.loads(fetch(f"{cache.daemon.url}/health").body)["disk"]
    return disk


def fill_disk(cache: Cache, disk: SmallDisk) -> None:
    """Request an endless blob and disconnect; return when the download has ended at the reserve."""
    since = cache.log_size
    with cache.scripted(f"*{NEVER}", Endless()):
        request_and_disconnect(cache)
        wait_until(lambda: FULL in cache.daemon.log[since:], SOON, "the download ends")
    assert RESERVE - SLACK <= disk.free < RESERVE + 2 * MIB
    assert partial(cache, BLOB).stat().st_size > DISK // 2
    wait_until(lambda: disk_health(cache)["full"], SOON, "the state is reported")


def request_and_disconnect(cache: Cache) -> None:
    """Request an endless blob and disconnect at once."""
    with socket.create_connection(("127.0.0.1", cache.daemon.port)) as client:
        target = cache.url(BLOB).removeprefix(cache.daemon.url)
        client.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        wait_until(lambda: cache.sent(BLOB), SOON, "the upstream is asked")


@pytest.mark.parametrize("how", ["lives", "terminated", "killed"])
def test_other_images_are_cached_after_an_endless_blob(cache: Cache, disk: SmallDisk, other: Image, how: str) -> None:
    """After a restart too: unwanted partials are adopted, and removed when room is needed."""
    cache.upstream.add(REPOSITORY, other, "1")
    fill_disk(cache, disk)
    if how != "lives":
        if how == "killed":
            cache.daemon.kill()
        else:
            cache.daemon.terminate()
        cache.daemon.start()
        assert partial(cache, BLOB).exists()
    pull(cache, REPOSITORY, other)
    assert not partial(cache, BLOB).exists()
    assert disk.free >= RESERVE - SLACK
    wait_until(lambda: not disk_health(cache)["full"], SOON, "the state is reported")


def test_repeated_endless_blobs(cache: Cache, disk: SmallDisk, other: Image) -> None:
    cache.upstream.add(REPOSITORY, other, "1")
    pull(cache, REPOSITORY, other)
    since = cache.log_size
    with cache.scripted("*/blobs/*", Endless()):
        for number in range(5):
            path = f"{REPOSITORY}/blobs/{digest_of(str(number).encode())}"
            cache.refused(path, 503, "UNAVAILABLE")
            assert disk.free >= RESERVE - SLACK
    assert len([line for line in cache.errors(since) if FULL in line]) == 5
    assert cache.ask(f"{REPOSITORY}/blobs/{other.layers[0].digest}").body == other.layers[0].data


def test_endless_download_ends_when_its_client_disconnects(cache: Cache, disk: SmallDisk) -> None:
    """The download ends long before the disk is full."""
    with cache.scripted(f"*{NEVER}", Endless(rate=100_000)):
        request_and_disconnect(cache)
        wait_until(lambda: ENDS in cache.daemon.log, 60 + SOON, "the download ends")
        assert cache.sent(BLOB) == 1
        wait_until(lambda: all(request.done for request in cache.upstream.requests), SOON, "the connection is closed")
    assert 0 < partial(cache, BLOB).stat().st_size < DISK // 2
    assert not disk_health(cache)["full"]


def test_blob_declared_larger_than_the_disk_is_refused_at_once(cache: Cache, disk: SmallDisk) -> None:
    with cache.scripted(f"*{NEVER}", Endless(declared=10**15)):
        since = cache.log_size
        cache.refused(BLOB, 503, "UNAVAILABLE")
        assert f"{FULL}: {10**15} bytes are needed" in cache.one_error(since)
    assert cache.partials == set()


def test_download_ends_at_the_size_in_the_manifest(cache: Cache, disk: SmallDisk, other: Image) -> None:
    small = plain_image("small", 1000)
    cache.upstream.add(REPOSITORY, small, "small")
    cache.upstream.add(REPOSITORY, other, "1")
    digest = small.layers[0].digest
    assert cache.ask(f"{REPOSITORY}/manifests/small").status == 200
    free = disk.free
    with cache.scripted(f"*{digest}", Endless()):
        since = cache.log_size
        with cache.opened(f"{REPOSITORY}/blobs/{digest}") as answer:
            assert small.layers[0].data != short_body(answer)
        assert "sent more than 1000 bytes" in cache.one_error(since)
    wait_until(lambda: cache.partials == set(), SOON, "no partial is kept")
    assert disk.free > free - SLACK
    pull(cache, REPOSITORY, other)


def test_prune_removes_abandoned_partials_but_not_active_ones(cache: Cache, disk: SmallDisk) -> None:
    written = plain_image("written", MIB)
    cache.upstream.add(REPOSITORY, written, "1")
    layer, hold = written.layers[0], Hold(MIB // 2)
    coming = partial(cache, layer.digest)
    with cache.scripted(f"*{layer.digest}", hold), cache.opened(f"{REPOSITORY}/blobs/{layer.digest}") as answer:
        wait_until(
            lambda: coming.exists() and coming.stat().st_size == MIB // 2, SOON, "half of the blob has arrived"
        )
        fill_disk(cache, disk)
        path = partial(cache, BLOB)
        assert "0 orphans" in command(cache.daemon, "prune", "--orphans").stdout
        prune = ("prune", "--orphans", "--older-than", "1s")
        wait_until(
            lambda: command(cache.daemon, *prune).stdout and not path.exists(),
            SOON,
            "the partial is old enough, and is pruned",
        )
        assert not path.with_name(f"{path.name}.note").exists()
        assert disk.free > DISK // 2
        command(cache.daemon, *prune)
        assert coming.stat().st_size == MIB // 2
        hold.release.set()
        assert answer.read() == layer.data
    cache.wait_stored(layer.digest)


def test_load_without_a_daemon_respects_the_reserve(disk: SmallDisk, tmp_path: Path, other: Image) -> None:
    """What fits is loaded, the rest is reported."""
    with ScriptedRegistry() as upstream:
        shell = shell_in(tmp_path, [{"name": upstream.host, "scheme": "http"}], reserve="4MB")
        shell = replace(shell, store=disk.path / "images")
        names = [f"{upstream.host}/{REPOSITORY}:{tag}" for tag in ("large", "other", "endless")]
        endless = plain_image("endless", 2 * MIB)
        for image, tag in ((plain_image("large", DISK), "large"), (other, "other"), (endless, "endless")):
            upstream.add(REPOSITORY, image, tag)
        (tmp_path / "list").write_text("\n".join(names))
        with scripted(upstream, f"*{endless.layers[0].digest}", Endless()):
            done = shell.run("load", str(tmp_path / "list"))
    assert done.returncode == 1
    assert f"{FULL}: {DISK} bytes are needed" in done.stdout + done.stderr
    assert "1 loaded, 0 already there, 2 failed" in done.stdout
    assert disk.free >= RESERVE - SLACK
