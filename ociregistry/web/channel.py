"""The connection of a client: its limits, TLS, and the count of requests in flight that a shutdown waits for."""

from __future__ import annotations

import fcntl
import sys
import termios
from collections import Counter
from typing import Any, cast

from OpenSSL import SSL
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import (
    IDelayedCall,
    IHalfCloseableProtocol,
    IOpenSSLServerConnectionCreator,
    IReactorTime,
    ITCPTransport,
)
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.protocols.tls import TLSMemoryBIOProtocol
from twisted.python.failure import Failure
from twisted.web.http import HTTPChannel
from twisted.web.server import Request
from zope.interface import implementer

from ociregistry.concurrency import Event
from ociregistry.config.tls import ServerTls
from ociregistry.openssl import openssl_context, openssl_reason

_log = Logger(namespace="ociregistry.web")


class InFlight:
    """Counts requests in flight and new connections that have not sent their first request yet.

    It also knows all open connections, as bytes of an answered request may still wait to be sent.
    """

    def __init__(self) -> None:
        self._requests = 0
        self._connections: set[HTTPChannel] = set()
        self._changed = Event()

    def began(self) -> None:
        """Count one request or new connection more."""
        self._requests += 1

    def ended(self) -> None:
        """Count one request or new connection less."""
        self._requests -= 1
        self._changed.fire()

    def idle(self) -> Deferred[None]:
        """Return a Deferred that fires as soon as nothing is in flight."""
        return succeed(None) if self._requests == 0 else Deferred.fromCoroutine(self._idle())

    async def _idle(self) -> None:
        while self._requests:
            await self._changed.wait()

    def connected(self, channel: HTTPChannel) -> None:
        """Note that a connection was opened."""
        self._connections.add(channel)

    def disconnected(self, channel: HTTPChannel) -> None:
        """Note that a connection was closed."""
        self._connections.discard(channel)
        self._changed.fire()

    async def close(self) -> None:
        """Close all connections when their unsent bytes are sent; return when they are closed."""
        for channel in list(self._connections):
            channel.loseConnection()
        while self._connections:
            await self._changed.wait()


@implementer(IOpenSSLServerConnectionCreator)
class ServerPolicy:
    """Makes the TLS side of each client connection."""

    def __init__(self, settings: ServerTls) -> None:
        self.reconfigure(settings)

    def reconfigure(self, settings: ServerTls) -> None:
        """Use other certificates for new connections, so that they can be renewed while the daemon runs."""
        self._context = openssl_context(settings.identity, settings.client_ca)

    def serverConnectionForTLS(self, tlsProtocol: TLSMemoryBIOProtocol) -> SSL.Connection:
        """Make the TLS connection for `tlsProtocol`."""
        return SSL.Connection(self._context, None)


_REQUEST_WITHIN = 30.0
"""Seconds from the first byte of a request to its last."""

_FIRST_REQUEST_WITHIN = 5.0
"""Seconds for which a new connection counts as in flight, so that a shutdown does not cut it off."""

MOST_CONNECTIONS = 2000
"""Connections from one address. A node keeps a handful, but a whole cluster may share one address."""

_BUFFER = 16 * 1024
"""Bytes that are read at once, and that a transport holds unsent before it pauses its producer."""

_TLS_HANDSHAKE = b"\x16"
_NOT_TLS = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\nContent-Length: 36\r\n\r\n"
    b"this port speaks plain HTTP, no TLS\n"
)


_IPV4_IN_IPV6 = "::ffff:"


def host_of(address: IPv4Address | IPv6Address) -> str:
    """Return the host of an address; that of an IPv4 client of an IPv6 socket in IPv4's notation."""
    host: str = address.host
    in_ipv4 = host.removeprefix(_IPV4_IN_IPV6)
    return in_ipv4 if "." in in_ipv4 and ":" not in in_ipv4 else host


def host_and_port(address: IPv4Address | IPv6Address) -> str:
    """Return an address for messages."""
    host = host_of(address)
    return f"[{host}]:{address.port}" if ":" in host else f"{host}:{address.port}"


