"""Hosts whose response headers never end cost the daemon no memory, and one clear line."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.certificates import Authority
from tests.client import fetch
from tests.images import MIB, Image, digest_of
from tests.processes import Daemon
from tests.real.caches import Cache, assert_error, cache_in, error_lines, plain_image
from tests.upstream import ScriptedRegistry
from tests.upstream_auth import Tokens

MOST_SENT = 64 * MIB
"""Bytes that a host sends at most: the test fails before that."""
MOST_GROWTH = 24 * MIB
WHY = "its headers have more than 65536 bytes, 1000 lines, or 12288 bytes in one line"

ENDLESS: dict[str, tuple[bytes, bytes]] = {
    "headers": (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n", b"X-%d: " + b"x" * 1000 + b"\r\n"),
    "short_headers": (b"HTTP/1.1 200 OK\r\n", b"x%d:\r\n"),
    "one_header": (b"HTTP/1.1 200 OK\r\nX: 1\r\n", b" %d" + b"x" * 1000 + b"\r\n"),
    "one_line": (b"HTTP/1.1 200 OK\r\nX: ", b"%d" + b"x" * 1000),
    "informational": (b"", b"HTTP/1.1 103 Early Hints\r\nLink: <%d>\r\n\r\n"),
    "disguised_informational": (b"", b"HTTP/1.1 +100 Continue\n%d: 1\n\n"),
}


class EndlessHeaders:
    """A host that answers each request by `first` and then `repeated`, with a number in it, without end."""

    def __init__(self, first: bytes, repeated: bytes, tls: ssl.SSLContext | None = None) -> None:
        self._first = first
        self._repeated = repeated
        self._tls = tls
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.host = f"127.0.0.1:{self.port}"
        self.requests: list[bytes] = []
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listening.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            # The daemon closes the connection.
            with connection, suppress(OSError):
                self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(20)
        if self._tls is not None:
            with self._tls.wrap_socket(connection, server_side=True) as secure:
                self._send(secure)
        else:
            self._send(connection)

    def _send(self, connection: socket.socket) -> None:
        self.requests.append(connection.recv(65536))
        connection.sendall(self._first)
        sent = number = 0
        while self._repeated and sent < MOST_SENT:
            lines = b"".join(self._repeated % one for one in range(number, number + 1000))
            number += 1000
            connection.sendall(lines)
            sent += len(lines)


@pytest.fixture
def endless(request: pytest.FixtureRequest) -> Iterator[EndlessHeaders]:
    """A host with endless headers, of the kind that the test wants."""
    with EndlessHeaders(*ENDLESS[getattr(request, "param", "headers")]) as host:
        yield host


@pytest.fixture
def image() -> Image:
    """An image that no host has unless the test adds it."""
    return plain_image("endless headers", 1000)


def assert_bounded(daemon: Daemon, what: str, url: str) -> None:
    """Request a URL: the answer is 503, memory stays small, and one error line says why `what` failed."""
    since, before = len(daemon.log), daemon.peak_memory()
    assert_error(fetch(url), 503, "UNAVAILABLE")
    assert daemon.peak_memory() - before < MOST_GROWTH
    (line,) = error_lines(daemon, since)
    assert what in line
    assert WHY in line


@pytest.mark.parametrize("endless", ENDLESS, indirect=True)
def test_upstream(endless: EndlessHeaders, tmp_path: Path) -> None:
    with cache_in(tmp_path, named=[endless.host]) as cache:
        url = f"{cache.daemon.url}/v2/team/app/manifests/1?ns={endless.host}"
        assert_bounded(cache.daemon, endless.host, url)
        assert len(endless.requests) == 1


def test_upstream_over_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    with (
        EndlessHeaders(*ENDLESS["headers"], tls=authority.server_context("127.0.0.1")) as endless,
        Daemon(tmp_path, {endless.host: {"tls": {"ca": str(authority.ca)}}}) as daemon,
    ):
        url = f"{daemon.url}/v2/team/app/manifests/1?ns={endless.host}"
        assert_bounded(daemon, endless.host, url)


def test_blob(endless: EndlessHeaders, image: Image, tmp_path: Path) -> None:
    with cache_in(tmp_path, named=[endless.host]) as cache:
        url = f"{cache.daemon.url}/v2/team/app/blobs/{image.blobs[0].digest}?ns={endless.host}"
        assert_bounded(cache.daemon, endless.host, url)


def test_token_service(endless: EndlessHeaders, image: Image, tmp_path: Path) -> None:
    with cache_in(tmp_path, named=[endless.host]) as cache:
        cache.upstream.add("team/app", image, "1")
        cache.upstream.script("*", Tokens(f"http://{endless.host}/token"))
        url = cache.url("team/app/manifests/1")
        assert_bounded(cache.daemon, cache.upstream.host, url)


def test_mirror(endless: EndlessHeaders, image: Image, tmp_path: Path) -> None:
    """The registry is asked instead."""
    with ScriptedRegistry() as upstream, ExitStack() as stack:
        upstream.add("team/app", image, "1")
        entry = {"scheme": "http", "mirrors": [f"http://{endless.host}"]}
        cache = Cache(stack.enter_context(Daemon(tmp_path, {upstream.host: entry})), upstream)
        before = cache.daemon.peak_memory()
        assert cache.ask("team/app/manifests/1").body == image.manifest.data
        assert cache.daemon.peak_memory() - before < MOST_GROWTH
        assert WHY in cache.daemon.log
        assert endless.requests


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_proxy(endless: EndlessHeaders, scheme: str, tmp_path: Path) -> None:
    """In answer to a request in absolute form, and to CONNECT."""
    entry = {"scheme": scheme, "proxy": f"http://{endless.host}"}
    with Daemon(tmp_path, {"registry.example": entry}) as daemon:
        before = daemon.peak_memory()
        assert_error(fetch(f"{daemon.url}/v2/team/app/manifests/1?ns=registry.example"), 503, "UNAVAILABLE")
        assert daemon.peak_memory() - before < MOST_GROWTH
        assert endless.requests[0].startswith(b"CONNECT" if scheme == "https" else b"GET http://")
        assert len(error_lines(daemon, 0)) == 1


def test_long_headers_of_honest_hosts_are_read(tmp_path: Path) -> None:
    """The body may come in the same segment as the headers, and consist of line ends."""
    body = b"\n" * 100_000
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n" % len(body)
    lines = b"".join(b"X-%d: %s\r\n" % (number, b"x" * 500) for number in range(100))
    with (
        EndlessHeaders(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100 + head + lines + b"\r\n" + body, b"") as honest,
        cache_in(tmp_path, named=[honest.host]) as cache,
    ):
        answer = fetch(f"{cache.daemon.url}/v2/team/app/blobs/{digest_of(body)}?ns={honest.host}")
        assert (answer.status, answer.body) == (200, body)
