"""A body: read at the speed of its reader, and given up when the upstream says nothing any more."""

from __future__ import annotations

import pytest
from twisted.internet.defer import CancelledError
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.web.client import ResponseFailed
from twisted.web.http import PotentialDataLoss

from ociregistry.errors import Unavailable
from ociregistry.upstream.body import Body
from tests.unit.support.bodies import connected, end
from tests.unit.support.doubles import failed, fired

MIB = 1024 * 1024


def test_bytes_come_as_they_came_and_then_none() -> None:
    body, _ = connected()
    reading = body.read()
    assert not reading.called
    body.dataReceived(b"one")
    assert fired(reading) == b"one"
    body.dataReceived(b"two")
    body.dataReceived(b"three")
    assert fired(body.read()) == b"twothree"
    reading = body.read()
    end(body)
    assert fired(reading) == b""
    assert fired(body.read()) == b""


def test_what_came_before_the_end_is_read_before_it() -> None:
    body, _ = connected()
    body.dataReceived(b"all")
    end(body)
    assert fired(body.read()) == b"all"
    assert fired(body.read()) == b""


@pytest.mark.parametrize(
    ("why", "words"),
    [
        (ConnectionDone(), "it closed the connection"),
        (ConnectionLost(), "the connection broke"),
        (ResponseFailed([Failure(ConnectionLost())]), "the connection broke"),
        (ResponseFailed([Failure(ConnectionDone())]), "it closed the connection"),
    ],
)
def test_a_connection_that_breaks_is_no_end(why: Exception, words: str) -> None:
    body, _ = connected()
    body.dataReceived(b"half")
    end(body, why)
    assert fired(body.read()) == b"half"
    error = failed(body.read(), Unavailable)
    assert error.message == f"reg.example: {words}"
    assert failed(body.read(), Unavailable).message == error.message


def test_who_waits_is_told_that_it_broke() -> None:
    body, _ = connected()
    reading = body.read()
    end(body, ConnectionLost())
    failed(reading, Unavailable)


def test_an_end_that_only_the_digest_can_judge_is_an_end() -> None:
    body, _ = connected()
    body.dataReceived(b"all")
    end(body, PotentialDataLoss())
    assert fired(body.read()) == b"all"
    assert fired(body.read()) == b""


def test_an_upstream_that_is_faster_than_the_reader_is_paused() -> None:
    body, connection = connected()
    body.dataReceived(b"x" * (MIB - 1))
    assert not connection.paused
    body.dataReceived(b"x")
    assert connection.paused
    body.dataReceived(b"y")  # what was in the pipe already
    assert len(fired(body.read())) == MIB + 1
    assert not connection.paused
    body.dataReceived(b"x" * MIB)
    assert connection.pauses == 2


def test_a_paused_body_that_has_ended_is_read_to_its_end() -> None:
    body, connection = connected()
    body.dataReceived(b"x" * MIB)
    end(body)
    assert len(fired(body.read())) == MIB
    assert fired(body.read()) == b""
    assert connection.pauses == 1


def test_ten_seconds_without_a_byte_break_it(clock: Clock) -> None:
    body, connection = connected(clock)
    body.dataReceived(b"first")
    assert fired(body.read()) == b"first"
    clock.advance(9)
    body.dataReceived(b"second")
    assert fired(body.read()) == b"second"
    reading = body.read()
    clock.advance(9)
    assert not reading.called
    clock.advance(1)
    assert "no byte came for 10 s" in failed(reading, Unavailable).message
    assert connection.closed
    # What waits for another request on the same path will not move either.
    assert connection.stalls == [("no byte came for 10 s", 10.0)]
    assert fired(body.ended) is None
    # The connection is lost a little later.
    end(body, ConnectionDone())
    failed(body.read(), Unavailable)


def test_the_first_byte_may_not_be_longer_in_coming(clock: Clock) -> None:
    body, connection = connected(clock)
    clock.advance(10)
    failed(body.read(), Unavailable)
    assert connection.closed


def test_the_time_while_we_pause_the_upstream_does_not_count(clock: Clock) -> None:
    body, connection = connected(clock)
    body.dataReceived(b"x" * MIB)
    clock.advance(10_000)
    assert not connection.closed
    assert len(fired(body.read())) == MIB
    clock.advance(9)
    assert not connection.closed
    clock.advance(1)
    assert connection.closed


@pytest.mark.parametrize("why", [None, ConnectionLost()])
def test_nothing_is_left_behind_at_the_end(clock: Clock, why: Exception | None) -> None:
    body, _ = connected(clock)
    body.dataReceived(b"x" * MIB)
    fired(body.read())
    assert not body.ended.called
    end(body, why)
    assert fired(body.ended) is None
    assert clock.getDelayedCalls() == []


def test_who_wants_no_more_closes_the_connection(clock: Clock) -> None:
    body, connection = connected(clock)
    body.dataReceived(b"some")
    body.abort()
    assert connection.closed
    end(body, ConnectionDone())
    assert fired(body.ended) is None
    assert clock.getDelayedCalls() == []


def test_a_body_that_has_ended_leaves_its_connection_to_others() -> None:
    body, connection = connected()
    end(body)
    body.abort()
    assert not connection.closed


def test_a_body_that_never_began_can_be_aborted(clock: Clock) -> None:
    Body("reg.example", clock, lambda why, silent: None).abort()


def test_who_stops_waiting_may_read_again() -> None:
    body, _ = connected()
    reading = body.read()
    reading.cancel()
    failed(reading, CancelledError)
    body.dataReceived(b"late")
    assert fired(body.read()) == b"late"
