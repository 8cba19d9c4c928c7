"""A site over a real store, whose answers by the usual way are counted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

from twisted.internet.address import IPv4Address
from twisted.internet.interfaces import IAddress
from twisted.internet.task import Clock

from ociregistry.context import FROM_CLIENT, Context
from ociregistry.names import Upstream
from ociregistry.pullthrough.cache import PullThrough
from ociregistry.pullthrough.demand import Demand
from ociregistry.store.store import Store
from ociregistry.web.api import V2
from ociregistry.web.requests import Query
from ociregistry.web.resource import Answer
from ociregistry.web.site import RegistrySite
from tests.images import make_image
from tests.unit.support.common import image, manifest, until
from tests.unit.support.demands import NoDemand
from tests.unit.support.http_agents import INSTANCE
from tests.unit.support.web_clients import Transport

BUILT = make_image("hits", layer_size=20_000)
IMAGE = manifest(BUILT)
APP = image("reg.example/team/app:1")
TAG = "/v2/team/app/manifests/1?ns=reg.example"
MANIFEST = f"/v2/team/app/manifests/{IMAGE.digest}?ns=reg.example"
BLOB = f"/v2/team/app/blobs/{BUILT.layers[0].digest}?ns=reg.example"
CLIENT = IPv4Address("TCP", "192.0.2.1", 40_000)

_DATE = re.compile(rb"\r\nDate: [^\r]*")


def request(target: str, method: str = "GET", headers: str = "", version: str = "1.1") -> bytes:
    """Return a request; each of the `headers` ends with CRLF."""
    return f"{method} {target} HTTP/{version}\r\nHost: cache\r\n{headers}\r\n".encode("latin-1")


def undated(answer: bytes) -> bytes:
    """Return an answer without its date."""
    return _DATE.sub(b"", answer)


class CountingV2(V2):
    """The API; `asked` counts what takes the usual way."""

    asked = 0

    async def answer(self, method: str, path: bytes, query: Query, context: Context = FROM_CLIENT) -> Answer:
        self.asked += 1
        return await super().answer(method, path, query, context)


class _Transport(Transport):
    def resumeProducing(self) -> None:
        # Real transports allow it after they were told to close.
        if not self.disconnecting:
            super().resumeProducing()


class Connection:
    """A connection to the site; `full` while its client takes nothing."""

    def __init__(self, site: RegistrySite, address: IAddress = CLIENT) -> None:
        self.transport = _Transport(peerAddress=address)
        self.channel: Any = site.buildProtocol(address)
        self.channel.makeConnection(self.transport)

    def send(self, *segments: bytes) -> Connection:
        """Send bytes, in these segments."""
        for segment in segments:
            self.channel.dataReceived(segment)
        return self

    @property
    def received(self) -> bytes:
        """All that the client has received."""
        return cast(bytes, self.transport.value())

    @property
    def whole(self) -> bool:
        """Whether one answer was received as a whole, or the connection is closed."""
        answer = self.received.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        head, end, body = answer.partition(b"\r\n\r\n")
        length = re.search(rb"\r\nContent-Length: ([0-9]+)", head)
        return self.transport.disconnecting or bool(end and length and (self.head or len(body) >= int(length[1])))

    head = False
    """Whether the request is a HEAD."""


class Served:
    """A site over the store, and the demand that it tells."""

    def __init__(
        self, root: Path, store: Store, cache: PullThrough, clock: Clock, demand: Demand | None = None
    ) -> None:
        self.root = root
        self.clock = clock
        self._store = store
        self.v2 = CountingV2(cache, cast(Any, cache), demand or NoDemand(), Upstream("docker.io"), INSTANCE)
        self.site = RegistrySite(self.v2, {}, 60, clock, lambda: True)

    async def fill(self) -> None:
        """Store the image and its blobs."""
        await self._store.keep(IMAGE, APP, wanted=True)
        for blob in BUILT.blobs:
            (self.root / "blobs" / blob.digest.removeprefix("sha256:")).write_bytes(blob.data)

    async def ask(self, *segments: bytes, address: IAddress = CLIENT) -> bytes:
        """Send one request on a new connection, in these segments; return the answer without its date."""
        connection = Connection(self.site, address)
        connection.head = segments[0].startswith(b"HEAD")
        connection.send(*segments)
        await until(lambda: connection.whole)
        return undated(connection.received)

    async def remember(self, target: str, method: str = "GET") -> bytes:
        """Have the answer to a plain request remembered, by the usual way, and return it."""
        before = self.v2.asked
        answer = await self.ask(request(target, method))
        assert (answer[:15], self.v2.asked) == (b"HTTP/1.1 200 OK", before + 1)
        return answer

    async def is_short(self, *segments: bytes, address: IAddress = CLIENT) -> bool:
        """Send a request; tell whether it took the short way."""
        before = self.v2.asked
        await self.ask(*segments, address=address)
        return self.v2.asked == before
