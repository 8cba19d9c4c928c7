"""Waiting for upstreams: a client is answered when the link is down, and the request goes on for the next one."""

from __future__ import annotations

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ociregistry.context import FROM_CLIENT, Context, Priority, Via
from ociregistry.errors import LoopDetected
from ociregistry.pullthrough.waiting import DeadlineExceeded, SharedRequests, deadline, unless_loop
from ociregistry.upstream.breaker import CircuitBreaker, LinkDown
from tests.unit.support.common import failed, fired

PATIENT = Context(patient=True)
CHAIN = Via(("ociregistry-0123456789abcdef",))
LOOP = LoopDetected("reg.example: a loop", "1.1 ociregistry-0123456789abcdef")


class Upstream:
    """An upstream behind a circuit breaker, and the requests for one piece of content."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.breaker = CircuitBreaker("reg.example:443", clock, lambda: 1.0)
        self.requests: SharedRequests[str, str] = SharedRequests(clock)
        self.sent: list[Deferred[str]] = []

    def ask(self, context: Context = FROM_CLIENT) -> Deferred[str]:
        """Return what a client gets."""
        return Deferred.fromCoroutine(self.requests.wait("content", self._start, context))

    async def _start(self, context: Context) -> str:
        attempt = self.breaker.enter("reg.example", context.priority)
        assert context.wanted is not None
        attempt.link_down = context.wanted.link_down
        if attempt.down is not None:
            context.wanted.link_down(attempt.down)
        self.sent.append(Deferred())
        answer = await self.sent[-1]
        attempt.answered()
        return answer


@pytest.fixture
def upstream(clock: Clock) -> Upstream:
    """Return an upstream that does not answer yet."""
    return Upstream(clock)


def test_all_clients_are_answered_when_the_link_goes_down(upstream: Upstream, clock: Clock) -> None:
    """The late response is what later clients get; those that come before it get the error at once."""
    clients = [upstream.ask() for _ in range(3)]
    clock.advance(10)
    for client in clients:
        failed(client, LinkDown)
    assert failed(upstream.ask(), LinkDown).retry_after == 2
    clock.advance(5)
    upstream.sent[0].callback("late")
    assert len(upstream.sent) == 1
    again = upstream.ask()
    upstream.sent[1].callback("again")
    assert fired(again) == "again"
    assert clock.getDelayedCalls() == []


def test_request_in_flight_is_joined_once_the_link_is_back(upstream: Upstream, clock: Clock) -> None:
    failed_first = upstream.ask()
    clock.advance(10)
    failed(failed_first, LinkDown)
    upstream.breaker.answered()
    client = upstream.ask()
    upstream.sent[0].callback("late")
    assert fired(client) == "late"


def test_command_waits_as_long_as_the_request_lives(upstream: Upstream, clock: Clock) -> None:
    commands = [upstream.ask(PATIENT)]
    clock.advance(10)
    commands.append(upstream.ask(PATIENT))
    clock.advance(10)
    upstream.sent[0].callback("late")
    assert [fired(one) for one in commands] == ["late"] * 2


def test_command_fails_at_once_while_the_link_is_known_to_be_down(upstream: Upstream) -> None:
    upstream.breaker.enter("reg.example").failed("no route")
    failed(upstream.ask(PATIENT), LinkDown)


def test_client_does_not_wait_for_a_probe_that_takes_long(upstream: Upstream, clock: Clock) -> None:
    """It waits for 1.5 s at most, and gets what the probe brings in that time."""
    upstream.breaker.enter("reg.example").failed("no route")
    clock.advance(1)
    probe = upstream.ask(Context(priority=Priority.METADATA, patient=True))
    clients = [upstream.ask() for _ in range(2)]
    clock.advance(1.5)
    for client in clients:
        failed(client, LinkDown)
    failed(upstream.ask(), LinkDown)
    upstream.sent[0].callback("brought")
    assert fired(probe) == "brought"


def test_client_is_served_when_a_young_probe_succeeds(upstream: Upstream, clock: Clock) -> None:
    upstream.breaker.enter("reg.example").failed("no route")
    clock.advance(1)
    probe = upstream.breaker.enter("reg.example", Priority.METADATA)
    client = upstream.ask()
    clock.advance(1)
    assert not client.called
    probe.answered()
    upstream.sent[0].callback("content")
    assert fired(client) == "content"


@pytest.mark.parametrize(("hops", "seconds"), [(0, 25), (1, 8), (2, 6), (3, 4), (4, 2), (9, 2)])
def test_inner_cache_of_a_chain_answers_first(clock: Clock, hops: int, seconds: float) -> None:
    context = Context(Via(CHAIN.instances * hops))
    assert deadline(context) == seconds
    upstream = Upstream(clock)
    client = upstream.ask(context)
    while seconds > 5:
        # Bytes come all the time, but no response.
        clock.advance(5)
        upstream.breaker.heard()
        seconds -= 5
    clock.advance(seconds)
    failed(client, DeadlineExceeded)
    upstream.sent[0].callback("late")


def test_loop_is_told_at_once() -> None:
    waiting: Deferred[str] = Deferred()
    looking: Deferred[LoopDetected | None] = Deferred()

    async def look() -> LoopDetected | None:
        return await looking

    result = Deferred.fromCoroutine(unless_loop(waiting, look, Clock()))
    looking.callback(LOOP)
    failed(result, LoopDetected)


def test_result_ends_the_search_for_a_loop() -> None:
    for found in (True, False):
        waiting: Deferred[str] = Deferred()
        looking: Deferred[LoopDetected | None] = Deferred()

        async def look(looking: Deferred[LoopDetected | None] = looking) -> LoopDetected | None:
            return await looking

        result = Deferred.fromCoroutine(unless_loop(waiting, look, Clock()))
        if found:
            looking.callback(None)
        waiting.callback("content")
        assert fired(result) == "content"
        assert looking.called
