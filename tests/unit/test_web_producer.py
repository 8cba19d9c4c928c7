"""Sending bodies: flow control, timeouts and failures."""

from __future__ import annotations

import errno
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.admin.requests import Requests
from ociregistry.errors import Unavailable
from ociregistry.log import Seldom
from ociregistry.web.channel import Channel
from ociregistry.web.producer import ContentProducer, SendLimits, Unsent
from ociregistry.web.resource import Answer
from ociregistry.web.site import RegistrySite
from tests.images import MIB
from tests.unit.support.common import texts
from tests.unit.support.raw_clients import Growing, Handler, RawClient, site

PIECE = 256 * 1024
PATIENCE = 45.0


@pytest.fixture
def content() -> Growing:
    """Return content of ten pieces."""
    return Growing(10 * PIECE)


@pytest.fixture
def server(content: Growing, clock: Clock) -> RegistrySite:
    """Return a server that sends it."""
    handler = Handler()
    handler.give = lambda: Answer(200, content, ranged=True)
    return site(handler, clock, PATIENCE)


@pytest.fixture
def client(server: RegistrySite) -> RawClient:
    """Return a client that has requested it."""
    return RawClient(server).ask("/v2/x")


def test_available_content_is_sent_immediately(content: Growing, client: RawClient) -> None:
    content.grow(bytes(10 * PIECE))
    assert client.got().whole
    assert not client.ended


def test_paused_client_gets_nothing(content: Growing, client: RawClient) -> None:
    client.pause()
    content.grow(bytes(3 * PIECE))
    # One piece was already being sent.
    assert len(client.got().body) == PIECE
    content.grow(bytes(7 * PIECE))
    assert len(client.got().body) == PIECE
    client.resume()
    assert client.got().whole


def test_client_may_pause_repeatedly(content: Growing, client: RawClient) -> None:
    content.grow(bytes(range(256)) * 2)
    for count in range(10):
        client.pause()
        client.resume()
        content.grow(bytes(100))
        assert len(client.got().body) == 512 + 100 * (count + 1)
    assert client.got().body[:512] == bytes(range(256)) * 2


@pytest.mark.parametrize("paused", [False, True])
def test_disconnected_client_releases_content(
    content: Growing, client: RawClient, server: RegistrySite, clock: Clock, paused: bool
) -> None:
    content.grow(bytes(100))
    if paused:
        client.pause()
        content.grow(bytes(3 * PIECE))
    client.leave()
    assert content.closed == 1
    assert server.in_flight.idle().called
    assert clock.getDelayedCalls() == []


def test_stalled_upstream_truncates_the_response(
    content: Growing, client: RawClient, clock: Clock, events: list[LogEvent]
) -> None:
    content.grow(bytes(100))
    clock.advance(PATIENCE - 1)
    content.grow(bytes(100))
    clock.advance(PATIENCE - 1)
    assert not client.ended
    clock.advance(1)
    assert client.ended
    assert len(client.got().body) == 200
    assert content.closed == 1
    (line,) = texts(events, LogLevel.error)
    assert line.startswith("GET /v2/x: response truncated: ")
    assert "no byte came from the upstream for 45 s" in line


def test_stalled_client_is_dropped_after_a_minute(
    content: Growing, client: RawClient, clock: Clock, events: list[LogEvent]
) -> None:
    client.pause()
    content.grow(bytes(3 * PIECE))
    clock.advance(59)
    assert not client.ended
    clock.advance(1)
    assert client.ended
    client.leave()
    assert content.closed == 1
    # Not logged as an error.
    assert texts(events, LogLevel.error) == []
    assert len(texts(events, LogLevel.warn)) == 1


