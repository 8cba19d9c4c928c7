"""The body of an upstream's response: read in pieces, with back-pressure and a stall timer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import IDelayedCall, IPushProducer, IReactorTime, ITCPTransport, ITransport
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.tcp import Connection
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http import PotentialDataLoss

from ociregistry.errors import Unavailable
from ociregistry.upstream.bandwidth import set_receive_buffer
from ociregistry.upstream.failures import explain

_MOST_BUFFERED = 1024 * 1024
"""Bytes."""


class Body(Protocol):
    """Receives a body at the speed of its reader: with 1 MiB or more unread, the upstream is paused.

    At most 1 MiB is received at once, so that less than 2 MiB are unread. The connection is aborted when no byte
    comes for `STALL` seconds while the upstream is not paused.
    """

    STALL = 10.0

    def __init__(
        self,
        upstream: str,
        clock: IReactorTime,
        stalled: Callable[[str, float], object],
        consume: Callable[[int], float] = lambda count: 0.0,
    ) -> None:
        """Create the protocol that receives a body from `upstream`, which is its name for messages.

        `stalled` is called before the body ends because of a stall, with the reason and the seconds without a byte.
        `consume` is called with the number of bytes of each piece received; it returns the seconds for which no more
        must be read.
        """
        self._upstream = upstream
        self._clock = clock
        self._on_stall = stalled
        self._consume = consume
        self._paused_by_reader = False
        self._throttle: IDelayedCall | None = None
        self._received: list[bytes] = []
        self._buffered = 0
        self._paused = False
        self._ended: Failure | None = None
        self._waiting: Deferred[list[bytes]] | None = None
        self._enlarged: Connection | None = None
        """The connection that receives large pieces for this body."""
        self._timer: IDelayedCall | None = None
        self.ended: Deferred[None] = Deferred()
        """Fires when the body has ended, so that its connection can be used again or is closed."""

    def read(self) -> Deferred[bytes]:
        """Read as `read_pieces` does; the Deferred fires with the pieces joined, and with b"" at the end."""
        return self.read_pieces().addCallback(b"".join)

    def read_pieces(self) -> Deferred[list[bytes]]:
        """Read the pieces that came since the last call, or wait for one; the Deferred fires with none at the end.

        Must not be called while an earlier call waits.

        Raises:
            Unavailable: the connection broke before the end; the Deferred fails with it.
        """
        if self._received:
            pieces, self._received = self._received, []
            self._buffered = 0
            self._resume()
            return succeed(pieces)
        if self._ended is not None:
            if self._is_complete(self._ended):
                return succeed([])
            return fail(Unavailable(f"{self._upstream}: {explain(self._ended.value)}"))
        waiting: Deferred[list[bytes]] = Deferred(lambda _: setattr(self, "_waiting", None))
        self._waiting = waiting
        self._resume()
        return waiting

    def pause(self) -> None:
        """Pause the upstream until the next call of `read`, so that other downloads go first."""
        self._paused_by_reader = True
        self._regulate()

    def _resume(self) -> None:
        self._paused_by_reader = False
        self._regulate()

    def _regulate(self) -> None:
        """Pause the upstream while the body is held, throttled, or has 1 MiB or more unread; resume it otherwise."""
        throttled = self._throttle is not None and self._throttle.active()
        pause = self._paused_by_reader or throttled or self._buffered >= _MOST_BUFFERED
        if pause == self._paused or self._ended is not None:
            return
        self._paused = pause
        self._set_timer()
        if pause:
            self._producer.pauseProducing()
        else:
            self._producer.resumeProducing()

    def set_receive_buffer(self, size: int) -> None:
        """Set the size in bytes of the kernel's receive buffer for this connection."""
        connection = self._connection
        if connection is not None:
            set_receive_buffer(connection.getHandle(), size)

    def receive_pieces(self, size: int) -> None:
        """Receive up to `size` bytes at once instead of Twisted's 64 KiB, until the body ends."""
        connection = self._connection
        if connection is not None and self._ended is None:
            connection.bufferSize = size
            self._enlarged = connection

    @property
    def _connection(self) -> Connection | None:
        """The transport with the socket, below TLS and others; None where there is none, as at the end."""
        transport: Any = getattr(self.transport, "_producer", None)
        while not isinstance(transport, Connection | None):
            transport = getattr(transport, "transport", None)
        return transport

    def abort(self) -> None:
        """Abort the connection, unless the body has ended."""
        if self._ended is None:
            _abort(self.transport)

    @property
    def _producer(self) -> IPushProducer:
        return cast(IPushProducer, self.transport)

    def connectionMade(self) -> None:
        self._set_timer()

    def dataReceived(self, data: bytes) -> None:
        self._received.append(data)
        self._buffered += len(data)
        wait = self._consume(len(data))
        if wait > 0:
            self._end_throttle()
            self._throttle = self._clock.callLater(wait, self._regulate)
        self._regulate()
        self._set_timer()
        self._wake()

    def _end_throttle(self) -> None:
        if self._throttle is not None and self._throttle.active():
            self._throttle.cancel()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self._ended is None:
            self._end(reason)

    def _end(self, reason: Failure) -> None:
        self._ended = reason
        if self._enlarged is not None:
            del self._enlarged.bufferSize
        self._end_throttle()
        self._set_timer()
        self._wake()
        self.ended.callback(None)

    def _wake(self) -> None:
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            self.read_pieces().chainDeferred(waiting)

    def _set_timer(self) -> None:
        timer = self._timer if self._timer is not None and self._timer.active() else None
        if self._ended is not None or self._paused:
            if timer is not None:
                timer.cancel()
        elif timer is not None:
            timer.reset(self.STALL)
        else:
            self._timer = self._clock.callLater(self.STALL, self._stalled)

    def _stalled(self) -> None:
        producer = self.transport
        why = f"no byte came for {self.STALL:.0f} s"
        self._on_stall(why, self.STALL)
        self._end(Failure(TimeoutError(why)))
        _abort(producer)

    @staticmethod
    def _is_complete(reason: Failure) -> bool:
        # PotentialDataLoss: without a length or chunks, the end of the connection is the end of the body, and only
        # the digest tells whether the content is complete.
        return reason.check(ResponseDone, PotentialDataLoss) is not None


def _abort(producer: object) -> None:
    # A response's transport proxy only has loseConnection(), which over TLS waits for the peer's answer, for ever
    # where the network is down. The transport behind the proxy can be aborted.
    transport = getattr(producer, "_producer", None)
    if ITCPTransport.providedBy(transport):
        transport.abortConnection()
    elif producer is not None:
        cast(ITransport, producer).loseConnection()
