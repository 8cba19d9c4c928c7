"""Response bodies: flow control and the silence timeout."""

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
from tests.unit.support.common import failed, fired

MIB = 1024 * 1024


def test_bytes_are_read_as_received_then_empty() -> None:
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


def test_pieces_are_read_as_they_were_received() -> None:
    body, _ = connected()
    pieces = [b"one", b"two"]
    for piece in pieces:
        body.dataReceived(piece)
    read = fired(body.read_pieces())
    assert [id(piece) for piece in read] == [id(piece) for piece in pieces]
    end(body)
    assert fired(body.read_pieces()) == []


def test_buffered_bytes_are_read_before_the_end() -> None:
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
def test_lost_connection_is_an_error(why: Exception, words: str) -> None:
    body, _ = connected()
    body.dataReceived(b"half")
    end(body, why)
    assert fired(body.read()) == b"half"
    error = failed(body.read(), Unavailable)
    assert error.message == f"reg.example: {words}"
    assert failed(body.read(), Unavailable).message == error.message


def test_waiting_reader_gets_the_error() -> None:
    body, _ = connected()
    reading = body.read()
    end(body, ConnectionLost())
    failed(reading, Unavailable)


def test_end_without_content_length_is_an_end() -> None:
    body, _ = connected()
    body.dataReceived(b"all")
    end(body, PotentialDataLoss())
    assert fired(body.read()) == b"all"
    assert fired(body.read()) == b""


def test_body_pauses_when_its_buffer_is_full() -> None:
    body, connection = connected()
    body.dataReceived(b"x" * (MIB - 1))
    assert not connection.paused
    body.dataReceived(b"x")
    assert connection.paused
    body.dataReceived(b"y")  # bytes already in transit
    assert len(fired(body.read())) == MIB + 1
    assert not connection.paused
    body.dataReceived(b"x" * MIB)
    assert connection.pauses == 2


def test_paused_body_that_has_ended_is_read_completely() -> None:
    body, connection = connected()
    body.dataReceived(b"x" * MIB)
    end(body)
    assert len(fired(body.read())) == MIB
    assert fired(body.read()) == b""
    assert connection.pauses == 1


def test_ten_seconds_of_silence_abort(clock: Clock) -> None:
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
    # The stall is reported, because other requests on the same path are affected too.
    assert connection.stalls == [("no byte came for 10 s", 10.0)]
    assert fired(body.ended) is None
    # The connection is lost a little later.
    end(body, ConnectionDone())
    failed(body.read(), Unavailable)


def test_silence_before_the_first_byte_counts(clock: Clock) -> None:
    body, connection = connected(clock)
    clock.advance(10)
    failed(body.read(), Unavailable)
    assert connection.closed


def test_paused_time_does_not_count_as_silence(clock: Clock) -> None:
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
def test_no_delayed_call_is_left_at_the_end(clock: Clock, why: Exception | None) -> None:
    body, _ = connected(clock)
    body.dataReceived(b"x" * MIB)
    fired(body.read())
    assert not body.ended.called
    end(body, why)
    assert fired(body.ended) is None
    assert clock.getDelayedCalls() == []


def test_abort_closes_the_connection(clock: Clock) -> None:
    body, connection = connected(clock)
    body.dataReceived(b"some")
    body.abort()
    assert connection.closed
    end(body, ConnectionDone())
    assert fired(body.ended) is None
    assert clock.getDelayedCalls() == []


def test_abort_after_the_end_keeps_the_connection() -> None:
    body, connection = connected()
    end(body)
    body.abort()
    assert not connection.closed


def test_abort_before_the_beginning(clock: Clock) -> None:
    Body("reg.example", clock, lambda why, silent: None).abort()


def test_cancelled_read_can_be_repeated() -> None:
    body, _ = connected()
    reading = body.read()
    reading.cancel()
    failed(reading, CancelledError)
    body.dataReceived(b"late")
    assert fired(body.read()) == b"late"
