"""The resource tree and the HTTP server that serves it."""

from __future__ import annotations

import io
from collections import Counter

from twisted.internet.interfaces import IReactorTime
from twisted.web.resource import Resource
from twisted.web.server import Request, Site

from ociregistry.context import Context
from ociregistry.errors import NotFound
from ociregistry.web.api import V2
from ociregistry.web.channel import Channel, Traffic
from ociregistry.web.requests import Query
from ociregistry.web.resource import Answer, Handler, Served

_IDLE_CONNECTION = 150.0
"""Seconds. Clients keep idle connections for 90 to 120 s; closing one earlier can make a client's request fail."""


class _Nowhere(io.RawIOBase):
    """A file object that discards what is written to it."""

    def write(self, data: object) -> int:
        return len(data)  # type: ignore[arg-type]  # any buffer has a length

    def read(self, size: int = -1) -> bytes:
        return b""

    def seek(self, offset: int, whence: int = 0) -> int:
        return 0

    def tell(self) -> int:
        return 0


class _PullOnlyRequest(Request):
    """A request whose body is discarded, because no supported request has one."""

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
    """The HTTP server; `web/resource.py` writes the access log."""

    def __init__(self, v2: V2, health: Handler, patience: float, clock: IReactorTime) -> None:
        """Build the resource tree; `patience` is the number of seconds to wait for the next byte of content."""
        self.traffic = Traffic()

        def served(handler: Handler) -> Served:
            return Served(handler, self.traffic, patience, clock)

        root = _Root(served(_nothing))
        root.putChild(b"v2", served(v2.answer))
        root.putChild(b"health", served(health))
        super().__init__(root, requestFactory=_PullOnlyRequest, timeout=_IDLE_CONNECTION, reactor=clock)
        addresses: Counter[str] = Counter()
        # Site's `protocol` is typed for the wrapper that can also speak HTTP/2.
        self.protocol = lambda: Channel(clock, addresses, self.traffic)  # type: ignore[method-assign, assignment, return-value]

    def log(self, request: object) -> None:
        """Do nothing: `web/resource.py` writes the access log."""


async def _nothing(method: str, path: bytes, query: Query, context: Context) -> Answer:
    raise NotFound(f"no such path: {path[:300]!r}; the API is at /v2/")
