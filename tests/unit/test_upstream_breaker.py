"""Circuit breakers: an unreachable host is probed by one request at a time, with one log line per change."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import pytest
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.context import Priority
from ociregistry.upstream.breaker import Attempt, CircuitBreaker, CircuitBreakers, LinkDown
from ociregistry.upstream.origin import Origin
from tests.unit.support.common import texts

NAME = "reg.example:443"
UPSTREAM = "up.example"
DISTANCES = [1, 2, 4, 8, 16, 30, 30, 30]


@pytest.fixture
def breaker(clock: Clock) -> CircuitBreaker:
    """Return a circuit breaker with the longest intervals."""
    clock.advance(1000)
    return CircuitBreaker(NAME, clock, lambda: 1.0)


def refused(breaker: CircuitBreaker) -> LinkDown:
    """Return the error of a refused request."""
    with pytest.raises(LinkDown) as down:
        breaker.enter(UPSTREAM)
    return down.value


def take_down(breaker: CircuitBreaker) -> None:
    """Open the breaker by a failed request."""
    breaker.enter(UPSTREAM).failed("no route")


def test_breaker_is_closed_initially(breaker: CircuitBreaker, events: list[LogEvent]) -> None:
    attempts = [breaker.enter(UPSTREAM) for _ in range(3)]
    for attempt in attempts:
        attempt.answered()
    breaker.enter(UPSTREAM, Priority.URGENT).abandoned()
    breaker.enter(UPSTREAM)
    assert texts(events, LogLevel.warn) == []


def test_failure_opens_the_breaker(breaker: CircuitBreaker, events: list[LogEvent]) -> None:
    take_down(breaker)
    down = refused(breaker)
    assert down.message == f"{UPSTREAM}: {NAME} could not be reached a moment ago: no route"
    assert (down.status, down.headers()) == (503, {"Retry-After": "1"})
    refused(breaker)
    assert texts(events, LogLevel.warn) == [f"{NAME} cannot be reached: no route"]


@pytest.mark.parametrize(("jitter", "share"), [(0.0, 0.5), (0.5, 0.75), (1.0, 1.0)])
def test_probe_interval_doubles_up_to_30_seconds(
    clock: Clock, events: list[LogEvent], jitter: float, share: float
) -> None:
    breaker = CircuitBreaker(NAME, clock, lambda: jitter)
    attempt = breaker.enter(UPSTREAM)
    for distance in DISTANCES:
        attempt.failed("no route")
        assert refused(breaker).retry_after == ceil(distance * share)
        clock.advance(distance * share - 0.125)
        assert refused(breaker).retry_after == 1
        clock.advance(0.125)
        attempt = breaker.enter(UPSTREAM)
    assert len(texts(events, LogLevel.warn)) == 1


def test_default_jitter_is_random(clock: Clock) -> None:
    ends = set()
    for _ in range(10):
        breaker = CircuitBreaker(NAME, clock)
        take_down(breaker)
        ends.add(breaker._down_until)
    assert len(ends) > 1
    assert all(0.5 <= end <= 1 for end in ends)


def test_one_request_passes_as_probe(breaker: CircuitBreaker, clock: Clock) -> None:
    take_down(breaker)
    clock.advance(1)
    probe = breaker.enter(UPSTREAM)
    # Regardless of its duration.
    for _ in range(5):
        assert refused(breaker).retry_after == 1
        clock.advance(100)
    probe.answered()
    breaker.enter(UPSTREAM)
    breaker.enter(UPSTREAM)


def test_urgent_request_always_passes_as_probe(breaker: CircuitBreaker, clock: Clock) -> None:
    take_down(breaker)
    attempts = [breaker.enter(UPSTREAM, Priority.URGENT) for _ in range(3)]
    clock.advance(1)
    refused(breaker)
    attempts[0].failed("no route still")
    # The interval is doubled.
    clock.advance(1.875)
    assert "no route still" in refused(breaker).message
    clock.advance(0.125)
    breaker.enter(UPSTREAM)


def test_response_closes_the_breaker(breaker: CircuitBreaker, clock: Clock, events: list[LogEvent]) -> None:
    take_down(breaker)
    attempts = [breaker.enter(UPSTREAM, Priority.URGENT) for _ in range(2)]
    clock.advance(7)
    for attempt in attempts:
        attempt.answered()
    assert texts(events, LogLevel.warn)[1:] == [f"{NAME} can be reached again, after 7 s"]
    breaker.enter(UPSTREAM).answered()
    assert len(texts(events, LogLevel.warn)) == 2
    # The next outage starts with one second again.
    clock.advance(1)
    take_down(breaker)
    clock.advance(1)
    breaker.enter(UPSTREAM)
    assert len(texts(events, LogLevel.warn)) == 3


def test_simultaneous_failures_count_once(breaker: CircuitBreaker, clock: Clock, events: list[LogEvent]) -> None:
    attempts = [breaker.enter(UPSTREAM) for _ in range(20)]
    clock.advance(10)
    for attempt in attempts:
        clock.advance(0.03125)
        attempt.failed("too slow")
    assert len(texts(events, LogLevel.warn)) == 1
    clock.advance(0.375)
    # One second after the first failure.
    refused(breaker)
    clock.advance(0.03125)
    probe = breaker.enter(UPSTREAM)
    probe.failed("too slow")
    clock.advance(1.875)
    refused(breaker)
    clock.advance(0.125)
    breaker.enter(UPSTREAM)


def test_failure_of_an_older_request_is_ignored(
    breaker: CircuitBreaker, clock: Clock, events: list[LogEvent]
) -> None:
    take_down(breaker)
    late, good = breaker.enter(UPSTREAM, Priority.URGENT), breaker.enter(UPSTREAM, Priority.URGENT)
    clock.advance(5)
    good.answered()
    late.failed("too slow")
    breaker.failed(clock.seconds() - 10, "a body was silent for so long")
    breaker.enter(UPSTREAM)
    assert len(texts(events, LogLevel.warn)) == 2


@pytest.mark.parametrize("end", [Attempt.abandoned, lambda attempt: attempt.failed("no")])
def test_ended_probe_lets_the_next_one_pass(
    breaker: CircuitBreaker, clock: Clock, end: Callable[[Attempt], None]
) -> None:
    take_down(breaker)
    clock.advance(1)
    end(breaker.enter(UPSTREAM))
    clock.advance(2)
    breaker.enter(UPSTREAM)
    refused(breaker)


def test_abandoned_probe_changes_nothing(breaker: CircuitBreaker, clock: Clock, events: list[LogEvent]) -> None:
    take_down(breaker)
    clock.advance(1)
    breaker.enter(UPSTREAM).abandoned()
    breaker.enter(UPSTREAM).failed("no")
    clock.advance(1.875)
    refused(breaker)
    assert len(texts(events, LogLevel.warn)) == 1


@pytest.mark.parametrize("end", [Attempt.abandoned, lambda attempt: attempt.failed("no")])
def test_older_request_is_no_probe(breaker: CircuitBreaker, clock: Clock, end: Callable[[Attempt], None]) -> None:
    earlier = breaker.enter(UPSTREAM)
    clock.advance(10)
    breaker.failed(clock.seconds() - 10, "no")
    clock.advance(1)
    breaker.enter(UPSTREAM)
    end(earlier)
    refused(breaker)


def test_probe_of_an_earlier_outage_is_ignored(breaker: CircuitBreaker, clock: Clock) -> None:
    take_down(breaker)
    clock.advance(1)
    breaker.enter(UPSTREAM)
    breaker.enter(UPSTREAM, Priority.URGENT).answered()
    take_down(breaker)
    clock.advance(1)
    breaker.enter(UPSTREAM)
    refused(breaker)


def test_each_origin_has_its_own_breaker(clock: Clock) -> None:
    breakers = CircuitBreakers(clock)
    https, http = Origin("https", "reg.example", 443), Origin("http", "reg.example", 80)
    take_down(breakers.get(https))
    assert refused(breakers.get(https)).message.startswith(f"{UPSTREAM}: reg.example:443 ")
    for other in (http, Origin("https", "reg.example", 5000), Origin("https", "else.example", 443)):
        breakers.get(other).enter(UPSTREAM)


def test_most_recently_used_breakers_are_kept(clock: Clock) -> None:
    """Redirects may lead to any number of hosts."""
    breakers = CircuitBreakers(clock)
    first = Origin("https", "reg.example", 443)
    take_down(breakers.get(first))
    for number in range(5000):
        breakers.get(Origin("https", f"{number}.example", 443))
        refused(breakers.get(first))
    assert len(breakers._breakers) == 1000
    for number in range(1000):
        breakers.get(Origin("https", f"again.{number}.example", 443))
    breakers.get(first).enter(UPSTREAM)
