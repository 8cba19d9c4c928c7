"""Links: a host that cannot be reached is asked seldom, by one request at a time, and each change is one line."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import pytest
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.upstream.breaker import Attempt, Link, LinkDown, Links
from ociregistry.upstream.origin import Origin
from tests.unit.doubles import texts

NAME = "reg.example:443"
WHO = "up.example"
DISTANCES = [1, 2, 4, 8, 16, 30, 30, 30]


@pytest.fixture
def link(clock: Clock) -> Link:
    """A link whose distances are as long as they may be."""
    clock.advance(1000)
    return Link(NAME, clock, lambda: 1.0)


def refused(link: Link) -> LinkDown:
    """How a request is refused."""
    with pytest.raises(LinkDown) as down:
        link.enter(WHO)
    return down.value


def take_down(link: Link) -> None:
    """A request fails."""
    link.enter(WHO).failed("no route")


def test_a_link_is_up_at_first(link: Link, events: list[LogEvent]) -> None:
    attempts = [link.enter(WHO) for _ in range(3)]
    for attempt in attempts:
        attempt.answered()
    link.enter(WHO, insist=True).abandoned()
    link.enter(WHO)
    assert texts(events, LogLevel.warn) == []


def test_a_failure_takes_it_down(link: Link, events: list[LogEvent]) -> None:
    take_down(link)
    down = refused(link)
    assert down.message == f"{WHO}: {NAME} could not be reached a moment ago: no route"
    assert (down.status, down.headers()) == (503, {"Retry-After": "1"})
    refused(link)
    assert texts(events, LogLevel.warn) == [f"{NAME} cannot be reached: no route"]


@pytest.mark.parametrize(("jitter", "share"), [(0.0, 0.5), (0.5, 0.75), (1.0, 1.0)])
def test_the_distance_of_probes_doubles_up_to_half_a_minute(
    clock: Clock, events: list[LogEvent], jitter: float, share: float
) -> None:
    link = Link(NAME, clock, lambda: jitter)
    attempt = link.enter(WHO)
    for distance in DISTANCES:
        attempt.failed("no route")
        assert refused(link).retry_after == ceil(distance * share)
        clock.advance(distance * share - 0.125)
        assert refused(link).retry_after == 1
        clock.advance(0.125)
        attempt = link.enter(WHO)
    assert len(texts(events, LogLevel.warn)) == 1


def test_jitter_is_random_where_nobody_says_otherwise(clock: Clock) -> None:
    ends = set()
    for _ in range(10):
        link = Link(NAME, clock)
        take_down(link)
        ends.add(link._down_until)
    assert len(ends) > 1
    assert all(0.5 <= end <= 1 for end in ends)


def test_one_request_passes_as_the_probe(link: Link, clock: Clock) -> None:
    take_down(link)
    clock.advance(1)
    probe = link.enter(WHO)
    # However long it takes.
    for _ in range(5):
        assert refused(link).retry_after == 1
        clock.advance(100)
    probe.answered()
    link.enter(WHO)
    link.enter(WHO)


def test_who_insists_always_passes_and_is_a_probe(link: Link, clock: Clock) -> None:
    take_down(link)
    attempts = [link.enter(WHO, insist=True) for _ in range(3)]
    clock.advance(1)
    refused(link)
    attempts[0].failed("no route still")
    # The next after twice the time.
    clock.advance(1.875)
    assert "no route still" in refused(link).message
    clock.advance(0.125)
    link.enter(WHO)


def test_an_answer_brings_it_up_again(link: Link, clock: Clock, events: list[LogEvent]) -> None:
    take_down(link)
    attempts = [link.enter(WHO, insist=True) for _ in range(2)]
    clock.advance(7)
    for attempt in attempts:
        attempt.answered()
    assert texts(events, LogLevel.warn)[1:] == [f"{NAME} can be reached again, after 7 s"]
    link.enter(WHO).answered()
    assert len(texts(events, LogLevel.warn)) == 2
    # Next time it begins with a second again.
    clock.advance(1)
    take_down(link)
    clock.advance(1)
    link.enter(WHO)
    assert len(texts(events, LogLevel.warn)) == 3


def test_what_failed_at_once_is_one_failure(link: Link, clock: Clock, events: list[LogEvent]) -> None:
    attempts = [link.enter(WHO) for _ in range(20)]
    clock.advance(10)
    for attempt in attempts:
        clock.advance(0.03125)
        attempt.failed("too slow")
    assert len(texts(events, LogLevel.warn)) == 1
    clock.advance(0.375)
    # A second after the first of them.
    refused(link)
    clock.advance(0.03125)
    probe = link.enter(WHO)
    probe.failed("too slow")
    clock.advance(1.875)
    refused(link)
    clock.advance(0.125)
    link.enter(WHO)


def test_a_failure_of_a_request_from_before_it_came_up_does_not_count(
    link: Link, clock: Clock, events: list[LogEvent]
) -> None:
    take_down(link)
    late, good = link.enter(WHO, insist=True), link.enter(WHO, insist=True)
    clock.advance(5)
    good.answered()
    late.failed("too slow")
    link.failed(clock.seconds() - 10, "a body was silent for so long")
    link.enter(WHO)
    assert len(texts(events, LogLevel.warn)) == 2


@pytest.mark.parametrize("end", [Attempt.abandoned, lambda attempt: attempt.failed("no")])
def test_a_probe_that_ends_lets_the_next_one_through(
    link: Link, clock: Clock, end: Callable[[Attempt], None]
) -> None:
    take_down(link)
    clock.advance(1)
    end(link.enter(WHO))
    clock.advance(2)
    link.enter(WHO)
    refused(link)


def test_a_probe_that_tells_nothing_changes_nothing(link: Link, clock: Clock, events: list[LogEvent]) -> None:
    take_down(link)
    clock.advance(1)
    link.enter(WHO).abandoned()
    link.enter(WHO).failed("no")
    clock.advance(1.875)
    refused(link)
    assert len(texts(events, LogLevel.warn)) == 1


@pytest.mark.parametrize("end", [Attempt.abandoned, lambda attempt: attempt.failed("no")])
def test_a_request_from_before_is_no_probe_that_ends(
    link: Link, clock: Clock, end: Callable[[Attempt], None]
) -> None:
    earlier = link.enter(WHO)
    clock.advance(10)
    link.failed(clock.seconds() - 10, "no")
    clock.advance(1)
    link.enter(WHO)
    end(earlier)
    refused(link)


def test_nor_is_the_probe_of_an_outage_that_is_over(link: Link, clock: Clock) -> None:
    take_down(link)
    clock.advance(1)
    link.enter(WHO)
    link.enter(WHO, insist=True).answered()
    take_down(link)
    clock.advance(1)
    link.enter(WHO)
    refused(link)


def test_every_origin_has_its_own(clock: Clock) -> None:
    links = Links(clock)
    https, http = Origin("https", "reg.example", 443), Origin("http", "reg.example", 80)
    take_down(links.to(https))
    assert refused(links.to(https)).message.startswith(f"{WHO}: reg.example:443 ")
    for other in (http, Origin("https", "reg.example", 5000), Origin("https", "else.example", 443)):
        links.to(other).enter(WHO)


def test_those_that_were_used_last_are_kept(clock: Clock) -> None:
    """Redirects may lead to any number of hosts."""
    links = Links(clock)
    first = Origin("https", "reg.example", 443)
    take_down(links.to(first))
    for number in range(5000):
        links.to(Origin("https", f"{number}.example", 443))
        refused(links.to(first))
    assert len(links._kept) == 1000
    for number in range(1000):
        links.to(Origin("https", f"again.{number}.example", 443))
    links.to(first).enter(WHO)
