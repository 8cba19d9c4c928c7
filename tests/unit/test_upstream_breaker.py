"""Links: a host that cannot be reached is asked seldom, by one request at a time, and each change is one line."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import pytest
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.context import Priority
from ociregistry.upstream.breaker import Attempt, CircuitBreaker, CircuitBreakers, LinkDown
from ociregistry.upstream.origin import Origin
from tests.unit.support.doubles import texts

NAME = "reg.example:443"
WHO = "up.example"
DISTANCES = [1, 2, 4, 8, 16, 30, 30, 30]


@pytest.fixture
def breaker(clock: Clock) -> CircuitBreaker:
    """A link whose distances are as long as they may be."""
    clock.advance(1000)
    return CircuitBreaker(NAME, clock, lambda: 1.0)


def refused(breaker: CircuitBreaker) -> LinkDown:
    """How a request is refused."""
    with pytest.raises(LinkDown) as down:
        breaker.enter(WHO)
    return down.value


def take_down(breaker: CircuitBreaker) -> None:
    """A request fails."""
    breaker.enter(WHO).failed("no route")


def test_a_link_is_up_at_first(breaker: CircuitBreaker, events: list[LogEvent]) -> None:
    attempts = [breaker.enter(WHO) for _ in range(3)]
    for attempt in attempts:
        attempt.answered()
    breaker.enter(WHO, Priority.URGENT).abandoned()
    breaker.enter(WHO)
    assert texts(events, LogLevel.warn) == []


def test_a_failure_takes_it_down(breaker: CircuitBreaker, events: list[LogEvent]) -> None:
    take_down(breaker)
    down = refused(breaker)
    assert down.message == f"{WHO}: {NAME} could not be reached a moment ago: no route"
    assert (down.status, down.headers()) == (503, {"Retry-After": "1"})
    refused(breaker)
    assert texts(events, LogLevel.warn) == [f"{NAME} cannot be reached: no route"]


@pytest.mark.parametrize(("jitter", "share"), [(0.0, 0.5), (0.5, 0.75), (1.0, 1.0)])
def test_the_distance_of_probes_doubles_up_to_half_a_minute(
    clock: Clock, events: list[LogEvent], jitter: float, share: float
) -> None:
    breaker = CircuitBreaker(NAME, clock, lambda: jitter)
    attempt = breaker.enter(WHO)
    for distance in DISTANCES:
        attempt.failed("no route")
        assert refused(breaker).retry_after == ceil(distance * share)
        clock.advance(distance * share - 0.125)
        assert refused(breaker).retry_after == 1
        clock.advance(0.125)
        attempt = breaker.enter(WHO)
    assert len(texts(events, LogLevel.warn)) == 1


def test_jitter_is_random_where_nobody_says_otherwise(clock: Clock) -> None:
    ends = set()
    for _ in range(10):
        breaker = CircuitBreaker(NAME, clock)
        take_down(breaker)
        ends.add(breaker._down_until)
    assert len(ends) > 1
    assert all(0.5 <= end <= 1 for end in ends)


def test_one_request_passes_as_the_probe(breaker: CircuitBreaker, clock: Clock) -> None:
    take_down(breaker)
    clock.advance(1)
    probe = breaker.enter(WHO)
    # However long it takes.
    for _ in range(5):
        assert refused(breaker).retry_after == 1
        clock.advance(100)
    probe.answered()
    breaker.enter(WHO)
    breaker.enter(WHO)


def test_an_urgent_request_always_passes_and_is_a_probe(breaker: CircuitBreaker, clock: Clock) -> None:
    take_down(breaker)
    attempts = [breaker.enter(WHO, Priority.URGENT) for _ in range(3)]
    clock.advance(1)
    refused(breaker)
    attempts[0].failed("no route still")
    # The next after twice the time.
    clock.advance(1.875)
    assert "no route still" in refused(breaker).message
    clock.advance(0.125)
    breaker.enter(WHO)


def test_an_answer_brings_it_up_again(breaker: CircuitBreaker, clock: Clock, events: list[LogEvent]) -> None:
    take_down(breaker)
    attempts = [breaker.enter(WHO, Priority.URGENT) for _ in range(2)]
    clock.advance(7)
    for attempt in attempts:
        attempt.answered()
    assert texts(events, LogLevel.warn)[1:] == [f"{NAME} can be reached again, after 7 s"]
    breaker.enter(WHO).answered()
    assert len(texts(events, LogLevel.warn)) == 2
    # Next time it begins with a second again.
    clock.advance(1)
    take_down(breaker)
    clock.advance(1)
    breaker.enter(WHO)
    assert len(texts(events, LogLevel.warn)) == 3


def test_what_failed_at_once_is_one_failure(breaker: CircuitBreaker, clock: Clock, events: list[LogEvent]) -> None:
    attempts = [breaker.enter(WHO) for _ in range(20)]
    clock.advance(10)
    for attempt in attempts:
        clock.advance(0.03125)
        attempt.failed("too slow")
    assert len(texts(events, LogLevel.warn)) == 1
    clock.advance(0.375)
    # A second after the first of them.
    refused(breaker)
    clock.advance(0.03125)
    probe = breaker.enter(WHO)
    probe.failed("too slow")
    clock.advance(1.875)
    refused(breaker)
    clock.advance(0.125)
    breaker.enter(WHO)


def test_a_failure_of_a_request_from_before_it_came_up_does_not_count(
    breaker: CircuitBreaker, clock: Clock, events: list[LogEvent]
) -> None:
    take_down(breaker)
    late, good = breaker.enter(WHO, Priority.URGENT), breaker.enter(WHO, Priority.URGENT)
    clock.advance(5)
    good.answered()
    late.failed("too slow")
    breaker.failed(clock.seconds() - 10, "a body was silent for so long")
    breaker.enter(WHO)
    assert len(texts(events, LogLevel.warn)) == 2


@pytest.mark.parametrize("end", [Attempt.abandoned, lambda attempt: attempt.failed("no")])
def test_a_probe_that_ends_lets_the_next_one_through(
    breaker: CircuitBreaker, clock: Clock, end: Callable[[Attempt], None]
) -> None:
    take_down(breaker)
    clock.advance(1)
    end(breaker.enter(WHO))
    clock.advance(2)
    breaker.enter(WHO)
    refused(breaker)


def test_a_probe_that_tells_nothing_changes_nothing(
    breaker: CircuitBreaker, clock: Clock, events: list[LogEvent]
) -> None:
    take_down(breaker)
    clock.advance(1)
    breaker.enter(WHO).abandoned()
    breaker.enter(WHO).failed("no")
    clock.advance(1.875)
    refused(breaker)
    assert len(texts(events, LogLevel.warn)) == 1


@pytest.mark.parametrize("end", [Attempt.abandoned, lambda attempt: attempt.failed("no")])
def test_a_request_from_before_is_no_probe_that_ends(
    breaker: CircuitBreaker, clock: Clock, end: Callable[[Attempt], None]
) -> None:
    earlier = breaker.enter(WHO)
    clock.advance(10)
    breaker.failed(clock.seconds() - 10, "no")
    clock.advance(1)
    breaker.enter(WHO)
    end(earlier)
    refused(breaker)


def test_nor_is_the_probe_of_an_outage_that_is_over(breaker: CircuitBreaker, clock: Clock) -> None:
    take_down(breaker)
    clock.advance(1)
    breaker.enter(WHO)
    breaker.enter(WHO, Priority.URGENT).answered()
    take_down(breaker)
    clock.advance(1)
    breaker.enter(WHO)
    refused(breaker)


def test_every_origin_has_its_own(clock: Clock) -> None:
    breakers = CircuitBreakers(clock)
    https, http = Origin("https", "reg.example", 443), Origin("http", "reg.example", 80)
    take_down(breakers.get(https))
    assert refused(breakers.get(https)).message.startswith(f"{WHO}: reg.example:443 ")
    for other in (http, Origin("https", "reg.example", 5000), Origin("https", "else.example", 443)):
        breakers.get(other).enter(WHO)


def test_those_that_were_used_last_are_kept(clock: Clock) -> None:
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
    breakers.get(first).enter(WHO)
