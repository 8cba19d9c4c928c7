"""Clients of the HTTP server without a network, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, cast

from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IPushProducer, IReactorTime
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.web.http import HTTPChannel

from ociregistry.concurrency import Event
from ociregistry.context import FROM_CLIENT, Context
from ociregistry.pullthrough.completion import Incomplete
from ociregistry.store.lookups import Counts
from ociregistry.store.space import Room
from ociregistry.web.api import V2, health, probe
from ociregistry.web.exchange import InMemory
from ociregistry.web.requests import Query
from ociregistry.web.resource import Answer
from ociregistry.web.site import RegistrySite

STARTED = datetime(2026, 3, 1, 22, 17, 30, tzinfo=UTC)
ROOM = Room(size=100, free=10, reserve=7, full=False)


class Growing:
    """Content that grows when the test says so."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.data = b""
        self.closed = 0
        self.error: Exception | None = None
        self._changed = Event()

    def grow(self, data: bytes) -> None:
        """Append data."""
        self.data += data
        self._changed.fire()

    def fail(self, error: Exception) -> None:
        """Fail: there will be no more data."""
        self.error = error
        self._changed.fire()

    def more_than(self, offset: int) -> Deferred[int]:
        """Wait for more data."""
        return Deferred.fromCoroutine(self._more_than(offset))

    async def _more_than(self, offset: int) -> int:
        while len(self.data) <= offset:
            if self.error is not None:
                raise self.error
            await self._changed.wait()
        return len(self.data)

    def read(self, offset: int, count: int) -> Deferred[bytes]:
        """Read available data."""
        return InMemory(self.data).read(offset, count)

    def close(self) -> None:
        """Count the close."""
        self.closed += 1


class Handler(V2):
    """An API with scripted answers."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bytes]] = []
        self.contexts: list[Context] = []
        self.give: Callable[[], Answer | Deferred[Answer] | Exception] = lambda: Answer(200, InMemory(b"hello"))

    async def answer(self, method: str, path: bytes, query: Query, context: Context = FROM_CLIENT) -> Answer:
        self.asked.append((method, path))
        self.contexts.append(context)
        given = self.give()
        if isinstance(given, Exception):
            raise given
        return await given if isinstance(given, Deferred) else given


def site(handler: V2, clock: IReactorTime, patience: float = 60.0) -> RegistrySite:
    """Return a site over the handler."""
    health_resource = health(
        lambda: Counts(lists=2, images=3),
        lambda: Incomplete(images=1, bytes=5),
        lambda: None,
        lambda: ROOM,
        list,
        STARTED,
    )
    others = {"health": health_resource, "livez": probe(), "readyz": probe(lambda: "stopping")}
    return RegistrySite(handler, others, patience, clock, lambda: True)


class Got:
    """A response as the client received it."""

    def __init__(self, head: bytes, body: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        self.version, status, _ = first.split(" ", 2)
        self.status = int(status)
        self.headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        self.body = body

    @property
    def whole(self) -> bool:
        """Return whether the body is complete."""
        return len(self.body) == int(self.headers["content-length"])

    @property
    def error(self) -> Mapping[str, Any]:
        """Return the single error in the body."""
        assert self.headers["content-type"] == "application/json"
        (error,) = json.loads(self.body)["errors"]
        assert set(error) == {"code", "message", "detail"}
        return cast(Mapping[str, Any], error)


class RawClient:
    """A client with one connection."""

    def __init__(self, server: RegistrySite) -> None:
        address = IPv4Address("TCP", "192.0.2.1", 40_000)
        self.transport = StringTransport(peerAddress=address)
        protocol = server.buildProtocol(address)
        assert protocol is not None
        self.channel = cast(HTTPChannel, protocol)
        self.channel.makeConnection(self.transport)

    def send(self, data: bytes) -> RawClient:
        """Send bytes."""
        self.channel.dataReceived(data)
        return self

    def ask(self, path: str, method: str = "GET", **headers: str) -> RawClient:
        """Send a request."""
        lines = [
            f"{method} {path} HTTP/1.1",
            "Host: cache",
            *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items()),
        ]
        return self.send("\r\n".join([*lines, "", ""]).encode("latin-1"))

    @property
    def received(self) -> bytes:
        """Return all bytes received."""
        return bytes(self.transport.value())

    def got(self, method: str = "GET") -> Got:
        """Return the single response so far."""
        (answer,) = self.all_got(method)
        return answer

    def all_got(self, *methods: str) -> list[Got]:
        """Return the responses to requests of these methods; the last one may be incomplete."""
        answers = []
        rest = self.received
        for method in methods:
            head, _, rest = rest.partition(b"\r\n\r\n")
            length = 0 if method == "HEAD" else int(Got(head, b"").headers["content-length"])
            answers.append(Got(head, rest[:length]))
            rest = rest[length:]
        assert not rest, rest
        return answers

    def pause(self) -> None:
        """Stop reading."""
        cast(IPushProducer, self.transport.producer).pauseProducing()

    def resume(self) -> None:
        """Continue reading."""
        cast(IPushProducer, self.transport.producer).resumeProducing()

    @property
    def ended(self) -> bool:
        """Return whether the server has ended the connection."""
        return self.transport.disconnecting

    def leave(self) -> None:
        """Close the connection."""
        self.channel.connectionLost(Failure(ConnectionDone()))
