"""One direction of a bad link: the bytes of its connections take turns, and arrive a while after they left."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

BUFFER = 64 * 1024
"""What one direction of a connection holds beside the wire."""

PIECE = 8 * 1024
"""What is read, sent and written at once."""

_TO_BE_TAKEN = 2 * PIECE
_TO_BE_SENT = BUFFER - _TO_BE_TAKEN
_TURN = 0.01
"""Seconds that one connection's turn lasts at most."""
_SMALLEST = 128
_LATE = 0.1
"""Seconds: by so much at most a link makes up for a timer that was late."""
_EPSILON = 1e-9

Item = bytes | Callable[[], None]
"""Data, or what is to happen when all data before it has got there."""


class Source(Protocol):
    """Where a flow's bytes come from."""

    def hold(self, held: bool) -> None:
        """Read no more for now, or go on."""


class Sink(Protocol):
    """Where a flow's bytes get to."""

    free: bool
    """Whether it has taken all that it was given."""

    def take(self, data: bytes) -> None:
        """This has arrived."""


class Wire:
    """What all connections of the link share in this direction: `rate` bytes a second, `delay` seconds to get there.

    While it is frozen nothing leaves and nothing arrives. It goes on with what it held then.
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
        """Be like this from now on; what is under way arrives when it would have."""
        self._rate, self._delay = rate, delay
        self._free_at = min(self._free_at, self._clock.seconds())
        self.run()

    def freeze(self, frozen: bool) -> None:
        """Stand still, or go on."""
        self._frozen = frozen
        self._free_at = max(self._free_at, self._clock.seconds())
        self.run()

    @property
    def window(self) -> float:
        """How much of one connection may be under way: what fills the wire, and what the other end may hold.

        Without a rate nothing says how much fills it: a buffer, if the way is not the shortest.
        """
        fills = self._rate * self._delay if self._rate is not None else BUFFER if self._delay else 0
        return _TO_BE_TAKEN + fills

    def ask(self, flow: Flow) -> None:
        """This flow wants a turn."""
        if flow not in self._turns and flow.wants(self.window):
            if not self._turns:
                self._free_at = max(self._free_at, self._clock.seconds())
            self._turns.append(flow)
        self.run()

    def run(self) -> None:
        """Do all that is due by now."""
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
            # Nobody overtakes, also when the delay has become shorter.
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
        """This is to go over the wire."""
        if self._dropped:
            return
        self._queued.append(item)
        self._waiting += _size(item)
        if self._waiting > _TO_BE_SENT - PIECE:
            self._source.hold(True)
        self._wire.ask(self)

    def drop(self) -> None:
        """Nothing gets there any more, not even what is under way."""
        self._dropped = True
        self._queued.clear()
        self._arrived.clear()

    def wants(self, window: float) -> bool:
        """Is there something that may leave? What `window` has no room for waits until the other end takes more."""
        return bool(self._queued) and (callable(self._queued[0]) or self._under_way < window)

    def launch(self, most: int) -> Item:
        """The next that leaves."""
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
        """It has arrived."""
        if not self._dropped:
            self._arrived.append(item)
            self.flush()

    def flush(self) -> None:
        """Hand over what has arrived, as far as it is taken."""
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
