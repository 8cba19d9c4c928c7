"""Server, bad links and clients for the tests of the bad-link proxy."""

from __future__ import annotations

import socket
from typing import Any

from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from zope.interface import implementer

from tests.badlink import BadLink, Badness
from tests.unit.support.common import REACTOR, turn

KIB = 1024
SMALL = 32 * KIB


def small_buffers(transport: Any) -> None:
    """Set small kernel buffers for the socket."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        transport.getHandle().setsockopt(socket.SOL_SOCKET, option, SMALL)


def pattern(start: int, end: int) -> bytes:
    """Return bytes from `start` to `end` that encode their own position."""
    return b"".join(b"%015d\n" % (number * 16) for number in range(start // 16, end // 16 + 1))[
        start % 16 : start % 16 + end - start
    ]


class Peer(Protocol):
    """Protocol that keeps what it receives and the reason of its end."""

    transport: Any

    def __init__(self) -> None:
        self.received = b""
        self.ended: type | None = None

    def connectionMade(self) -> None:
        small_buffers(self.transport)

    def dataReceived(self, data: bytes) -> None:
        self.received += data

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.ended = type(reason.value)


@implementer(IHalfCloseableProtocol)
class ContentProducer(Peer):
    """Server side: send as many bytes as each received line says; close after a line `0` or end of input."""

    def __init__(self) -> None:
        super().__init__()
        self._sent = self._wanted = self.given = 0

    def dataReceived(self, data: bytes) -> None:
        super().dataReceived(data)
        for line in data.decode().split():
            if line == "0":
                self.transport.loseConnection()
            else:
                self._wanted += int(line)
        self.transport.unregisterProducer()
        self.transport.registerProducer(self, False)

    def readConnectionLost(self) -> None:
        self.transport.loseConnection()

    def writeConnectionLost(self) -> None:
        """Do nothing."""

    def resumeProducing(self) -> None:
        """Send the next chunk: the kernel has taken the previous one."""
        self.given = self._sent
        end = min(self._wanted, self._sent + SMALL)
        if end > self._sent:
            self.transport.write(pattern(self._sent, end))
            self._sent = end
        else:
            self.transport.unregisterProducer()

    def stopProducing(self) -> None:
        """It is over."""


class LinkTestbed:
    """A server and links to it."""

    def __init__(self) -> None:
        self.senders: list[ContentProducer] = []
        factory = Factory.forProtocol(self._sender)
        factory.noisy = False
        self._server = REACTOR.listenTCP(0, factory, interface="127.0.0.1")
        self._links: list[BadLink] = []

    def _sender(self) -> ContentProducer:
        self.senders.append(ContentProducer())
        return self.senders[-1]

    def link(self, clock: Clock | None = None, **faults: Any) -> BadLink:
        """Start a link with the given faults."""
        port = self._server.getHost().port
        self._links.append(BadLink(REACTOR, "127.0.0.1", port, Badness(**faults), clock=clock).start())
        return self._links[-1]

    async def client(self, link: BadLink, *wanted: int) -> Peer:
        """Connect through the link and request `wanted` bytes."""
        factory = Factory.forProtocol(Peer)
        factory.noisy = False
        peer = await TCP4ClientEndpoint(REACTOR, "127.0.0.1", link.port).connect(factory)
        assert isinstance(peer, Peer)
        for number in wanted:
            peer.transport.write(b"%d\n" % number)
        return peer

    async def close(self) -> None:
        """Stop the server."""
        stopped = self._server.stopListening()
        if stopped is not None:
            await stopped

    async def end(self) -> None:
        """Stop the server and all links."""
        await self.close()
        for link in self._links:
            await link.stop()
            assert link.counts.open == 0


async def quiet(*peers: Peer) -> None:
    """Wait until the peers have received nothing for 20 reactor iterations."""
    still, seen = 0, -1
    while still < 20:
        await turn()
        now = sum(len(peer.received) for peer in peers)
        still, seen = (still + 1 if now == seen else 0), now


async def advance(clock: Clock, seconds: float, step: float = 0.01) -> None:
    """Advance the clock in steps, running the reactor in between."""
    for _ in range(round(seconds / step)):
        clock.advance(step)
        for _ in range(4):
            await turn()
