"""Sends content to a client as fast as it arrives and the client reads it.

One push producer serves plain and TLS connections, stored blobs and blobs that are still being downloaded. It waits
while bytes that it wrote are unsent in this process. A client takes bytes when its kernel acknowledges them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from twisted.internet import defer
from twisted.internet.interfaces import IPushProducer, IReactorTime
from zope.interface import implementer

from ociregistry.admin.requests import Requests
from ociregistry.concurrency import Event
from ociregistry.errors import Unavailable, is_out_of_descriptors
from ociregistry.log import Seldom
from ociregistry.pullthrough.cache import Content, FileContent, is_in_file
from ociregistry.web.channel import Channel

_LARGEST_PIECE = 256 * 1024
"""Bytes per write: large enough to make the work per write negligible."""
_SMALLEST_PIECE = 16 * 1024
"""Bytes per write where memory is scarce."""
_TAKEN_AT_ONCE = 512 * 1024
"""Bytes that a client has to take at once for a thread to send to it: for less, that costs several times as much."""

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
    """What all exchanges share."""

    patience: float
    """Seconds to wait for the next bytes of the content."""
    unsent: Unsent
    seldom: Seldom
    """For the log line that file descriptors are lacking."""
    logs_requests: Callable[[], bool]
    """Tells whether the access log is written."""
    requests: Requests
    """Counts all answers."""
    transfers: set[ContentProducer] = field(default_factory=set)
    """Those that are sending files. Threads send for several; one alone leaves the other cores to its client."""


class ClientGone(Exception):
    """The client has closed the connection."""


@implementer(IPushProducer)
class ContentProducer:
    """Sends a part of `content`, of which `in_memory` bytes are held in memory, to the client of `channel`."""

    def __init__(
        self, channel: Channel, content: Content, in_memory: int, limits: SendLimits, clock: IReactorTime
    ) -> None:
        self._channel = channel
        self._content = content
        self._in_memory = in_memory
        self._patience = limits.patience
        self._unsent = limits.unsent
        self._transfers = limits.transfers
        self._is_fast = False
        """Whether the client took much when bytes of a file were last sent to it."""
        self._clock = clock
        self._paused = False
        self._dropped = False
        self._resumed = Event()
        self.sent = 0
        """The number of bytes that were sent."""
        self.first_sent_at: float | None = None
        """When the first of them was sent."""
        self.last_progress = clock.seconds()
        """When the client was last seen to take bytes."""

    async def send(self, start: int, stop: int) -> None:
        """Send the bytes from `start` up to, not including, `stop`.

        Raises:
            Unavailable: the upstream sent no byte within `patience`, or the content is shorter than its size.
            SlowClient: the client took nothing for `SLOWEST` seconds, or for less where memory was needed.
            ClientGone: the connection is lost.
        """
        self._channel.registerProducer(self, True)
        try:
            available = 0
            while start < stop:
                if start >= available:
                    available = await self._more_than(start)
                count = await self._send_some(start, min(available, stop) - start)
                # A socket of which the buffer is full takes none.
                if count and self.first_sent_at is None:
                    self.first_sent_at = self._clock.seconds()
                start += count
                self.sent += count
        finally:
            self._transfers.discard(self)
            self._channel.unregisterProducer()

    async def _send_some(self, start: int, count: int) -> int:
        try:
            if self._channel.socket is not None and is_in_file(self._content):
                return await self._send_file(self._content, start, count)
            return await self._write(start, min(count, self._unsent.piece))
        except EOFError:
            raise Unavailable(f"{self._content}: the file ends at byte {start} of {self._content.size}") from None
        except ConnectionError as error:
            raise ClientGone(str(error)) from error

    async def _send_file(self, content: FileContent, start: int, count: int) -> int:
        """Send bytes of a file to the socket itself, in turn with all other connections."""
        self._transfers.add(self)
        self._paused = True
        self._channel.resume_when_writable()
        await self._taken(0)
        socket = self._channel.socket
        if socket is None:
            raise ClientGone("the connection is lost")
        try:
            with self._channel.whole_packets():
                in_thread = self._is_fast and len(self._transfers) > 1
                sent = await content.send(socket, start, count, in_thread=in_thread)
        except OSError as error:
            if not is_out_of_descriptors(error):
                raise
            # A thread that sends needs one more than a thread that reads.
            return await self._write(start, min(count, self._unsent.piece))
        self._is_fast = sent >= _TAKEN_AT_ONCE
        return sent

    async def _write(self, start: int, count: int) -> int:
        data = await self._content.read(start, count)
        if not data:
            raise EOFError
        self._channel.write(data)
        if self._paused:
            await self._taken(len(data))
        return len(data)

    async def _more_than(self, offset: int) -> int:
        waiting = self._content.more_than(offset).addTimeout(self._patience, self._clock)
        try:
            return await waiting
        except defer.TimeoutError:
            raise Unavailable(f"{self._content}: no byte came from the upstream for {self._patience:g} s") from None

    async def _taken(self, size: int) -> None:
        """Wait until nothing that was written is unsent in this process; the last piece had `size` bytes."""
        self.last_progress = self._clock.seconds()
        unacknowledged = self._channel.unacknowledged
        held = self._in_memory + size
        if held:
            self._unsent.add(self, held)
        try:
            while self._paused:
                silent = self._clock.seconds() - self.last_progress
                if self._dropped or silent >= SLOWEST:
                    needed = ", and memory was needed" if self._dropped else ""
                    raise SlowClient(f"the client read nothing for {silent:.0f} s{needed}")
                try:
                    await self._resumed.wait().addTimeout(min(_LOOK, SLOWEST - silent), self._clock)
                except defer.TimeoutError:
                    before, unacknowledged = unacknowledged, self._channel.unacknowledged
                    if unacknowledged != before:
                        self.last_progress = self._clock.seconds()
        finally:
            self._unsent.remove(self)

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
        """Do nothing: `send` is cancelled when the connection is lost."""
