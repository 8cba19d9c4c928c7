"""A body under a limit: it is paused for its time, not for longer, and that is no silence of the upstream."""

from __future__ import annotations

from typing import cast

import pytest
from twisted.internet.error import ConnectionLost
from twisted.internet.interfaces import ITransport
from twisted.internet.task import Clock

import ociregistry.upstream.bandwidth
from ociregistry.errors import Unavailable
from ociregistry.upstream.bandwidth import Bandwidth
from ociregistry.upstream.body import Body
from tests.unit.support.bodies import UPSTREAM, Connection, end
from tests.unit.support.doubles import failed, fired

KIB = 1024
MIB = 1024 * KIB
RATE = 64 * KIB


class Thin:
    """A body that has a second for every 64 KiB, and its connection."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.bandwidth = Bandwidth(float(RATE), (), clock)
        self.connection = Connection()
        self.body = Body(UPSTREAM, clock, self.connection.stalled, self.bandwidth.consume)
        self.body.makeConnection(cast(ITransport, self.connection))

    def comes(self, seconds: float) -> None:
        """As much comes as may in so many seconds."""
        self.body.dataReceived(bytes(int(seconds * RATE)))

    @property
    def paused(self) -> bool:
        """Whether the upstream is."""
        return self.connection.paused


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packets have no headers, so that figures are round."""
    monkeypatch.setattr(ociregistry.upstream.bandwidth, "_PAYLOAD_FRACTION", 1.0)


@pytest.fixture
def thin(clock: Clock) -> Thin:
    """One that has begun."""
    return Thin(clock)


def test_it_is_paused_for_its_time(thin: Thin) -> None:
    reading = thin.body.read()
    thin.comes(2)
    assert len(fired(reading)) == 2 * RATE
    thin.clock.advance(1.875)
    assert thin.paused
    thin.clock.advance(0.125)
    assert not thin.paused
    thin.comes(1)
    assert thin.paused
    assert thin.connection.pauses == 2


def test_who_reads_meanwhile_does_not_resume_it(thin: Thin) -> None:
    thin.comes(2)
    assert len(fired(thin.body.read())) == 2 * RATE
    reading = thin.body.read()
    assert thin.paused
    thin.clock.advance(2)
    assert not thin.paused
    thin.comes(0.5)
    assert len(fired(reading)) == RATE // 2


def test_what_was_in_the_pipe_takes_its_time_too(thin: Thin) -> None:
    thin.comes(1)
    thin.clock.advance(0.5)
    thin.comes(1)
    thin.clock.advance(1.375)
    assert thin.paused
    thin.clock.advance(0.125)
    assert not thin.paused
    assert thin.connection.pauses == 1


def test_the_time_while_it_is_paused_is_no_silence(thin: Thin) -> None:
    thin.comes(1000)
    thin.body.read()
    thin.clock.advance(999)
    assert not thin.connection.closed
    thin.clock.advance(1)
    reading = thin.body.read()
    thin.clock.advance(9.875)
    assert not reading.called
    # From there on it is.
    thin.clock.advance(0.125)
    failed(reading, Unavailable)
    assert thin.connection.stalls == [("no byte came for 10 s", 10.0)]
    assert thin.clock.getDelayedCalls() == []


@pytest.mark.parametrize("why", [None, ConnectionLost()])
def test_nothing_is_left_of_it_at_the_end(thin: Thin, why: Exception | None) -> None:
    thin.comes(5)
    end(thin.body, why)
    assert thin.clock.getDelayedCalls() == []
    assert len(fired(thin.body.read())) == 5 * RATE


def test_no_time_is_left_for_a_limit_that_is_gone(thin: Thin) -> None:
    thin.bandwidth.reconfigure(None, ())
    thin.comes(1)
    assert not thin.paused
    (stall,) = thin.clock.getDelayedCalls()
    assert stall.getTime() == 10


def test_a_full_buffer_stays_paused_until_it_is_read(thin: Thin) -> None:
    thin.comes(16)
    thin.clock.advance(16)
    assert thin.paused
    assert len(fired(thin.body.read())) == MIB
    assert not thin.paused


def test_a_full_buffer_that_is_read_in_time_waits_for_its_time(thin: Thin) -> None:
    thin.comes(16)
    thin.clock.advance(8)
    assert len(fired(thin.body.read())) == MIB
    assert thin.paused
    thin.clock.advance(8)
    assert not thin.paused


# Others go first


def test_a_body_that_is_held_lets_nothing_come_until_it_is_read(thin: Thin) -> None:
    thin.body.pause()
    assert thin.paused
    thin.clock.advance(10_000)
    assert thin.paused
    assert not thin.connection.closed
    thin.body.read()
    assert not thin.paused
    assert thin.connection.pauses == 1


def test_held_or_throttled_it_is_paused_once(thin: Thin) -> None:
    thin.comes(1)
    thin.body.pause()
    thin.body.pause()
    fired(thin.body.read())
    assert thin.paused
    thin.clock.advance(1)
    assert not thin.paused
    assert thin.connection.pauses == 1


def test_a_body_that_is_held_is_not_resumed_by_the_end_of_its_time(thin: Thin) -> None:
    thin.comes(1)
    fired(thin.body.read())
    thin.body.pause()
    thin.clock.advance(1)
    assert thin.paused


def test_nor_by_what_was_in_the_pipe(thin: Thin) -> None:
    thin.body.pause()
    thin.comes(1)
    thin.clock.advance(1)
    assert thin.paused


def test_held_throttled_and_full_it_goes_on_when_it_is_read(thin: Thin) -> None:
    thin.comes(16)
    thin.body.pause()
    thin.clock.advance(100)
    assert thin.paused
    fired(thin.body.read())
    assert not thin.paused
    end(thin.body)
    assert thin.clock.getDelayedCalls() == []


def test_a_body_that_has_ended_is_not_held(thin: Thin) -> None:
    thin.comes(0.0625)
    thin.clock.advance(0.0625)
    end(thin.body)
    thin.body.pause()
    assert not thin.paused
    assert len(fired(thin.body.read())) == RATE // 16
    assert fired(thin.body.read()) == b""
    assert thin.clock.getDelayedCalls() == []
