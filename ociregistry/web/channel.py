"""The connection of a client: its limits, TLS, and the count of requests in flight that a shutdown waits for."""

from __future__ import annotations

import fcntl
import re
import sys
import termios
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from socket import IPPROTO_TCP, MSG_MORE, TCP_CORK
from typing import Any, Protocol, cast

from OpenSSL import SSL
from twisted.internet import tcp
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
from twisted.web.http_headers import Headers
from twisted.web.server import Request
from zope.interface import implementer

from ociregistry.concurrency import Event
from ociregistry.config.tls import ServerTls
from ociregistry.log import Seldom
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

    @property
    def requests(self) -> int:
        """The number of both."""
        return self._requests

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

BUFFER = 16 * 1024
"""Bytes that are read at once, and that a transport holds unsent before it pauses its producer."""

_TLS_HANDSHAKE = b"\x16"
_LONGEST_PLAIN = 4096
_PLAIN = re.compile(
    rb"(?P<line>(?:GET|HEAD) [!-~]+ HTTP/1\.1)\r\n"
    rb"(?i:"
    rb"(?!range|if-|via|connection(?!:[ \t]*keep-alive\r)|expect|content-|transfer-|te:|trailer|upgrade|cookie)"
    rb"[a-z0-9!#$%&'*+.^_`|~-]+:[ -~]*\r\n"
    rb"){0,100}\r\n"
)
"""A request of which no header alters the answer: the headers that may are left out, and so are many headers.

A line can match in one way only: if there were two, the time would double with each header.
"""


def plain_request_line(data: bytes) -> bytes | None:
    """Return the request line if `data` is one whole GET or HEAD request whose headers do not alter the answer.

    None does not mean that the request is wrong.
    """
    match = _PLAIN.fullmatch(data) if len(data) <= _LONGEST_PLAIN else None
    return None if match is None else match["line"]


