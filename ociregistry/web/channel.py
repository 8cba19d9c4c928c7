"""One client's connection: limits, TLS towards clients, and the count of requests that a stop waits for."""

from __future__ import annotations

from collections import Counter
from typing import cast

from OpenSSL import SSL
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IDelayedCall, IOpenSSLServerConnectionCreator, IReactorTime, ITCPTransport
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.protocols.tls import TLSMemoryBIOProtocol
from twisted.python.failure import Failure
from twisted.web.http import HTTPChannel
from twisted.web.server import Request
from zope.interface import implementer

from ociregistry.concurrency import Event
from ociregistry.config.tls import ServerTls, openssl_context, openssl_reason


class Traffic:
    """The requests that are being answered, and the connections whose first one is awaited."""

    def __init__(self) -> None:
        self._requests = 0
        self._changed = Event()

    def began(self) -> None:
        """One more."""
        self._requests += 1

    def ended(self) -> None:
        """One less."""
        self._requests -= 1
        self._changed.fire()

    def idle(self) -> Deferred[None]:
        """Fires when there is none."""
        return succeed(None) if self._requests == 0 else Deferred.fromCoroutine(self._idle())

    async def _idle(self) -> None:
        while self._requests:
            await self._changed.wait()


@implementer(IOpenSSLServerConnectionCreator)
class ServerPolicy:
    """Makes the TLS side of each connection that a client opens."""

    def __init__(self, settings: ServerTls) -> None:
        self.reconfigure(settings)

    def reconfigure(self, settings: ServerTls) -> None:
        """Connections that are opened from now on are made by these: certificates are renewed under a daemon."""
        self._context = openssl_context(settings.identity, settings.client_ca)

    def serverConnectionForTLS(self, tlsProtocol: TLSMemoryBIOProtocol) -> SSL.Connection:
        """A new connection."""
        return SSL.Connection(self._context, None)


_REQUEST_WITHIN = 30.0
"""Seconds from the first byte of a request to its last."""

_FIRST_REQUEST_WITHIN = 5.0
"""Seconds that who has connected counts as one who is being served: a daemon that stops must not cut it off."""

MOST_CONNECTIONS = 2000
"""From one address. A node keeps a handful; but a whole cluster may stand behind one address."""

_TLS_HANDSHAKE = b"\x16"
_NOT_TLS = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\nContent-Length: 36\r\n\r\n"
    b"this port speaks plain HTTP, no TLS\n"
)


class Channel(HTTPChannel):
    """HTTPChannel with limits. `addresses` counts the connections of each address, over all channels.

    A new one is part of the `traffic`, until its first request is.
    """

    log = Logger(namespace="ociregistry.web")

    def __init__(self, clock: IReactorTime, addresses: Counter[str], traffic: Traffic) -> None:
        super().__init__()
        self._clock = clock
        self._traffic = traffic
        self._addresses = addresses
        self._address = ""
        self._deadline: IDelayedCall | None = None
        self._awaited: IDelayedCall | None = None
        self._fresh = True
        self._serving = False

    def connectionMade(self) -> None:
        """Counts the connection, and refuses it when there are too many."""
        super().connectionMade()
        peer: object = self._tcp.getPeer()
        is_tcp = isinstance(peer, IPv4Address | IPv6Address)
        # Small answers must not wait for an acknowledgement of earlier ones; transports in memory have none.
        if is_tcp and hasattr(self.transport, "setTcpNoDelay"):
            self._tcp.setTcpNoDelay(True)
        self._address = peer.host if isinstance(peer, IPv4Address | IPv6Address) else str(peer)
        self._addresses[self._address] += 1
        self._traffic.began()
        self._awaited = self._clock.callLater(_FIRST_REQUEST_WITHIN, self._await_no_longer)
        if self._addresses[self._address] > MOST_CONNECTIONS:
            self.abort()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Counts it no more, and tells of a client that TLS did not let in."""
        if reason.check(SSL.Error) and self._fresh:
            self.log.warn("{client}: TLS failed: {why}", client=self._address, why=openssl_reason(reason.value))
        self._addresses[self._address] -= 1
        if not self._addresses[self._address]:
            del self._addresses[self._address]
        self._stop_deadline()
        self._await_no_longer()
        super().connectionLost(reason)

    def dataReceived(self, data: bytes) -> None:
        """Sets a deadline for the whole of a request that begins."""
        if self._fresh and data.startswith(_TLS_HANDSHAKE):
            # At once: a client that tries TLS first turns to plain HTTP on an answer, and waits 10 s for silence.
            self._tcp.write(_NOT_TLS)
            self._tcp.loseConnection()
            return
        self._fresh = False
        if self._deadline is None and not self._serving:
            self._deadline = self._clock.callLater(_REQUEST_WITHIN, self._too_slow)
        super().dataReceived(data)

    def allContentReceived(self) -> None:
        """The request is here."""
        self._stop_deadline()
        self._serving = True
        super().allContentReceived()
        self._await_no_longer()

    def requestDone(self, request: Request) -> None:
        """The answer has been sent; what came of the next request meanwhile is looked at now."""
        self._serving = False
        super().requestDone(request)

    def abort(self) -> None:
        """Ends the connection at once, whatever was not sent yet."""
        self._tcp.abortConnection()

    @property
    def _tcp(self) -> ITCPTransport:
        return cast(ITCPTransport, self.transport)

    def _too_slow(self) -> None:
        self._deadline = None
        self.abort()

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _await_no_longer(self) -> None:
        if self._awaited is not None:
            if self._awaited.active():
                self._awaited.cancel()
            self._awaited = None
            self._traffic.ended()
