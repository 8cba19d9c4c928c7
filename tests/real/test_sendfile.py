"""Blobs go from the page cache to plain TCP connections within the kernel, whichever file system has the store."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from socket import IPPROTO_TCP, TCP_INFO
from urllib.parse import urlsplit

import pytest

from tests import procfs
from tests.certificates import Authority
from tests.client import fetch
from tests.disk_faults import Trace, ext4_disk, fuse_disk, small_disk, traced
from tests.images import MIB, Blob, digest_of
from tests.processes import free_port, wait_until
from tests.real.caches import SOON, Cache, daemon_in, plain_image
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Hold

SIZE = 5 * MIB
_DATA_SEGS_IN = 152
"""Offset in struct tcp_info of tcpi_data_segs_in (linux/tcp.h)."""
LARGE = 64 * 1024
"""Bytes: no read or write of this process moves as many of a blob."""

_COUNTED = re.compile(r"(\w+)\((\d+<[^>]*>).* = (\d+)")
"""A call of strace -y, its first descriptor, and the number of bytes that it moved."""
_CALLS = "sendfile,write,writev,send,sendto,sendmsg,read,pread64,preadv2"


@contextmanager
def normal_disk(path: Path) -> Iterator[Path]:
    """Give a folder on the disk of the tests."""
    path.mkdir()
    yield path


@contextmanager
def tmpfs(path: Path) -> Iterator[Path]:
    """Mount a file system in memory."""
    with small_disk(path, 64 * MIB) as disk:
        yield disk.path


@contextmanager
def ext4(path: Path) -> Iterator[Path]:
    """Mount an ext4."""
    with ext4_disk(path, 64 * MIB, 1000) as disk:
        yield disk.path


@contextmanager
def fuse(path: Path) -> Iterator[Path]:
    """Mount a folder by FUSE."""
    with fuse_disk(path) as disk:
        yield disk.path


DISKS: dict[str, Callable[[Path], AbstractContextManager[Path]]] = {
    "normal": normal_disk,
    "tmpfs": tmpfs,
    "ext4": ext4,
    "fuse": fuse,
}


@pytest.fixture(params=DISKS)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A mounted file system."""
    with DISKS[request.param](tmp_path / "disk") as path:
        yield path


@contextmanager
def cache_on(disk: Path, folder: Path, *options: str, port: int | None = None) -> Iterator[Cache]:
    """Run a daemon with its store on the disk until the block ends."""
    with (
        ScriptedRegistry() as upstream,
        daemon_in(folder, upstream, *options, image_path=disk / "images", port=port) as daemon,
    ):
        yield Cache(daemon, upstream)


class Command(HTTPConnection):
    """A connection to the control socket in `folder`."""

    def __init__(self, folder: Path) -> None:
        super().__init__("ociregistry")
        self._folder = folder

    def connect(self) -> None:
        """Connect, even where the path is too long for the kernel."""
        self.sock = socket.socket(socket.AF_UNIX)
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            self.sock.connect(f"/proc/self/fd/{folder}/socket")
        finally:
            os.close(folder)


@contextmanager
def calls_of(cache: Cache, requests: int, names: str, output: Path) -> Iterator[Trace]:
    """Record the system calls with these `names` that the daemon makes in the block, to answer that many requests."""
    since = cache.log_size
    with traced(cache.daemon.process.pid, names, output) as trace:
        yield trace
        # A client has its last byte before the call has returned.
        wait_until(lambda: cache.daemon.log[since:].count("#info] GET /v2/") == requests, SOON, "all are answered")


def stored(cache: Cache) -> Blob:
    """Return a layer of `SIZE` bytes that is in the store, in the repository `sent`."""
    image = plain_image("sent", SIZE)
    cache.upstream.add("sent", image, "1")
    assert cache.ask("sent/manifests/1").body == image.manifest.data
    assert digest_of(cache.ask(f"sent/blobs/{image.layers[0].digest}").body) == image.layers[0].digest
    cache.wait_stored(image.layers[0].digest)
    # A client has its last byte before that is logged.
    wait_until(lambda: cache.daemon.log.count("#info] GET /v2/") == 2, SOON, "both answers are logged")
    return image.layers[0]


