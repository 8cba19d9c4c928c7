"""Rates: of the last ten seconds, of each download and of all, and unknown at first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import pytest
from twisted.internet.task import Clock

from ociregistry.admin.rates import Rates, seconds_left
from ociregistry.pullthrough.download import Download


class Flow:
    """A download that the test moves on."""

    received = 0


class Flows:
    """The downloads in flight, and what came in all."""

    def __init__(self, clock: Clock) -> None:
        self.flows: list[Flow] = []
        self.received = 0
        self.clock = clock
        self.rates = Rates(lambda: cast(list[Download], self.flows), lambda: self.received, clock)

    def begin(self) -> Flow:
        """Begin a download."""
        self.flows.append(Flow())
        return self.flows[-1]

    def run(self, seconds: int, *rates: int) -> None:
        """Let that many bytes come in each second, one number for each download."""
        for _ in range(seconds):
            for flow, rate in zip(self.flows, rates, strict=True):
                flow.received += rate
                self.received += rate
            self.clock.advance(1)

    def of(self, flow: Flow) -> float | None:
        """Return the rate of a download."""
        return self.rates.of(cast(Download, flow))


@pytest.fixture
def flows(clock: Clock) -> Iterator[Flows]:
    """Return the downloads of a daemon that has started."""
    flows = Flows(clock)
    flows.rates.startService()
    yield flows
    flows.rates.stopService()


def test_rate_is_unknown_at_first(flows: Flows) -> None:
    flow = flows.begin()
    assert (flows.of(flow), flows.rates.all) == (None, None)
    flows.run(1, 500)
    assert (flows.of(flow), flows.rates.all) == (None, 500)
    flows.run(1, 500)
    assert (flows.of(flow), flows.rates.all) == (500, 500)


def test_rate_is_that_of_the_last_ten_seconds(flows: Flows) -> None:
    flow = flows.begin()
    flows.run(30, 1000)
    assert flows.of(flow) == 1000
    flows.run(5, 0)
    assert flows.of(flow) == 500
    flows.run(5, 0)
    assert flows.of(flow) == 0


def test_each_download_has_its_own_rate(flows: Flows) -> None:
    one, other = flows.begin(), flows.begin()
    flows.run(12, 1000, 50)
    assert (flows.of(one), flows.of(other), flows.rates.all) == (1000, 50, 1050)
    flows.flows.remove(one)
    flows.run(1, 50)
    assert (flows.of(one), flows.of(other)) == (None, 50)


def test_bytes_that_are_cut_off_are_no_negative_rate(flows: Flows) -> None:
    flow = flows.begin()
    flows.run(3, 1000)
    flow.received = 0
    flows.run(1, 0)
    assert flows.of(flow) == 0


def test_nothing_is_read_after_the_stop(flows: Flows, clock: Clock) -> None:
    flows.rates.stopService()
    assert clock.getDelayedCalls() == []
    flows.rates.startService()


@pytest.mark.parametrize(
    ("missing", "rate", "seconds"),
    [(1000, 100.0, 10), (1001, 100.0, 11), (0, 100.0, 0), (1000, 0.0, None), (1000, None, None), (None, 100.0, None)],
)
def test_seconds_left(missing: int | None, rate: float | None, seconds: int | None) -> None:
    assert seconds_left(missing, rate) == seconds
