"""Bounds the headers of responses from upstreams, token services, mirrors and proxies.

Twisted's HTTP client keeps headers, and skips informational responses (1xx), without end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IProtocol, IProtocolFactory, IStreamClientEndpoint
from twisted.internet.protocol import Protocol
from twisted.protocols.basic import LineReceiver
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.python.failure import Failure
from zope.interface import implementer

LARGEST_HEADERS = 64 * 1024
"""Bytes of the headers of one response, with those of the informational responses before it."""
MOST_HEADERS = 1000
"""Lines of the same."""
_SLICE = 4096
"""Bytes that are parsed before the next check."""
LONGEST_LINE = LineReceiver.MAX_LENGTH - _SLICE
"""Bytes. At a longer line than its maximum, Twisted's client closes the connection without giving a reason."""


class HeadersTooLong(Exception):
    """A host sends more headers than any response needs."""

    def __init__(self) -> None:
        super().__init__(
            f"its headers have more than {LARGEST_HEADERS} bytes, {MOST_HEADERS} lines, "
            f"or {LONGEST_LINE} bytes in one line"
        )


class _BoundedHeaders(ProtocolWrapper):
    """Counts what the HTTP client receives from the moment when it writes a request until it pauses for the body.

    The client pauses its transport when the headers are complete and a body follows. Without a body, no byte follows
    before the next request.
    """

    def __init__(self, factory: WrappingFactory[Any], wrappedProtocol: IProtocol) -> None:
        super().__init__(factory, wrappedProtocol)
        self._expect_headers()

    def write(self, data: bytes) -> None:
        self._expect_headers()
        super().write(data)

    def writeSequence(self, data: Iterable[bytes]) -> None:
        self._expect_headers()
        super().writeSequence(data)

    def _expect_headers(self) -> None:
        self._in_headers = True
        self._bytes = 0
        self._lines = 0
        self._bytes_in_line = 0

    def pauseProducing(self) -> None:
        """Stop counting: the headers are complete."""
        self._in_headers = False
        self._transport.pauseProducing()

    def dataReceived(self, data: bytes) -> None:
        """Pass on what was received; while it is of headers, in small slices, and only up to the bounds."""
        if not self._in_headers:
            super().dataReceived(data)
            return
        rest = memoryview(data)
        while rest and self._in_headers:
            if self._too_long():
                self._fail()
                return
            piece, rest = bytes(rest[:_SLICE]), rest[_SLICE:]
            self._count(piece)
            super().dataReceived(piece)
        if rest:
            super().dataReceived(bytes(rest))

    def _count(self, piece: bytes) -> None:
        self._bytes += len(piece)
        self._lines += piece.count(b"\n")
        _, ended, line = piece.rpartition(b"\n")
        self._bytes_in_line = len(line) if ended else self._bytes_in_line + len(line)

    def _too_long(self) -> bool:
        return self._bytes > LARGEST_HEADERS or self._lines > MOST_HEADERS or self._bytes_in_line > LONGEST_LINE

    def _fail(self) -> None:
        # The HTTP client must not hear a second time that the connection is lost.
        client, self.wrappedProtocol = self.wrappedProtocol, Protocol()
        client.connectionLost(Failure(HeadersTooLong()))
        self._transport.abortConnection()

    @property
    def _transport(self) -> Any:
        # No interface of Twisted has both of the methods that are used.
        return self.transport


class _Factory(WrappingFactory):
    protocol = _BoundedHeaders
    noisy = False


@implementer(IStreamClientEndpoint)
class BoundedHeaders:
    """Connects an HTTP client by another endpoint; requests whose response has endless headers fail.

    They fail with `HeadersTooLong`, and their connection is closed.
    """

    def __init__(self, endpoint: IStreamClientEndpoint) -> None:
        self._endpoint = endpoint

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """Connect; the Deferred fires with the protocol that `protocolFactory` made."""
        connected = self._endpoint.connect(_Factory(protocolFactory))
        return connected.addCallback(lambda wrapper: cast(_BoundedHeaders, wrapper).wrappedProtocol)
