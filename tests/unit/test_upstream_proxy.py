"""Requests through a forward proxy: what it is asked, what it is not, and what its refusals mean."""

from __future__ import annotations

import base64
import os
import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest
from twisted.internet.abstract import isIPAddress
from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.internet.error import DNSLookupError
from twisted.logger import LogEvent, LogLevel

from ociregistry.config.proxy import NO_PROXIES, NoProxy, Proxies, Proxy, ProxySettings
from ociregistry.config.registries import RegistrySettings
from ociregistry.config.tls import SYSTEM_TRUST, UpstreamTls
from ociregistry.errors import Denied, OutOfDescriptors, Unavailable
from ociregistry.names import Repository, Upstream
from ociregistry.openssl import Certificates
from ociregistry.settings import load_settings
from ociregistry.upstream.breaker import CircuitBreakers
from ociregistry.upstream.client import BaseUrl, Client
from ociregistry.upstream.connect import Resolver
from ociregistry.upstream.http import DEFAULT_OPTIONS, RequestOptions, Response
from ociregistry.upstream.network import Network
from ociregistry.upstream.proxy import Route
from tests.certificates import Authority
from tests.forward_proxy import ForwardProxy
from tests.processes import without_free_descriptors
from tests.unit.support.common import REACTOR, failed, on_reactor, texts, until
from tests.unit.support.http_agents import INSTANCE
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Redirect, Reply

NAME, STORAGE = "reg.example:5000", "storage.example:5000"
TAG = "manifests/1"
BODY = b"it came"


