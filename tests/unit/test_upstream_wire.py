"""A registry over real connections: scheme detection, redirects, TLS and aborted downloads."""

from __future__ import annotations

import json
import socket
from contextlib import suppress

import pytest
from twisted.internet.defer import Deferred

from ociregistry.errors import ManifestUnknown, NameInvalid, Unavailable
from ociregistry.names import Digest, Repository, Upstream
from ociregistry.upstream.client import BaseUrl
from ociregistry.upstream.network import Network as DaemonsNetwork
from ociregistry.upstream.registry import Registry
from tests.certificates import Authority
from tests.images import make_image
from tests.unit.support.common import REACTOR, image, manifest, on_reactor, until
from tests.unit.support.http_agents import INSTANCE, client_over
from tests.unit.support.wire import Network
from tests.unit.test_upstream_network import configured, entry
from tests.upstream import ScriptedRegistry
from tests.upstream_auth import Tokens
from tests.upstream_rules import Header, Hold, Redirect, Reply, Resize

BUILT = make_image("wire", layer_size=4 * 1024 * 1024)
IMAGE = manifest(BUILT)
LAYER = BUILT.layers[0]


def repository(registry: Registry) -> Repository:
    """Return the repository of the image."""
    return Repository(registry.upstream, "team/app")


async def pull(registry: Registry) -> None:
    """Request the manifest and a layer, and check them."""
    assert await registry.manifest(image(f"{repository(registry)}:1")) == IMAGE
    assert await registry.manifest(image(f"{repository(registry)}@{IMAGE.digest}")) == IMAGE
    stream = await registry.blob(repository(registry), Digest(LAYER.digest))
    assert stream.size == len(LAYER.data)
    received = bytearray()
    while piece := await stream.body.read():
        received += piece
    assert received == LAYER.data
    assert await registry.blob_size(repository(registry), Digest(LAYER.digest)) == len(LAYER.data)
    assert (await registry.tags(repository(registry))).tags == ("1",)
    assert (await registry.referrers(repository(registry), IMAGE.digest)).children == ()


@on_reactor
async def test_http_registry_is_detected_once(network: Network, upstream: ScriptedRegistry) -> None:
    upstream.add("team/app", BUILT, "1")
    await pull(network.registry(upstream.host))
    # One connection tried TLS; the others carried the requests.
    assert upstream.connections == 2


@on_reactor
async def test_https_registry(network: Network, secure: ScriptedRegistry, authority: Authority) -> None:
    secure.add("team/app", BUILT, "1")
    await pull(network.registry(secure.host, trust=authority.ca))
    assert secure.connections == 1


@on_reactor
async def test_invalid_certificate_causes_no_http_fallback(network: Network, secure: ScriptedRegistry) -> None:
    registry = network.registry(secure.host)
    with pytest.raises(Unavailable, match=r"TLS failed: .* CN=127\.0\.0\.1 is refused: its issuer is not trusted$"):
        await registry.manifest(image(f"{repository(registry)}:1"))
    assert secure.connections == 1


@on_reactor
async def test_token_service_on_another_host(network: Network, upstream: ScriptedRegistry) -> None:
    with ScriptedRegistry() as service:
        tokens = Tokens(f"{service.url}/token", key="access_token")
        upstream.add("team/app", BUILT, "1")
        upstream.script("*", tokens)
        service.script("*", tokens)
        registry = network.registry(upstream.host, scheme="http")
        await pull(registry)
        tokens.revoke()
        await pull(registry)
        assert service.count("GET", "/token") == 2
        assert [request.header("Authorization") for request in service.requests] == [None, None]


@on_reactor
async def test_blobs_on_storage_behind_redirects(network: Network, upstream: ScriptedRegistry) -> None:
    with ScriptedRegistry() as storage:
        upstream.add("team/app", BUILT, "1")
        storage.add("team/app", BUILT)
        upstream.script("*", Tokens(f"{upstream.url}/token"))
        upstream.script("/v2/*/blobs/*", Redirect(storage.url))
        await pull(network.registry(upstream.host, scheme="http"))
        assert storage.bytes_sent(LAYER.digest) == len(LAYER.data)
        assert [request.header("Authorization") for request in storage.requests] == [None, None]


