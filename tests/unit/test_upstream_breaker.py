"""Circuit breakers: a lost or silent host is probed by one request at a time, with one log line per change."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.context import Priority
from ociregistry.upstream.breaker import Attempt, CircuitBreaker, CircuitBreakers, LinkDown
from ociregistry.upstream.origin import Origin
from tests.unit.support.common import failed, fired, texts

NAME = "reg.example:443"
UPSTREAM = "up.example"
DISTANCES = [1, 2, 4, 8, 16, 30, 30, 30]


@pytest.fixture
def breaker(clock: Clock) -> CircuitBreaker:
    """Return a circuit breaker with the longest intervals."""
    clock.advance(1000)
    return CircuitBreaker(NAME, clock, lambda: 1.0)


def refused(breaker: CircuitBreaker, priority: Priority = Priority.BACKGROUND) -> LinkDown:
    """Return the error of a refused request."""
    with pytest.raises(LinkDown) as down:
        breaker.enter(UPSTREAM, priority)
    return down.value


def probe(breaker: CircuitBreaker) -> Attempt:
    """Register a request that passes as a probe."""
    return breaker.enter(UPSTREAM, Priority.BACKGROUND)


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
    assert (down.status, down.headers()) == (503, {"Retry-After": "2"})
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
        # A little more than the time of the next probe, which is answered then.
        assert refused(breaker).retry_after == ceil(distance * share + 0.5)
        clock.advance(distance * share - 0.125)
        assert refused(breaker).retry_after == 1
        clock.advance(0.125)
        refused(breaker, Priority.CLIENT)
        attempt = probe(breaker)
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
    attempt = probe(breaker)
    # Regardless of its duration.
    for _ in range(5):
        refused(breaker)
        clock.advance(100)
    attempt.answered()
    breaker.enter(UPSTREAM)
    breaker.enter(UPSTREAM)


def test_urgent_request_always_passes_as_probe(breaker: CircuitBreaker, clock: Clock) -> None:
    take_down(breaker)
    attempts = [breaker.enter(UPSTREAM, Priority.URGENT) for _ in range(3)]
    clock.advance(1)
    refused(breaker)
    attempts[0].failed("no route still")
    # The interval is doubled, and begins with the probe.
    clock.advance(0.875)
    assert "no route still" in refused(breaker).message
    clock.advance(0.125)
    probe(breaker)


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
    probe(breaker)
    assert len(texts(events, LogLevel.warn)) == 3


def test_simultaneous_failures_count_once(breaker: CircuitBreaker, clock: Clock, events: list[LogEvent]) -> None:
    attempts = [breaker.enter(UPSTREAM) for _ in range(20)]
    clock.advance(5)
    for attempt in attempts:
        clock.advance(0.03125)
        attempt.failed("too slow")
    assert len(texts(events, LogLevel.warn)) == 1
    clock.advance(0.375)
    # One second after the first failure.
    refused(breaker)
    clock.advance(0.03125)
    probe(breaker).failed("too slow")
    clock.advance(1.875)
    refused(breaker)
    clock.advance(0.125)
    probe(breaker)


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
    end(probe(breaker))
    clock.advance(2)
    probe(breaker)
    refused(breaker)


def test_abandoned_probe_is_no_failure(breaker: CircuitBreaker, clock: Clock, events: list[LogEvent]) -> None:
    """The next one is due after the interval, which is not lengthened."""
    take_down(breaker)
    clock.advance(1)
    for _ in range(2):
        probe(breaker).abandoned()
        clock.advance(1.875)
        refused(breaker)
        clock.advance(0.125)
    assert len(texts(events, LogLevel.warn)) == 1


@pytest.mark.parametrize("end", [Attempt.abandoned, lambda attempt: attempt.failed("no")])
def test_older_request_is_no_probe(breaker: CircuitBreaker, clock: Clock, end: Callable[[Attempt], None]) -> None:
    earlier = breaker.enter(UPSTREAM)
    clock.advance(5)
    breaker.failed(clock.seconds() - 5, "no")
    clock.advance(1)
    probe(breaker)
    end(earlier)
    refused(breaker)


def test_probe_of_an_earlier_outage_is_ignored(breaker: CircuitBreaker, clock: Clock) -> None:
    take_down(breaker)
    clock.advance(1)
    probe(breaker)
    breaker.enter(UPSTREAM, Priority.URGENT).answered()
    take_down(breaker)
    clock.advance(1)
    probe(breaker)
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


def told(breaker: CircuitBreaker) -> tuple[Attempt, list[LinkDown]]:
    """Register a client's request; return it with the errors that it is told."""
    attempt, errors = breaker.enter(UPSTREAM), list[LinkDown]()
    attempt.link_down = errors.append
    return attempt, errors