class AddressesAlone(Resolver):
    """Resolves no names, but addresses."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def addresses(self, host: str) -> Deferred[tuple[str, ...]]:
        """Return the address that `host` is, or an error."""
        self.asked.append(host)
        return succeed((host,)) if isIPAddress(host) else fail(DNSLookupError("nothing is resolved here"))


class Proxied:
    """Asks the upstream NAME through a proxy; no name can be resolved here."""

    def __init__(self) -> None:
        self.names = AddressesAlone()

    def client(
        self,
        proxies: Proxies,
        *,
        no_proxy: str = "",
        name: str = NAME,
        scheme: str | None = None,
        tls: UpstreamTls = SYSTEM_TRUST,
        own: Proxies | None = None,
        named: tuple[str, ...] = (),
        breakers: CircuitBreakers | None = None,
    ) -> Client:
        """A client of an upstream with these proxies, or with its `own`; the file has an entry for those `named`."""
        upstream = Upstream.parse(name)
        entry = RegistrySettings(upstream, scheme, tls=tls, proxy=own)
        entries = {one: RegistrySettings(one) for one in map(Upstream.parse, named)}
        proxy = ProxySettings(proxies, NoProxy.parse(no_proxy, pytest.fail))
        settings = replace(load_settings({}, (), None, {}), registries=entries, proxy=proxy)
        network = Network(settings, INSTANCE, REACTOR)
        network._resolver = self.names
        network._breakers = breakers or network._breakers
        return network._client(entry, BaseUrl(scheme, upstream.name))

    async def get(self, client: Client, options: RequestOptions = DEFAULT_OPTIONS) -> Response:
        """A response of the upstream."""
        return await client.request("GET", Repository(Upstream(NAME), "team/app"), TAG, options=options)

    async def refused(self, client: Client) -> str:
        """Why there is none."""
        with pytest.raises(Unavailable) as refused:
            await self.get(client)
        return refused.value.message


@pytest.fixture
def asking() -> Proxied:
    """Asks upstreams by real connections."""
    return Proxied()


def through(proxy: ForwardProxy, login: str = "") -> Proxies:
    """The proxy for all URLs. It is named by its address, which is a loopback one, as an operator may."""
    scheme, _, rest = proxy.url.partition("://")
    parsed = Proxy.parse(f"{scheme}://{login}{rest}")
    return Proxies(parsed, parsed)


@pytest.fixture
def proxy(upstream: ScriptedRegistry) -> Iterator[ForwardProxy]:
    """A proxy that knows the registry by two names."""
    where = "127.0.0.1", upstream.port
    with ForwardProxy({NAME: where, STORAGE: where, "169.254.169.254": where, "localhost": where}) as proxy:
        upstream.script("*", Reply(200, BODY))
        yield proxy


@pytest.fixture
def secure_proxy(secure: ScriptedRegistry) -> Iterator[ForwardProxy]:
    """A proxy that knows a registry that speaks TLS."""
    with ForwardProxy({NAME: ("127.0.0.1", secure.port)}) as proxy:
        secure.script("*", Reply(200, BODY))
        yield proxy


def trusting(authority: Authority, *, verify: bool = True) -> UpstreamTls:
    """Trust in the authority of the registry; its certificate is for another name."""
    return UpstreamTls(Certificates(authority.ca, (authority.ca.read_bytes(),)), verify=verify)


@on_reactor
async def test_http_request_has_absolute_form(
    asking: Proxied, proxy: ForwardProxy, upstream: ScriptedRegistry
) -> None:
    client = asking.client(through(proxy, "a%40b:p%3Aq@"), scheme="http")
    response = await asking.get(client)
    assert await response.collect(100) == BODY
    (request,) = proxy.requests
    assert request[0] == f"GET http://{NAME}/v2/team/app/{TAG} HTTP/1.1"
    basic = base64.b64encode(b"a@b:p:q").decode()
    assert f"Proxy-Authorization: Basic {basic}" in request
    assert f"Host: {NAME}" in request
    assert upstream.requests[0].header("Proxy-Authorization") is None
    assert asking.names.asked == ["127.0.0.1"]


@on_reactor
async def test_https_request_uses_a_tunnel(
    asking: Proxied, secure_proxy: ForwardProxy, secure: ScriptedRegistry, authority: Authority
) -> None:
    client = asking.client(through(secure_proxy, "u:p@"), tls=trusting(authority, verify=False))
    response = await asking.get(client)
    assert await response.collect(100) == BODY
    (request,) = secure_proxy.requests
    assert request[0] == f"CONNECT {NAME} HTTP/1.1"
    basic = base64.b64encode(b"u:p").decode()
    assert f"Proxy-Authorization: Basic {basic}" in request
    assert any(header.startswith("User-Agent: ociregistry/") for header in request)
    (asked,) = secure.requests
    assert asked.header("Proxy-Authorization") is None
    assert asking.names.asked == ["127.0.0.1"]


@on_reactor
async def test_certificate_is_verified_through_the_tunnel(
    asking: Proxied, secure_proxy: ForwardProxy, authority: Authority
) -> None:
    client = asking.client(through(secure_proxy), tls=trusting(authority))
    why = await asking.refused(client)
    assert "it is for another host name" in why
    assert why.endswith(f", through the proxy {secure_proxy.url}")


@pytest.mark.parametrize("scheme", ["http", "https"])
@on_reactor
async def test_proxy_over_tls(
    asking: Proxied,
    upstream: ScriptedRegistry,
    secure: ScriptedRegistry,
    authority: Authority,
    scheme: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its certificate is verified by the operating system's trust store."""
    registry = upstream if scheme == "http" else secure
    registry.script("*", Reply(200, BODY))
    tls = SYSTEM_TRUST if scheme == "http" else trusting(authority, verify=False)
    where = {NAME: ("127.0.0.1", registry.port)}
    with ForwardProxy(where, tls=authority.server_context("127.0.0.1")) as proxy:
        client = asking.client(through(proxy), scheme=scheme, tls=tls)
        assert "TLS failed: the certificate of CN=127.0.0.1 is refused" in (why := await asking.refused(client))
        assert f"proxy {proxy.url}" in why
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
        response = await asking.get(asking.client(through(proxy), scheme=scheme, tls=tls))
        assert await response.collect(100) == BODY


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(
    "name",
    [
        *("127.0.0.1", "127.1", "0x7f000001", "2130706433", "[::1]", "[::ffff:127.0.0.1]"),
        *("169.254.169.254", "100.100.100.200", "0.0.0.0", "[fe80::1]", "localhost", "a.localhost"),
    ],
)
@on_reactor
async def test_forbidden_address_is_refused_behind_a_proxy(
    asking: Proxied, proxy: ForwardProxy, scheme: str, name: str
) -> None:
    client = asking.client(NO_PROXIES, own=through(proxy), name=name, scheme=scheme)
    with pytest.raises(Denied):
        await asking.get(client)
    assert proxy.requests == []


@on_reactor
async def test_redirect_to_forbidden_address_is_refused_behind_a_proxy(
    asking: Proxied, proxy: ForwardProxy, upstream: ScriptedRegistry
) -> None:
    upstream.script("*", Redirect("http://169.254.169.254"))
    with pytest.raises(Denied):
        await asking.get(asking.client(through(proxy), scheme="http"))
    assert len(proxy.requests) == 1


@on_reactor
async def test_configured_host_may_have_forbidden_address_behind_proxy(asking: Proxied, proxy: ForwardProxy) -> None:
    named = asking.client(through(proxy), name="169.254.169.254", scheme="http", named=("169.254.169.254",))
    assert (await asking.get(named)).status == 200
    assert proxy.lines == [f"GET http://169.254.169.254/v2/team/app/{TAG}"]


