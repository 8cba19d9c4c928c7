"""Bodies under a bandwidth limit: pauses, and their effect on the silence timeout."""

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
    """A body on a limit of 64 KiB per second, and its connection."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.bandwidth = Bandwidth(float(RATE), (), clock)
        self.connection = Connection()
        self.body = Body(UPSTREAM, clock, self.connection.stalled, self.bandwidth.consume)
        self.body.makeConnection(cast(ITransport, self.connection))

    def comes(self, seconds: float) -> None:
        """Deliver the bytes of this many seconds."""
        self.body.dataReceived(bytes(int(seconds * RATE)))

    @property
    def paused(self) -> bool:
        """Return whether the transport is paused."""
        return self.connection.paused


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count no packet headers, so that figures are round."""
    monkeypatch.setattr(ociregistry.upstream.bandwidth, "_PAYLOAD_FRACTION", 1.0)


@pytest.fixture
def thin(clock: Clock) -> Thin:
    """Return a body that has begun."""
    return Thin(clock)


def test_body_is_paused_for_its_delay(thin: Thin) -> None:
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


def test_reading_does_not_end_the_delay(thin: Thin) -> None:
    thin.comes(2)
    assert len(fired(thin.body.read())) == 2 * RATE
    reading = thin.body.read()
    assert thin.paused
    thin.clock.advance(2)
    assert not thin.paused
    thin.comes(0.5)
    assert len(fired(reading)) == RATE // 2


def test_bytes_received_while_paused_extend_the_delay(thin: Thin) -> None:
    thin.comes(1)
    thin.clock.advance(0.5)
    thin.comes(1)
    thin.clock.advance(1.375)
    assert thin.paused
    thin.clock.advance(0.125)
    assert not thin.paused
    assert thin.connection.pauses == 1


def test_delay_does_not_count_as_silence(thin: Thin) -> None:
    thin.comes(1000)
    thin.body.read()
    thin.clock.advance(999)
    assert not thin.connection.closed
    thin.clock.advance(1)
    reading = thin.body.read()
    thin.clock.advance(9.875)
    assert not reading.called
    # Afterwards silence counts.
    thin.clock.advance(0.125)
    failed(reading, Unavailable)
    assert thin.connection.stalls == [("no byte came for 10 s", 10.0)]
    assert thin.clock.getDelayedCalls() == []


@pytest.mark.parametrize("why", [None, ConnectionLost()])
def test_no_delayed_call_is_left_at_the_end(thin: Thin, why: Exception | None) -> None:
    thin.comes(5)
    end(thin.body, why)
    assert thin.clock.getDelayedCalls() == []
    assert len(fired(thin.body.read())) == 5 * RATE


def test_no_delay_after_the_limit_is_removed(thin: Thin) -> None:
    thin.bandwidth.reconfigure(None, ())
    thin.comes(1)
    assert not thin.paused
    (stall,) = thin.clock.getDelayedCalls()
    assert stall.getTime() == 10


def test_full_buffer_stays_paused_until_read(thin: Thin) -> None:
    thin.comes(16)
    thin.clock.advance(16)
    assert thin.paused
    assert len(fired(thin.body.read())) == MIB
    assert not thin.paused


def test_full_buffer_read_early_stays_paused_for_its_delay(thin: Thin) -> None:
    thin.comes(16)
    thin.clock.advance(8)
    assert len(fired(thin.body.read())) == MIB
    assert thin.paused
    thin.clock.advance(8)
    assert not thin.paused


# Yielding to clients


def test_held_body_is_paused_until_read(thin: Thin) -> None:
    thin.body.pause()
    assert thin.paused
    thin.clock.advance(10_000)
    assert thin.paused
    assert not thin.connection.closed
    thin.body.read()
    assert not thin.paused
    assert thin.connection.pauses == 1


def test_hold_and_throttle_pause_only_once(thin: Thin) -> None:
    thin.comes(1)
    thin.body.pause()
    thin.body.pause()
    fired(thin.body.read())
    assert thin.paused
    thin.clock.advance(1)
    assert not thin.paused
    assert thin.connection.pauses == 1


def test_end_of_delay_does_not_resume_a_held_body(thin: Thin) -> None:
    thin.comes(1)
    fired(thin.body.read())
    thin.body.pause()
    thin.clock.advance(1)
    assert thin.paused


def test_received_bytes_do_not_resume_a_held_body(thin: Thin) -> None:
    thin.body.pause()
    thin.comes(1)
    thin.clock.advance(1)
    assert thin.paused


def test_held_throttled_and_full_body_resumes_on_read(thin: Thin) -> None:
    thin.comes(16)
    thin.body.pause()
    thin.clock.advance(100)
    assert thin.paused
    fired(thin.body.read())
    assert not thin.paused
    end(thin.body)
    assert thin.clock.getDelayedCalls() == []


def test_ended_body_is_not_held(thin: Thin) -> None:
    thin.comes(0.0625)
    thin.clock.advance(0.0625)
    end(thin.body)
    thin.body.pause()
    assert not thin.paused
    assert len(fired(thin.body.read())) == RATE // 16
    assert fired(thin.body.read()) == b""
    assert thin.clock.getDelayedCalls() == []
