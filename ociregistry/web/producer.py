"""Sends content to a client as fast as it arrives and the client reads it.

One push producer serves plain and TLS connections, stored blobs and blobs that are still being downloaded. It waits
while bytes that it wrote are unsent in this process. A client takes bytes when its kernel acknowledges them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from twisted.internet import defer
from twisted.internet.interfaces import IPushProducer, IReactorTime
from twisted.web.http import Request
from zope.interface import implementer

from ociregistry.concurrency import Event
from ociregistry.errors import Unavailable
from ociregistry.log import Seldom
from ociregistry.pullthrough.cache import Content
from ociregistry.web.channel import Channel

_LARGEST_PIECE = 256 * 1024
"""Bytes per write: large enough to make the work per write negligible."""
_SMALLEST_PIECE = 16 * 1024
"""Bytes per write where memory is scarce."""

SLOWEST = 60.0
"""Seconds for which a client may take nothing."""
_LOOK = 5.0
"""Seconds from one look at what a client has taken to the next. A client that took nothing meanwhile has stalled."""
_MOST_UNSENT = 64 * 1024 * 1024
"""Bytes."""


class SlowClient(Exception):
    """The client does not read what is sent to it."""


class Unsent:
    """Bounds the bytes that this process holds for all clients together until they take them.

    The nearer the bound, the smaller the pieces that are written. Above the bound, stalled clients are dropped, those
    first that took their last byte the longest time ago; clients that do take bytes are never dropped.
    """

    def __init__(self, clock: IReactorTime, most: int = _MOST_UNSENT) -> None:
        self._clock = clock
        self._most = most
        self._total = 0
        self._held: dict[ContentProducer, int] = {}

    @property
    def piece(self) -> int:
        """The number of bytes to write at once."""
        return max(_SMALLEST_PIECE, min((self._most - self._total) // 64, _LARGEST_PIECE))

    def add(self, producer: ContentProducer, size: int) -> None:
        """Count the bytes that `producer` waits for its client to take; drop stalled clients as far as needed."""
        self._held[producer] = size
        self._total += size
        while self._total > self._most:
            oldest = min(self._held, key=lambda held: held.last_progress)
            if self._clock.seconds() - oldest.last_progress < _LOOK:
                return
            self.remove(oldest)
            oldest.drop()

    def remove(self, producer: ContentProducer) -> None:
        """Stop counting the bytes of `producer`, if they are counted."""
        self._total -= self._held.pop(producer, 0)


@dataclass(frozen=True, slots=True)
class SendLimits:
    """What all answers share."""

    patience: float
    """Seconds to wait for the next bytes of the content."""
    unsent: Unsent
    seldom: Seldom
    """For the log line that file descriptors are lacking."""


@implementer(IPushProducer)
class ContentProducer:
    """Writes a part of `content`, of which `in_memory` bytes are held in memory, to `request`."""

    def __init__(
        self, request: Request, content: Content, in_memory: int, limits: SendLimits, clock: IReactorTime
    ) -> None:
        self._request = request
        self._content = content
        self._in_memory = in_memory
        self._patience = limits.patience
        self._unsent = limits.unsent
        self._clock = clock
        self._paused = False
        self._dropped = False
        self._resumed = Event()
        self.last_progress = clock.seconds()
        """When the client was last seen to take bytes."""

    async def send(self, start: int, stop: int) -> None:
        """Write the bytes from `start` up to, not including, `stop`.

        Raises:
            Unavailable: the upstream sent no byte within `patience`, or the content is shorter than its size.
            SlowClient: the client took nothing for `SLOWEST` seconds, or for less where memory was needed.
        """
        self._request.registerProducer(self, True)
        try:
            available = 0
            while start < stop:
                if start >= available:
                    available = await self._more_than(start)
                data = await self._content.read(start, min(self._unsent.piece, available - start, stop - start))
                if not data:
                    raise Unavailable(f"{self._content}: the file ends at byte {start} of {self._content.size}")
                self._request.write(data)
                start += len(data)
                if self._paused:
                    await self._taken(len(data))
        finally:
            # A request whose client has disconnected has no channel.
            if self._request.channel is not None:
                self._request.unregisterProducer()

    async def _more_than(self, offset: int) -> int:
        waiting = self._content.more_than(offset).addTimeout(self._patience, self._clock)
        try:
            return await waiting
        except defer.TimeoutError:
            raise Unavailable(f"{self._content}: no byte came from the upstream for {self._patience:g} s") from None

    async def _taken(self, size: int) -> None:
        """Wait until nothing that was written is unsent in this process; the last piece had `size` bytes."""
        self.last_progress = self._clock.seconds()
        unacknowledged = self._unacknowledged()
        self._unsent.add(self, self._in_memory + size)
        try:
            while self._paused:
                silent = self._clock.seconds() - self.last_progress
                if self._dropped or silent >= SLOWEST:
                    needed = ", and memory was needed" if self._dropped else ""
                    raise SlowClient(f"the client read nothing for {silent:.0f} s{needed}")
                try:
                    await self._resumed.wait().addTimeout(min(_LOOK, SLOWEST - silent), self._clock)
                except defer.TimeoutError:
                    before, unacknowledged = unacknowledged, self._unacknowledged()
                    if unacknowledged != before:
                        self.last_progress = self._clock.seconds()
        finally:
            self._unsent.remove(self)

    def _unacknowledged(self) -> int | None:
        channel = cast("Channel | None", self._request.channel)
        return None if channel is None else channel.unacknowledged

    def drop(self) -> None:
        """Give the client up, to which bytes are unsent."""
        self._dropped = True
        self._resumed.fire()

    def pauseProducing(self) -> None:
        self._paused = True

    def resumeProducing(self) -> None:
        self._paused = False
        self._resumed.fire()

    def stopProducing(self) -> None:
        """Do nothing: on a lost connection, `notifyFinish` of the request cancels `send`."""