@on_reactor
async def test_no_proxy_applies_to_each_host_of_a_request(
    asking: Proxied, proxy: ForwardProxy, upstream: ScriptedRegistry
) -> None:
    """Here it is where the registry redirects to."""
    upstream.script("*", Redirect(f"http://{STORAGE}"), times=1)
    client = asking.client(through(proxy), scheme="http", no_proxy="storage.example")
    assert "host name cannot be resolved" in await asking.refused(client)
    upstream.script("*", Redirect(f"http://{STORAGE}"), times=1)
    assert (await asking.get(asking.client(through(proxy), scheme="http"))).redirected
    assert len(proxy.lines) == 3


def test_proxy_of_an_entry_overrides_no_proxy_for_its_own_host() -> None:
    one = Proxies(Proxy("http", "one", 1), Proxy("http", "one", 1))
    base = BaseUrl(None, NAME)
    own = frozenset({base.origin("http"), base.origin("https")})
    no_proxy = NoProxy.parse(".example", pytest.fail)
    other = BaseUrl(None, STORAGE).origin("https")
    assert Route(one, no_proxy, own).to(base.origin("https")) == one.https
    assert Route(one, no_proxy, own).to(base.origin("http")) == one.http
    assert Route(one, no_proxy, own).to(other) is None
    assert Route(one, no_proxy).to(base.origin("https")) is None


@on_reactor
async def test_http_fallback_when_host_in_tunnel_speaks_no_tls(asking: Proxied, proxy: ForwardProxy) -> None:
    """It is the host that says so. Its name has a port, which is what allows http."""
    assert (await asking.get(asking.client(through(proxy)))).status == 200
    assert proxy.lines == [f"CONNECT {NAME}", f"GET http://{NAME}/v2/team/app/{TAG}"]


@on_reactor
async def test_no_http_fallback_through_proxy_for_name_without_port(
    asking: Proxied, proxy: ForwardProxy, upstream: ScriptedRegistry
) -> None:
    proxy.hosts = {"reg.example:443": ("127.0.0.1", upstream.port)}
    assert "TLS failed" in await asking.refused(asking.client(through(proxy), name="reg.example"))
    assert proxy.lines == ["CONNECT reg.example:443"]


@pytest.mark.parametrize("status", [403, 407, 500, 502, 503, 504])
@on_reactor
async def test_no_http_fallback_when_proxy_refuses(asking: Proxied, proxy: ForwardProxy, status: int) -> None:
    """Its status says nothing about what the host speaks."""
    proxy.refusal = f"HTTP/1.1 {status} No\r\nContent-Length: 2\r\n\r\nno".encode()
    client = asking.client(through(proxy))
    why = await asking.refused(client)
    assert why.startswith(f"{NAME}: proxy {proxy.url}: it ")
    assert f"({status})" in why
    await asking.refused(client)
    assert set(proxy.lines) == {f"CONNECT {NAME}"}


@pytest.mark.parametrize(("status", "down"), [(403, False), (407, False), (500, True), (502, True), (504, True)])
@on_reactor
async def test_breaker_of_host_opens_when_proxy_cannot_reach_it(
    asking: Proxied, proxy: ForwardProxy, status: int, down: bool, events: list[LogEvent]
) -> None:
    proxy.refusal = f"HTTP/1.1 {status} No\r\n\r\n".encode()
    client = asking.client(through(proxy), scheme="https")
    await asking.refused(client)
    told = texts(events, LogLevel.warn)
    assert told == (
        [f"{NAME} cannot be reached: proxy {proxy.url}: it cannot reach {NAME} ({status})"] if down else []
    )
    await asking.refused(client)
    assert len(proxy.requests) == (1 if down else 2)


@on_reactor
async def test_direct_and_proxied_host_have_separate_breakers(
    asking: Proxied, proxy: ForwardProxy, upstream: ScriptedRegistry, events: list[LogEvent]
) -> None:
    """What cannot be reached directly may be there behind a proxy, and the other way round."""
    breakers = CircuitBreakers(REACTOR)
    answers = []
    for proxies in (NO_PROXIES, through(proxy), NO_PROXIES, through(proxy)):
        client = asking.client(proxies, scheme="http", breakers=breakers)
        answers.append(await asking.refused(client) if proxies == NO_PROXIES else (await asking.get(client)).status)
    why = "host name cannot be resolved"
    assert answers == [f"{NAME}: {why}", 200, f"{NAME}: {NAME} could not be reached a moment ago: {why}", 200]
    assert texts(events, LogLevel.warn) == [f"{NAME} cannot be reached: {why}"]