@implementer(IHalfCloseableProtocol)
class Channel(HTTPChannel):
    """An HTTPChannel with limits on time and on connections per address.

    A client may close its side of the connection after a request, and still gets the whole response.

    `addresses` counts the connections of each address and is shared by all channels. A new connection counts in
    `in_flight` until its first request does.
    """

    def __init__(self, clock: IReactorTime, addresses: Counter[str], in_flight: InFlight) -> None:
        super().__init__()
        self._clock = clock
        self._in_flight = in_flight
        self._addresses = addresses
        self._address = ""
        self._deadline: IDelayedCall | None = None
        self._first_request_deadline: IDelayedCall | None = None
        self._fresh = True
        self._serving = False
        self._half_closed = False
        self._unacknowledged: int | None = None

    def connectionMade(self) -> None:
        """Count the connection, and abort it when its address has too many."""
        super().connectionMade()
        peer: object = self._tcp.getPeer()
        is_tcp = isinstance(peer, IPv4Address | IPv6Address)
        # Without TCP_NODELAY small responses wait for the ACK of earlier ones. Transports in memory lack the method.
        if is_tcp and hasattr(self.transport, "setTcpNoDelay"):
            self._tcp.setTcpNoDelay(True)
        self._connection.bufferSize = _BUFFER
        self._address = host_of(peer) if isinstance(peer, IPv4Address | IPv6Address) else str(peer)
        self._addresses[self._address] += 1
        self._in_flight.connected(self)
        self._in_flight.began()
        self._first_request_deadline = self._clock.callLater(_FIRST_REQUEST_WITHIN, self._stop_waiting)
        if self._addresses[self._address] > MOST_CONNECTIONS:
            self.abort()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Stop counting the connection, and log a failed TLS handshake."""
        if reason.check(SSL.Error) and self._fresh:
            _log.warn("{client}: TLS failed: {why}", client=self._address, why=openssl_reason(reason.value))
        self._addresses[self._address] -= 1
        if not self._addresses[self._address]:
            del self._addresses[self._address]
        self._stop_deadline()
        self._stop_waiting()
        self._in_flight.disconnected(self)
        super().connectionLost(reason)

    def dataReceived(self, data: bytes) -> None:
        """Set a deadline for a request that begins; tell a client that speaks TLS on a plain port."""
        if self._fresh and data.startswith(_TLS_HANDSHAKE):
            # A client that tries TLS first falls back to plain HTTP on any response, and waits 10 s without one.
            self._tcp.write(_NOT_TLS)
            self._tcp.loseConnection()
            return
        self._fresh = False
        if self._deadline is None and not self._serving:
            self._deadline = self._clock.callLater(_REQUEST_WITHIN, self._too_slow)
        super().dataReceived(data)

    def allContentReceived(self) -> None:
        """Cancel the deadline: the request is complete."""
        self._stop_deadline()
        self._serving = True
        super().allContentReceived()
        self._stop_waiting()

    def requestDone(self, request: Request) -> None:
        """End a request whose response has been sent; pipelined bytes of the next one are parsed now."""
        self._serving = False
        super().requestDone(request)
        self._end_if_answered()

    def readConnectionLost(self) -> None:
        """Answer what has been requested, then close: the client sends no more."""
        self._half_closed = True
        self._end_if_answered()

    def writeConnectionLost(self) -> None:
        """Do nothing: this side of a connection is never closed alone."""

    @property
    def unacknowledged(self) -> int | None:
        """The bytes in the kernel that the client has not acknowledged; None where that cannot be told."""
        try:
            queued = fcntl.ioctl(self._connection.getHandle().fileno(), termios.TIOCOUTQ, bytes(4))
        except (AttributeError, OSError, ValueError):
            # A transport in memory, or a closed socket.
            return None
        return int.from_bytes(queued, sys.byteorder)

    def timeoutConnection(self) -> None:
        """Close an idle connection, unless its client still takes the end of a response."""
        before, self._unacknowledged = self._unacknowledged, self.unacknowledged
        if self._unacknowledged and self._unacknowledged != before:
            self.setTimeout(self.timeOut)
        else:
            super().timeoutConnection()

    def abort(self) -> None:
        """Close the connection at once and drop unsent bytes."""
        self._tcp.abortConnection()

    @property
    def _tcp(self) -> ITCPTransport:
        return cast(ITCPTransport, self.transport)

    @property
    def _connection(self) -> Any:
        """The transport beneath TLS."""
        transport: Any = self.transport
        return transport.transport if isinstance(transport, TLSMemoryBIOProtocol) else transport

    def _end_if_answered(self) -> None:
        if self._half_closed and not self._serving:
            self.loseConnection()

    def _too_slow(self) -> None:
        self._deadline = None
        self.abort()

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _stop_waiting(self) -> None:
        if self._first_request_deadline is not None:
            if self._first_request_deadline.active():
                self._first_request_deadline.cancel()
            self._first_request_deadline = None
            self._in_flight.ended()
