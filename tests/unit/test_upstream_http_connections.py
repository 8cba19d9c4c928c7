"""Connections: unneeded responses release them, idle ones are reused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import pytest
from twisted.internet.defer import CancelledError, Deferred, gatherResults

from ociregistry.config.registries import Mirror
from ociregistry.errors import RegistryError, Unavailable
from ociregistry.names import Digest, Repository, Upstream
from ociregistry.upstream.network import Network as DaemonsNetwork
from tests.images import make_image
from tests.unit.support.common import REACTOR, image, manifest, on_reactor, until
from tests.unit.support.http_agents import INSTANCE
from tests.unit.support.wire import Network
from tests.unit.test_upstream_network import configured, entry
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Header, Hold, Reply

BUILT = make_image("connections")
IMAGE = manifest(BUILT)
HUGE = bytes(16 * 1024 * 1024)
"""More than socket buffers hold."""


@pytest.fixture
def daemon_networks() -> Iterator[DaemonsNetwork]:
    """Return upstream access assembled as in the daemon."""
    network = DaemonsNetwork(configured(), INSTANCE, REACTOR)
    network.startService()
    yield network
    network.stopService()


def wants_token(upstream: ScriptedRegistry) -> Reply:
    """Return a 401 with a long body."""
    return Reply(401, HUGE, (("WWW-Authenticate", f'Bearer realm="{upstream.url}/token"'),))


@pytest.mark.parametrize("what", ["challenge", "redirect", "token service", "refusal", "last redirect"])
@on_reactor
async def test_unneeded_response_releases_the_connection(
    network: Network, upstream: ScriptedRegistry, what: str
) -> None:
    upstream.script("*", Reply(404))
    if what == "challenge":
        upstream.script("/v2/*", wants_token(upstream), times=1)
        upstream.script("/token", Reply(200, b'{"token": "t"}'))
    elif what == "redirect":
        upstream.script("/v2/*", Reply(307, HUGE, (("Location", "/elsewhere"),)))
    elif what == "token service":
        upstream.script("/v2/*", wants_token(upstream))
        upstream.script("/token", Reply(500, HUGE))
    elif what == "refusal":
        upstream.script("*", Reply(500, HUGE))
    else:
        upstream.script("*", Reply(307, HUGE, (("Location", "/again"),)))
    client = network.client(upstream.host, scheme="http")
    with suppress(RegistryError):
        response = await client.request("GET", Repository(Upstream(upstream.host), "team/app"), "blobs/x")
        await response.discard()
    await until(lambda: all(request.done for request in upstream.requests))
    assert all(request.sent < len(HUGE) for request in upstream.requests)


@pytest.mark.parametrize("status", [404, 416, 500])
@on_reactor
async def test_refused_blob_response_releases_the_connection(
    network: Network, upstream: ScriptedRegistry, status: int
) -> None:
    upstream.script("*", Reply(status, HUGE))
    registry = network.registry(upstream.host, scheme="http")
    where = Repository(registry.upstream, "team/app")
    with pytest.raises(RegistryError):
        await registry.blob(where, Digest(BUILT.layers[0].digest), start=5)
    await until(lambda: upstream.requests[0].done)
    assert upstream.requests[0].sent < len(HUGE)


@on_reactor
async def test_wrong_range_releases_the_connection(network: Network, upstream: ScriptedRegistry) -> None:
    upstream.script("*", Reply(200, b"all of it"))
    upstream.script("*", Reply(206, HUGE, (("Content-Range", "bytes 7-16777222/16777223"),)), times=1)
    registry = network.registry(upstream.host, scheme="http")
    where = Repository(registry.upstream, "team/app")
    stream = await registry.blob(where, Digest(BUILT.layers[0].digest), start=5)
    assert (stream.start, await stream.body.read()) == (0, b"all of it")
    await until(lambda: upstream.requests[0].done)
    assert upstream.requests[0].sent < len(HUGE)


@on_reactor
async def test_encoded_body_releases_the_connection(network: Network, upstream: ScriptedRegistry) -> None:
    upstream.script("*", Reply(200, HUGE))
    upstream.script("*", Header("Content-Encoding", "gzip"))
    with pytest.raises(Unavailable, match="Content-Encoding"):
        await network.http("reg.example").send("GET", upstream.url, {})
    await until(lambda: upstream.requests[0].done)
    assert upstream.requests[0].sent < len(HUGE)


@on_reactor
async def test_error_of_a_mirror_releases_the_connection(
    daemon_networks: DaemonsNetwork, upstream: ScriptedRegistry
) -> None:
    with ScriptedRegistry() as mirror:
        mirror.script("*", Reply(404, HUGE))
        upstream.add("team/app", BUILT, "1")
        mirrors = (Mirror("http", Upstream(mirror.host)),)
        daemon_networks.reconfigure(configured(entry(upstream.host, scheme="http", mirrors=mirrors)))
        registry = daemon_networks.registry(Upstream(upstream.host))
        assert await registry.manifest(image(f"{upstream.host}/team/app:1")) == IMAGE
        await until(lambda: mirror.requests[0].done)
        assert mirror.requests[0].sent < len(HUGE)


@on_reactor
async def test_cancelled_request_closes_the_connection(network: Network, upstream: ScriptedRegistry) -> None:
    upstream.script("*", Hold())
    sending = Deferred.fromCoroutine(network.http("reg.example").send("GET", upstream.url, {}))
    await until(lambda: upstream.requests)
    sending.cancel()
    with pytest.raises(CancelledError):
        await sending


def advance(upstream: ScriptedRegistry, count: int) -> bool:
    """Wait until `count` requests have arrived."""
    return len(upstream.requests) == count


@on_reactor
async def test_idle_connections_are_reused_up_to_the_limit(
    daemon_networks: DaemonsNetwork, upstream: ScriptedRegistry
) -> None:
    upstream.add("team/app", BUILT, "1")
    daemon_networks.reconfigure(configured(entry(upstream.host, scheme="http")))
    registry = daemon_networks.registry(Upstream(upstream.host))
    for number in (1, 2, 3):
        hold = Hold()
        remove = upstream.script("*", hold)
        asked = [Deferred.fromCoroutine(registry.manifest(image(f"{upstream.host}/team/app:1"))) for _ in range(18)]
        await until(partial(advance, upstream, 18 * number))
        hold.release.set()
        remove()
        assert await gatherResults(asked) == [IMAGE] * 18
    assert upstream.connections == 18