def moved(trace: Trace, *calls: str) -> list[int]:
    """Return how many bytes each of these calls moved, other than those for the log."""
    counted = filter(None, map(_COUNTED.fullmatch, trace.calls))
    return [int(one[3]) for one in counted if one[1] in calls and ".log" not in one[2]]


def sockets(pid: int) -> int:
    """Count the sockets of a process."""
    return sum(target.startswith("socket:") for target in procfs.descriptors(pid))


def test_blob_is_sent_within_the_kernel(disk: Path, tmp_path: Path) -> None:
    """A hit by the usual way and one by the short way, and parts of the blob."""
    with cache_on(disk, tmp_path) as cache:
        layer = stored(cache)
        target = f"sent/blobs/{layer.digest}"
        with calls_of(cache, 6, _CALLS, tmp_path / "strace") as trace:
            for _ in range(2):
                assert digest_of(cache.ask(target).body) == layer.digest
            for first, last in ((0, 0), (1, SIZE - 1), (SIZE - 7, SIZE - 1), (MIB - 1, 3 * MIB)):
                part = cache.ask(target, headers={"Range": f"bytes={first}-{last}"})
                assert part.status == 206
                assert part.body == layer.data[first : last + 1]
        sent = 2 * SIZE + 1 + (SIZE - 1) + 7 + (2 * MIB + 2)
        assert sum(moved(trace, "sendfile")) == sent
        others = moved(trace, *(set(_CALLS.split(",")) - {"sendfile"}))
        assert max(others) < LARGE
        assert sum(others) < LARGE


def test_packets_are_filled(tmp_path: Path) -> None:
    """On loopback a packet takes 64 KiB, and sendfile(2) hands over as much at a time, but never at its borders."""
    with normal_disk(tmp_path / "disk") as disk, cache_on(disk, tmp_path) as cache:
        layer = stored(cache)
        url = urlsplit(cache.url(f"sent/blobs/{layer.digest}"))
        with closing(HTTPConnection(url.netloc)) as client:

            def packets() -> int:
                client.request("GET", f"{url.path}?{url.query}")
                assert client.getresponse().read() == layer.data
                told = client.sock.getsockopt(IPPROTO_TCP, TCP_INFO, 160)
                return int(struct.unpack_from("I", told, _DATA_SEGS_IN)[0])

            # The kernel has found out by then how much it may send at once.
            before = max(packets() for _ in range(4))
            assert 8 * SIZE / (max(packets() for _ in range(8)) - before) > 50_000
            with traced(cache.daemon.process.pid, "setsockopt,sendfile", tmp_path / "strace") as trace:
                packets()
                wait_until(lambda: "TCP_CORK, [0]" in trace.text.rpartition("sendfile(")[2], SOON, "the rest is sent")


def test_growing_blob_is_sent_from_its_file_and_from_memory(disk: Path, tmp_path: Path) -> None:
    """What is here already is sent while the rest is awaited, also to a second client, without Twisted's buffers."""
    image = plain_image("growing", SIZE)
    layer = image.layers[0]
    hold = Hold(after=3 * MIB)
    with cache_on(disk, tmp_path) as cache:
        cache.upstream.add("growing", image, "1")
        assert cache.ask("growing/manifests/1").status == 200
        target = f"growing/blobs/{layer.digest}"
        with (
            calls_of(cache, 2, _CALLS, tmp_path / "strace") as trace,
            cache.scripted(f"*{layer.digest}", hold),
            cache.opened(target) as first,
        ):
            got = first.read(2 * MIB)
            with cache.opened(target) as second:
                also = second.read(2 * MIB)
                hold.release.set()
                bodies = [got + first.read(), also + second.read()]
        assert [hashlib.sha256(body).hexdigest() for body in bodies] == [layer.digest[7:]] * 2
        assert sum(moved(trace, "sendfile", "writev")) == 2 * SIZE
        # The second client is behind what came last.
        assert sum(moved(trace, "sendfile")) >= MIB
        assert sum(moved(trace, "send", "sendto", "sendmsg")) < LARGE


