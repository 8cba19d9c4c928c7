"""Malformed responses of upstreams: their errors are told in plain words, without the notation of Python."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.protocol import Factory, Protocol

from ociregistry.errors import Unavailable
from ociregistry.names import Repository, Upstream
from ociregistry.upstream.registry import Registry
from tests.unit.support.common import REACTOR, image, on_reactor
from tests.unit.support.wire import Network

OK = b"HTTP/1.1 200 OK\r\n"
NOT_HTTP = "its response is not valid HTTP"
NO_URL = "which is not an http or https URL"
PYTHON = re.compile(r"""[ (]b['"]|<class|codec|unpack|positional|got '""")
"""What only messages of Python contain."""


def redirect(location: bytes) -> bytes:
    """Return a response with this Location."""
    return b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\nContent-Length: 0\r\n\r\n"


def document(data: bytes) -> bytes:
    """Return a response with this body, as JSON."""
    return OK + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data)


async def manifest(registry: Registry) -> None:
    """Request a manifest."""
    await registry.manifest(image(f"{registry.upstream}/team/app:1"))


async def tags(registry: Registry) -> None:
    """Request the tags."""
    await registry.tags(Repository(registry.upstream, "team/app"))


RESPONSES: dict[str, tuple[bytes, str]] = {
    "status line": (b"zz\r\n\r\n", NOT_HTTP),
    "status": (b"HTTP/1.1 zz OK\r\n\r\n", NOT_HTTP),
    "version": (b"FTP/9 200 OK\r\n\r\n", NOT_HTTP),
    "header": (OK + b"zz\r\n\r\n", NOT_HTTP),
    "length": (OK + b"Content-Length: zz\r\n\r\n", NOT_HTTP),
    "two lengths": (OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", NOT_HTTP),
    "long length": (OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", NOT_HTTP),
    "encoding": (OK + b"Transfer-Encoding: zz\r\n\r\n", NOT_HTTP),
    "chunk": (OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", NOT_HTTP),
    "space in Location": (redirect(b"http://reg.example/a c"), NO_URL),
    "control character in Location": (redirect(b"http://reg.example/\x01"), NO_URL),
    "bytes in Location": (redirect(b"http://reg.example/\xff"), NO_URL),
    "no UTF-8": (document(b"{\xff}"), "byte 1 is not UTF-8"),
    "no JSON": (document(b"{"), "Expecting"),
    "no tags": (document(b"{}"), "valid"),
    "no names": (document(b'{"tags": [1]}'), "valid"),
    "no document": (document(b"[1]"), "valid"),
}


@pytest.mark.parametrize("ask", [manifest, tags])
@pytest.mark.parametrize(("response", "why"), RESPONSES.values(), ids=RESPONSES.keys())
@on_reactor
async def test_malformed_response_is_told_in_plain_words(
    network: Network, response: bytes, why: str, ask: Callable[[Registry], Coroutine[Deferred[Any], Any, None]]
) -> None:
    class Upstreams(Protocol):
        def dataReceived(self, data: bytes) -> None:
            assert self.transport is not None
            self.transport.write(response)
            self.transport.loseConnection()

    port = REACTOR.listenTCP(0, Factory.forProtocol(Upstreams), interface="127.0.0.1")
    try:
        host = Upstream(f"127.0.0.1:{port.getHost().port}")
        with pytest.raises(Unavailable) as error:
            await ask(network.registry(str(host), scheme="http"))
    finally:
        await maybeDeferred(port.stopListening)
    assert why in error.value.message
    assert not PYTHON.search(error.value.message), error.value.message
