"""The bandwidth limit of all upstreams together: a token bucket that every body draws on."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, time

from twisted.internet.interfaces import IReactorTime

from ociregistry.config.file import Window

_PAYLOAD_FRACTION = 1448 / 1500
"""The payload's fraction of a packet; the rest is headers, to which the limit applies as well."""
_BURST_SECONDS = 0.1
"""Seconds of the rate that the bucket holds at most."""
_BUFFER_SECONDS = 0.3
"""Seconds of the rate that all receive buffers together hold: a round trip to the other side of the world."""
SMALLEST_BUFFER = 16 * 1024
"""Bytes of a connection's receive buffer, at least."""
_LARGEST_BUFFER = 1024 * 1024
"""Bytes of a connection's receive buffer, at most."""
_PIECE_SECONDS = 0.02
"""Seconds of the rate that are read at once: reading less takes more of the processor, more makes bursts."""
_SMALLEST_PIECE = 64 * 1024
"""Bytes."""
LARGEST_PIECE = 1024 * 1024
"""Bytes that are read at once, at most."""
_LARGEST_SMALL = 64 * 1024
"""Bytes up to which a body is small: it is not delayed."""


def set_receive_buffer(connection: socket.socket, size: int) -> None:
    """Set the size in bytes of the kernel's receive buffer for a TCP connection, and let the window grow with it."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    # Otherwise Linux keeps the window of a smaller buffer, and a distant upstream sends no more in a round trip. The
    # kernel doubles the size of a buffer.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, 2 * size)


def _local_time() -> time:
    return datetime.now().astimezone().time()


@dataclass(frozen=True, slots=True)
class BandwidthLimit:
    """The limit that is in force."""

    limit: float | None = None
    """Bytes per second of all upstreams together; None for no limit."""
    window: str | None = None
    """The times of the daily window that it is from; None where it is the limit of the rest of the day."""


class Bandwidth:
    """The token bucket, and the large bodies that share its rate.

    Small bodies draw on the bucket without delay; large bodies are delayed for them afterwards.
    """

    def __init__(
        self,
        limit: float | None,
        windows: tuple[Window, ...],
        clock: IReactorTime,
        now: Callable[[], time] = _local_time,
    ) -> None:
        """Create the bucket.

        `limit` is in bytes per second, None for no limit. The first of the `windows` that contains the local time
        replaces it.
        """
        self.reconfigure(limit, windows)
        self._divided: float | None = None
        """The rate by which the receive buffers were divided."""
        self._clock = clock
        self._now = now
        self._tokens = 0.0
        self._refilled_at = clock.seconds()
        self._shares: set[Share] = set()

    def reconfigure(self, limit: float | None, windows: tuple[Window, ...]) -> None:
        """Replace the limit and the windows, in the units of the constructor."""
        self._limit = limit
        self._windows = windows

    @property
    def rate(self) -> float | None:
        """The limit at this time in bytes per second; None for no limit."""
        window = self._window
        return self._limit if window is None else window.rate

    @property
    def in_force(self) -> BandwidthLimit:
        """The limit at this time, and where it is from."""
        window = self._window
        return BandwidthLimit(self._limit) if window is None else BandwidthLimit(window.rate, str(window))

    @property
    def _window(self) -> Window | None:
        if not self._windows:
            return None
        now = self._now()
        return next((window for window in self._windows if window.holds(now)), None)

    @property
    def buffer(self) -> int | None:
        """The bytes of the receive buffer for each large body; None for the kernel's own choice."""
        rate = self.rate
        if rate is None:
            return None
        each = rate * _BUFFER_SECONDS / max(1, len(self._shares))
        return int(min(max(each, SMALLEST_BUFFER), _LARGEST_BUFFER))

    @property
    def piece(self) -> int:
        """The bytes that a large body reads at once, at most."""
        rate = self.rate
        return LARGEST_PIECE if rate is None else int(min(max(rate * _PIECE_SECONDS, _SMALLEST_PIECE), LARGEST_PIECE))

    def join(self, share: Share) -> None:
        """Add the share of a large body that begins, and divide the receive buffers again."""
        self._shares.add(share)
        self._rebalance()

    def leave(self, share: Share) -> None:
        """Remove the share of a body that has ended, and divide the receive buffers among the others."""
        self._shares.discard(share)
        self._rebalance()

    def _rebalance(self) -> None:
        buffer = self.buffer
        if buffer is None and self._divided is not None:
            # The kernel no longer chooses the size of a buffer that was set.
            buffer = _LARGEST_BUFFER
        self._divided = self.rate
        if buffer is not None:
            for share in self._shares:
                share.resize(buffer)

    def consume(self, count: int) -> float:
        """Take `count` received bytes from the bucket; return the seconds for which no more should be read."""
        now = self._clock.seconds()
        elapsed, self._refilled_at = now - self._refilled_at, now
        limit = self.rate
        if limit != self._divided:
            self._rebalance()
        if limit is None:
            self._tokens = 0.0
            return 0.0
        rate = limit * _PAYLOAD_FRACTION
        self._tokens = min(self._tokens + elapsed * rate, rate * _BURST_SECONDS) - count
        return max(0.0, -self._tokens / rate)

    @staticmethod
    def is_small(length: int | None) -> bool:
        """Return whether a body of `length` bytes is small, so that it is not delayed; None is an unknown length."""
        return length is not None and length <= _LARGEST_SMALL


class Share:
    """The use of the bucket by one large body: the bytes that were read, and those in its receive buffer.

    A full receive buffer is assumed, because its bytes have used the link already.
    """

    def __init__(self, bandwidth: Bandwidth, length: int | None) -> None:
        """Set up the share of a body of `length` bytes, None if that is unknown."""
        self._bandwidth = bandwidth
        self._length = length
        self._resize: Callable[[int], object] = lambda buffer: None
        self._buffer = 0
        self._read = 0
        self._charged = 0

    def begin(self, resize: Callable[[int], object]) -> None:
        """Join the bandwidth when the body has its connection; `resize` sets its receive buffer in bytes."""
        self._resize = resize
        self._bandwidth.join(self)

    def resize(self, buffer: int) -> None:
        """Set the body's receive buffer to `buffer` bytes."""
        self._buffer = buffer
        self._resize(buffer)

    def consume(self, count: int) -> float:
        """Count `count` bytes as read, and take what was received meanwhile from the bucket.

        Returns:
            The seconds for which no more should be read.
        """
        self._read += count
        received = self._read + self._buffer
        received = received if self._length is None else min(received, self._length)
        due = max(0, received - self._charged)
        self._charged += due
        return self._bandwidth.consume(due)

    def end(self) -> None:
        """Leave the bandwidth when the body has ended."""
        self._bandwidth.leave(self)