@on_reactor
async def test_redirect_from_https_to_http_is_refused(
    network: Network, secure: ScriptedRegistry, authority: Authority, upstream: ScriptedRegistry
) -> None:
    secure.script("*", Redirect(upstream.url))
    registry = network.registry(secure.host, trust=authority.ca)
    with pytest.raises(Unavailable, match="redirects from https to http"):
        await registry.manifest(image(f"{repository(registry)}:1"))
    assert upstream.connections == 0


@on_reactor
async def test_redirect_to_unreachable_host_causes_no_http_fallback(
    network: Network, secure: ScriptedRegistry, authority: Authority, upstream: ScriptedRegistry
) -> None:
    upstream.close()
    secure.script("*", Redirect(f"https://{upstream.host}"))
    registry = network.registry(secure.host, trust=authority.ca)
    with pytest.raises(Unavailable, match="the connection was refused"):
        await registry.manifest(image(f"{repository(registry)}:1"))
    assert secure.connections == 1


@pytest.fixture
def ipv6() -> str:
    """Return the IPv6 loopback address, if the machine has it."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    return "::1"


@pytest.mark.parametrize("scheme", ["http", None])
@on_reactor
async def test_upstream_at_ipv6_address(network: Network, ipv6: str, scheme: str | None) -> None:
    with ScriptedRegistry(address=ipv6) as upstream:
        upstream.add("team/app", BUILT, "1")
        await pull(network.registry(f"[::1]:{upstream.port}", scheme=scheme))
        assert {request.header("Host") for request in upstream.requests} == {f"[::1]:{upstream.port}"}


@on_reactor
async def test_tls_upstream_at_ipv6_address(network: Network, authority: Authority, ipv6: str) -> None:
    with ScriptedRegistry(address=ipv6, tls=authority.server_context("::1")) as upstream:
        upstream.add("team/app", BUILT, "1")
        await pull(network.registry(f"[::1]:{upstream.port}", scheme="https", trust=authority.ca))


@on_reactor
async def test_daemon_connects_to_ipv6_address(ipv6: str) -> None:
    with ScriptedRegistry(address=ipv6) as upstream:
        upstream.add("team/app", BUILT, "1")
        way = DaemonsNetwork(configured(entry(upstream.host)), INSTANCE, REACTOR)
        way.startService()
        await pull(way.registry(Upstream(upstream.host)))
        way.stopService()


@on_reactor
async def test_redirect_to_ipv6_address_keeps_signature(
    network: Network, upstream: ScriptedRegistry, ipv6: str
) -> None:
    with ScriptedRegistry(address=ipv6) as storage:
        storage.script("*", Reply(200, LAYER.data))
        signed = "X-Signature=a%2Fb%2b~-_.!*'()&se=2026%3A01"
        upstream.script("*", Reply(307, b"", (("Location", f"http://[::1]:{storage.port}/x%2Fy?{signed}"),)))
        registry = network.registry(upstream.host, scheme="http")
        stream = await registry.blob(repository(registry), Digest(LAYER.digest))
        stream.body.abort()
        (request,) = storage.requests
        assert (request.path, request.query) == ("/x/y", signed)


@pytest.mark.parametrize("ns", ["docker.io", "reg.example:5000", "[::1]:5000"])
@pytest.mark.parametrize("query", ["", "n=5&last=a%2Fb"])
@on_reactor
async def test_mirror_uses_ns(network: Network, upstream: ScriptedRegistry, ns: str, query: str) -> None:
    upstream.script("*", Reply(404))
    base = BaseUrl("http", upstream.host, "/proxy/v2", ns)
    client = client_over(network.http(upstream.host), REACTOR, base=base)
    where = Repository(Upstream.parse(ns), "team/app")
    await (await client.request("GET", where, "tags/list" + (f"?{query}" if query else ""))).discard()
    (request,) = upstream.requests
    assert request.path == "/proxy/v2/team/app/tags/list"
    assert request.parameters("ns") == (ns,)
    assert (request.parameters("n"), request.parameters("last")) == ((("5",), ("a/b",)) if query else ((), ()))


async def ended_soon(ended: Deferred[None]) -> None:
    """Wait for the end of the connection, which must not depend on the other side."""
    await ended.addTimeout(3, REACTOR)


@pytest.mark.parametrize("held", [False, True])
@on_reactor
async def test_aborted_body_closes_its_connection_immediately(
    network: Network, upstream: ScriptedRegistry, held: bool
) -> None:
    upstream.add("team/app", BUILT, "1")
    await abort_and_go_on(network.registry(upstream.host, scheme="http", connections=1), upstream, held)


@pytest.mark.parametrize("held", [False, True])
@on_reactor
async def test_aborted_body_closes_its_tls_connection_immediately(
    network: Network, secure: ScriptedRegistry, authority: Authority, held: bool
) -> None:
    """Waiting for the peer's close_notify could take forever: it may be gone, or busy sending."""
    secure.add("team/app", BUILT, "1")
    registry = network.registry(secure.host, scheme="https", trust=authority.ca, connections=1)
    await abort_and_go_on(registry, secure, held)


