"""A client of a site in memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress
from twisted.internet.testing import StringTransport

from ociregistry.errors import ManifestUnknown
from ociregistry.pullthrough.cache import FoundBlob
from ociregistry.pullthrough.waiting import CacheStatus
from ociregistry.web.exchange import InMemory
from ociregistry.web.site import RegistrySite

QUICK = b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n"
SLOW = b"GET /v2/team/app/manifests/1 HTTP/1.1\r\nHost: x\r\n\r\n"
BLOB = b"GET /v2/team/app/blobs/sha256:%s HTTP/1.1\r\nHost: x\r\n\r\n" % (b"0" * 64)
DATA = b"x" * 3_000_000


class SizedData(InMemory):
    """Content shorter than its declared size."""

    size = len(DATA)


class Cache:
    """A cache that finds every blob and no manifest, once told to answer."""

    counts = SimpleNamespace(lists=0, images=0)

    def __init__(self) -> None:
        self.answer: Deferred[None] = Deferred()
        self.data = InMemory(DATA)

    async def manifest(self, image: object, via: object, *, wanted: bool) -> None:
        await self.answer
        raise ManifestUnknown("it is not here")

    async def blob(self, repository: object, digest: object, via: object) -> FoundBlob:
        return FoundBlob(self.data, CacheStatus.HIT)


class Transport(StringTransport):
    """A connection whose client reads everything, or nothing while `full`."""

    aborted = False
    full = False

    def write(self, data: bytes) -> None:
        super().write(data)
        if self.full:
            assert self.producer is not None
            self.producer.pauseProducing()

    def unregisterProducer(self) -> None:
        """Remove the producer; as with real transports, there may be none."""
        self.producer = None

    def abortConnection(self) -> None:
        self.aborted = True
        super().abortConnection()


class Client:
    """A connection to a site."""

    def __init__(self, site: RegistrySite, address: IAddress | None = None) -> None:
        address = address or IPv4Address("TCP", "10.0.0.7", 40000)
        self.transport = Transport(peerAddress=address)
        self.channel: Any = site.buildProtocol(address)
        self.channel.makeConnection(self.transport)

    def send(self, data: bytes) -> None:
        """Send data, unless the connection has ended."""
        if not self.gone:
            self.channel.dataReceived(data)

    @property
    def statuses(self) -> list[bytes]:
        """Return the statuses of the responses so far."""
        parts = self.transport.value().split(b"HTTP/1.1 ")[1:]
        return [part[:3] for part in parts]

    @property
    def gone(self) -> bool:
        """Return whether the server has ended the connection."""
        return self.transport.disconnecting
