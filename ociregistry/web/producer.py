"""Sends content to a client as fast as it arrives and the client reads it.

One push producer serves plain and TLS connections, stored blobs and blobs that are still being downloaded.
"""

from __future__ import annotations

from twisted.internet import defer
from twisted.internet.interfaces import IPushProducer, IReactorTime
from twisted.web.http import Request
from zope.interface import implementer

from ociregistry.concurrency import Event
from ociregistry.errors import Unavailable
from ociregistry.pullthrough.cache import Content

_PIECE = 256 * 1024
"""Bytes per write: large enough to make the work per write negligible, small enough for many clients at once."""


SLOWEST = 60.0
"""Seconds for which a client may read nothing."""


class SlowClient(Exception):
    """The client does not read what is sent to it."""


@implementer(IPushProducer)
class ContentProducer:
    """Writes a part of `content` to `request`; waits at most `patience` seconds for the next bytes of the content."""

    def __init__(self, request: Request, content: Content, patience: float, clock: IReactorTime) -> None:
        self._request = request
        self._content = content
        self._patience = patience
        self._clock = clock
        self._paused = False
        self._resumed = Event()

    async def send(self, start: int, stop: int) -> None:
        """Write the bytes from `start` up to, not including, `stop`.

        Raises:
            Unavailable: the upstream sent no byte within `patience`, or the content is shorter than its size.
            SlowClient: the client read nothing for `SLOWEST` seconds.
        """
        self._request.registerProducer(self, True)
        try:
            available = 0
            while start < stop:
                if start >= available:
                    available = await self._more_than(start)
                data = await self._content.read(start, min(_PIECE, available - start, stop - start))
                if not data:
                    raise Unavailable(f"{self._content}: the file ends at byte {start} of {self._content.size}")
                self._request.write(data)
                start += len(data)
                while self._paused:
                    await self._taken()
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

    async def _taken(self) -> None:
        try:
            await self._resumed.wait().addTimeout(SLOWEST, self._clock)
        except defer.TimeoutError:
            raise SlowClient(f"the client read nothing for {SLOWEST:.0f} s") from None

    def pauseProducing(self) -> None:
        self._paused = True

    def resumeProducing(self) -> None:
        self._paused = False
        self._resumed.fire()

    def stopProducing(self) -> None:
        """Do nothing: on a lost connection, `notifyFinish` of the request cancels `send`."""
