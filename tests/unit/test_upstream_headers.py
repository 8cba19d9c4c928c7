"""Bounds on the headers of responses, below Twisted's own HTTP client."""

from __future__ import annotations

import pytest
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IProtocol, IProtocolFactory, IStreamClientEndpoint
from twisted.internet.protocol import Protocol
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.web.client import URI, Agent, HTTPConnectionPool
from twisted.web.iweb import IAgentEndpointFactory, IResponse
from zope.interface import implementer

from ociregistry.upstream.failures import broke_without_response, causes, explain, is_unreachable
from ociregistry.upstream.headers import LARGEST_HEADERS, LONGEST_LINE, MOST_HEADERS, BoundedHeaders, HeadersTooLong
from tests.unit.support.bodies import connected
from tests.unit.support.common import fired

OK = b"HTTP/1.1 200 OK\r\n"


class Transport(StringTransport):
    """A connection that notes whether it was aborted."""

    aborted = False

    def abortConnection(self) -> None:
        self.aborted = True
        super().abortConnection()


@implementer(IStreamClientEndpoint, IAgentEndpointFactory)
class Endpoint:
    """Connects in memory."""

    def endpointForURI(self, uri: URI) -> IStreamClientEndpoint:
        return BoundedHeaders(self)

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        self.transport = Transport()
        protocol = protocolFactory.buildProtocol(None)  # type: ignore[arg-type]  # the client ignores the address
        assert protocol is not None
        self.protocol = protocol
        protocol.makeConnection(self.transport)
        return succeed(protocol)


class Reader(Protocol):
    """Receives a body."""

    received = b""

    def dataReceived(self, data: bytes) -> None:
        self.received += data


class Client:
    """An HTTP client with one connection that is kept."""

    def __init__(self) -> None:
        self.endpoint = Endpoint()
        clock = Clock()
        self._agent = Agent.usingEndpointFactory(clock, self.endpoint, HTTPConnectionPool(clock))

    def ask(self) -> list[IResponse | Failure]:
        """Send a request; return a list that will have its outcome."""
        outcome: list[IResponse | Failure] = []
        self._agent.request(b"GET", b"http://host/").addBoth(outcome.append)
        return outcome

    def receive(self, data: bytes) -> None:
        """Receive this, in one piece."""
        self.endpoint.protocol.dataReceived(data)


@pytest.fixture
def client() -> Client:
    """Return a client."""
    return Client()


@pytest.mark.parametrize("start", [OK, b""], ids=["headers", "informational"])
@pytest.mark.parametrize("size", [0, 1000])
def test_endless_headers_fail(client: Client, start: bytes, size: int) -> None:
    line = b"X: " + b"x" * size + b"\r\n"
    piece = line if start else b"HTTP/1.1 102 Processing\r\n" + line + b"\r\n"
    outcome = client.ask()
    client.receive(start)
    received = 0
    while not outcome:
        client.receive(piece)
        received += len(piece)
        assert received <= LARGEST_HEADERS + 5000
    (failed,) = outcome
    assert isinstance(failed, Failure)
    assert failed.value is not None
    (cause,) = causes(failed.value)
    assert isinstance(cause, HeadersTooLong)
    assert explain(failed.value) == str(cause)
    assert not broke_without_response(failed.value)
    assert not is_unreachable(failed.value)
    assert client.endpoint.transport.aborted
    client.receive(piece)
    client.endpoint.protocol.connectionLost(Failure(ConnectionAbortedError()))


@pytest.mark.parametrize(
    "lines", [b"a:\r\n" * LARGEST_HEADERS, b"a:\r\n" * (MOST_HEADERS + 2000), b"a:" + b"x" * (LONGEST_LINE + 5000)]
)
def test_one_large_segment_fails_too(client: Client, lines: bytes) -> None:
    outcome = client.ask()
    client.receive(OK + lines)
    (failed,) = outcome
    assert isinstance(failed, Failure)
    assert client.endpoint.transport.aborted


def test_bodies_and_later_responses_are_not_counted(client: Client) -> None:
    for _ in range(3):
        outcome = client.ask()
        body = b"\n" * LARGEST_HEADERS * 2
        client.receive(OK + b"X: %s\r\nContent-Length: %d\r\n\r\n" % (b"x" * 10_000, len(body)) + body)
        (response,) = outcome
        assert not isinstance(response, Failure)
        reader = Reader()
        response.deliverBody(reader)
        assert reader.received == body
    assert client.endpoint.transport.value().count(b"GET / ") == 3


def test_what_is_received_of_a_body_is_not_copied(client: Client) -> None:
    outcome = client.ask()
    client.receive(OK + b"Content-Length: 2000\r\n\r\n")
    (response,) = outcome
    assert not isinstance(response, Failure)
    body, _ = connected()
    response.deliverBody(body)
    piece = bytes(1000)
    client.receive(piece)
    (received,) = fired(body.read_pieces())
    assert received is piece
