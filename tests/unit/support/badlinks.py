"""A server, bad links to it, and clients: what the tests of the bad link share."""

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
from tests.unit.support.doubles import REACTOR, turn

KIB = 1024
SMALL = 32 * KIB


def small_buffers(transport: Any) -> None:
    """The kernel hides little for this socket."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        transport.getHandle().setsockopt(socket.SOL_SOCKET, option, SMALL)


def pattern(start: int, end: int) -> bytes:
    """Bytes that tell where they stand."""
    return b"".join(b"%015d\n" % (number * 16) for number in range(start // 16, end // 16 + 1))[
        start % 16 : start % 16 + end - start
    ]


class Peer(Protocol):
    """Keeps what it receives, and how it ended."""

    transport: Any

    def __init__(self) -> None:
        self.received = b""
        self.ended: type | None = None

    def connectionMade(self) -> None:
        """Make the kernel's part small."""
        small_buffers(self.transport)

    def dataReceived(self, data: bytes) -> None:
        """Keep it."""
        self.received += data

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Keep why."""
        self.ended = type(reason.value)


@implementer(IHalfCloseableProtocol)
class ContentProducer(Peer):
    """A server's end: it sends as many bytes as each line wants, and closes then if there is a 0, or an end."""

    def __init__(self) -> None:
        super().__init__()
        self._sent = self._wanted = self.given = 0

    def dataReceived(self, data: bytes) -> None:
        """A number or several."""
        super().dataReceived(data)
        for line in data.decode().split():
            if line == "0":
                self.transport.loseConnection()
            else:
                self._wanted += int(line)
        self.transport.unregisterProducer()
        self.transport.registerProducer(self, False)

    def readConnectionLost(self) -> None:
        """Nothing more is wanted."""
        self.transport.loseConnection()

    def writeConnectionLost(self) -> None:
        """Nor sent."""

    def resumeProducing(self) -> None:
        """The kernel has taken all that it was given."""
        self.given = self._sent
        end = min(self._wanted, self._sent + SMALL)
        if end > self._sent:
            self.transport.write(pattern(self._sent, end))
            self._sent = end
        else:
            self.transport.unregisterProducer()

    def stopProducing(self) -> None:
        """It is over."""


class Scene:
    """A server, and the links to it."""

    def __init__(self) -> None:
        self.senders: list[ContentProducer] = []
        factory = Factory.forProtocol(self._sender)
        factory.noisy = False
        self._server = REACTOR.listenTCP(0, factory, interface="127.0.0.1")
        self._links: list[BadLink] = []

    def _sender(self) -> ContentProducer:
        self.senders.append(ContentProducer())
        return self.senders[-1]

    def link(self, clock: Clock | None = None, **badness: Any) -> BadLink:
        """A link that is so bad."""
        port = self._server.getHost().port
        self._links.append(BadLink(REACTOR, "127.0.0.1", port, Badness(**badness), clock=clock).start())
        return self._links[-1]

    async def client(self, link: BadLink, *wanted: int) -> Peer:
        """Somebody who connects over the link, and wants so many bytes."""
        factory = Factory.forProtocol(Peer)
        factory.noisy = False
        peer = await TCP4ClientEndpoint(REACTOR, "127.0.0.1", link.port).connect(factory)
        assert isinstance(peer, Peer)
        for number in wanted:
            peer.transport.write(b"%d\n" % number)
        return peer

    async def close(self) -> None:
        """No server any more."""
        stopped = self._server.stopListening()
        if stopped is not None:
            await stopped

    async def end(self) -> None:
        """No link either."""
        await self.close()
        for link in self._links:
            await link.stop()
            assert link.counts.open == 0


async def quiet(*peers: Peer) -> None:
    """Return when nothing has moved for a while."""
    still, seen = 0, -1
    while still < 20:
        await turn()
        now = sum(len(peer.received) for peer in peers)
        still, seen = (still + 1 if now == seen else 0), now


async def advance(clock: Clock, seconds: float, step: float = 0.01) -> None:
    """Let time pass in steps, between which sockets do what they can."""
    for _ in range(round(seconds / step)):
        clock.advance(step)
        for _ in range(4):
            await turn()
