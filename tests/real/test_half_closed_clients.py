"""Clients that close their side of the connection after the request, as `nc -N` does, get their whole answer."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests import procfs
from tests.images import MIB, Image
from tests.processes import wait_until
from tests.real.caches import SOON, Cache, plain_image
from tests.upstream_rules import Hold

BIG = 24 * MIB
"""More than the kernel's buffers hold."""


@pytest.fixture
def image(cache: Cache, repository: str) -> Image:
    """An image at the upstream with a layer of `BIG` bytes."""
    image = plain_image(repository, BIG)
    cache.upstream.add(repository, image, "1")
    return image


def request(cache: Cache, path: str, method: bytes = b"GET") -> bytes:
    """Return the bytes of a request for `path` below /v2/."""
    target = cache.url(path).removeprefix(cache.daemon.url).encode()
    return b"%s %s HTTP/1.1\r\nHost: x\r\n\r\n" % (method, target)


def half_closed(cache: Cache, data: bytes) -> bytes:
    """Send data, close this side, and return what comes until the daemon closes the connection by FIN."""
    with socket.create_connection(("127.0.0.1", cache.daemon.port), timeout=SOON) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(MIB), b""))


def body(answer: bytes) -> bytes:
    """Return the body of the only answer, which must be complete."""
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert f"Content-Length: {len(rest)}".encode() in head.split(b"\r\n")
    return rest


def test_misses_and_hits(cache: Cache, repository: str, image: Image) -> None:
    since = cache.log_size
    for _ in range(2):
        assert body(half_closed(cache, request(cache, f"{repository}/manifests/1"))) == image.manifest.data
        for blob in image.blobs:
            assert body(half_closed(cache, request(cache, f"{repository}/blobs/{blob.digest}"))) == blob.data
            cache.wait_stored(blob.digest)
    assert cache.errors(since) == []


def test_requests_in_flight(cache: Cache, repository: str, image: Image) -> None:
    """The upstream answers long after the client has closed its side."""
    layer = image.blobs[1]
    for path, data, after in (("manifests/1", image.manifest.data, None), (f"blobs/{layer.digest}", layer.data, MIB)):
        hold = Hold(after)
        with cache.scripted(f"/v2/{repository}/{path}", hold), ThreadPoolExecutor(1) as client:
            answer = client.submit(half_closed, cache, request(cache, f"{repository}/{path}"))
            assert hold.reached.wait(SOON)
            hold.release.set()
            assert body(answer.result(SOON)) == data


def test_pipelined_requests_are_all_answered(cache: Cache, repository: str, image: Image) -> None:
    path = f"{repository}/manifests/1"
    answer = half_closed(cache, request(cache, path, b"HEAD") + request(cache, path) + request(cache, path, b"HEAD"))
    assert answer.count(b"HTTP/1.1 200 ") == 3
    assert answer.count(image.manifest.data) == 1


@pytest.mark.parametrize("sent", [b"", b"GET /v2/ HT", b"GET /v2/ HTTP/1.1\r\nHost: x\r\n"])
def test_incomplete_request_ends_the_connection(cache: Cache, sent: bytes) -> None:
    assert half_closed(cache, sent) == b""


def test_closed_connections_leave_nothing(cache: Cache, repository: str, image: Image) -> None:
    """A client that is gone looks half-closed until something is sent to it."""
    pid = cache.daemon.process.pid
    open_before = len(procfs.descriptors(pid))
    hold = Hold(MIB)
    with cache.scripted(f"/v2/{repository}/blobs/*", hold):
        with socket.create_connection(("127.0.0.1", cache.daemon.port), timeout=SOON) as connection:
            connection.sendall(request(cache, f"{repository}/blobs/{image.blobs[1].digest}"))
            assert hold.reached.wait(SOON)
        hold.release.set()
        cache.wait_stored(image.blobs[1].digest)
    # A connection to the upstream may be kept.
    wait_until(lambda: len(procfs.descriptors(pid)) <= open_before + 1, SOON, "the descriptors are closed")