def mostly_by_threads(trace: Trace, pid: int) -> bool:
    """Whether most calls were begun by other threads than that of the reactor."""
    own = [line.startswith(f"{pid} ") for line in trace.text.splitlines() if "sendfile(" in line]
    # Now and then a thread sends what the kernel writes to the disk at that moment.
    return 2 * sum(own) < len(own)


@pytest.mark.parametrize("kind", ["stored", "growing"])
def test_threads_send_to_several_clients(tmp_path: Path, kind: str) -> None:
    """While another transfer goes on, of which the client reads nothing."""
    image = plain_image("several", 8 * SIZE)
    layer = image.layers[0]
    with normal_disk(tmp_path / "disk") as disk, cache_on(disk, tmp_path) as cache:
        cache.upstream.add("several", image, "1")
        assert cache.ask("several/manifests/1").status == 200
        target, pid = f"several/blobs/{layer.digest}", cache.daemon.process.pid
        rules = []
        if kind == "stored":
            assert digest_of(cache.ask(target).body) == layer.digest
            cache.wait_stored(layer.digest)
        else:
            rules = [Hold(after=7 * SIZE)]
        part = {"Range": f"bytes=0-{6 * SIZE - 1}"}

        def is_right() -> bool:
            return cache.ask(target, headers=part).body == layer.data[: 6 * SIZE]

        with cache.scripted(f"*{layer.digest}", *rules), cache.opened(target) as waits:
            assert is_right()
            with traced(pid, "sendfile", tmp_path / "strace") as trace:
                # A client on a busy machine may be slow.
                wait_until(lambda: is_right() and mostly_by_threads(trace, pid), SOON, "threads send")
            for rule in rules:
                rule.release.set()
            assert digest_of(waits.read()) == layer.digest


def test_tls_and_the_control_socket(disk: Path, tmp_path: Path) -> None:
    """Their bytes are right as well; those for TLS pass through the process."""
    authority = Authority(tmp_path)
    certificate, key = authority.issue("127.0.0.1")
    plain, secure = free_port(), free_port()
    listen = (
        *("--listen", f"tcp:{plain}:interface=127.0.0.1"),
        *("--listen", f"ssl:{secure}:certKey={certificate}:privateKey={key}:interface=127.0.0.1"),
    )
    with cache_on(disk, tmp_path, *listen, port=plain) as cache:
        layer = stored(cache)
        url = cache.url(f"sent/blobs/{layer.digest}")
        parts: tuple[tuple[dict[str, str], bytes], ...] = (
            ({}, layer.data),
            ({"Range": f"bytes=7-{MIB}"}, layer.data[7 : MIB + 1]),
        )
        with traced(cache.daemon.process.pid, "sendfile", tmp_path / "strace") as trace:
            over_tls = url.replace(cache.daemon.url, f"https://127.0.0.1:{secure}")
            for headers, part in 2 * parts:
                assert fetch(over_tls, headers=headers, tls=authority.client_context()).body == part
        assert trace.text.count("sendfile") == 0
        with closing(Command(cache.daemon.image_path / "pulls" / "0")) as command:
            for headers, part in 2 * parts:
                command.request("GET", url.removeprefix(cache.daemon.url), headers=headers)
                assert command.getresponse().read() == part


def test_client_that_leaves_in_the_middle(disk: Path, tmp_path: Path) -> None:
    """Nothing of it is left: no socket, and no line of an error."""
    with cache_on(disk, tmp_path) as cache:
        layer = stored(cache)
        pid, since = cache.daemon.process.pid, cache.log_size
        before = sockets(pid)
        for _ in range(20):
            with cache.opened(f"sent/blobs/{layer.digest}") as answer:
                assert answer.read(100) == layer.data[:100]
        assert digest_of(cache.ask(f"sent/blobs/{layer.digest}").body) == layer.digest
        wait_until(lambda: sockets(pid) <= before, SOON, "their connections are closed")
        assert cache.errors(since) == []
