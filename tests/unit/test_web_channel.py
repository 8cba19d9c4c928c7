"""Client connections: deadlines, limits per address, and draining."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import LogEvent, LogLevel

from ociregistry.log import Seldom
from ociregistry.names import DOCKER_HUB, Upstream
from ociregistry.web.api import V2
from ociregistry.web.channel import MOST_CONNECTIONS, Channel, InFlight, host_and_port
from ociregistry.web.site import RegistrySite
from tests.unit.support.common import texts
from tests.unit.support.demands import NoDemand
from tests.unit.support.http_agents import INSTANCE
from tests.unit.support.web_clients import BLOB, DATA, QUICK, SLOW, Cache, Client, SizedData

WHOLE_REQUEST = 30
FIRST_REQUEST = 5
NOTHING_TAKEN = 60
KEPT_ALIVE = 120
"""Go clients keep an idle connection for 90 s, containerd may keep it longer."""


@pytest.fixture
def cache() -> Cache:
    """Return the cache behind the site."""
    return Cache()


@pytest.fixture
def site(cache: Any, clock: Clock) -> RegistrySite:
    """Return a site whose answer to `SLOW` the test delays."""
    v2 = V2(cache, cache, NoDemand(), Upstream(DOCKER_HUB), INSTANCE)
    return RegistrySite(v2, {}, 60, clock, lambda: True)


@pytest.fixture
def client(site: RegistrySite) -> Client:
    """Return a connection."""
    return Client(site)


def drip(client: Client, clock: Clock, seconds: int, byte: bytes = b"x") -> None:
    """Send one byte at the end of every second."""
    for _ in range(seconds):
        clock.advance(1)
        client.send(byte)


def test_slow_headers_are_aborted(client: Client, clock: Clock) -> None:
    client.send(b"GET /v2/ HTTP/1.1\r\nX-Slow: ")
    drip(client, clock, WHOLE_REQUEST - 1)
    assert not client.gone
    drip(client, clock, 1)
    assert client.transport.aborted
    assert client.statuses == []


def test_deadline_starts_with_the_first_byte(client: Client, clock: Clock) -> None:
    clock.advance(100)
    client.send(b"G")
    clock.advance(WHOLE_REQUEST - 1)
    assert not client.gone
    client.send(QUICK[1:])
    assert client.statuses == [b"200"]


@pytest.mark.parametrize("framing", [b"Content-Length: 1000", b"Transfer-Encoding: chunked"])
def test_slow_request_body_is_aborted(client: Client, clock: Clock, framing: bytes) -> None:
    """The body belongs to the request."""
    client.send(b"PUT /v2/x/blobs/uploads/1 HTTP/1.1\r\nHost: x\r\n" + framing + b"\r\n\r\n")
    client.send(b"3e7\r\n" if b"chunked" in framing else b"x")
    drip(client, clock, WHOLE_REQUEST - 1)
    assert not client.gone
    drip(client, clock, 1)
    assert client.transport.aborted
    assert client.statuses == []


def test_each_request_has_its_own_deadline(client: Client, clock: Clock) -> None:
    for number in range(1, 4):
        client.send(QUICK[:10])
        clock.advance(WHOLE_REQUEST - 1)
        client.send(QUICK[10:])
        assert client.statuses == [b"200"] * number
    client.send(QUICK[:10])
    clock.advance(WHOLE_REQUEST)
    assert client.transport.aborted


def test_response_time_is_unlimited(client: Client, cache: Cache, clock: Clock) -> None:
    client.send(SLOW)
    clock.pump([1] * 300)
    assert not client.gone
    cache.answer.callback(None)
    assert client.statuses == [b"404"]
    assert not client.gone


def test_pipelined_request_waits(client: Client, cache: Cache, clock: Clock) -> None:
    client.send(SLOW)
    client.send(QUICK)
    clock.advance(WHOLE_REQUEST * 2)
    assert client.statuses == []
    assert not client.gone
    cache.answer.callback(None)
    assert client.statuses == [b"404", b"200"]
    clock.advance(WHOLE_REQUEST * 2)
    assert not client.gone


def test_partial_pipelined_request_gets_its_deadline_later(client: Client, cache: Cache, clock: Clock) -> None:
    client.send(SLOW)
    client.send(QUICK[:10])
    clock.advance(WHOLE_REQUEST * 2)
    cache.answer.callback(None)
    clock.advance(WHOLE_REQUEST - 1)
    assert not client.gone
    clock.advance(1)
    assert client.transport.aborted
    assert client.statuses == [b"404"]


def test_partial_pipelined_request_behind_an_immediate_response(client: Client, clock: Clock) -> None:
    """In one segment: the idle timeout applies until its next byte."""
    client.send(QUICK + QUICK[:10])
    assert client.statuses == [b"200"]
    drip(client, clock, WHOLE_REQUEST, b"x")
    assert not client.gone
    drip(client, clock, 1)
    assert client.transport.aborted


def test_idle_connection_outlives_the_clients_timeout(client: Client, clock: Clock) -> None:
    for number in range(1, 4):
        client.send(QUICK)
        clock.pump([1] * KEPT_ALIVE)
        assert client.statuses == [b"200"] * number
        assert not client.gone
    clock.pump([1] * KEPT_ALIVE)
    assert client.gone


def test_silent_connection_is_closed(client: Client, clock: Clock) -> None:
    clock.pump([1] * KEPT_ALIVE)
    assert not client.gone
    clock.pump([1] * KEPT_ALIVE)
    assert client.transport.aborted


def test_stalled_reader_is_aborted_after_a_minute(client: Client, clock: Clock) -> None:
    client.transport.full = True
    client.send(BLOB)
    sent = len(client.transport.value())
    assert 0 < sent < len(DATA) / 2
    clock.pump([1] * (NOTHING_TAKEN - 1))
    assert not client.gone
    clock.advance(1)
    assert client.transport.aborted
    assert len(client.transport.value()) == sent


def test_stalled_reader_of_a_truncated_response_is_aborted(client: Client, cache: Cache, clock: Clock) -> None:
    """The FIN waits behind data that the client does not read."""
    cache.data = SizedData(DATA[:1000])
    client.send(BLOB)
    assert client.transport.disconnecting
    assert not client.transport.aborted
    clock.pump([1] * (NOTHING_TAKEN - 1))
    assert not client.transport.aborted
    clock.pump([1] * NOTHING_TAKEN)
    assert client.transport.aborted


@pytest.mark.parametrize(
    "data",
    [QUICK, QUICK[:10], SLOW, SLOW + QUICK, BLOB, b"\x16\x03\x01", b"no request\r\n\r\n", b"x" * 20_000, b""],
    ids=["quick", "half", "slow", "pipelined", "blob", "hello", "malformed", "long", "nothing"],
)
def test_no_delayed_call_is_left_behind(client: Client, clock: Clock, data: bytes) -> None:
    if data:
        client.send(data)
    client.channel.connectionLost()
    assert clock.getDelayedCalls() == []


@pytest.mark.parametrize("hello", [b"\x16", b"\x16\x03\x01\x02\x00\x01"])
def test_tls_hello_is_answered_immediately(client: Client, hello: bytes) -> None:
    client.send(hello)
    head, _, body = client.transport.value().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert f"Content-Length: {len(body)}".encode() in head
    assert client.transport.disconnecting
    assert not client.transport.aborted, "what it is told must get through"


def test_data_after_a_tls_hello_is_ignored(client: Client) -> None:
    client.channel.dataReceived(b"\x16")
    response = client.transport.value()
    client.channel.dataReceived(QUICK)
    assert client.transport.value() == response


def test_tls_hello_is_logged_once_a_minute(site: RegistrySite, clock: Clock, events: list[LogEvent]) -> None:
    """A client that tries TLS first may send one for each connection."""

    def hello(host: str) -> None:
        Client(site, IPv4Address("TCP", host, 40000)).send(b"\x16\x03\x01")

    for host in ("10.0.0.7", "10.0.0.7", "10.0.0.8"):
        hello(host)
        clock.advance(20)
    hello("10.0.0.9")
    line = (
        "{}: the client speaks TLS, and this port is plain HTTP: unless it goes on without TLS, "
        "write http:// in its hosts.toml, or set tls"
    )
    assert texts(events, LogLevel.warn) == [line.format(host) for host in ("10.0.0.7", "10.0.0.9")]


def test_tls_hello_counts_only_at_the_start(client: Client) -> None:
    """Later, the same byte is data."""
    client.send(b"PUT /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n")
    client.send(b"\x16\x03\x01")
    assert client.statuses == [b"405"]
    assert not client.gone


def test_connections_per_address_are_limited(site: RegistrySite) -> None:
    clients = [Client(site) for _ in range(MOST_CONNECTIONS)]
    assert not any(client.gone for client in clients)
    # Refused connections count until they are closed.
    for _ in range(3):
        refused = Client(site)
        assert refused.transport.aborted
        refused.channel.connectionLost()
    other = Client(site, IPv4Address("TCP", "10.0.0.8", 40000))
    local = Client(site, UNIXAddress(b"/run/socket"))
    assert not other.gone
    assert not local.gone
    clients.pop().channel.connectionLost()
    assert not Client(site).gone
    assert Client(site).transport.aborted


def test_address_is_forgotten_with_its_last_connection(clock: Clock) -> None:
    addresses: Counter[str] = Counter()
    channels = [Channel(clock, addresses, InFlight(), Seldom(clock)) for _ in range(3)]
    for channel in channels:
        channel.callLater = clock.callLater  # type: ignore[method-assign, assignment]  # as the site does
        channel.makeConnection(StringTransport(peerAddress=IPv4Address("TCP", "10.0.0.7", 40000)))
    assert addresses == {"10.0.0.7": 3}
    for channel in channels:
        channel.connectionLost()
    assert dict(addresses) == {}


def test_new_connection_counts_as_in_flight(site: RegistrySite, cache: Cache, client: Client, clock: Clock) -> None:
    """A daemon that stops waits for it, as for a request in flight."""
    idle = site.in_flight.idle()
    clock.advance(FIRST_REQUEST - 1)
    client.send(SLOW)
    clock.advance(FIRST_REQUEST)
    assert not idle.called
    cache.answer.callback(None)
    assert client.statuses == [b"404"]
    assert idle.called


def test_idle_connection_does_not_count_as_in_flight(site: RegistrySite, client: Client) -> None:
    client.send(QUICK)
    assert client.statuses == [b"200"]
    assert site.in_flight.idle().called


def test_silent_new_connection_counts_only_briefly(site: RegistrySite, client: Client, clock: Clock) -> None:
    idle = site.in_flight.idle()
    clock.advance(FIRST_REQUEST - 1)
    assert not idle.called
    clock.advance(1)
    assert idle.called
    client.send(QUICK)
    assert client.statuses == [b"200"]


def test_closed_connection_does_not_count(site: RegistrySite, client: Client, clock: Clock) -> None:
    client.channel.connectionLost()
    assert site.in_flight.idle().called
    assert clock.getDelayedCalls() == []


def test_half_closed_client_gets_its_responses(client: Client, cache: Cache) -> None:
    client.send(SLOW + QUICK)
    client.channel.readConnectionLost()
    assert not client.gone
    cache.answer.callback(None)
    assert client.statuses == [b"404", b"200"]
    assert client.gone


@pytest.mark.parametrize("sent", [b"", QUICK[:10], QUICK, QUICK + QUICK[:10]])
def test_half_closed_client_without_a_request_in_flight_is_disconnected(client: Client, sent: bytes) -> None:
    client.send(sent)
    client.channel.readConnectionLost()
    assert client.gone


def test_idle_connection_is_kept_while_its_client_takes_the_rest(
    client: Client, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of a response may wait in the kernel longer than an idle connection is kept."""
    unacknowledged = 1_000_000
    monkeypatch.setattr(Channel, "unacknowledged", property(lambda _: unacknowledged))
    client.send(QUICK)
    for _ in range(10):
        clock.pump([1] * KEPT_ALIVE)
        unacknowledged -= 1
    assert not client.gone
    clock.pump([1] * 3 * KEPT_ALIVE)
    assert client.gone
    assert client.statuses == [b"200"]


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        (IPv4Address("TCP", "192.0.2.1", 80), "192.0.2.1:80"),
        (IPv6Address("TCP", "::ffff:192.0.2.1", 80), "192.0.2.1:80"),
        (IPv6Address("TCP", "::ffff:0:0", 80), "[::ffff:0:0]:80"),
        (IPv6Address("TCP", "2001:db8::1", 80), "[2001:db8::1]:80"),
        (IPv6Address("TCP", "fe80::1%eth0", 80), "[fe80::1%eth0]:80"),
        (IPv6Address("TCP", "::", 80), "[::]:80"),
    ],
)
def test_addresses_in_messages(address: IPv4Address | IPv6Address, shown: str) -> None:
    assert host_and_port(address) == shown