def test_client_that_takes_bytes_is_not_dropped(
    content: Growing, client: RawClient, clock: Clock, events: list[LogEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its kernel acknowledges counts, although the transport resumes much later."""
    unacknowledged = 1_000_000
    monkeypatch.setattr(Channel, "unacknowledged", property(lambda _: unacknowledged))
    client.pause()
    content.grow(bytes(3 * PIECE))
    for _ in range(10):
        clock.pump([1] * 55)
        unacknowledged -= 1
    assert not client.ended
    clock.pump([1] * 59)
    assert not client.ended
    clock.pump([1] * 10)
    assert client.ended
    assert texts(events, LogLevel.warn) == ["GET /v2/x: 192.0.2.1:40000: the client read nothing for 60 s"]


class Holder:
    """A producer whose client took its last byte at `last_progress`."""

    def __init__(self, last_progress: float) -> None:
        self.last_progress = last_progress
        self.dropped = False

    def drop(self) -> None:
        """Note that it was dropped."""
        self.dropped = True


def test_oldest_stalled_clients_are_dropped_above_the_bound(clock: Clock) -> None:
    unsent = Unsent(clock, 100)
    clock.advance(10)
    holders: list[Any] = [Holder(at) for at in (3, 1, 2, 7, 8, 9)]
    for holder in holders:
        unsent.add(holder, 30)
    assert [holder.dropped for holder in holders] == [True, True, True, False, False, False]
    # The others took bytes a moment ago.
    late: Any = Holder(10)
    unsent.add(late, 30)
    assert not any(holder.dropped for holder in holders[3:])
    clock.advance(10)
    holders[3].last_progress = 15.1
    unsent.remove(late)
    unsent.add(late, 31)
    assert [holder.dropped for holder in holders[3:]] == [False, True, False]


def test_pieces_become_smaller_near_the_bound(clock: Clock) -> None:
    unsent = Unsent(clock)
    sizes = []
    for _ in range(2000):
        sizes.append(unsent.piece)
        holder: Any = Holder(0)
        unsent.add(holder, unsent.piece)
    assert sizes[:100] == [PIECE] * 100
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 16 * 1024
    # All of them together, although none has stalled yet.
    assert sum(sizes) < 96 * 1024 * 1024


def test_failure_truncates_the_response(content: Growing, client: RawClient, events: list[LogEvent]) -> None:
    content.grow(bytes(100))
    content.fail(Unavailable("the connection broke"))
    assert client.ended
    assert client.got().body == bytes(100)
    assert texts(events, LogLevel.error) == ["GET /v2/x: response truncated: the connection broke"]
    assert content.closed == 1


def test_truncated_file_truncates_the_response(content: Growing, client: RawClient) -> None:
    """The file is shorter than `more_than` reported."""
    content.read = lambda offset, count: Growing(0).read(0, 0)  # type: ignore[method-assign]  # returns no data
    content.grow(bytes(100))
    assert client.ended
    assert client.got().body == b""


def test_disk_error_truncates_the_response(content: Growing, client: RawClient, events: list[LogEvent]) -> None:
    content.fail(OSError(5, "Input/output error"))
    assert client.ended
    assert "Input/output error" in texts(events, LogLevel.error)[0]


@pytest.mark.expect_logged_failures
def test_defect_truncates_the_response_with_a_traceback(
    content: Growing, client: RawClient, events: list[LogEvent]
) -> None:
    content.fail(ZeroDivisionError("a secret"))
    assert client.ended
    assert b"secret" not in client.received
    assert [event["log_failure"].type for event in events if "log_failure" in event] == [ZeroDivisionError]


def test_range_is_read_from_its_start(content: Growing, server: RegistrySite) -> None:
    client = RawClient(server).ask("/v2/x", Range=f"bytes={PIECE}-{PIECE + 9}")
    content.grow(bytes(PIECE) + b"0123")
    assert client.got().body == b"0123"
    content.grow(b"456789abcdef")
    assert client.got().body == b"0123456789"
    assert client.got().whole


def test_two_clients_read_at_their_own_speed(content: Growing, server: RegistrySite) -> None:
    fast, slow = RawClient(server).ask("/v2/x"), RawClient(server).ask("/v2/x")
    slow.pause()
    content.grow(bytes(10 * PIECE))
    assert fast.got().whole
    assert len(slow.got().body) == PIECE
    slow.resume()
    assert slow.got().whole
    assert content.closed == 2


class FullAtFirst:
    """A channel, and a file of five bytes: the socket takes none until three seconds have passed."""

    socket = object()
    unacknowledged = 0

    def __init__(self, clock: Clock) -> None:
        self.size = 5
        self.in_thread: list[bool] = []
        self._clock = clock

    def registerProducer(self, producer: ContentProducer, streaming: bool) -> None:
        self._producer = producer

    def unregisterProducer(self) -> None:
        pass

    def resume_when_writable(self) -> None:
        self._producer.resumeProducing()

    def whole_packets(self) -> AbstractContextManager[None]:
        return nullcontext()

    def more_than(self, offset: int) -> Deferred[int]:
        return succeed(self.size)

    async def send(self, socket: object, start: int, count: int, *, in_thread: bool) -> int:
        self.in_thread.append(in_thread)
        if self._clock.seconds() < 3:
            self._clock.advance(1)
            return 0
        return count


def test_first_byte_is_sent_when_the_socket_takes_it(clock: Clock) -> None:
    full: Any = FullAtFirst(clock)
    began = clock.seconds()
    limits = SendLimits(PATIENCE, Unsent(clock), Seldom(clock), lambda: True, Requests())
    producer = ContentProducer(full, full, 0, limits, clock)
    ended = Deferred.fromCoroutine(producer.send(0, 5))
    assert ended.called
    assert (producer.sent, producer.first_sent_at) == (5, began + 3)


class Takes(FullAtFirst):
    """A channel and a file, of which the client takes these numbers of bytes, one after the other."""

    def __init__(self, clock: Clock, *takes: int) -> None:
        super().__init__(clock)
        self.size = sum(takes)
        self._takes = list(takes)

    async def send(self, socket: object, start: int, count: int, *, in_thread: bool) -> int:
        self.in_thread.append(in_thread)
        return self._takes.pop(0)


class LacksDescriptors(FullAtFirst):
    """A channel and a file, of which no thread can send: there is no descriptor left."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.written = b""

    async def send(self, socket: object, start: int, count: int, *, in_thread: bool) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def read(self, offset: int, count: int) -> Deferred[bytes]:
        return succeed(b"12345"[offset : offset + count])

    def write(self, data: bytes) -> None:
        self.written += data


def test_answer_that_has_begun_is_not_cut_short_without_a_descriptor(clock: Clock) -> None:
    lacking: Any = LacksDescriptors(clock)
    limits = SendLimits(PATIENCE, Unsent(clock), Seldom(clock), lambda: True, Requests())
    producer = ContentProducer(lacking, lacking, 0, limits, clock)
    assert Deferred.fromCoroutine(producer.send(1, 5)).called
    assert (lacking.written, producer.sent) == (b"2345", 4)


def test_several_transfers_are_sent_by_threads(clock: Clock) -> None:
    """Each while its client is fast; one alone is not, also after the others have ended."""
    limits = SendLimits(PATIENCE, Unsent(clock), Seldom(clock), lambda: True, Requests())

    def send(content: Any) -> Deferred[None]:
        return Deferred.fromCoroutine(ContentProducer(content, content, 0, limits, clock).send(0, content.size))

    slow: Any = FullAtFirst(clock)
    slow.resume_when_writable = lambda: None
    waiting = send(slow)
    several = Takes(clock, MIB, 0, MIB, MIB, 20_000, MIB, MIB)
    assert send(several).called
    assert several.in_thread == [False, True, False, True, True, False, True]
    waiting.cancel()
    waiting.addErrback(lambda failure: failure.trap(CancelledError))
    alone = Takes(clock, MIB, MIB)
    assert send(alone).called
    assert alone.in_thread == [False, False]
