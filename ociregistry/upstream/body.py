"""The body of an upstream's response: read piece by piece, with back-pressure and a stall timer."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import cast

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import IDelayedCall, IPushProducer, IReactorTime, ITCPTransport, ITransport
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http import PotentialDataLoss

from ociregistry.errors import Unavailable
from ociregistry.upstream.failures import explain

_MOST_BUFFERED = 1024 * 1024


class Body(Protocol):
    """Reads a body at the speed of its reader: beyond 1 MiB unread, the upstream is paused.

    `STALL` seconds without a byte break the connection.
    """

    STALL = 10.0

    def __init__(
        self,
        upstream: str,
        clock: IReactorTime,
        stalled: Callable[[str, float], object],
        draw: Callable[[int], float] = lambda count: 0.0,
    ) -> None:
        """`stalled` is called with a reason, and with for how many seconds no byte came, before the end for it.
        `draw` is called with every number of bytes that came; it gives for how many seconds no more are to be read.
        """
        self._upstream = upstream
        self._clock = clock
        self._tell_stalled = stalled
        self._draw = draw
        self._held = False
        self._throttle: IDelayedCall | None = None
        self._received: list[bytes] = []
        self._buffered = 0
        self._paused = False
        self._ended: Failure | None = None
        self._waiting: Deferred[bytes] | None = None
        self._timer: IDelayedCall | None = None
        self.ended: Deferred[None] = Deferred()
        """Fires when the connection is free for others, or gone."""

    def read(self) -> Deferred[bytes]:
        """Fires with the bytes that came since the last call, at least one; with none at the end.

        Fails with `Unavailable` when the connection broke before the end. One call at a time.
        """
        if self._received:
            data = b"".join(self._received)
            self._received.clear()
            self._buffered = 0
            self._let_go()
            return succeed(data)
        if self._ended is not None:
            if self._whole(self._ended):
                return succeed(b"")
            return fail(Unavailable(f"{self._upstream}: {explain(self._ended.value)}"))
        waiting: Deferred[bytes] = Deferred(lambda _: setattr(self, "_waiting", None))
        self._waiting = waiting
        self._let_go()
        return waiting

    def hold(self) -> None:
        """Lets no more come until the next call of `read`: others go first."""
        self._held = True
        self._regulate()

    def _let_go(self) -> None:
        self._held = False
        self._regulate()

    def _regulate(self) -> None:
        """Pauses the upstream while it is held, throttled or far ahead of its reader."""
        throttled = self._throttle is not None and self._throttle.active()
        pause = self._held or throttled or self._buffered >= _MOST_BUFFERED
        if pause == self._paused or self._ended is not None:
            return
        self._paused = pause
        self._set_timer()
        if pause:
            self._producer.pauseProducing()
        else:
            self._producer.resumeProducing()

    def set_receive_buffer(self, size: int) -> None:
        """Lets the kernel receive about `size` bytes for this connection before they are read."""
        transport = getattr(self.transport, "_producer", None)
        while transport is not None and not isinstance(handle := transport.getHandle(), socket.socket):
            # What stands on top of the connection speaks TLS.
            transport = getattr(transport, "transport", None)
        if transport is not None:
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)

    def abort(self) -> None:
        """Closes the connection, unless the body has ended."""
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
        wait = self._draw(len(data))
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
        self._end_throttle()
        self._set_timer()
        self._wake()
        self.ended.callback(None)

    def _wake(self) -> None:
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            self.read().chainDeferred(waiting)

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
        self._tell_stalled(why, self.STALL)
        self._end(Failure(TimeoutError(why)))
        _abort(producer)

    @staticmethod
    def _whole(reason: Failure) -> bool:
        # Without a length or chunks the end of the connection is the end of the body; whether it was the end of
        # the content only its digest can tell.
        return reason.check(ResponseDone, PotentialDataLoss) is not None


def _abort(producer: object) -> None:
    # The proxy that a response gives only offers loseConnection(), which over TLS waits for the peer's answer: on a
    # dead link for ever. The transport behind it can be aborted.
    transport = getattr(producer, "_producer", None)
    if ITCPTransport.providedBy(transport):
        transport.abortConnection()
    elif producer is not None:
        cast(ITransport, producer).loseConnection()
