"""Probing: hosts that are down are asked by the daemon itself, while something from them is wanted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from twisted.internet import error
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ociregistry.context import Priority, Wanted
from ociregistry.errors import Unavailable
from ociregistry.upstream.bandwidth import Bandwidth
from ociregistry.upstream.breaker import CircuitBreakers, LinkDown
from ociregistry.upstream.http import HttpClient, RequestOptions
from ociregistry.upstream.origin import Origin
from ociregistry.upstream.probing import Prober
from tests.unit.support.common import failed, fired
from tests.unit.test_upstream_breaker_requests import Waiting

URL = "https://reg.example/v2/team/app/manifests/1"
PING = b"https://reg.example/v2/"


class Missing:
    """A client that misses a host, and the probes of that host."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.agent = Waiting()
        self.breakers = CircuitBreakers(clock)
        self.breaker = self.breakers.get(Origin.of(URL))
        self.prober = Prober(clock)
        self.prober.startService()
        self.http = HttpClient(
            "reg.example",
            self.agent,
            self.breakers,
            Bandwidth(None, (), clock),
            lambda: None,
            clock,
            want=self.prober.want,
        )

    def send(self, priority: Priority = Priority.CLIENT, wanted: Wanted | None = None) -> Deferred[object]:
        """Send a request."""
        options = RequestOptions(priority=priority, wanted=wanted)
        return Deferred.fromCoroutine(self.http.send("GET", URL, {}, options=options))

    def miss(self, priority: Priority = Priority.CLIENT, wanted: Wanted | None = None) -> None:
        """Send a request that fails, as the host refuses the connection."""
        sent = self.send(priority, wanted)
        if not sent.called:
            self.refuse()
        failed(sent, Unavailable)

    def refuse(self) -> None:
        """Fail the request in flight."""
        self.agent.asked[-1].errback(error.ConnectionRefusedError())

    def pump(self, seconds: float) -> list[float]:
        """Advance the time; refuse each probe at once, and return when they were sent."""
        began, times = self.clock.seconds(), []
        while self.clock.seconds() < began + seconds:
            before = len(self.agent.asked)
            self.clock.advance(0.125)
            if len(self.agent.asked) > before:
                times.append(self.clock.seconds() - began)
                self.refuse()
        return times


@pytest.fixture
def missing(clock: Clock) -> Iterator[Missing]:
    """Return a client; nothing is left when the prober has stopped."""
    missing = Missing(clock)
    yield missing
    missing.prober.stopService()
    assert clock.getDelayedCalls() == []


def test_host_is_probed_without_clients(missing: Missing) -> None:
    """By `GET /v2/` without credentials, at intervals up to 30 s, for ten minutes after the last miss."""
    missing.miss()
    times = missing.pump(700)
    assert set(missing.agent.uris[1:]) == {PING}
    assert times[0] <= 1.25
    distances = [after - before for before, after in itertools.pairwise(times)]
    assert 15 <= max(distances) <= 31
    assert 590 - 31 < times[-1] < 600
    # The next miss is refused, and begins the probes again at once.
    failed(missing.send(), LinkDown)
    assert missing.pump(1)[0] <= 0.25


def test_probe_closes_the_breaker_and_ends_the_probes(missing: Missing, clock: Clock) -> None:
    missing.miss()
    clock.advance(1.25)
    missing.breaker.answered()
    missing.agent.asked[-1].errback(ValueError("no HTTP"))
    sent = len(missing.agent.asked)
    missing.pump(100)
    assert len(missing.agent.asked) == sent


def test_wanted_request_is_the_probe(missing: Missing, clock: Clock) -> None:
    """A manifest that a client missed is fetched; where that is in flight already, the host is pinged."""
    fetched: list[Deferred[None]] = []

    def again() -> Deferred[None] | None:
        if len(fetched) > 1:
            return None

        async def fetch() -> None:
            await missing.send(Priority.METADATA)

        fetched.append(Deferred.fromCoroutine(fetch()))
        return fetched[-1]

    missing.miss(wanted=Wanted(lambda error: None, again))  # type: ignore[arg-type]  # a Deferred is awaited as well
    clock.advance(1.25)
    assert missing.agent.uris[1:] == [URL.encode()]
    missing.refuse()
    missing.pump(3)
    assert len(fetched) == 2
    missing.pump(5)
    assert missing.agent.uris[3:] == [PING]


