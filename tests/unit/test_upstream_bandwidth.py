"""The bandwidth limit of all upstreams: rate, time windows and receive buffers."""

from __future__ import annotations

import math
import socket
import sys
from collections.abc import Callable
from datetime import time

import pytest
from twisted.internet.task import Clock

from ociregistry.config.file import Window
from ociregistry.upstream import bandwidth as module
from ociregistry.upstream.bandwidth import SMALLEST_BUFFER, Bandwidth, BandwidthLimit, Share, set_receive_buffer

KIB = 1024
MIB = 1024 * KIB
DAY = Window(time(8), time(18), 1000.0)
NIGHT = Window(time(22), time(6), 2000.0)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count no packet headers, so that figures are round."""
    monkeypatch.setattr(module, "_PAYLOAD_FRACTION", 1.0)


def at(hour: int, minute: int = 0, second: int = 0) -> Callable[[], time]:
    """Return a time-of-day function."""
    return lambda: time(hour, minute, second)


@pytest.mark.parametrize(
    ("now", "rate"),
    [
        (at(7, 59, 59), 50.0),
        (at(8), 1000.0),
        (at(17, 59, 59), 1000.0),
        (at(18), 50.0),
        (at(21, 59, 59), 50.0),
        (at(22), 2000.0),
        (at(0), 2000.0),
        (at(5, 59, 59), 2000.0),
        (at(6), 50.0),
    ],
)
def test_time_of_day_selects_the_rate(clock: Clock, now: Callable[[], time], rate: float) -> None:
    assert Bandwidth(50.0, (DAY, NIGHT), clock, now).rate == rate
    assert Bandwidth(None, (DAY, NIGHT), clock, now).rate == (None if rate == 50.0 else rate)


def test_first_matching_window_wins(clock: Clock) -> None:
    always = Window(time(0), time(0), 3000.0)
    assert Bandwidth(None, (DAY, always), clock, at(12)).rate == 1000.0
    assert Bandwidth(None, (always, DAY), clock, at(12)).rate == 3000.0
    assert Bandwidth(None, (DAY, always), clock, at(20)).rate == 3000.0


def test_window_in_force_is_told(clock: Clock) -> None:
    for now, told in (
        (at(9), BandwidthLimit(1000.0, "08:00-18:00")),
        (at(23), BandwidthLimit(2000.0, "22:00-06:00")),
        (at(19), BandwidthLimit(50.0)),
    ):
        assert Bandwidth(50.0, (DAY, NIGHT), clock, now).in_force == told
    assert Bandwidth(None, (), clock).in_force == BandwidthLimit(None, None)


def test_time_of_day_is_local(clock: Clock) -> None:
    assert Bandwidth(None, (Window(time(0), time(0), 5.0),), clock).rate == 5.0
    assert Bandwidth(7.0, (), clock).rate == 7.0


@pytest.mark.parametrize("windows", [(), (DAY,)])
def test_no_limit_no_delay(clock: Clock, windows: tuple[Window, ...]) -> None:
    bandwidth = Bandwidth(None, windows, clock, at(20))
    assert [bandwidth.consume(100 * MIB) for _ in range(100)] == [0.0] * 100
    assert bandwidth.buffer is None


def test_packet_headers_count(clock: Clock) -> None:
    bandwidth = Bandwidth(15_000.0, (), clock)
    assert bandwidth.consume(14_480) == pytest.approx(1.0)
    clock.advance(1)
    assert bandwidth.consume(0) == pytest.approx(0.0)


@pytest.mark.usefixtures("exact")
def test_delay_follows_received_bytes(clock: Clock) -> None:
    bandwidth = Bandwidth(1000.0, (), clock)
    assert bandwidth.consume(500) == 0.5
    # The next caller waits for both.
    assert bandwidth.consume(250) == 0.75
    clock.advance(0.5)
    assert bandwidth.consume(0) == 0.25
    clock.advance(0.25)
    assert bandwidth.consume(0) == 0.0


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("idle", [0.0, 0.0625, 0.125, 1.0, 100_000.0])
def test_unused_rate_accumulates_for_a_tenth_of_a_second(clock: Clock, idle: float) -> None:
    bandwidth = Bandwidth(1000.0, (), clock)
    clock.advance(idle)
    assert bandwidth.consume(1000) == pytest.approx(1 - min(idle, 0.1))


class EndlessBody:
    """An endless body in pieces of `size` bytes that obeys the returned delays."""

    def __init__(self, bandwidth: Bandwidth, size: int, clock: Clock, advance: list[tuple[float, int]]) -> None:
        self._bandwidth = bandwidth
        self._size = size
        self._clock = clock
        self._advance = advance
        self.reads = 0
        clock.callLater(0, self._read)

    def _read(self) -> None:
        self.reads += 1
        self._advance.append((self._clock.seconds(), self._size))
        # No reactor calls earlier than that.
        self._clock.callLater(max(0.0001, self._bandwidth.consume(self._size)), self._read)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("rate", [62_500, 250_000, 12_500_000])
@pytest.mark.parametrize("sizes", [(1460,), (16 * KIB,), (1460, 1460, 4096), (2048, 16 * KIB, 8192, 500, 16 * KIB)])
def test_rate_over_any_ten_seconds(clock: Clock, rate: int, sizes: tuple[int, ...]) -> None:
    bandwidth = Bandwidth(float(rate), (), clock)
    advance: list[tuple[float, int]] = []
    # Larger reads on a faster connection.
    bodies = [EndlessBody(bandwidth, size * max(1, rate // 250_000), clock, advance) for size in sizes]
    # Without the start, when nothing had arrived yet.
    clock.advance(100)
    first = clock.seconds()
    while clock.seconds() < first + 40:
        clock.advance(0.002)
    for start in range(int(first), int(first) + 30):
        total = sum(size for when, size in advance if start < when <= start + 10)
        assert total == pytest.approx(10 * rate, rel=0.05)
    assert all(body.reads > 10 for body in bodies)


@pytest.mark.usefixtures("exact")
def test_burst_after_a_pause_is_limited(clock: Clock) -> None:
    bandwidth = Bandwidth(100_000.0, (), clock)
    clock.advance(3600)
    at_once = 0
    while bandwidth.consume(1000) == 0.0:
        at_once += 1000
    assert at_once == 10_000


@pytest.mark.usefixtures("exact")
def test_new_limit_applies_immediately(clock: Clock) -> None:
    bandwidth = Bandwidth(None, (), clock, at(12))
    assert bandwidth.consume(MIB) == 0.0
    bandwidth.reconfigure(1000.0, ())
    # Bytes received without a limit cause no delay.
    assert bandwidth.consume(1000) == 1.0
    bandwidth.reconfigure(500.0, ())
    assert (bandwidth.rate, bandwidth.consume(0)) == (500.0, 2.0)
    bandwidth.reconfigure(500.0, (DAY,))
    assert (bandwidth.rate, bandwidth.consume(0)) == (1000.0, 1.0)
    bandwidth.reconfigure(None, ())
    assert (bandwidth.rate, bandwidth.consume(MIB)) == (None, 0.0)
    bandwidth.reconfigure(1000.0, ())
    assert bandwidth.consume(1000) == 1.0


@pytest.mark.usefixtures("exact")
def test_starting_window_applies_to_downloads_in_progress(clock: Clock) -> None:
    hour = 7
    bandwidth = Bandwidth(None, (DAY,), clock, lambda: time(hour))
    assert bandwidth.consume(1000) == 0.0
    hour = 8
    assert bandwidth.consume(1000) == 1.0


class Body:
    """A large body: its draws and its receive buffer sizes."""

    def __init__(self, bandwidth: Bandwidth, length: int | None = None) -> None:
        self.share = Share(bandwidth, length)
        self.buffers: list[int] = []
        self.share.begin(self.buffers.append)


@pytest.mark.parametrize(
    ("rate", "count", "buffer"),
    [
        (1000.0, 1, 16 * KIB),
        (250_000.0, 1, 75_000),
        (250_000.0, 3, 25_000),
        (250_000.0, 10, 16 * KIB),
        (4.0 * MIB, 1, MIB),
        (4.0 * MIB, 4, int(0.3 * MIB)),
    ],
)
def test_receive_buffers_hold_a_third_of_a_second_in_total(
    clock: Clock, rate: float, count: int, buffer: int
) -> None:
    for bandwidth in (
        Bandwidth(rate, (), clock),
        Bandwidth(None, (Window(time(0), time(0), rate),), clock),
    ):
        bodies = [Body(bandwidth) for _ in range(count)]
        assert bandwidth.buffer == buffer
        assert [body.buffers[-1] for body in bodies] == [buffer] * count


def test_ended_body_leaves_its_share_to_others(clock: Clock) -> None:
    bandwidth = Bandwidth(250_000.0, (), clock)
    first, second = Body(bandwidth), Body(bandwidth)
    assert first.buffers == [75_000, 37_500]
    second.share.end()
    second.share.end()
    assert (first.buffers[-1], len(second.buffers)) == (75_000, 1)
    first.share.end()
    assert bandwidth._shares == set()


def test_other_limit_divides_the_receive_buffers_of_bodies_in_progress_again(clock: Clock) -> None:
    now = time(12)
    bandwidth = Bandwidth(250_000.0, (Window(time(18), time(20), 500_000.0),), clock, lambda: now)
    first, second = Body(bandwidth), Body(bandwidth)
    for now in (time(18), time(19), time(20)):  # noqa: B007  # the lambda uses it
        first.share.consume(1)
    assert (first.buffers, second.buffers) == ([75_000, 37_500, 75_000, 37_500], [37_500, 75_000, 37_500])
    bandwidth.reconfigure(None, ())
    second.share.consume(1)
    assert first.buffers[-1] == second.buffers[-1] == MIB
    # A body that begins without a limit has the kernel choose.
    first.share.end()
    assert Body(bandwidth).buffers == []


@pytest.mark.usefixtures("exact")
def test_receive_buffer_counts_as_received(clock: Clock) -> None:
    bandwidth = Bandwidth(250_000.0, (), clock)
    share = Body(bandwidth, 200_000).share
    assert share.consume(25_000) == 0.4
    assert share.consume(25_000) == 0.5
    # No more than the body's length.
    assert share.consume(100_000) == 0.8
    assert share.consume(50_000) == 0.8
    share.end()
    assert Body(bandwidth).share.consume(25_000) == pytest.approx(1.2)


@pytest.mark.usefixtures("exact")
def test_prepaid_bytes_are_not_charged_again(clock: Clock) -> None:
    bandwidth = Bandwidth(250_000.0, (), clock)
    share = Body(bandwidth).share
    assert share.consume(1000) == 76_000 / 250_000
    Body(bandwidth)
    # Bytes charged in advance are still to be read.
    assert share.consume(30_000) == share.consume(7_500) == 76_000 / 250_000
    assert share.consume(1000) == 77_000 / 250_000


@pytest.mark.parametrize(
    ("length", "small"), [(0, True), (64 * KIB, True), (64 * KIB + 1, False), (math.inf, False), (None, False)]
)
def test_is_small(length: int | None, small: bool) -> None:
    assert Bandwidth.is_small(length) is small


_SEND_WINDOW = slice(228, 232)
"""Where the member tcpi_snd_wnd of Linux' struct tcp_info is, since 5.4."""


def test_distant_upstream_may_send_in_a_round_trip_what_the_receive_buffer_holds() -> None:
    """Also after a connection began with a small buffer."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALLEST_BUFFER)
        theirs, _ = server.accept()
        with theirs:
            theirs.sendall(bytes(SMALLEST_BUFFER))
            set_receive_buffer(ours, MIB)
            for _ in range(100):
                assert ours.recv(SMALLEST_BUFFER, socket.MSG_WAITALL)
                theirs.sendall(bytes(SMALLEST_BUFFER))
            window = theirs.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)[_SEND_WINDOW]
    assert int.from_bytes(window, sys.byteorder) > MIB // 2
