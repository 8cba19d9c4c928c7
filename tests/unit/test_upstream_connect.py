"""Connecting: forbidden addresses are refused, and the checked address is the one connected to."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet import error
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import DNSLookupError
from twisted.internet.interfaces import IProtocol
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.testing import MemoryReactorClock
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.python.failure import Failure
from twisted.web.client import URI, Agent

from ociregistry.config.tls import UpstreamTls
from ociregistry.errors import Denied, Unavailable
from ociregistry.upstream.bandwidth import Bandwidth
from ociregistry.upstream.connect import Dialer, Resolver
from ociregistry.upstream.http import Response
from ociregistry.upstream.tls import ContextCache, UpstreamPolicy
from tests.unit.support.doubles import failed
from tests.unit.support.http_agents import exchanges_over

Told = tuple[str, ...] | Exception | None


class Names(Resolver):
    """Return scripted addresses in order, the last for good: addresses, an error, or no answer (None)."""

    def __init__(self, *told: Told) -> None:
        self._told = list(told)
        self.asked: list[str] = []
        self.silence: Deferred[tuple[str, ...]] = Deferred()

    def addresses(self, host: str) -> Deferred[tuple[str, ...]]:
        """Return the next result, for any host."""
        self.asked.append(host)
        told = self._told.pop(0) if len(self._told) > 1 else self._told[0]
        if told is None:
            return self.silence
        return fail(told) if isinstance(told, Exception) else succeed(told)


class Dialled:
    """A dialer for reg.example, and its connections."""

    def __init__(self, *told: Told, named: tuple[tuple[str, int], ...] = ()) -> None:
        self.names = Names(*told)
        self.reactor = MemoryReactorClock()
        self.dialer = Dialer(
            "reg.example",
            self.names,
            lambda host, port: (host, port) in named,
            UpstreamPolicy(UpstreamTls(verify=False), ("", 0), ContextCache()),
            Bandwidth(None, (), self.reactor),
            self.reactor,
        )

    def connect(self, url: str = "http://cdn.example/") -> Deferred[IProtocol]:
        """Connect to the host of a URL."""
        endpoint = self.dialer.endpointForURI(URI.fromBytes(url.encode()))
        return endpoint.connect(Factory.forProtocol(Protocol))

    def send(self, url: str = "http://cdn.example/") -> Deferred[Response]:
        """Send a request like the daemon."""
        agent = Agent.usingEndpointFactory(self.reactor, self.dialer)
        http = exchanges_over(agent, self.reactor)
        return Deferred.fromCoroutine(http.send("GET", url, {}))

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
    dialled = Dialled((address,))
    denied = failed(dialled.connect(f"{scheme}://cdn.example:8443/"), Denied)
    assert denied.message == only_named("cdn.example", kind, address)
    assert dialled.connected == []


@pytest.mark.parametrize(
    "addresses", [("127.0.0.1", "8.8.8.8"), ("8.8.8.8", "127.0.0.1"), ("2606::1", "1.1.1.1", "::")]
)
def test_host_with_one_forbidden_address_is_refused(addresses: tuple[str, ...]) -> None:
    dialled = Dialled(addresses)
    failed(dialled.connect(), Denied)
    dialled.reactor.advance(60)
    assert dialled.connected == []


def test_request_to_forbidden_address_is_denied() -> None:
    """A connection error would be retried and not reach the client that chose the name."""
    dialled = Dialled(("127.0.0.1",))
    assert failed(dialled.send(), Denied).message == only_named("cdn.example", "loopback", "127.0.0.1")
    assert dialled.reactor.getDelayedCalls() == []


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
    dialled = Dialled((address,))
    dialled.connect(url)
    assert dialled.connected == [(address, port)]
    # Resolvers take the host without brackets.
    assert dialled.names.asked == [url.partition("//")[2].rstrip("/").removesuffix(f":{port}").strip("[]")]
    (client,) = dialled.clients
    assert client[3] == 10


def test_tls_over_the_checked_connection() -> None:
    dialled = Dialled(("8.8.8.8",))
    dialled.connect("https://cdn.example/")
    assert isinstance(inner_factory(dialled), TLSMemoryBIOFactory)
    plain = Dialled(("8.8.8.8",))
    plain.connect("http://cdn.example/")
    assert not isinstance(inner_factory(plain), TLSMemoryBIOFactory)


def inner_factory(dialled: Dialled) -> Any:
    """Return the protocol factory inside the single endpoint wrapper."""
    return dialled.clients[0][2]._wrappedFactory


def test_checked_address_is_connected_to() -> None:
    """The name is not resolved a second time, which prevents DNS rebinding."""
    dialled = Dialled(("8.8.8.8", "8.8.4.4"), ("127.0.0.1",))
    dialled.connect()
    dialled.clients[0][2].clientConnectionFailed(None, Failure(error.ConnectionRefusedError()))
    dialled.reactor.advance(1)
    assert dialled.connected == [("8.8.8.8", 80), ("8.8.4.4", 80)]
    assert dialled.names.asked == ["cdn.example"]


def test_each_connection_is_checked() -> None:
    dialled = Dialled(("8.8.8.8",), ("127.0.0.1",))
    dialled.connect()
    failed(dialled.connect(), Denied)
    assert dialled.connected == [("8.8.8.8", 80)]


@pytest.mark.parametrize(
    ("url", "named", "address"),
    [
        ("http://localhost:5000/", ("localhost", 5000), "127.0.0.1"),
        ("https://reg.example/", ("reg.example", 443), "169.254.169.254"),
        ("http://[::1]:5000/", ("::1", 5000), "::1"),
    ],
)
def test_configured_host_may_have_any_address(url: str, named: tuple[str, int], address: str) -> None:
    dialled = Dialled((address,), named=(named,))
    dialled.connect(url)
    assert dialled.connected == [(address, named[1])]


@pytest.mark.parametrize("url", ["http://localhost/", "http://localhost:5001/", "http://127.0.0.1:5000/"])
def test_configured_host_allows_no_other_port_or_name(url: str) -> None:
    dialled = Dialled(("127.0.0.1",), named=(("localhost", 5000),))
    failed(dialled.connect(url), Denied)
    assert dialled.connected == []


@pytest.mark.parametrize("named", [(), (("cdn.example", 80),)])
def test_name_lookup_times_out_after_ten_seconds(named: tuple[tuple[str, int], ...]) -> None:
    dialled = Dialled(None, named=named)
    connecting = dialled.connect()
    dialled.reactor.advance(9.9)
    assert not connecting.called
    dialled.reactor.advance(0.1)
    assert str(failed(connecting, DNSLookupError)) == "DNS lookup failed: no answer within 10 s."
    assert dialled.connected == []
    assert dialled.reactor.getDelayedCalls() == []


@pytest.mark.parametrize("told", [None, DNSLookupError("it has no address")])
def test_name_without_address(told: Told) -> None:
    dialled = Dialled(told)
    sending = dialled.send()
    dialled.reactor.advance(10)
    assert failed(sending, Unavailable).message == "reg.example: host name cannot be resolved"
    assert dialled.connected == []


def test_cancelled_connect_opens_nothing() -> None:
    dialled = Dialled(None)
    connecting = dialled.connect()
    connecting.cancel()
    connecting.addErrback(lambda _: None)
    assert connecting.called
    assert dialled.reactor.getDelayedCalls() == []
    assert dialled.connected == []