def test_probes_want_nothing_themselves(missing: Missing) -> None:
    """Otherwise they would go on for ever; so would those for the metadata of other platforms."""
    missing.miss(Priority.METADATA)
    assert not missing.prober.probes(missing.breaker)
    assert missing.pump(100) == []
    missing.miss(Priority.BACKGROUND)
    assert missing.prober.probes(missing.breaker)
    assert missing.pump(100) != []


def test_host_is_wanted_for_as_long_as_it_is_probed(missing: Missing) -> None:
    def link() -> tuple[bool, bool]:
        (found,) = missing.breakers.links(lambda host, port: True, missing.prober.probes)
        return found.up, found.wanted

    missing.miss()
    assert link() == (False, True)
    missing.pump(700)
    assert link() == (False, False)
    failed(missing.send(), LinkDown)
    assert link() == (False, True)
    missing.breaker.answered()
    assert link() == (True, False)


def test_silent_probe_ends_before_the_next(missing: Missing, clock: Clock) -> None:
    """There is one at a time, and each begins at most 30 s after the one before."""
    missing.miss()
    begun = []
    for _ in range(3000):
        before = len(missing.agent.asked)
        clock.advance(0.125)
        if len(missing.agent.asked) > before:
            begun.append(clock.seconds())
            assert sum(not asked.called for asked in missing.agent.asked) == 1
    distances = [after - before for before, after in itertools.pairwise(begun)]
    assert min(distances) >= 25
    assert max(distances) <= 30.5


def test_stopped_prober_cancels_its_probe(missing: Missing, clock: Clock) -> None:
    missing.miss()
    clock.advance(1.25)
    assert len(missing.agent.asked) == 2
    missing.prober.stopService()
    assert all(asked.called for asked in missing.agent.asked)
    missing.miss()
    assert clock.getDelayedCalls() == []


def test_only_the_hosts_missed_last_are_probed(missing: Missing, clock: Clock) -> None:
    """A client that names many hosts does not have all of them probed."""
    urls = [f"https://host{number}.example/v2/team/app/manifests/1" for number in range(150)]
    for url in [*urls, urls[0]]:
        sent = Deferred.fromCoroutine(missing.http.send("GET", url, {}))
        if not sent.called:
            missing.refuse()
        failed(sent, Unavailable)
    before = len(missing.agent.uris)
    clock.advance(1.25)
    probed = {uri.decode() for uri in missing.agent.uris[before:]}
    assert probed == {url.partition("team/")[0] for url in (*urls[51:], urls[0])}


def test_breaker_that_another_one_replaced_is_not_probed(missing: Missing, clock: Clock) -> None:
    """Its probes would pass through the other one, without a pause."""
    missing.miss()
    for number in range(1000):
        missing.breakers.get(Origin.of(f"https://host{number}.example/"))
    assert not missing.breaker.is_open
    missing.pump(10)
    assert len(missing.agent.asked) == 1


def test_breaker_of_a_request_in_flight_is_kept(missing: Missing) -> None:
    sent = missing.send()
    for number in range(2000):
        missing.breakers.get(Origin.of(f"https://host{number}.example/"))
    assert missing.breakers.get(Origin.of(URL)) is missing.breaker
    missing.refuse()
    failed(sent, Unavailable)
    assert missing.breaker.is_open


def test_what_a_probe_has_fetched_is_not_fetched_again(missing: Missing) -> None:
    """Such as from a mirror; then the host is pinged."""
    fetched = []

    async def fetch() -> None:
        fetched.append(missing.clock.seconds())

    missing.miss(wanted=Wanted(lambda error: None, fetch))
    missing.pump(100)
    assert len(fetched) == 1
    assert set(missing.agent.uris[1:]) == {PING}


def test_probe_that_is_refused_elsewhere_is_followed_by_a_ping(missing: Missing) -> None:
    """Such as by a token service, which must not be asked again and again without a pause."""
    tried = []

    async def fetch() -> None:
        tried.append(missing.clock.seconds())
        raise Unavailable("the token service refuses")

    missing.miss(wanted=Wanted(lambda error: None, fetch))
    pings = missing.pump(100)
    assert len(tried) == len(pings) < 15
    assert set(missing.agent.uris[1:]) == {PING}


def test_client_waits_for_the_probe_that_its_miss_begins(missing: Missing, clock: Clock) -> None:
    missing.miss()
    missing.pump(700)
    soon = Deferred.fromCoroutine(failed(missing.send(), LinkDown).ends_soon())
    clock.advance(0.125)
    assert not soon.called
    missing.breaker.answered()
    assert fired(soon) is True
    missing.refuse()
