"""How much of a large body is received at once over a real connection."""

from __future__ import annotations

import fcntl
import sys
import termios

import pytest

from ociregistry.names import Digest
from ociregistry.upstream.body import Body
from tests.certificates import Authority
from tests.images import make_image
from tests.unit.support.common import on_reactor, until
from tests.unit.support.wire import Network
from tests.unit.test_upstream_wire import BUILT, LAYER, repository
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import NoLength

TWISTED = 64 * 1024
"""Bytes that Twisted receives at once."""


def readable(body: Body) -> int:
    """Return the number of bytes that the kernel holds."""
    assert body._connection is not None
    return int.from_bytes(fcntl.ioctl(body._connection.fileno(), termios.FIONREAD, bytes(4)), sys.byteorder)


async def read_all(body: Body) -> list[bytes]:
    """Return the pieces up to the end."""
    received: list[bytes] = []
    while pieces := await body.read_pieces():
        received += pieces
    return received


@on_reactor
async def test_what_the_kernel_holds_is_received_at_once(network: Network, upstream: ScriptedRegistry) -> None:
    # More than a body buffers before it is read, so that the kernel holds the rest.
    large = make_image("large", layers=1, layer_size=8_000_000)
    layer = large.layers[0]
    upstream.add("team/app", large, "1")
    registry = network.registry(upstream.host, scheme="http")
    body = (await registry.blob(repository(registry), Digest(layer.digest))).body
    await until(lambda: readable(body) > TWISTED + 4096)
    pieces = await read_all(body)
    assert b"".join(pieces) == layer.data
    assert max(map(len, pieces)) > TWISTED


@pytest.mark.parametrize("tls", [False, True])
@on_reactor
async def test_large_pieces_end_with_the_body(
    network: Network, upstream: ScriptedRegistry, secure: ScriptedRegistry, authority: Authority, tls: bool
) -> None:
    host = secure if tls else upstream
    host.add("team/app", BUILT, "1")
    registry = network.registry(host.host, trust=authority.ca if tls else None)
    body = (await registry.blob(repository(registry), Digest(LAYER.digest))).body
    connection = body._connection
    assert connection is not None
    assert connection.bufferSize == 1024 * 1024
    assert b"".join(await read_all(body)) == LAYER.data
    assert connection.bufferSize == TWISTED


@pytest.mark.parametrize(("rate", "size"), [(1000.0, TWISTED), (10e6, 200_000), (1e9, 1024 * 1024)])
@on_reactor
async def test_pieces_under_a_limit_are_what_it_allows_in_a_fiftieth_of_a_second(
    network: Network, upstream: ScriptedRegistry, rate: float, size: int
) -> None:
    upstream.add("team/app", BUILT, "1")
    http = network.http(upstream.host)
    http._bandwidth.reconfigure(rate, ())
    response = await http.send("GET", f"{upstream.url}/v2/team/app/blobs/{LAYER.digest}", {})
    connection = response.body._connection
    assert connection is not None
    assert connection.bufferSize == size
    response.body.abort()
    await until(lambda: connection.bufferSize == TWISTED)


@on_reactor
async def test_chunked_body_is_received_as_usual(network: Network, upstream: ScriptedRegistry) -> None:
    upstream.add("team/app", BUILT, "1")
    upstream.script("/v2/*/blobs/*", NoLength())
    http = network.http(upstream.host)
    response = await http.send("GET", f"{upstream.url}/v2/team/app/blobs/{LAYER.digest}", {})
    assert response.length is None
    connection = response.body._connection
    assert connection is not None
    assert connection.bufferSize == TWISTED
    assert b"".join(await read_all(response.body)) == LAYER.data
