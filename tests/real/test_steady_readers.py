"""Clients that read slowly but steadily get everything; those that read nothing are dropped after a minute."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

from tests.certificates import Authority
from tests.images import MIB
from tests.processes import free_port
from tests.real.caches import SOON, Cache, daemon_in, plain_image
from tests.upstream import ScriptedRegistry

SLOWEST = 60.0
"""Seconds for which a client may read nothing."""
WATCHED = SLOWEST + 20
RATE = 2000
"""Bytes a second; a piece of 256 KiB takes two minutes."""
BIG = 16 * MIB

Connect = Callable[[], socket.socket]


def tcp(port: int) -> Connect:
    """Return a function that connects as a client on another machine, whose segments are small."""

    def connect() -> socket.socket:
        connection = socket.socket()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1448)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        return connection

    return connect


def unix(path: Path) -> Connect:
    """Return a function that connects to the control socket."""

    def connect() -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        with ExitStack() as stack:
            # The path may be too long for the kernel.
            folder = os.open(path.parent, os.O_RDONLY)
            stack.callback(os.close, folder)
            connection.connect(f"/proc/self/fd/{folder}/{path.name}")
        return connection

    return connect


def read_steadily(connect: Connect, target: str, stop: threading.Event) -> bytes:
    """Request this and read at `RATE`; return the body so far."""
    with closing(connect()) as connection:
        connection.settimeout(SOON)
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        received = bytearray()
        began = time.monotonic()
        while not stop.is_set():
            wanted = int((time.monotonic() - began) * RATE) - len(received)
            if wanted > 0:
                data = connection.recv(wanted)
                assert data, f"closed after {time.monotonic() - began:.0f} s"
                received += data
            stop.wait(0.25)
    head, _, body = bytes(received).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    return body


def time_of_the_end(connect: Connect, target: str) -> float:
    """Request this and read nothing; return after how many seconds the connection was reset."""
    with closing(connect()) as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        began = time.monotonic()
        while time.monotonic() - began < 2 * SLOWEST:
            time.sleep(0.5)
            # The kernel tells of the reset although data is unread.
            if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                break
        return time.monotonic() - began


def test_steady_readers_are_not_dropped(tmp_path: Path) -> None:
    """By TCP, by TLS and by the control socket, at 2 kB/s."""
    authority = Authority(tmp_path)
    certificate, key = authority.issue("127.0.0.1")
    plain, secure = free_port(), free_port()
    context = authority.client_context()
    endpoints = (
        f"tcp:{plain}:interface=127.0.0.1",
        f"ssl:{secure}:certKey={certificate}:privateKey={key}:interface=127.0.0.1",
    )
    image = plain_image("steady", BIG)
    layer = image.blobs[1]
    listen = [option for endpoint in endpoints for option in ("--listen", endpoint)]
    with ScriptedRegistry() as upstream, daemon_in(tmp_path, upstream, *listen, port=plain) as daemon:
        cache = Cache(daemon, upstream)
        upstream.add("steady", image, "1")
        cache.ask("steady/manifests/1")
        cache.ask(f"steady/blobs/{layer.digest}")
        cache.wait_stored(layer.digest)
        target = cache.url(f"steady/blobs/{layer.digest}").removeprefix(cache.daemon.url)
        control = cache.daemon.image_path / "pulls" / "0" / "socket"
        ways = [
            tcp(plain),
            lambda: context.wrap_socket(tcp(secure)(), server_hostname="127.0.0.1"),
            unix(control),
        ]
        stop = threading.Event()
        with ThreadPoolExecutor(len(ways) + 1) as clients:
            readers = [clients.submit(read_steadily, way, target, stop) for way in ways]
            idle = clients.submit(time_of_the_end, tcp(plain), target)
            stop.wait(WATCHED)
            stop.set()
            for reader in readers:
                body = reader.result(SOON)
                assert len(body) > WATCHED * RATE / 2
                assert body == layer.data[: len(body)]
            assert SLOWEST - 5 < idle.result(SLOWEST) < SLOWEST + 20
        assert cache.daemon.log.count("the client read nothing for 60 s") == 1
