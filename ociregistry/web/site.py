"""The resource tree and the HTTP server that serves it."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from twisted.internet.interfaces import IAddress, IReactorTime
from twisted.web.resource import Resource
from twisted.web.server import Request, Site

from ociregistry.admin.requests import Requests
from ociregistry.context import Context
from ociregistry.errors import NotFound
from ociregistry.log import Seldom
from ociregistry.web.api import V2
from ociregistry.web.channel import Channel, InFlight
from ociregistry.web.hits import Hits
from ociregistry.web.producer import SendLimits, Unsent
from ociregistry.web.requests import Query, origin_form
from ociregistry.web.resource import Answer, Guard, Handler, HandlerResource, admit

_IDLE_CONNECTION = 150.0
"""Seconds. Clients keep idle connections for 90 to 120 s; closing one earlier can make a client's request fail."""


class _NullFile(io.RawIOBase):
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
        self.content = _NullFile()

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:
        self.requestHeaders.removeHeader(b"content-type")
        super().requestReceived(command, origin_form(path), version)


class _FallbackResource(Resource):
    def __init__(self, fallback: Resource) -> None:
        super().__init__()
        self._fallback = fallback

    def getChild(self, path: bytes, request: Request) -> Resource:
        return self._fallback


class HandlerSite(Site):
    """An HTTP server whose requests handlers answer; `web/exchange.py` writes the access log."""

    noisy = False

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        fallback: Handler,
        patience: float,
        clock: IReactorTime,
        logs_requests: Callable[[], bool],
        guard: Guard = admit,
    ) -> None:
        """Build the resource tree: `handlers` by the first part of the path, `fallback` for all others.

        `patience` is the number of seconds to wait for the next byte of content. `logs_requests` tells whether the
        access log is written. `guard` is called with each request before its handler.
        """
        self.in_flight = InFlight()
        self.requests = Requests()
        limits = SendLimits(patience, Unsent(clock), Seldom(clock), logs_requests, self.requests)
        self.hits = Hits(self.in_flight, limits, clock)

        def resource(handler: Handler) -> HandlerResource:
            return HandlerResource(handler, self.in_flight, self.hits, limits, clock, guard)

        root = _FallbackResource(resource(fallback))
        for part, handler in handlers.items():
            root.putChild(part.encode(), resource(handler))
        super().__init__(root, requestFactory=_PullOnlyRequest, timeout=_IDLE_CONNECTION, reactor=clock)
        self._clock = clock
        self._addresses: Counter[str] = Counter()
        self._speaks_tls = Seldom(clock)

    def buildProtocol(self, addr: IAddress | None) -> Any:
        """Make the channel of a new connection, without the superclass's wrapper that can also speak HTTP/2."""
        # Any, since Twisted's types allow only that wrapper, which is private.
        channel: Any = Channel(self._clock, self._addresses, self.in_flight, self._speaks_tls, self.hits)
        channel.factory, channel.site = self, self
        channel.requestFactory = self.requestFactory
        channel.timeOut, channel.callLater = self.timeOut, self._clock.callLater
        return channel

    def log(self, request: object) -> None:
        """Do nothing: `web/exchange.py` writes the access log."""


class RegistrySite(HandlerSite):
    """The HTTP server for clients of the registry."""

    def __init__(
        self,
        v2: V2,
        others: Mapping[str, Handler],
        patience: float,
        clock: IReactorTime,
        logs_requests: Callable[[], bool],
    ) -> None:
        """Answer by the API, and by `others` beside it; the rest of the arguments are those of `HandlerSite`."""
        super().__init__({"v2": v2.answer, **others}, _not_found, patience, clock, logs_requests)


async def _not_found(method: str, path: bytes, query: Query, context: Context) -> Answer:
    raise NotFound(f"no such path: {path[:300].decode('latin-1')!r}; the API is at /v2/")
