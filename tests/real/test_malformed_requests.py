"""Malformed and oversized requests are refused at once, and leave nothing behind."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests import procfs
from tests.client import fetch
from tests.images import MIB
from tests.processes import wait_until
from tests.real.caches import SOON, Cache, assert_error, cache_in

AT_ONCE = 5.0
"""Seconds; Go gives up on a TLS handshake after 10."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cache]:
    """One cache for all tests of this file."""
    with cache_in(tmp_path_factory.mktemp("hostile_bytes")) as cache:
        yield cache


def client_hello() -> bytes:
    """Return the first bytes of a TLS client."""
    sent = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), sent, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return sent.read()


def answer_until_closed(cache: Cache, *pieces: bytes, within: float = SOON) -> bytes:
    """Send these pieces; return the daemon's answer until it closes the connection, by FIN or by RST.

    Each piece after the first is sent when the answer has begun, or after a tenth of a second.
    """
    answer = b""
    deadline = time.monotonic() + within
    with socket.create_connection(("127.0.0.1", cache.daemon.port)) as connection, suppress(ConnectionError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for number, piece in enumerate(pieces):
            if number:
                connection.settimeout(0.1)
                with suppress(TimeoutError):
                    answer += connection.recv(65536)
            connection.settimeout(within)
            with suppress(ConnectionError):  # It may be closed already; its answer can still be read.
                connection.sendall(piece)
        while data := connection.recv(65536):
            answer += data
            assert time.monotonic() < deadline, answer[:500]
    assert time.monotonic() < deadline, answer[:500]
    return answer


HELLO = client_hello()


@pytest.mark.parametrize("cut", [len(HELLO), 1, 5, 300], ids=["whole", "first_byte", "record_header", "half"])
def test_tls_hello_is_answered_at_once(cache: Cache, cut: int) -> None:
    """The hello may come in several segments: today's do not fit into one."""
    pieces = [piece for piece in (HELLO[:cut], HELLO[cut:]) if piece]
    answer = answer_until_closed(cache, *pieces, within=AT_ONCE)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert f"Content-Length: {len(body)}".encode() in head.split(b"\r\n")
    assert body


def test_tls_client_fails_at_once(cache: Cache) -> None:
    began = time.monotonic()
    context = ssl.create_default_context()
    with (
        socket.create_connection(("127.0.0.1", cache.daemon.port), timeout=SOON) as plain,
        pytest.raises(ssl.SSLError),
    ):
        context.wrap_socket(plain, server_hostname="localhost")
    assert time.monotonic() - began < AT_ONCE


def test_tls_hello_after_a_request_is_a_malformed_request(cache: Cache) -> None:
    """It counts as the beginning of a malformed request."""
    request = b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = answer_until_closed(cache, request, HELLO + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"HTTP/1.1 400 " in answer


def lines(count: int) -> bytes:
    """Return this many headers."""
    return b"".join(b"X-%d: 1\r\n" % number for number in range(count))


MALFORMED = {
    "request_line": b"GET /v2/" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "header": b"GET /v2/ HTTP/1.1\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
    "headers_together": b"GET /v2/ HTTP/1.1\r\n"
    + b"".join(b"X: %s\r\n" % (b"x" * 1000) for _ in range(20))
    + b"\r\n",
    "folded_header": b"GET /v2/ HTTP/1.1\r\nX: 1\r\n" + (b" " + b"x" * 1000 + b"\r\n") * 20 + b"\r\n",
    "many_headers": b"GET /v2/ HTTP/1.1\r\n" + lines(600) + b"\r\n",
    "endless_line": b"GET /v2/" + b"x" * (16 * MIB),
    "endless_headers": b"GET /v2/ HTTP/1.1\r\n" + lines(100_000),
    "no_header": b"GET /v2/ HTTP/1.1\r\nno colon\r\n\r\n",
    "no_version": b"GET\r\n\r\n",
    "nothing_like_it": b"\x00\x01\x02\x03\r\n\r\n",
    "http_2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "two_lengths": b"PUT /v2/ HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
    "length_and_chunks": b"PUT /v2/ HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "negative_length": b"PUT /v2/ HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    "bad_chunk": b"PUT /v2/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_request_closes_the_connection(cache: Cache, name: str) -> None:
    """400 or nothing, then the end of the connection; the daemon survives, and keeps nothing."""
    pid = cache.daemon.process.pid
    before, open_before = cache.daemon.peak_memory(), len(procfs.descriptors(pid))
    answer = answer_until_closed(cache, MALFORMED[name])
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
    assert fetch(f"{cache.daemon.url}/health").status == 200
    assert cache.daemon.peak_memory() - before < 4 * MIB
    wait_until(lambda: len(procfs.descriptors(pid)) <= open_before, SOON, "the descriptor is closed")


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_request_body_is_discarded(cache: Cache, chunked: bool) -> None:
    """PUT with 100 MB: 405, nothing on disk, nothing in memory."""
    size, piece = 100_000_000, b"x" * 100_000
    pid = cache.daemon.process.pid
    peak, written, files = cache.daemon.peak_memory(), procfs.written(pid), cache.files
    with socket.create_connection(("127.0.0.1", cache.daemon.port), timeout=60) as connection:
        framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % size
        connection.sendall(
            b"PUT /v2/big/blobs/uploads/1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%s\r\n\r\n" % framing
        )
        for _ in range(size // len(piece)):
            connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
        connection.sendall(b"0\r\n\r\n" if chunked else b"")
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 405 ")
    assert b'"UNSUPPORTED"' in answer
    assert cache.files == files
    # The daemon writes nothing but its log.
    assert 0 < procfs.written(pid) - written < 100_000
    assert cache.daemon.peak_memory() - peak < 16 * MIB


def test_incomplete_request_body_leaves_nothing(cache: Cache) -> None:
    """The sender disconnects: no answer, no error, no descriptor."""
    pid, since = cache.daemon.process.pid, cache.log_size
    open_before = len(procfs.descriptors(pid))
    with socket.create_connection(("127.0.0.1", cache.daemon.port), timeout=SOON) as connection:
        connection.sendall(b"PUT /v2/big/blobs/uploads/1 HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 1000)
        wait_until(lambda: len(procfs.descriptors(pid)) > open_before, SOON, "the client is connected")
    wait_until(lambda: len(procfs.descriptors(pid)) <= open_before, SOON, "the descriptor is closed")
    assert cache.errors(since) == []
    assert_error(fetch(f"{cache.daemon.url}/v2/_catalog"), 404, "UNSUPPORTED")
