"""The resource tree and the HTTP server in front of it."""

from __future__ import annotations

import io
from collections import Counter

from twisted.internet.interfaces import IReactorTime
from twisted.web.resource import Resource
from twisted.web.server import Request, Site

from ociregistry.errors import NotFound
from ociregistry.via import Via
from ociregistry.web.api import V2
from ociregistry.web.channel import Channel, Traffic
from ociregistry.web.requests import Query
from ociregistry.web.resource import Answer, Handler, Served

_IDLE_CONNECTION = 150.0
"""Seconds; clients keep connections for 90 to 120 s, and one that we close under them fails a request."""


class _Nowhere(io.RawIOBase):
    """Takes what nobody reads."""

    def write(self, data: object) -> int:
        return len(data)  # type: ignore[arg-type]  # any buffer has a length

    def read(self, size: int = -1) -> bytes:
        return b""

    def seek(self, offset: int, whence: int = 0) -> int:
        return 0

    def tell(self) -> int:
        return 0


class _PullOnlyRequest(Request):
    """Takes no body into memory or onto disk: no request that is answered has one."""

    def gotLength(self, length: int | None) -> None:
        self.content = _Nowhere()

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:
        self.requestHeaders.removeHeader(b"content-type")
        super().requestReceived(command, path, version)


class _Root(Resource):
    def __init__(self, elsewhere: Resource) -> None:
        super().__init__()
        self._elsewhere = elsewhere

    def getChild(self, path: bytes, request: Request) -> Resource:
        return self._elsewhere


class RegistrySite(Site):
    """The HTTP server; its access lines are written where requests are served."""

    def __init__(self, v2: V2, health: Handler, patience: float, clock: IReactorTime) -> None:
        """`patience` is how many seconds a client waits for the next byte of an answer."""
        self.traffic = Traffic()

        def served(handler: Handler) -> Served:
            return Served(handler, self.traffic, patience, clock)

        root = _Root(served(_nothing))
        root.putChild(b"v2", served(v2.answer))
        root.putChild(b"health", served(health))
        super().__init__(root, requestFactory=_PullOnlyRequest, timeout=_IDLE_CONNECTION, reactor=clock)
        addresses: Counter[str] = Counter()
        # Typed for the wrapper that could also speak HTTP/2.
        self.protocol = lambda: Channel(clock, addresses, self.traffic)  # type: ignore[method-assign, assignment, return-value]

    def log(self, request: object) -> None:
        """Writes nothing."""


async def _nothing(method: str, path: bytes, query: Query, via: Via) -> Answer:
    raise NotFound(f"there is nothing at {path[:300]!r}; the API is at /v2/")
