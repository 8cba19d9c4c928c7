"""Slow and silent clients: others can pull, and the daemon's memory stays small."""

from __future__ import annotations

import hashlib
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import pytest

from tests import procfs
from tests.client import fetch
from tests.images import MIB, Blob, Image
from tests.processes import wait_until
from tests.real.caches import SOON, Cache, cache_in, plain_image

IDLE = 1000
READERS = 50
SENDERS = 50
BIG = 64 * MIB
PIECE = 256 * 1024

# For each connection: Twisted's objects, 16 KiB of headers at most, and as much again for the allocator. For each
# reader: the piece waiting to be taken, the next one, and both once more in buffers on the way.
MOST_GROWTH = (IDLE + READERS + SENDERS) * 32 * 1024 + READERS * 4 * PIECE

SILENT = 2500
"""Clients that request a blob and read nothing."""
# For each of them Twisted's objects and the open blob; and 64 MiB that are unsent, or half as much again before any
# client counts as stalled.
MOST_GROWTH_OF_SILENT = SILENT * 64 * 1024 + 96 * MIB

ENOUGH_FOR_ALL = 8192


@pytest.fixture(scope="module", autouse=True)
def descriptors() -> Iterator[None]:
    """Raise the limit of descriptors above the customary 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < ENOUGH_FOR_ALL:
        pytest.fail(f"ulimit -Hn is {hard}, {ENOUGH_FOR_ALL} are needed", pytrace=False)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, ENOUGH_FOR_ALL), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cache]:
    """One cache for all tests of this file."""
    with cache_in(tmp_path_factory.mktemp("hostile")) as cache:
        yield cache


@pytest.fixture(scope="module")
def big(cache: Cache) -> Blob:
    """A cached blob of 64 MiB in the repository `big`."""
    image = plain_image("big", BIG)
    cache.upstream.add("big", image, "1")
    pull(cache, "big", image)
    cache.wait_stored(image.blobs[1].digest)
    return image.blobs[1]


def pull(cache: Cache, repository: str, image: Image) -> None:
    """Pull the image as a client does: the manifest by tag, then its blobs, with the correct bytes."""
    assert cache.ask(f"{repository}/manifests/1").body == image.manifest.data
    for blob in image.blobs:
        hasher = hashlib.sha256()
        with cache.opened(f"{repository}/blobs/{blob.digest}") as answer:
            assert (answer.status, answer.headers["Content-Length"]) == (200, str(len(blob.data)))
            while data := answer.read(MIB):
                hasher.update(data)
        assert f"sha256:{hasher.hexdigest()}" == blob.digest


def sockets(pid: int) -> int:
    """Count the open sockets; blobs are kept open."""
    return sum(descriptor.startswith("socket:") for descriptor in procfs.descriptors(pid))


class Slow:
    """Clients that read or send one byte a second, each on a separate connection, until they are closed."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._ended = threading.Event()
        self._steps: list[Callable[[], object]] = []
        self._thread = threading.Thread(target=self._run)
        self._connections = ExitStack()
        self.rounds = 0
        """How often each of them has acted."""

    def __enter__(self) -> Slow:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self._connections.close()

    def connect(self, buffer: int = 0) -> socket.socket:
        """Connect with a receive buffer of `buffer` bytes that is never read, or of the usual megabytes."""
        connection = self._connections.enter_context(socket.socket())
        if buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.settimeout(SOON)
        connection.connect(self._address)
        return connection

    def read_slowly(self, target: bytes) -> None:
        """Request this and read a byte a second."""
        connection = self.connect(buffer=65536)
        connection.sendall(b"GET %s HTTP/1.1\r\nHost: slow\r\n\r\n" % target)
        assert connection.recv(12) == b"HTTP/1.1 200"
        self._steps.append(lambda: connection.recv(1))

    def send_slowly(self) -> None:
        """Begin a request and send one byte of its headers a second."""
        connection = self.connect()
        connection.sendall(b"GET /v2/ HTTP/1.1\r\nHost: slow\r\nX-Slow: ")
        self._steps.append(lambda: connection.send(b"x"))

    def start(self) -> None:
        """Start acting."""
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(1):
            for step in self._steps:
                # The daemon may close some of them; the others continue.
                with suppress(OSError):
                    step()
            self.rounds += 1


def test_slow_and_silent_clients_do_not_block_others(cache: Cache, big: Blob) -> None:
    """1,000 send nothing, 50 read a byte a second, 50 send one: other clients pull, hits and misses."""
    pid = cache.daemon.process.pid
    target = cache.url(f"big/blobs/{big.digest}").removeprefix(cache.daemon.url).encode()
    before, open_before = procfs.memory(pid), sockets(pid)
    highest = before
    with Slow(("127.0.0.1", cache.daemon.port)) as crowd:
        for _ in range(IDLE):
            crowd.connect()
        for _ in range(READERS):
            crowd.read_slowly(target)
        for _ in range(SENDERS):
            crowd.send_slowly()
        crowd.start()
        here = IDLE + READERS + SENDERS
        wait_until(lambda: sockets(pid) >= open_before + here, SOON, "all of them are connected")
        number = 0
        while crowd.rounds < 8:
            number += 1
            fresh = plain_image(f"crowd/{number}", MIB)
            cache.upstream.add(f"crowd/{number}", fresh, "1")
            pull(cache, f"crowd/{number}", fresh)
            assert cache.ask(f"big/blobs/{big.digest}").body == big.data
            highest = max(highest, procfs.memory(pid))
        assert sockets(pid) >= open_before + here
    growth = highest - before
    assert growth <= MOST_GROWTH, f"{before >> 20} MiB grew by {growth >> 20} MiB"
    wait_until(lambda: sockets(pid) <= open_before, SOON, "their descriptors are closed")
    assert fetch(f"{cache.daemon.url}/health").status == 200


def test_clients_that_read_nothing_hold_little_memory(cache: Cache, big: Blob) -> None:
    """2,500 of them, from several addresses; others can pull, and none is dropped, as no bytes are held for them."""
    pid, since = cache.daemon.process.pid, cache.log_size
    target = cache.url(f"big/blobs/{big.digest}").removeprefix(cache.daemon.url).encode()
    before, open_before = procfs.memory(pid), sockets(pid)
    with ExitStack() as stack:
        for number in range(SILENT):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            connection.bind((f"127.0.0.{2 + number % 2}", 0))
            connection.settimeout(SOON)
            connection.connect(("127.0.0.1", cache.daemon.port))
            connection.sendall(b"GET %s HTTP/1.1\r\nHost: silent\r\n\r\n" % target)
            assert connection.recv(12) == b"HTTP/1.1 200"
        assert procfs.memory(pid) - before <= MOST_GROWTH_OF_SILENT
        began = time.monotonic()
        while time.monotonic() - began < 8:
            assert cache.ask(f"big/blobs/{big.digest}").body == big.data
        assert procfs.memory(pid) - before <= MOST_GROWTH_OF_SILENT
        assert ", and memory was needed" not in cache.daemon.log[since:]
        assert cache.errors(since) == []
    wait_until(lambda: sockets(pid) <= open_before, SOON, "their descriptors are closed")
