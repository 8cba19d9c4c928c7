"""A disk that does not answer: an open or read that never returns."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from http.client import IncompleteRead
from pathlib import Path

import pytest

from ociregistry.store.threads import READ_WITHIN
from tests.client import fetch
from tests.disk_faults import Trace, drop, faults, fuse_disk, hanging_ext4, kept_in_memory
from tests.images import MIB, Image, digest_of
from tests.processes import wait_until
from tests.real.caches import SOON, Cache, blob_file, cache_in, daemon_in, plain_image
from tests.upstream import ScriptedRegistry

HANG = "delay_enter=300000000"
"""Five minutes, unless the trace ends before."""
ANSWERED = 25.0
"""Seconds within which a client must be answered."""
CLIENTS = 20

Hang = Callable[..., AbstractContextManager[Trace]]


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    """A cache for this test alone, whose disk hangs."""
    with cache_in(tmp_path) as cache:
        yield cache


@pytest.fixture
def hang(cache: Cache, tmp_path: Path) -> Hang:
    """A function that makes these system calls of the daemon on one path hang."""

    def hang(calls: str, path: Path, *options: str) -> AbstractContextManager[Trace]:
        return faults(cache.daemon.process.pid, calls, HANG, tmp_path / "strace", "-P", str(path), *options)

    return hang


def cached(cache: Cache, tag: str, size: int = MIB) -> Image:
    """Return an image with a layer of `size` bytes that is in the cache."""
    image = plain_image(tag, size)
    cache.upstream.add("hangs", image, tag)
    assert cache.ask(f"hangs/manifests/{tag}").body == image.manifest.data
    assert digest_of(cache.ask(blob_of(image)).body) == image.layers[0].digest
    cache.wait_stored(image.layers[0].digest)
    return image


def blob_of(image: Image) -> str:
    """Return the path of its layer."""
    return f"hangs/blobs/{image.layers[0].digest}"


def assert_served(cache: Cache, image: Image, tag: str, within: float = SOON) -> None:
    """Check that a hit is not delayed."""
    assert_manifest_is_served(cache, image, tag, within)
    assert digest_of(fetch(cache.url(blob_of(image)), timeout=within).body) == image.layers[0].digest


def assert_manifest_is_served(cache: Cache, image: Image, tag: str, within: float = SOON) -> None:
    """Check that a hit is not delayed, by tag or by digest."""
    for reference in (tag, image.manifest.digest):
        assert fetch(cache.url(f"hangs/manifests/{reference}"), timeout=within).body == image.manifest.data


@pytest.mark.parametrize("kind", ["blob", "record"])
def test_file_that_cannot_be_opened_in_time(cache: Cache, hang: Hang, kind: str) -> None:
    """More clients than threads: they get 503 in time, and other hits go on."""
    sick, hit = cached(cache, "sick"), cached(cache, "hit")
    path, file = {
        "blob": (blob_of(sick), blob_file(cache.daemon, sick.layers[0].digest)),
        "record": ("hangs/manifests/sick", cache.daemon.image_path / "img" / sick.manifest.digest[7:]),
    }[kind]
    # The daemon reads a record that changed; let it do so before.
    time.sleep(2)
    sent = len(cache.upstream.requests)
    with hang("openat", file) as trace:
        began = time.monotonic()
        with ThreadPoolExecutor(CLIENTS) as clients:
            asked = [clients.submit(fetch, cache.url(path), timeout=60) for _ in range(CLIENTS)]
            wait_until(lambda: trace.begun, SOON, "the call hangs")
            while not all(answer.done() for answer in asked):
                assert_served(cache, hit, "hit")
            answers = [answer.result() for answer in asked]
        assert time.monotonic() - began < ANSWERED
        assert {answer.status for answer in answers} == {503}
        assert all("the disk has not answered for 20 s" in answer.body.decode() for answer in answers)
        assert all(answer.headers["retry-after"] for answer in answers)
        assert fetch(cache.url(path), timeout=SOON).status == 503
        assert_served(cache, hit, "hit")
        assert trace.begun == 2
        told = json.loads(fetch(f"{cache.daemon.url}/health").body)
        assert told["status"] == "degraded"
        assert told["reasons"] == [
            f"the disk does not answer: 2 reads and writes have not returned, among them of {file}"
        ]
    # The disk answers again; the link was not used.
    wait_until(lambda: cache.ask(path).status == 200, SOON, "it is served again")
    assert len(cache.upstream.requests) == sent


def test_read_that_hangs_ends_the_answer(cache: Cache, hang: Hang) -> None:
    sick, hit = cached(cache, "sick"), cached(cache, "hit")
    file = blob_file(cache.daemon, sick.layers[0].digest)
    since = cache.log_size
    # Nothing is in memory, so a thread sends it.
    with hang("sendfile", file, "-e", "trace=sendfile,preadv2", "-e", "inject=preadv2:error=EAGAIN"):
        with cache.opened(blob_of(sick)) as answer, ThreadPoolExecutor(1) as clients:
            reading = clients.submit(answer.read)
            while not reading.done():
                assert_served(cache, hit, "hit")
            assert reading.exception() is not None
        assert (
            f"response truncated: [Errno 110] the disk has not answered for 20 s: '{file}'"
            in cache.daemon.log[since:]
        )


@pytest.mark.parametrize("calls", ["openat", "pwrite64"])
def test_sigterm_while_the_disk_hangs(cache: Cache, hang: Hang, calls: str) -> None:
    """Nothing that still waits for the disk keeps the process: a read, or the write of a download."""
    image = cached(cache, "sick")
    missing = plain_image("missing", 3 * MIB)
    cache.upstream.add("hangs", missing, "missing")
    assert cache.ask("hangs/manifests/missing").status == 200
    asked = {"openat": image, "pwrite64": missing}[calls]
    file = {
        "openat": blob_file(cache.daemon, image.layers[0].digest),
        "pwrite64": cache.daemon.image_path / "pulls" / "0" / missing.layers[0].digest[7:],
    }[calls]
    with hang(calls, file) as trace, ThreadPoolExecutor(1) as clients:
        clients.submit(fetch, cache.url(blob_of(asked)), timeout=60)
        wait_until(lambda: trace.begun, SOON, "the call hangs")
        cache.daemon.process.terminate()
        # The thread still hangs: strace would keep the process until it lets go of it.
        wait_until(lambda: "Server Shut Down." in cache.daemon.log, 45, "the daemon ends")
        assert trace.ended == 0
    cache.daemon.process.wait(SOON)
    log = cache.daemon.log
    assert log.count("stopping although the disk does not answer: 1 read or write has not returned") == 1
    assert not (cache.daemon.image_path / "pulls" / "0" / "socket").exists()
    # What is in the store is served by the next.
    cache.daemon.start()
    assert_served(cache, image, "sick")


AT_ONCE = 2.0
"""Seconds within which a hit is answered that needs no disk, on a busy machine."""
ALL = slice(None)
QUEUE = 128
"""Requests that a disk on a loop device holds."""
HUNG_FOR = 75.0
"""Seconds: longer than those from one note of a pull in a record to the next, and for the system to write its own."""


def assert_refused_in_time(cache: Cache, image: Image, meanwhile: Callable[[], None]) -> None:
    """Ask for a blob that cannot be read: the answer ends in time, and hits are served meanwhile."""

    began = time.monotonic()
    with ThreadPoolExecutor(1) as clients:
        asked = clients.submit(is_whole, cache, image)
        while not asked.done():
            meanwhile()
        assert not asked.result()
    assert time.monotonic() - began < ANSWERED


def is_whole(cache: Cache, image: Image, part: slice = ALL) -> bool:
    """Ask for its layer, or a part of it; tell whether that came, rather than 503 or less."""
    headers = None if part is ALL else {"Range": f"bytes={part.start}-{part.stop - 1}"}
    try:
        answer = cache.ask(blob_of(image), headers=headers)
    except IncompleteRead:
        return False
    assert answer.status in (200, 206, 503)
    return answer.body == image.layers[0].data[part]


def test_disk_that_is_gone_for_long(tmp_path: Path) -> None:
    """What is in memory is served: manifests, and blobs from the page cache."""
    with (
        hanging_ext4(tmp_path / "disk", 128 * MIB) as disk,
        ScriptedRegistry() as upstream,
        daemon_in(tmp_path, upstream, image_path=tmp_path / "disk" / "images") as daemon,
    ):
        cache = Cache(daemon, upstream)
        hot, cold = cached(cache, "hot"), cached(cache, "cold")
        wait_until(lambda: not cache.partials, SOON, "both are stored")
        drop(blob_file(daemon, cold.layers[0].digest))
        file = blob_file(daemon, hot.layers[0].digest)
        # The next read would have its time noted, for which the disk is needed.
        os.utime(file, (1, 2))
        for _ in range(2):
            assert_served(cache, hot, "hot")
        os.utime(file, (1, 2))
        since = cache.log_size
        with kept_in_memory(file), disk.stopped():
            began = time.monotonic()
            while time.monotonic() - began < HUNG_FOR - ANSWERED:
                assert_served(cache, hot, "hot", AT_ONCE)
                time.sleep(0.1)
            assert_refused_in_time(cache, cold, lambda: assert_served(cache, hot, "hot", AT_ONCE))
            while time.monotonic() - began < HUNG_FOR:
                assert_served(cache, hot, "hot", AT_ONCE)
                time.sleep(0.1)
            assert "the disk does not answer" in daemon.log[since:]
        wait_until(lambda: is_whole(cache, cold), SOON, "the disk answers again")
        assert_served(cache, hot, "hot")


@pytest.mark.parametrize("part", [ALL, slice(4096, 8192)], ids=["all is read", "more is read ahead"])
def test_more_reads_than_the_queue_of_the_disk_takes(tmp_path: Path, part: slice) -> None:
    """Hits are served meanwhile; once the disk goes on, so is everything else."""
    with (
        hanging_ext4(tmp_path / "disk", 128 * MIB) as disk,
        ScriptedRegistry() as upstream,
        daemon_in(tmp_path, upstream, image_path=tmp_path / "disk" / "images") as daemon,
    ):
        cache = Cache(daemon, upstream)
        hot = cached(cache, "hot")
        colds = [cached(cache, f"cold-{number}", MIB // 8) for number in range(2 * QUEUE)]
        wait_until(lambda: not cache.partials, SOON, "all are stored")
        assert_served(cache, hot, "hot")
        for cold in colds:
            drop(blob_file(daemon, cold.layers[0].digest))
            if part is not ALL:
                # As clients that pull layers lazily: the end, then the begin, which has the kernel read the part too.
                assert is_whole(cache, cold, slice(MIB // 8 - 10, MIB // 8))
                assert is_whole(cache, cold, slice(0, 10))
        with ThreadPoolExecutor(len(colds)) as clients:
            drop(disk.path / "image")
            with kept_in_memory(blob_file(daemon, hot.layers[0].digest)), disk.stopped():
                asked = [clients.submit(is_whole, cache, cold, part) for cold in colds]
                began = time.monotonic()
                while time.monotonic() - began < READ_WITHIN / 2:
                    assert_served(cache, hot, "hot", AT_ONCE)
                assert part is not ALL or sum(not answer.done() for answer in asked) > QUEUE
            assert all(answer.result() for answer in asked)


def test_server_of_a_fuse_file_system_that_is_gone(tmp_path: Path) -> None:
    """Such a file system does not tell what is in memory, so threads send all blobs."""
    with (
        fuse_disk(tmp_path / "disk") as disk,
        ScriptedRegistry() as upstream,
        daemon_in(tmp_path, upstream, image_path=disk.path / "images") as daemon,
    ):
        cache = Cache(daemon, upstream)
        hot, cold = cached(cache, "hot"), cached(cache, "cold")
        # More than sockets hold.
        begun = cached(cache, "begun", 32 * MIB)
        for _ in range(2):
            assert_served(cache, hot, "hot")
        with cache.opened(blob_of(begun)) as answer, ThreadPoolExecutor(1) as clients:
            for image in (cold, begun):
                drop(blob_file(daemon, image.layers[0].digest))
            with disk.stopped():
                rest = clients.submit(answer.read)
                # The kernel asks the server now and then whether a file has changed, also about what is in memory.
                assert_refused_in_time(cache, cold, lambda: assert_manifest_is_served(cache, hot, "hot", AT_ONCE))
                assert_manifest_is_served(cache, hot, "hot", AT_ONCE)
                assert isinstance(rest.exception(ANSWERED), IncompleteRead)
        wait_until(lambda: is_whole(cache, cold) and is_whole(cache, begun), SOON, "it answers again")
        assert_served(cache, hot, "hot")


def test_disks_of_these_tests_end_while_another_mount_namespace_has_them(tmp_path: Path) -> None:
    """Tests that run beside this make such namespaces, which keep a copy of each mount that is there."""
    with ExitStack() as ends:
        with hanging_ext4(tmp_path / "disk", 8 * MIB) as disk:
            other = subprocess.Popen(["unshare", "--mount", "--propagation", "private", "sleep", "infinity"])
            ends.callback(other.wait, SOON)
            ends.callback(other.kill)
            comm = Path(f"/proc/{other.pid}/comm")
            wait_until(lambda: comm.read_text() == "sleep\n", SOON, "the namespace is there")
        assert str(tmp_path) in Path(f"/proc/{other.pid}/mountinfo").read_text()
        assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
        assert not Path("/proc", str(disk.pid)).exists()
