"""How much all upstreams together may bring: a budget that fills steadily, and that every body draws on."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, time

from twisted.internet.interfaces import IReactorTime

from ociregistry.config.file import Window

_OF_A_PACKET = 1448 / 1500
"""The part of a packet on the link that is ours: the rest is headers, which the limit is for as well."""
_BURST = 0.1
"""Seconds for which an unused budget is kept."""
_BUFFERED = 0.3
"""Seconds of the budget that the kernel takes before we read it, for all connections together: what is under way on
a link to the other side of the world."""
SMALLEST_BUFFER = 16 * 1024
_LARGEST_BUFFER = 1024 * 1024
_SMALL = 64 * 1024
"""Bytes of a body that does not wait behind larger ones."""


def _local_time() -> time:
    return datetime.now().astimezone().time()


class Bandwidth:
    """The budget. What is small is paid for, but does not wait: what is large waits for it afterwards."""

    def __init__(
        self,
        limit: float | None,
        windows: tuple[Window, ...],
        clock: IReactorTime,
        now: Callable[[], time] = _local_time,
    ) -> None:
        """`limit` is in bytes a second, None for none; the first of the `windows` that holds is in its place."""
        self.reconfigure(limit, windows)
        self._clock = clock
        self._now = now
        self._left = 0.0
        self._counted = clock.seconds()
        self._shares: set[Share] = set()

    def reconfigure(self, limit: float | None, windows: tuple[Window, ...]) -> None:
        """From now on it is these."""
        self._limit = limit
        self._windows = windows

    @property
    def rate(self) -> float | None:
        """Bytes a second at this time; None for no limit."""
        if not self._windows:
            return self._limit
        now = self._now()
        return next((window.rate for window in self._windows if window.holds(now)), self._limit)

    @property
    def buffer(self) -> int | None:
        """How many bytes the kernel may receive for one connection before they are read; None for its own choice."""
        rate = self.rate
        if rate is None:
            return None
        each = rate * _BUFFERED / max(1, len(self._shares))
        return int(min(max(each, SMALLEST_BUFFER), _LARGEST_BUFFER))

    def join(self, share: Share) -> None:
        """A large body begins."""
        self._shares.add(share)
        self._rebalance()

    def leave(self, share: Share) -> None:
        """Its body has ended; the others get its part of the buffers."""
        self._shares.discard(share)
        self._rebalance()

    def _rebalance(self) -> None:
        buffer = self.buffer
        if buffer is not None:
            for share in self._shares:
                share.resize(buffer)

    def draw(self, count: int) -> float:
        """Pays for `count` bytes that came; gives for how many seconds no more should be read."""
        now = self._clock.seconds()
        elapsed, self._counted = now - self._counted, now
        if self.rate is None:
            self._left = 0.0
            return 0.0
        rate = self.rate * _OF_A_PACKET
        self._left = min(self._left + elapsed * rate, rate * _BURST) - count
        return max(0.0, -self._left / rate)

    @staticmethod
    def is_small(length: int | None) -> bool:
        """Whether a body of so many bytes, if that is known, need not wait."""
        return length is not None and length <= _SMALL


class Share:
    """What one body draws: what was read, and what the kernel has received for it meanwhile."""

    def __init__(self, bandwidth: Bandwidth, length: int | None) -> None:
        """`length` is that of the body, in bytes, if it is known."""
        self._bandwidth = bandwidth
        self._length = length
        self._resize: Callable[[int], object] = lambda buffer: None
        self._buffer = 0
        self._read = 0
        self._paid = 0

    def begin(self, resize: Callable[[int], object]) -> None:
        """The body has its connection; `resize` sets how many bytes the kernel may receive before they are read."""
        self._resize = resize
        self._bandwidth.join(self)

    def resize(self, buffer: int) -> None:
        """The kernel may receive so many bytes before they are read."""
        self._buffer = buffer
        self._resize(buffer)

    def draw(self, count: int) -> float:
        """Pays for what came; `count` bytes of it were read. Gives for how many seconds no more should be."""
        self._read += count
        advance = self._read + self._buffer
        advance = advance if self._length is None else min(advance, self._length)
        due = max(0, advance - self._paid)
        self._paid += due
        return self._bandwidth.draw(due)

    def end(self) -> None:
        """No more will come."""
        self._bandwidth.leave(self)
