"""Many slow readers and a fast one of the same blob: each gets its share, wherever its bytes come from."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pytest

from tests.disk_faults import small_disk
from tests.images import MIB, Blob, digest_of
from tests.processes import wait_until
from tests.real.caches import SOON, Cache, daemon_in, plain_image
from tests.upstream import ScriptedRegistry

READERS = 200
SIZE = 64 * MIB
PIECE = 2000
"""Bytes that a slow reader takes at once."""
PAUSE = 0.1
"""Seconds from one turn of all slow readers to the next."""
PATIENCE = 120.0


@pytest.fixture(params=["ext4", "tmpfs"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cache]:
    """A daemon that sends what is in memory by itself, and one whose threads send everything."""
    disk = tmp_path / "disk"
    with (
        small_disk(disk, 3 * SIZE) if request.param == "tmpfs" else nullcontext(),
        ScriptedRegistry() as upstream,
        daemon_in(tmp_path, upstream, image_path=disk / "images") as daemon,
    ):
        yield Cache(daemon, upstream)


class SlowReaders:
    """Clients on other machines that read the blob at `target` a little at a time, in turn, until the block ends."""

    def __init__(self, port: int, target: str, blob: Blob) -> None:
        self._port = port
        self._request = f"GET {target} HTTP/1.1\r\nHost: slow\r\n\r\n".encode()
        self._blob = blob
        self._connections: list[socket.socket] = []
        self.received = [bytearray() for _ in range(READERS)]
        self.turns = 0
        """How often each of them has read."""
        self._stack = ExitStack()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> SlowReaders:
        for _ in range(READERS):
            connection = self._stack.enter_context(socket.socket())
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1448)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(PATIENCE)
            connection.connect(("127.0.0.1", self._port))
            connection.sendall(self._request)
            self._connections.append(connection)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._stack.close()

    def _run(self) -> None:
        while not self._ended.wait(PAUSE):
            for connection, received in zip(self._connections, self.received, strict=True):
                received.extend(connection.recv(PIECE))
            self.turns += 1

    def assert_all_got_bytes(self) -> None:
        """Check that each got something at each turn, and the right bytes."""
        for received in self.received:
            head, _, body = bytes(received).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            assert self._blob.data.startswith(body)
            # A turn may bring a single byte.
            assert len(received) >= self.turns


def test_fast_reader_beside_slow_ones(cache: Cache) -> None:
    image = plain_image("fair", SIZE)
    blob = image.layers[0]
    cache.upstream.add("fair", image, "1")
    assert cache.ask("fair/manifests/1").status == 200
    target = cache.url(f"fair/blobs/{blob.digest}").removeprefix(cache.daemon.url)
    assert digest_of(cache.ask(f"fair/blobs/{blob.digest}").body) == blob.digest
    cache.wait_stored(blob.digest)
    since = cache.log_size
    with SlowReaders(cache.daemon.port, target, blob) as slow:
        wait_until(lambda: slow.turns >= 2, PATIENCE, "each slow reader got bytes")
        before = slow.turns
        for _ in range(3):
            assert digest_of(cache.ask(f"fair/blobs/{blob.digest}").body) == blob.digest
        # It need not wait for the slow ones: these would take an hour for as many bytes.
        assert (slow.turns - before) * PIECE < SIZE / 10
        during = slow.turns
        wait_until(lambda: slow.turns >= during + 3, PATIENCE, "each slow reader goes on")
    slow.assert_all_got_bytes()
    assert cache.errors(since) == []
    assert cache.ask("fair/manifests/1").status == 200
    wait_until(lambda: cache.daemon.log[since:].count(" hit") >= READERS + 4, SOON, "all exchanges have ended")
