"""A connection over the bad link: its two sockets, and the faults that happen to it."""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
from typing import TYPE_CHECKING, Any

from twisted.internet.interfaces import IHalfCloseableProtocol, IPullProducer
from twisted.internet.protocol import ClientFactory, Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from tests.badlink_wire import BUFFER, PIECE, Flow

if TYPE_CHECKING:
    from tests.badlink import BadLink

_FLUSH = 0.002
_FLUSHES = 1000
_DIAL = 30


@implementer(IHalfCloseableProtocol, IPullProducer)
class End(Protocol):
    """One of the two sockets."""

    transport: Any

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.free = False
        self.lost = False
        self.sent_end = False
        self._read_end = False

    # The socket

    def connectionMade(self) -> None:
        """Keep the kernel's buffers small."""
        handle = self.transport.getHandle()
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            handle.setsockopt(socket.SOL_SOCKET, option, BUFFER // 2)  # Linux doubles the value.
        self.transport.setTcpNoDelay(True)
        self.transport.bufferSize = PIECE
        self.transport.registerProducer(self, False)
        self._connection.made(self)

    def dataReceived(self, data: bytes) -> None:
        """Receive bytes for the other end."""
        self._connection.read(self, data)

    def readConnectionLost(self) -> None:
        """The peer will send nothing more."""
        self._read_end = True
        self._connection.read_end(self)

    def writeConnectionLost(self) -> None:
        """The end of the stream was sent to the peer."""

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The socket is closed."""
        self.free, self.lost = False, True
        self._connection.lost(self)

    def resumeProducing(self) -> None:
        """Continue, since the kernel has taken all that was written."""
        self.free = True
        self._connection.flow_to(self).flush()

    def stopProducing(self) -> None:
        """The socket is closed."""

    # Operations on the socket

    def hold(self, held: bool) -> None:
        """Pause or resume reading."""
        if self.transport is not None and not self.lost and not self._read_end:
            (self.transport.pauseProducing if held else self.transport.resumeProducing)()

    def take(self, data: bytes) -> None:
        """Write data."""
        self._connection.deliver(self, data)

    def write(self, data: bytes) -> None:
        """Pass data to the kernel."""
        self.free = False
        self.transport.write(data)

    def end(self) -> None:
        """Send the end of the stream."""
        if self.transport is not None and not self.lost and not self.sent_end:
            self.sent_end = True
            self.transport.unregisterProducer()
            self.transport.loseWriteConnection()

    def close(self) -> None:
        """Close with FIN, after all pending data."""
        if self.transport is not None and not self.lost:
            self.transport.unregisterProducer()
            self.transport.loseConnection()

    def abort(self) -> None:
        """Close with RST."""
        if self.transport is not None and not self.lost:
            self.transport.abortConnection()

    @property
    def flushed(self) -> bool:
        """Whether the peer's kernel has received all that was written."""
        if self.lost or self.transport is None:
            return True
        waiting: int = struct.unpack("i", fcntl.ioctl(self.transport.fileno(), termios.TIOCOUTQ, bytes(4)))[0]
        return self.free and not waiting


class _Dialler(ClientFactory):
    noisy = False

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def buildProtocol(self, address: object) -> End:
        return self._connection.far

    def clientConnectionFailed(self, connector: object, reason: Failure) -> None:
        self._connection.not_dialled()


class Connection:
    """A connection from a client, at the near end, to the server, at the far end."""

    def __init__(self, link: BadLink) -> None:
        self._link = link
        self.near, self.far = End(self), End(self)
        self._up = Flow(link.up, self.near, self.far)
        self._down = Flow(link.down, self.far, self.near)
        self._sent_down = 0
        self._is_cut = self._cut_is_due = self._silent = self._dialling = False
        self._timer: Any = None

    def flow_to(self, end: End) -> Flow:
        """The flow whose bytes arrive at this end."""
        return self._down if end is self.near else self._up

    def _flow_from(self, end: End) -> Flow:
        return self._up if end is self.near else self._down

    def _other(self, end: End) -> End:
        return self.far if end is self.near else self.near

    # Start

    def made(self, end: End) -> None:
        """Register an end, the near one first; it is read from when a real handshake would have ended."""
        if end is self.far:
            self._dialling = False
            self._link.counts.dialled += 1
            if self._silent or self._is_cut or self.near.lost:
                self.far.abort()
            self._down.put(lambda: self.near.hold(False))
            return
        self._link.add(self)
        badness = self._link.badness
        if badness.hole:
            self.silence()
            return
        self.near.hold(True)
        if badness.cut_seconds is not None:
            self._timer = self._link.clock.callLater(badness.cut_seconds, self.cut)
        self._up.put(self._dial)

    def _dial(self) -> None:
        self._dialling = True
        self._link.reactor.connectTCP(*self._link.target, _Dialler(self), timeout=_DIAL)

    def not_dialled(self) -> None:
        """End the connection, since the server cannot be reached."""
        self._dialling = False
        self._down.put(self.abort)
        self._leave()

    # Transfer

    def read(self, end: End, data: bytes) -> None:
        """Send what was read at an end over the wire."""
        if self._silent or self._is_cut:
            self._link.counts.lost += len(data)
        else:
            self._flow_from(end).put(data)

    def deliver(self, end: End, data: bytes) -> None:
        """Deliver what has arrived for an end."""
        most = self._link.badness.cut_bytes
        if end is self.far:
            self._link.counts.up += len(data)
            end.write(data)
            return
        if most is not None:
            data = data[: max(0, most - self._sent_down)]
        self._sent_down += len(data)
        self._link.counts.down += len(data)
        if data:
            end.write(data)
        if most is not None and self._sent_down >= most:
            self.cut()

    def read_end(self, end: End) -> None:
        """Forward a FIN that was read at an end."""
        if self._silent or self._is_cut:
            end.close()
        else:
            self._flow_from(end).put(lambda: self._end_of(self._other(end)))

    def _end_of(self, end: End) -> None:
        end.end()
        if self.near.sent_end and self.far.sent_end:
            self._is_cut = True
            self.near.close()
            self.far.close()

    def lost(self, end: End) -> None:
        """Handle a closed socket: forward an RST, unless this proxy closed the socket."""
        self.flow_to(end).drop()
        if not self._silent and not self._is_cut:
            self._flow_from(end).put(self.abort)
        self._leave()

    # End

    def cut(self) -> None:
        """Cut the connection as the link is configured; while the link is down, the cut shows when it returns."""
        if self._is_cut or self._silent:
            return
        if self._link.is_down:
            self._cut_is_due = True
            return
        self._link.counts.cut += 1
        if self._link.badness.cut_by == "silence":
            self.silence()
            return
        self._stop()
        if self._link.badness.cut_by == "fin":
            self.near.close()
            self.far.close()
        else:
            self.near.hold(True)
            self.far.hold(True)
            self._abort_when_flushed(_FLUSHES)

    def link_returned(self) -> None:
        """Continue, or cut, since the link is up again."""
        if self._cut_is_due or self._link.badness.outage == "cut":
            self.cut()

    def silence(self) -> None:
        """Pass nothing more; a peer that closes is released."""
        self._stop()
        self._silent = True
        self.near.hold(False)
        self.far.hold(False)

    def abort(self) -> None:
        """Close both ends with RST at once."""
        self._stop()
        self.near.abort()
        self.far.abort()
        self._leave()

    def _stop(self) -> None:
        self._is_cut = True
        self._up.drop()
        self._down.drop()
        if self._timer is not None and self._timer.active():
            self._timer.cancel()

    def _abort_when_flushed(self, tries: int) -> None:
        # RST discards what still waits in our kernel, and the peer must receive that first.
        if self.near.flushed or not tries:
            self.abort()
        else:
            self._link.reactor.callLater(_FLUSH, self._abort_when_flushed, tries - 1)

    def _leave(self) -> None:
        """Remove the connection from the link when both ends are closed."""
        if self.near.lost and (self.far.lost or (self.far.transport is None and not self._dialling)):
            self._stop()
            self._link.remove(self)