async def abort_and_go_on(registry: Registry, upstream: ScriptedRegistry, held: bool) -> None:
    """Abort a blob held back by either side, and get another one over the only connection."""
    where, digest = repository(registry), Digest(LAYER.digest)
    if held:
        upstream.script("/v2/*/blobs/*", Hold(1000), times=1)
    stream = await registry.blob(where, digest)
    await stream.body.read()
    if not held:
        # Without a reader the body fills up and pauses the upstream.
        await until(lambda: upstream.requests[-1].sent > 2 * 1024 * 1024)
    stream.body.abort()
    await ended_soon(stream.body.ended)
    again = await registry.blob(where, digest)
    assert await again.body.read()
    again.body.abort()
    await ended_soon(again.body.ended)


# None of these may appear as a defect. The scripted registry sends latin-1, which is not UTF-8.
@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("Content-Type", 200),
        ("Docker-Content-Digest", 200),
        ("Location", 307),
        ("WWW-Authenticate", 401),
        ("Retry-After", 503),
    ],
)
@on_reactor
async def test_undecodable_headers(network: Network, upstream: ScriptedRegistry, name: str, status: int) -> None:
    upstream.script("*", Reply(status, IMAGE.data, (("Content-Type", IMAGE.media_type),)))
    upstream.script("*", Header(name, "http://ÿ\xfe"))
    registry = network.registry(upstream.host, scheme="http")
    with pytest.raises(ManifestUnknown if status == 401 else Unavailable):
        await registry.manifest(image(f"{repository(registry)}:1"))


@pytest.mark.parametrize("scheme", ["https", "http"])
@pytest.mark.parametrize(
    "name", ["a" * 64 + ".example", "ab--cd.example", "xn--a.example", "[.]", "[::::]", "a.0x7f"]
)
@on_reactor
async def test_invalid_host_name_is_an_error(network: Network, name: str, scheme: str) -> None:
    """It may be refused as a name or as a host, but must not appear as a defect."""
    with suppress(NameInvalid):
        registry = network.registry(name, scheme=scheme)
        with pytest.raises(Unavailable):
            await registry.manifest(image(f"{registry.upstream}/team/app:1"))


@on_reactor
async def test_truncated_tag_list(network: Network, upstream: ScriptedRegistry) -> None:
    upstream.script("*", Reply(200, json.dumps({"tags": ["a"] * 100}).encode()))
    upstream.script("*", Resize(-5))
    registry = network.registry(upstream.host, scheme="http")
    with pytest.raises(Unavailable, match="no valid list of tags"):
        await registry.tags(Repository(Upstream.parse(upstream.host), "team/app"))
