"""One direction of a bad link: its connections take turns sending, and bytes arrive after a delay."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

BUFFER = 64 * 1024
"""Bytes that one direction of a connection buffers beside the wire."""

PIECE = 8 * 1024
"""Bytes that are read, sent and written at once."""

_TO_BE_TAKEN = 2 * PIECE
_TO_BE_SENT = BUFFER - _TO_BE_TAKEN
_TURN = 0.01
"""Maximum duration of one connection's turn, in seconds."""
_SMALLEST = 128
_LATE = 0.1
"""Maximum delay of a timer that the link makes up for, in seconds."""
_EPSILON = 1e-9

Item = bytes | Callable[[], None]
"""Data, or an action to run when all data before it has arrived."""


class Source(Protocol):
    """Where a flow's bytes come from."""

    def hold(self, held: bool) -> None:
        """Pause or resume reading."""


class Sink(Protocol):
    """Where a flow's bytes arrive."""

    free: bool
    """Whether everything delivered so far was taken."""

    def take(self, data: bytes) -> None:
        """Take bytes that have arrived."""


class Wire:
    """One direction of the link, shared by all connections: `rate` bytes per second, `delay` seconds to arrive.

    A frozen wire sends and delivers nothing, and keeps its contents for later.
    """

    def __init__(self, clock: Any) -> None:
        self._clock = clock
        self._rate: float | None = None
        self._delay = 0.0
        self._frozen = False
        self._turns: deque[Flow] = deque()
        self._flight: deque[tuple[float, Flow, Item]] = deque()
        self._free_at = 0.0
        self._timer: Any = None
        self._running = False

    def reconfigure(self, rate: float | None, delay: float) -> None:
        """Change rate and delay; what is on the wire arrives at its original time."""
        self._rate, self._delay = rate, delay
        self._free_at = min(self._free_at, self._clock.seconds())
        self.run()

    def freeze(self, frozen: bool) -> None:
        """Freeze or continue."""
        self._frozen = frozen
        self._free_at = max(self._free_at, self._clock.seconds())
        self.run()

    @property
    def window(self) -> float:
        """How many bytes of one connection may be on the wire: the wire's capacity plus the receiver's buffer.

        Without a rate the capacity is unknown: use one buffer, unless the delay is zero.
        """
        fills = self._rate * self._delay if self._rate is not None else BUFFER if self._delay else 0
        return _TO_BE_TAKEN + fills

    def ask(self, flow: Flow) -> None:
        """Queue a flow for a turn."""
        if flow not in self._turns and flow.wants(self.window):
            if not self._turns:
                self._free_at = max(self._free_at, self._clock.seconds())
            self._turns.append(flow)
        self.run()

    def run(self) -> None:
        """Send and deliver everything that is due."""
        if self._running:
            return
        self._running = True
        try:
            while not self._frozen and (self._land() or self._launch()):
                pass
        finally:
            self._running = False
        self._wake_later()

    def _due(self, when: float) -> bool:
        return bool(when <= self._clock.seconds() + _EPSILON)

    def _land(self) -> bool:
        if not self._flight or not self._due(self._flight[0][0]):
            return False
        _, flow, item = self._flight.popleft()
        flow.land(item)
        return True

    def _launch(self) -> bool:
        if not self._turns or not self._due(self._free_at):
            return False
        flow = self._turns.popleft()
        if flow.wants(self.window):
            now = self._clock.seconds()
            item = flow.launch(PIECE if self._rate is None else int(min(PIECE, max(_SMALLEST, self._rate * _TURN))))
            if self._rate is not None and isinstance(item, bytes):
                self._free_at = max(self._free_at, now - _LATE) + len(item) / self._rate
            arrives = max(now, self._free_at) + self._delay
            # Keep the order, also when the delay has become shorter.
            self._flight.append((max(arrives, self._flight[-1][0] if self._flight else 0.0), flow, item))
            if flow.wants(self.window):
                self._turns.append(flow)
        return True

    def _wake_later(self) -> None:
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer = None
        due = [self._flight[0][0]] if self._flight else []
        due += [self._free_at] if self._turns else []
        if due and not self._frozen:
            self._timer = self._clock.callLater(max(0.0, min(due) - self._clock.seconds()), self.run)


class Flow:
    """One direction of one connection."""

    def __init__(self, wire: Wire, source: Source, sink: Sink) -> None:
        self._wire = wire
        self._source = source
        self._sink = sink
        self._queued: deque[Item] = deque()
        self._arrived: deque[Item] = deque()
        self._waiting = 0
        self._under_way = 0
        self._dropped = False

    def put(self, item: Item) -> None:
        """Queue an item for sending."""
        if self._dropped:
            return
        self._queued.append(item)
        self._waiting += _size(item)
        if self._waiting > _TO_BE_SENT - PIECE:
            self._source.hold(True)
        self._wire.ask(self)

    def drop(self) -> None:
        """Discard everything, also what is on the wire."""
        self._dropped = True
        self._queued.clear()
        self._arrived.clear()

    def wants(self, window: float) -> bool:
        """Whether anything may be sent now. Data beyond `window` waits until the receiver takes more."""
        return bool(self._queued) and (callable(self._queued[0]) or self._under_way < window)

    def launch(self, most: int) -> Item:
        """Take the next item to send, at most `most` bytes."""
        item = self._queued.popleft()
        if isinstance(item, bytes):
            if len(item) > most:
                self._queued.appendleft(item[most:])
                item = item[:most]
            self._waiting -= len(item)
            self._under_way += len(item)
            if self._waiting <= _TO_BE_SENT - 2 * PIECE:
                self._source.hold(False)
        return item

    def land(self, item: Item) -> None:
        """Receive an item that has arrived."""
        if not self._dropped:
            self._arrived.append(item)
            self.flush()

    def flush(self) -> None:
        """Deliver what has arrived, as far as the sink takes it."""
        while self._arrived and (self._sink.free or callable(self._arrived[0])):
            item = self._arrived.popleft()
            if isinstance(item, bytes):
                self._under_way -= len(item)
                self._sink.take(item)
            else:
                item()
        self._wire.ask(self)


def _size(item: Item) -> int:
    return len(item) if isinstance(item, bytes) else 0