class ShortWay(Protocol):
    """Answers repeated requests, of which the answer is known."""

    def answer(self, channel: Channel, request_line: bytes, request: bytes) -> bool:
        """Answer a plain request with this line, or return False: it is to take the usual way."""


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

    `addresses` counts the connections of each address and is shared by all channels, as is `seldom`, for the log line
    that a client speaks TLS. A new connection counts in `in_flight` until its first request does. Plain requests take
    the `short_way` where it has an answer.
    """

    def __init__(
        self,
        clock: IReactorTime,
        addresses: Counter[str],
        in_flight: InFlight,
        seldom: Seldom,
        short_way: ShortWay | None = None,
    ) -> None:
        super().__init__()
        self._short_way = short_way
        self._clock = clock
        self._in_flight = in_flight
        self._seldom = seldom
        self._addresses = addresses
        self._address = ""
        self._deadline: IDelayedCall | None = None
        self._first_request_deadline: IDelayedCall | None = None
        self._fresh = True
        self._serving = False
        self._half_closed = False
        self._between_requests = True
        """Whether no byte of a request has come since the last one was answered."""
        self._pipelined = False
        """Whether bytes came while a request was being answered."""
        self._parsing = False
        """Whether bytes are being parsed: those after an answered request may begin the next one."""
        self._on_short_way = False
        """Whether the short way is answering a request."""
        self._held = b""
        """Bytes that came meanwhile."""
        self._disconnected: Callable[[], object] | None = None
        self._idle_timeout: float | None = None
        self._closing = False
        self.head = b""
        """The status line and headers of the last response, as they were sent."""
        self.request_line: bytes | None = None
        """The request line of a plain request, whose answer may be remembered."""
        self._connection: Any = None
        """The transport beneath TLS."""
        self._plain: tcp.Connection | None = None
        """The transport, where it is a socket without TLS."""
        self._unacknowledged: int | None = None

    def connectionMade(self) -> None:
        """Count the connection, and abort it when its address has too many."""
        super().connectionMade()
        transport: Any = self.transport
        self._connection = transport.transport if isinstance(transport, TLSMemoryBIOProtocol) else transport
        self._plain = transport if isinstance(transport, tcp.Connection) else None
        peer: object = self._tcp.getPeer()
        is_tcp = isinstance(peer, IPv4Address | IPv6Address)
        # Without TCP_NODELAY small responses wait for the ACK of earlier ones. Transports in memory lack the method.
        if is_tcp and hasattr(self.transport, "setTcpNoDelay"):
            self._tcp.setTcpNoDelay(True)
        self._connection.bufferSize = BUFFER
        if not is_tcp:
            # A command, which may have removed a file just now.
            self._short_way = None
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
        if self._disconnected is not None:
            self._disconnected()
        super().connectionLost(reason)

    def dataReceived(self, data: bytes) -> None:
        """Set a deadline for a request that begins; tell a client that speaks TLS on a plain port."""
        if self._fresh and data.startswith(_TLS_HANDSHAKE):
            # A client that tries TLS first falls back to plain HTTP on any response, and waits 10 s without one.
            self._tcp.write(_NOT_TLS)
            self._tcp.loseConnection()
            if self._seldom.due():
                _log.warn(
                    "{client}: the client speaks TLS, and this port is plain HTTP: unless it goes on without TLS, "
                    "write http:// in its hosts.toml, or set tls",
                    client=self._address,
                )
            return
        self._fresh = False
        if self._on_short_way:
            self._held += data
            self._limit_held()
            return
        line = None
        if self._between_requests and self._short_way is not None and not self._closing:
            line = plain_request_line(data)
            if line is not None and self._short_way.answer(self, line, data):
                return
        self.request_line = line
        self._between_requests = False
        if self._deadline is None and not self._serving:
            self._deadline = self._clock.callLater(_REQUEST_WITHIN, self._too_slow)
        parsing, self._parsing = self._parsing, True
        super().dataReceived(data)
        self._parsing = parsing
        if line is not None and not self._serving:
            # It was the whole request, and is answered.
            self._between_requests = True

    def rawDataReceived(self, data: bytes) -> None:
        """Note that more came than one request without a body."""
        self._pipelined = True
        super().rawDataReceived(data)

    def writeHeaders(self, version: bytes, code: bytes, reason: bytes, headers: Any) -> None:
        """Write the status line and headers, and keep them in `head`."""
        # Twisted 22.4 passes pairs.
        pairs = _pairs(headers) if isinstance(headers, Headers) else headers
        lines = [b"%b %b %b\r\n" % (version, code, reason), *(b"%b: %b\r\n" % pair for pair in pairs), b"\r\n"]
        self.head = b"".join(lines)
        self.write(self.head)

    def allContentReceived(self) -> None:
        """Cancel the deadline: the request is complete."""
        self._stop_deadline()
        self._serving = True
        self._between_requests = False
        super().allContentReceived()
        self._stop_waiting()

    def requestDone(self, request: Request) -> None:
        """End a request whose response has been sent; pipelined bytes of the next one are parsed now."""
        self._serving = False
        self.request_line = None
        self._between_requests = not (self._parsing or self._pipelined)
        self._pipelined = False
        super().requestDone(request)
        self._end_if_answered()

    # The short way

    def begin(self, disconnected: Callable[[], object]) -> None:
        """Begin to answer a request that the channel has not parsed; further bytes wait until `end`.

        `disconnected` is called when the connection is lost before that.
        """
        self._serving = self._on_short_way = True
        self._disconnected = disconnected
        self._idle_timeout = self.setTimeout(None)

    def end(self) -> None:
        """End such a request: its response has been sent."""
        self._serving = self._on_short_way = False
        self._disconnected = None
        self.setTimeout(self._idle_timeout)
        held, self._held = self._held, b""
        if held:
            self._resume_reading()
            self.dataReceived(held)
        self._end_if_answered()

    def answered(self) -> None:
        """Note that a request was answered at once."""
        self.resetTimeout()
        self._stop_waiting()

    def _limit_held(self) -> None:
        if len(self._held) > BUFFER:
            self._connection.pauseProducing()

    def _resume_reading(self) -> None:
        if not self._closing:
            self._connection.resumeProducing()

    def resumeProducing(self) -> None:
        """Go on with what waited until the client took bytes."""
        super().resumeProducing()
        self._limit_held()

    @property
    def is_plain(self) -> bool:
        """Whether the connection is a socket without TLS, and not lost."""
        return self._plain is not None and bool(self._plain.connected)

    @property
    def socket(self) -> int | None:
        """The descriptor of the connection, where bytes of files can be sent to it; None for TLS and a lost one."""
        return self._plain.fileno() if self._plain is not None and self._plain.connected else None

    def resume_when_writable(self) -> None:
        """Call `resumeProducing` once everything that was written is sent, and the client can take more."""
        assert self._plain is not None
        self._plain.producerPaused = True
        self._plain.startWriting()

    @contextmanager
    def whole_packets(self) -> Iterator[None]:
        """Let the kernel fill packets from one call to the next, and send the rest with the end of the block.

        sendfile(2) hands over 64 KiB at a time, each of which would begin a packet: that costs half as much again.
        """
        self._cork(True)
        try:
            yield
        finally:
            self._cork(False)

    def _cork(self, value: bool) -> None:
        # A transport whose connection is lost has no socket any more.
        if self._plain is not None and self._plain.connected:
            # Other sockets than those of TCP have no such option.
            with suppress(OSError):
                self._plain.socket.setsockopt(IPPROTO_TCP, TCP_CORK, value)

    def send_now(self, data: bytes, *, more: bool) -> int:
        """Send as much of `data` as the client can take at present, and return its number of bytes.

        `more` tells that other bytes follow at once, so that the kernel may send them together.
        """
        plain = self._plain
        # What was written before goes first: Twisted keeps it in these two.
        if plain is None or plain.dataBuffer or plain._tempDataLen:
            return 0
        try:
            return plain.socket.send(data, MSG_MORE if more else 0)
        except OSError:
            # If the connection is lost, the transport finds that when it writes.
            return 0

    def loseConnection(self) -> None:
        """Close the connection when all is sent."""
        self._closing = True
        super().loseConnection()

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


def _pairs(headers: Headers) -> Iterator[tuple[bytes, bytes]]:
    return ((name, value) for name, values in headers.getAllRawHeaders() for value in values)
