"""Bandwidth limits on real connections: small bodies pass, large ones are delayed, receive buffers are set."""

from __future__ import annotations

import socket
from datetime import time
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.web.client import URI, Agent

import ociregistry.upstream.bandwidth
from ociregistry.config.file import Window
from ociregistry.upstream.bandwidth import Bandwidth
from ociregistry.upstream.breaker import CircuitBreakers
from ociregistry.upstream.connect import Dialer, Resolver
from ociregistry.upstream.http import HttpClient
from ociregistry.upstream.tls import ContextCache, UpstreamPolicy
from tests.unit.support.common import REACTOR, on_reactor, until
from tests.unit.support.wire import trusting
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Hold, NoLength, Reply

KIB = 1024
MIB = 1024 * KIB
RATE = 64 * KIB


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count no packet headers, so that figures are round."""
    monkeypatch.setattr(ociregistry.upstream.bandwidth, "_PAYLOAD_FRACTION", 1.0)


class Counted(Bandwidth):
    """A budget that never refills: one second for every 64 KiB."""

    def __init__(self) -> None:
        super().__init__(float(RATE), (), Clock())
        self.drawn = 0
        self.waits: list[float] = []

    def consume(self, count: int) -> float:
        self.drawn += count
        self.waits.append(super().consume(count))
        return self.waits[-1]


def sending(bandwidth: Bandwidth, clock: Clock) -> HttpClient:
    """Return an HTTP client with a limit."""
    return HttpClient("reg.example", Agent(REACTOR), CircuitBreakers(clock), bandwidth, lambda: None, clock)


@pytest.mark.parametrize("size", [1, 64 * KIB])
@on_reactor
async def test_small_body_is_charged_but_not_delayed(upstream: ScriptedRegistry, clock: Clock, size: int) -> None:
    upstream.script("*", Reply(200, bytes(size)))
    bandwidth = Counted()
    bandwidth.consume(100 * RATE)
    response = await sending(bandwidth, clock).send("GET", upstream.url, {})
    assert await response.collect(size) == bytes(size)
    assert bandwidth.drawn == 100 * RATE + size
    assert bandwidth.consume(0) >= 100 + size / RATE


@pytest.mark.parametrize("has_length", [True, False])
@on_reactor
async def test_large_or_unsized_body_is_delayed(upstream: ScriptedRegistry, clock: Clock, has_length: bool) -> None:
    data = bytes(64 * KIB + 1)
    upstream.script("*", Reply(200, data))
    if not has_length:
        upstream.script("*", NoLength("chunked"))
    bandwidth = Counted()
    response = await sending(bandwidth, clock).send("GET", upstream.url, {})
    collected = Deferred.fromCoroutine(response.collect(len(data)))
    await until(lambda: bandwidth.drawn)
    assert response.body._paused
    while not collected.called:
        drawn = bandwidth.drawn
        clock.advance(max(0.0, bandwidth.waits[-1]))
        await until(lambda drawn=drawn: bandwidth.drawn > drawn or collected.called)  # type: ignore[misc]  # of this iteration
    assert await collected == data
    # For an unknown size, plus what the receive buffer may hold.
    assert bandwidth.drawn == len(data) if has_length else bandwidth.drawn >= len(data)
    assert bandwidth._shares == set()
    assert clock.getDelayedCalls() == []


def received(connection: Any) -> int:
    """Return the receive buffer size in bytes; Linux doubles it for its own use."""
    return int(connection.getHandle().getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)) // 2


@pytest.mark.parametrize("rate", [None, 1000.0, 1e9])
@on_reactor
async def test_receive_buffer_is_small_under_a_limit(upstream: ScriptedRegistry, rate: float | None) -> None:
    resolver = Resolver(REACTOR)
    resolver.start()
    policy = UpstreamPolicy(trusting(None), ("", 0), ContextCache())
    bandwidth = Bandwidth(rate, (), REACTOR)
    breakers = CircuitBreakers(REACTOR)
    dialer = Dialer("reg.example", resolver, lambda host, port: True, policy, bandwidth, REACTOR, breakers)
    endpoint = dialer.endpointForURI(URI.fromBytes(upstream.url.encode()))
    connection: Any = await endpoint.connect(Factory.forProtocol(Protocol))
    size = received(connection.transport)
    assert size == 16 * KIB if rate else size > 60_000
    connection.transport.abortConnection()
    resolver.stop()


@on_reactor
async def test_large_body_gets_its_share_of_receive_buffers(upstream: ScriptedRegistry, clock: Clock) -> None:
    upstream.script("*", Reply(200, bytes(MIB)))
    http = sending(Bandwidth(250_000.0, (), clock), clock)
    bodies = []
    for buffer in (75_000, 37_500):
        bodies.append((await http.send("GET", upstream.url, {})).body)
        for body in bodies:
            connection: Any = body.transport
            assert received(connection._producer) == buffer
    for body in bodies:
        body.abort()
        await body.ended
    assert clock.getDelayedCalls() == []


@pytest.mark.parametrize("how", ["use", "window"])
@on_reactor
async def test_new_limit_applies_to_bodies_in_progress(upstream: ScriptedRegistry, clock: Clock, how: str) -> None:
    upstream.script("*", Reply(200, bytes(MIB)))
    hold = Hold(1000)
    upstream.script("*", hold)
    now = time(7)
    bandwidth = Bandwidth(None, (Window(time(8), time(18), 1000.0),), clock, lambda: now)
    response = await sending(bandwidth, clock).send("GET", upstream.url, {})
    await until(lambda: response.body._buffered == 1000)
    if how == "use":
        bandwidth.reconfigure(1000.0, ())
    else:
        now = time(8)
    hold.release.set()
    await until(lambda: response.body._buffered > 1000 or response.body._paused)
    throttled = response.body._paused and response.body._throttle is not None
    response.body.abort()
    await response.body.ended
    assert throttled