def test_silence_opens_the_breaker_for_all(breaker: CircuitBreaker, clock: Clock, events: list[LogEvent]) -> None:
    """It opens 10 s after the first request, which goes on; its late response closes it."""
    first, errors = told(breaker)
    clock.advance(9)
    second, others = told(breaker)
    clock.advance(0.875)
    assert not breaker.is_open
    clock.advance(0.125)
    assert breaker.is_open
    assert [len(errors), len(others)] == [1, 1]
    assert errors[0].message.endswith("nothing came from it for 10 s")
    refused(breaker, Priority.CLIENT)
    clock.advance(10)
    first.answered()
    second.abandoned()
    assert not breaker.is_open
    assert len(texts(events, LogLevel.warn)) == 2
    assert clock.getDelayedCalls() == []


def test_byte_of_any_connection_ends_the_silence(breaker: CircuitBreaker, clock: Clock) -> None:
    attempt, errors = told(breaker)
    for _ in range(6):
        clock.advance(9)
        breaker.heard()
    assert errors == []
    clock.advance(10)
    assert len(errors) == 1
    attempt.failed("no response in time")
    assert clock.getDelayedCalls() == []


@pytest.mark.parametrize(("took", "patience"), [(11, 22), (20, 25)])
def test_slow_host_is_not_taken_for_silent_twice(
    breaker: CircuitBreaker, clock: Clock, took: float, patience: float
) -> None:
    """After a first byte that came late, the patience is twice as long, up to 25 s; after ten minutes, 10 s again."""
    attempt, errors = told(breaker)
    clock.advance(took)
    assert len(errors) == 1
    attempt.answered()
    for _ in range(3):
        attempt, errors = told(breaker)
        clock.advance(took)
        attempt.answered()
        assert errors == []
    attempt, errors = told(breaker)
    clock.advance(patience - 0.125)
    assert errors == []
    clock.advance(0.125)
    assert len(errors) == 1
    attempt.abandoned()
    breaker.answered()
    clock.advance(600)
    _, errors = told(breaker)
    clock.advance(10)
    assert len(errors) == 1


def test_old_requests_are_given_up_when_the_host_answers_again(breaker: CircuitBreaker, clock: Clock) -> None:
    """Their connections may be lost, as they were made before the outage."""
    given_up: list[int] = []
    for age in (26, 24):
        attempt = breaker.enter(UPSTREAM)
        attempt.give_up = lambda age=age: given_up.append(age)  # type: ignore[misc]  # mypy infers no type for a default
        clock.advance(2)
    clock.advance(6)
    clock.advance(16)
    probe(breaker).answered()
    assert given_up == [26]


def test_unwatched_breaker_stays_closed_in_silence(clock: Clock) -> None:
    breaker = CircuitBreaker(NAME, clock, watches=False)
    _, errors = told(breaker)
    clock.advance(100)
    assert not breaker.is_open
    assert errors == []


def test_client_waits_for_a_young_probe(breaker: CircuitBreaker, clock: Clock) -> None:
    """For 1.5 s after the probe began; its success is told at once."""
    take_down(breaker)
    soon = Deferred.fromCoroutine(refused(breaker, Priority.CLIENT).ends_soon())
    assert fired(soon) is False
    clock.advance(1)
    attempt = probe(breaker)
    clock.advance(1)
    late, waits = (Deferred.fromCoroutine(refused(breaker, Priority.CLIENT).ends_soon()) for _ in range(2))
    clock.advance(0.25)
    assert not waits.called
    late.cancel()
    failed(late, CancelledError)
    attempt.answered()
    assert fired(waits) is True


