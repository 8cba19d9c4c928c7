"""Connecting: forbidden addresses are refused, and the checked address is the one connected to."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet import error
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import DNSLookupError
from twisted.internet.interfaces import IProtocol
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.python.failure import Failure
from twisted.web.client import URI, Agent

from ociregistry.config.tls import UpstreamTls
from ociregistry.context import Wanted
from ociregistry.errors import Denied, Unavailable
from ociregistry.upstream.bandwidth import Bandwidth
from ociregistry.upstream.breaker import CircuitBreakers
from ociregistry.upstream.connect import Dialer, Resolver
from ociregistry.upstream.http import RequestOptions, Response
from ociregistry.upstream.origin import Origin
from ociregistry.upstream.tls import ContextCache, UpstreamPolicy
from tests.unit.support.common import failed
from tests.unit.support.http_agents import exchanges_over

Resolved = tuple[str, ...] | Exception | None


class Names(Resolver):
    """Return scripted addresses in order, the last for good: addresses, an error, or no answer (None)."""

    def __init__(self, *resolved: Resolved) -> None:
        self._resolved = list(resolved)
        self.asked: list[str] = []
        self.silence: Deferred[tuple[str, ...]] = Deferred()

    def addresses(self, host: str) -> Deferred[tuple[str, ...]]:
        """Return the next result, for any host."""
        self.asked.append(host)
        resolved = self._resolved.pop(0) if len(self._resolved) > 1 else self._resolved[0]
        if resolved is None:
            return self.silence
        return fail(resolved) if isinstance(resolved, Exception) else succeed(resolved)


class DialerHarness:
    """A dialer for reg.example, and its connections."""

    def __init__(self, *resolved: Resolved, named: tuple[tuple[str, int], ...] = ()) -> None:
        self.names = Names(*resolved)
        self.reactor = MemoryReactorClock()
        self.dialer = Dialer(
            "reg.example",
            self.names,
            lambda host, port: (host, port) in named,
            UpstreamPolicy(UpstreamTls(verify=False), ("", 0), ContextCache()),
            Bandwidth(None, (), self.reactor),
            self.reactor,
            CircuitBreakers(self.reactor),
        )

    def connect(self, url: str = "http://cdn.example/") -> Deferred[IProtocol]:
        """Connect to the host of a URL."""
        endpoint = self.dialer.endpointForURI(URI.fromBytes(url.encode()))
        return endpoint.connect(Factory.forProtocol(Protocol))

    def send(self, url: str = "http://cdn.example/") -> Deferred[Response]:
        """Send a request like the daemon."""
        agent = Agent.usingEndpointFactory(self.reactor, self.dialer)
        http = exchanges_over(agent, self.reactor)
        options = RequestOptions(wanted=Wanted(lambda error: None))
        return Deferred.fromCoroutine(http.send("GET", url, {}, options=options))

    @property
    def clients(self) -> list[Any]:
        """Return the arguments of all calls of connectTCP."""
        return list(self.reactor.tcpClients)

    @property
    def connected(self) -> list[tuple[str, int]]:
        """Return the addresses and ports connected to."""
        return [(client[0], client[1]) for client in self.clients]


def only_named(host: str, kind: str, address: str) -> str:
    """Return the error text for a forbidden address."""
    return (
        f"reg.example: {host} has the {kind} address {address}, and only what is named in the configuration may "
        "have such an address"
    )


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("127.0.0.1", "loopback"),
        ("::1", "loopback"),
        ("::ffff:169.254.169.254", "cloud metadata"),
        ("fe80::1", "link-local"),
        ("0.0.0.0", "unspecified"),
    ],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_forbidden_address_is_refused(address: str, kind: str, scheme: str) -> None:
    harness = DialerHarness((address,))
    denied = failed(harness.connect(f"{scheme}://cdn.example:8443/"), Denied)
    assert denied.message == only_named("cdn.example", kind, address)
    assert harness.connected == []


@pytest.mark.parametrize(
    "addresses", [("127.0.0.1", "8.8.8.8"), ("8.8.8.8", "127.0.0.1"), ("2606::1", "1.1.1.1", "::")]
)
def test_host_with_one_forbidden_address_is_refused(addresses: tuple[str, ...]) -> None:
    harness = DialerHarness(addresses)
    failed(harness.connect(), Denied)
    harness.reactor.advance(60)
    assert harness.connected == []


def test_request_to_forbidden_address_is_denied() -> None:
    """A connection error would be retried and not reach the client that chose the name."""
    harness = DialerHarness(("127.0.0.1",))
    assert failed(harness.send(), Denied).message == only_named("cdn.example", "loopback", "127.0.0.1")
    assert harness.reactor.getDelayedCalls() == []


@pytest.mark.parametrize(
    ("url", "address", "port"),
    [
        ("http://cdn.example/", "8.8.8.8", 80),
        ("https://cdn.example/", "8.8.8.8", 443),
        ("http://cdn.example:5000/", "10.1.2.3", 5000),
        ("https://cdn.example:8443/", "2606:4700:4700::1111", 8443),
        ("http://[fd00::1]:5000/", "fd00::1", 5000),
        ("http://192.168.0.1/", "192.168.0.1", 80),
    ],
)
def test_resolved_address_is_connected_to(url: str, address: str, port: int) -> None:
    harness = DialerHarness((address,))
    harness.connect(url)
    assert harness.connected == [(address, port)]
    # Resolvers take the host without brackets.
    assert harness.names.asked == [url.partition("//")[2].rstrip("/").removesuffix(f":{port}").strip("[]")]
    (client,) = harness.clients
    assert client[3] == 30


def test_tls_over_the_checked_connection() -> None:
    harness = DialerHarness(("8.8.8.8",))
    harness.connect("https://cdn.example/")
    assert isinstance(inner_factory(harness), TLSMemoryBIOFactory)
    plain = DialerHarness(("8.8.8.8",))
    plain.connect("http://cdn.example/")
    assert not isinstance(inner_factory(plain), TLSMemoryBIOFactory)


def inner_factory(harness: DialerHarness) -> Any:
    """Return the protocol factory inside the single endpoint wrapper."""
    return harness.clients[0][2]._wrappedFactory._factory


def test_checked_address_is_connected_to() -> None:
    """The name is not resolved a second time, which prevents DNS rebinding."""
    harness = DialerHarness(("8.8.8.8", "8.8.4.4"), ("127.0.0.1",))
    harness.connect()
    harness.clients[0][2].clientConnectionFailed(None, Failure(error.ConnectionRefusedError()))
    harness.reactor.advance(1)
    assert harness.connected == [("8.8.8.8", 80), ("8.8.4.4", 80)]
    assert harness.names.asked == ["cdn.example"]


def test_each_connection_is_checked() -> None:
    harness = DialerHarness(("8.8.8.8",), ("127.0.0.1",))
    harness.connect()
    failed(harness.connect(), Denied)
    assert harness.connected == [("8.8.8.8", 80)]


@pytest.mark.parametrize(
    ("url", "named", "address"),
    [
        ("http://localhost:5000/", ("localhost", 5000), "127.0.0.1"),
        ("https://reg.example/", ("reg.example", 443), "169.254.169.254"),
        ("http://[::1]:5000/", ("::1", 5000), "::1"),
    ],
)
def test_configured_host_may_have_any_address(url: str, named: tuple[str, int], address: str) -> None:
    harness = DialerHarness((address,), named=(named,))
    harness.connect(url)
    assert harness.connected == [(address, named[1])]


@pytest.mark.parametrize("url", ["http://localhost/", "http://localhost:5001/", "http://127.0.0.1:5000/"])
def test_configured_host_allows_no_other_port_or_name(url: str) -> None:
    harness = DialerHarness(("127.0.0.1",), named=(("localhost", 5000),))
    failed(harness.connect(url), Denied)
    assert harness.connected == []


@pytest.mark.parametrize("named", [(), (("cdn.example", 80),)])
def test_name_lookup_times_out_after_30_seconds(named: tuple[tuple[str, int], ...]) -> None:
    harness = DialerHarness(None, named=named)
    connecting = harness.connect()
    harness.reactor.advance(29.9)
    assert not connecting.called
    harness.reactor.advance(0.1)
    assert str(failed(connecting, DNSLookupError)) == "DNS lookup failed: no answer within 30 s."
    assert harness.connected == []
    assert harness.reactor.getDelayedCalls() == []


@pytest.mark.parametrize("resolved", [None, DNSLookupError("it has no address")])
def test_name_without_address(resolved: Resolved) -> None:
    harness = DialerHarness(resolved)
    sending = harness.send()
    harness.reactor.advance(30)
    assert failed(sending, Unavailable).message == "reg.example: host name cannot be resolved"
    assert harness.connected == []


def test_cancelled_connect_opens_nothing() -> None:
    harness = DialerHarness(None)
    connecting = harness.connect()
    connecting.cancel()
    connecting.addErrback(lambda _: None)
    assert connecting.called
    assert harness.reactor.getDelayedCalls() == []
    assert harness.connected == []


def test_breaker_hears_of_connections_and_bytes() -> None:
    """So that a slow host is not taken for a silent one; a name that is not resolved is told apart."""
    harness = DialerHarness(("8.8.8.8",))
    breakers = CircuitBreakers(harness.reactor)
    harness.dialer._breakers = breakers
    breaker = breakers.get(Origin("http", "cdn.example", 80))
    attempt = breaker.enter("reg.example")
    harness.connect()
    harness.reactor.advance(9)
    protocol = harness.clients[0][2].buildProtocol(IPv4Address("TCP", "8.8.8.8", 80))
    protocol.makeConnection(StringTransport())
    for _ in range(2):
        harness.reactor.advance(9)
        assert not breaker.is_open
        protocol.dataReceived(b"HTTP/1.1 ")
    harness.reactor.advance(10)
    assert breaker.is_open
    attempt.abandoned()
