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
from tests.unit.support.common import failed, fired

KIB = 1024
MIB = 1024 * KIB
RATE = 64 * KIB


class ThrottledBody:
    """A body on a limit of 64 KiB per second, and its connection."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.bandwidth = Bandwidth(float(RATE), (), clock)
        self.connection = Connection()
        self.body = Body(UPSTREAM, clock, self.connection.stalled, self.bandwidth.consume)
        self.body.makeConnection(cast(ITransport, self.connection))

    def deliver(self, seconds: float) -> None:
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
def throttled(clock: Clock) -> ThrottledBody:
    """Return a body that has begun."""
    return ThrottledBody(clock)


def test_body_is_paused_for_its_delay(throttled: ThrottledBody) -> None:
    reading = throttled.body.read()
    throttled.deliver(2)
    assert len(fired(reading)) == 2 * RATE
    throttled.clock.advance(1.875)
    assert throttled.paused
    throttled.clock.advance(0.125)
    assert not throttled.paused
    throttled.deliver(1)
    assert throttled.paused
    assert throttled.connection.pauses == 2


def test_reading_does_not_end_the_delay(throttled: ThrottledBody) -> None:
    throttled.deliver(2)
    assert len(fired(throttled.body.read())) == 2 * RATE
    reading = throttled.body.read()
    assert throttled.paused
    throttled.clock.advance(2)
    assert not throttled.paused
    throttled.deliver(0.5)
    assert len(fired(reading)) == RATE // 2


def test_bytes_received_while_paused_extend_the_delay(throttled: ThrottledBody) -> None:
    throttled.deliver(1)
    throttled.clock.advance(0.5)
    throttled.deliver(1)
    throttled.clock.advance(1.375)
    assert throttled.paused
    throttled.clock.advance(0.125)
    assert not throttled.paused
    assert throttled.connection.pauses == 1


def test_delay_does_not_count_as_silence(throttled: ThrottledBody) -> None:
    throttled.deliver(1000)
    throttled.body.read()
    throttled.clock.advance(999)
    assert not throttled.connection.closed
    throttled.clock.advance(1)
    reading = throttled.body.read()
    throttled.clock.advance(9.875)
    assert not reading.called
    # Afterwards silence counts.
    throttled.clock.advance(0.125)
    failed(reading, Unavailable)
    assert throttled.connection.stalls == [("no byte came for 10 s", 10.0)]
    assert throttled.clock.getDelayedCalls() == []


@pytest.mark.parametrize("why", [None, ConnectionLost()])
def test_no_delayed_call_is_left_at_the_end(throttled: ThrottledBody, why: Exception | None) -> None:
    throttled.deliver(5)
    end(throttled.body, why)
    assert throttled.clock.getDelayedCalls() == []
    assert len(fired(throttled.body.read())) == 5 * RATE


def test_no_delay_after_the_limit_is_removed(throttled: ThrottledBody) -> None:
    throttled.bandwidth.reconfigure(None, ())
    throttled.deliver(1)
    assert not throttled.paused
    (stall,) = throttled.clock.getDelayedCalls()
    assert stall.getTime() == 10


def test_full_buffer_stays_paused_until_read(throttled: ThrottledBody) -> None:
    throttled.deliver(16)
    throttled.clock.advance(16)
    assert throttled.paused
    assert len(fired(throttled.body.read())) == MIB
    assert not throttled.paused


def test_full_buffer_read_early_stays_paused_for_its_delay(throttled: ThrottledBody) -> None:
    throttled.deliver(16)
    throttled.clock.advance(8)
    assert len(fired(throttled.body.read())) == MIB
    assert throttled.paused
    throttled.clock.advance(8)
    assert not throttled.paused


# Yielding to clients


def test_held_body_is_paused_until_read(throttled: ThrottledBody) -> None:
    throttled.body.pause()
    assert throttled.paused
    throttled.clock.advance(10_000)
    assert throttled.paused
    assert not throttled.connection.closed
    throttled.body.read()
    assert not throttled.paused
    assert throttled.connection.pauses == 1


def test_hold_and_throttle_pause_only_once(throttled: ThrottledBody) -> None:
    throttled.deliver(1)
    throttled.body.pause()
    throttled.body.pause()
    fired(throttled.body.read())
    assert throttled.paused
    throttled.clock.advance(1)
    assert not throttled.paused
    assert throttled.connection.pauses == 1


def test_end_of_delay_does_not_resume_a_held_body(throttled: ThrottledBody) -> None:
    throttled.deliver(1)
    fired(throttled.body.read())
    throttled.body.pause()
    throttled.clock.advance(1)
    assert throttled.paused


def test_received_bytes_do_not_resume_a_held_body(throttled: ThrottledBody) -> None:
    throttled.body.pause()
    throttled.deliver(1)
    throttled.clock.advance(1)
    assert throttled.paused


def test_held_throttled_and_full_body_resumes_on_read(throttled: ThrottledBody) -> None:
    throttled.deliver(16)
    throttled.body.pause()
    throttled.clock.advance(100)
    assert throttled.paused
    fired(throttled.body.read())
    assert not throttled.paused
    end(throttled.body)
    assert throttled.clock.getDelayedCalls() == []


def test_ended_body_is_not_held(throttled: ThrottledBody) -> None:
    throttled.deliver(0.0625)
    throttled.clock.advance(0.0625)
    end(throttled.body)
    throttled.body.pause()
    assert not throttled.paused
    assert len(fired(throttled.body.read())) == RATE // 16
    assert fired(throttled.body.read()) == b""
    assert throttled.clock.getDelayedCalls() == []