def test_client_waits_no_longer_than_a_probe_is_young(breaker: CircuitBreaker, clock: Clock) -> None:
    take_down(breaker)
    clock.advance(1)
    probe(breaker)
    down = refused(breaker, Priority.CLIENT)
    waits = Deferred.fromCoroutine(down.ends_soon())
    clock.advance(1.5)
    assert fired(waits) is False
    assert fired(Deferred.fromCoroutine(down.ends_soon())) is False


def test_stalled_body_opens_the_breaker_of_a_silent_host(breaker: CircuitBreaker, clock: Clock) -> None:
    clock.advance(10)
    breaker.heard()
    breaker.stalled(clock.seconds() - 10, "no byte came for 10 s")
    assert not breaker.is_open
    clock.advance(10)
    breaker.stalled(clock.seconds() - 10, "no byte came for 10 s")
    assert breaker.is_open


def test_silent_name_server_is_told(breaker: CircuitBreaker, clock: Clock) -> None:
    _, errors = told(breaker)
    with breaker.looking_up():
        clock.advance(10)
    assert errors[0].message.endswith("host name cannot be resolved: no answer within 10 s")


# What an operator sees


def test_link_tells_since_when_and_why(breaker: CircuitBreaker, clock: Clock) -> None:
    clock.advance(5)
    up = breaker.link(named=True)
    assert (up.host, up.named, up.up, up.for_seconds, up.why, up.next_probe) == (NAME, True, True, 5, "", None)
    take_down(breaker)
    clock.advance(0.5)
    probe_at = breaker.next_probe
    down = breaker.link(named=False)
    assert (down.named, down.up, down.for_seconds, down.why, down.next_probe) == (
        False,
        False,
        0.5,
        "no route",
        probe_at,
    )
    clock.advance(99)
    probe(breaker).failed("no route still")
    assert (breaker.link(named=True).for_seconds, breaker.link(named=True).why) == (99.5, "no route still")
    probe_again = breaker.enter(UPSTREAM, Priority.URGENT)
    probe_again.answered()
    assert breaker.link(named=True).for_seconds == 0


@pytest.mark.parametrize("works", ["http", "https"])
def test_host_that_is_asked_in_two_ways_is_up_if_one_works(clock: Clock, works: str) -> None:
    breakers = CircuitBreakers(clock)
    for scheme in ("http", "https"):
        attempt = breakers.get(Origin(scheme, "reg.example", 5000)).enter(UPSTREAM)
        if scheme == works:
            attempt.answered()
        else:
            attempt.failed("no route")
    (link,) = breakers.links(lambda host, port: False)
    assert (link.host, link.up, link.named) == ("reg.example:5000", True, True)


def test_host_that_never_answered_is_named_only_if_configured(clock: Clock) -> None:
    breakers = CircuitBreakers(clock)
    for host in ("known.example", "made-up.example"):
        take_down(breakers.get(Origin("https", host, 443)))
    links = breakers.links(lambda host, port: (host, port) == ("known.example", 443))
    assert [(link.host, link.named) for link in links] == [
        ("known.example:443", True),
        ("made-up.example:443", False),
    ]


def test_host_is_listed_as_soon_as_something_is_known_of_it(clock: Clock) -> None:
    """Clients may ask for hosts that are denied, and give up before a connection is made."""
    breakers = CircuitBreakers(clock)
    breaker = breakers.get(Origin("https", "reg.example", 443))
    breaker.enter(UPSTREAM).abandoned()
    attempt = breaker.enter(UPSTREAM)
    clock.advance(5)
    assert breakers.links(lambda host, port: True) == ()
    breaker.heard()
    clock.advance(2)
    attempt.answered()
    (link,) = breakers.links(lambda host, port: True)
    assert (link.up, link.for_seconds) == (True, 2)


def test_host_that_is_down_one_way_is_not_up_because_another_was_denied(clock: Clock) -> None:
    breakers = CircuitBreakers(clock)
    breakers.get(Origin("http", "reg.example", 5000)).enter(UPSTREAM).abandoned()
    take_down(breakers.get(Origin("https", "reg.example", 5000)))
    (link,) = breakers.links(lambda host, port: True)
    assert (link.up, link.why) == (False, "no route")