@on_reactor
async def test_host_that_was_never_contacted_is_not_listed(asking: Proxied, proxy: ForwardProxy) -> None:
    """A connection to the proxy tells nothing of the host that the proxy refuses."""
    breakers = CircuitBreakers(REACTOR)
    for name in ("169.254.169.254", "127.0.0.1:22"):
        for proxies in (NO_PROXIES, through(proxy)):
            with pytest.raises(Denied):
                await asking.get(asking.client(proxies, name=name, scheme="https", breakers=breakers))
    assert breakers.links(lambda host, port: False) == ()
    proxy.refusal = b"HTTP/1.1 403 No\r\n\r\n"
    await asking.refused(asking.client(through(proxy), scheme="https", breakers=breakers))
    (link,) = breakers.links(lambda host, port: False)
    assert (link.host, link.up) == (f"proxy {proxy.url}", True)
    proxy.refusal = b""
    assert (await asking.get(asking.client(through(proxy), breakers=breakers))).status == 200
    assert (NAME, True) in [(link.host, link.up) for link in breakers.links(lambda host, port: False)]


@pytest.mark.parametrize("scheme", ["http", "https"])
@on_reactor
async def test_breaker_of_proxy_opens_when_it_refuses_connections(
    asking: Proxied, scheme: str, events: list[LogEvent]
) -> None:
    """It is told once, and neither is http tried."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        gone = Proxy("http", "127.0.0.1", server.getsockname()[1])
    client = asking.client(Proxies(gone, gone), scheme=scheme if scheme == "http" else None)
    why = "the connection was refused"
    assert await asking.refused(client) == f"{NAME}: proxy {gone}: {why}"
    assert await asking.refused(client) == f"{NAME}: proxy {gone} could not be reached a moment ago: {why}"
    assert texts(events, LogLevel.warn) == [f"proxy {gone} cannot be reached: {why}"]


@on_reactor
async def test_breaker_of_proxy_opens_when_its_name_is_not_resolved(asking: Proxied, events: list[LogEvent]) -> None:
    proxies = Proxies(None, Proxy("http", "proxy.example", 3128))
    why = "proxy http://proxy.example:3128: host name cannot be resolved"
    assert await asking.refused(asking.client(proxies)) == f"{NAME}: {why}"
    assert texts(events, LogLevel.warn) == [why.replace(":3128:", ":3128 cannot be reached:")]


@pytest.mark.parametrize("scheme", ["http", "https"])
@on_reactor
async def test_lack_of_descriptors_says_nothing_about_the_proxy(
    asking: Proxied, proxy: ForwardProxy, scheme: str, events: list[LogEvent]
) -> None:
    breakers = CircuitBreakers(REACTOR)
    client = asking.client(through(proxy), scheme=scheme, breakers=breakers)
    with without_free_descriptors(os.getpid()), pytest.raises(OutOfDescriptors) as refused:
        await asking.get(client)
    why = "this server has no file descriptor left for a connection"
    assert refused.value.message == f"{NAME}: {why}, through the proxy {proxy.url}"
    assert texts(events, LogLevel.warn) == []
    assert [link.host for link in breakers.links(lambda host, port: False) if not link.up] == []


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "its response is not that of an HTTP proxy"),
        (b"HTTP/1.1 2000 OK\r\n\r\n", "its response is not that of an HTTP proxy"),
        (b"x" * 70_000, "its response is not that of an HTTP proxy"),
        (b"HTTP/1.1 200 OK\r\n", "it closed the connection"),
    ],
)
@on_reactor
async def test_malformed_response_to_connect(
    asking: Proxied, proxy: ForwardProxy, sent: bytes, why: str, events: list[LogEvent]
) -> None:
    proxy.refusal = sent
    assert await asking.refused(asking.client(through(proxy))) == f"{NAME}: proxy {proxy.url}: {why}"
    assert texts(events, LogLevel.warn) == []


@on_reactor
async def test_cancelled_request_closes_connection_to_silent_proxy(asking: Proxied, events: list[LogEvent]) -> None:
    """It was connected to, so it may be the host that takes its time; a caller that goes leaves no connection."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        silent = Proxy("http", "127.0.0.1", server.getsockname()[1])
        client = asking.client(Proxies(silent, silent), scheme="https")
        asked = Deferred.fromCoroutine(asking.get(client))
        server.setblocking(False)
        connections: list[socket.socket] = []
        await until(lambda: connections or accepted(server, connections))
        asked.cancel()
        failed(asked, CancelledError)
        connections[0].setblocking(False)
        await until(lambda: ended(connections[0]))
        connections[0].close()
        assert texts(events, LogLevel.warn) == []
        with pytest.raises(Unavailable, match=f"no response in time, through the proxy {silent}"):
            await asking.get(client, RequestOptions(timeout=0.1))
        assert texts(events, LogLevel.warn) == [
            f"{NAME} cannot be reached: no response in time, through the proxy {silent}"
        ]


def accepted(server: socket.socket, connections: list[socket.socket]) -> bool:
    """Accepts a connection if there is one."""
    try:
        connections.append(server.accept()[0])
    except BlockingIOError:
        return False
    return True


def ended(connection: socket.socket) -> bool:
    """Whether the other side has ended a connection; what it sent is thrown away."""
    try:
        return connection.recv(65536) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
