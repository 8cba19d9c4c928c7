"""Single requests over real connections: headers sent, responses refused, error texts and timeouts."""

from __future__ import annotations

import gzip
import socket
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ociregistry import __version__
from ociregistry.context import Wanted
from ociregistry.errors import Unavailable
from ociregistry.upstream.http import NoTls, RequestOptions, Response
from tests.certificates import Authority
from tests.unit.support.common import on_reactor, until
from tests.unit.support.wire import Network
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Cut, Declare, Header, Hold, NoLength, Reply

BODY = bytes(range(256)) * 400


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """Return a listening socket that never answers."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        listening.setblocking(False)
        yield listening


async def accept(listening: socket.socket) -> socket.socket:
    """Return a connection after the client has sent something."""
    connections: list[socket.socket] = []

    def said() -> bool:
        with suppress(BlockingIOError):
            if not connections:
                connections.append(listening.accept()[0])
                connections[0].setblocking(False)
            return bool(connections[0].recv(1, socket.MSG_PEEK))
        return False

    await until(said)
    return connections[0]


async def get(network: Network, url: str, method: str = "GET") -> Response:
    """Send a request."""
    return await network.http("reg.example").send(method, url, {"X-Ours": "1"})


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@on_reactor
async def test_request_headers(network: Network, upstream: ScriptedRegistry, method: str) -> None:
    upstream.script("*", Reply(200, BODY, (("X-Theirs", " a "), ("X-Theirs", "b"))))
    response = await get(network, f"{upstream.url}/some/path?q=1", method)
    (request,) = upstream.requests
    assert (request.method, request.path, request.query) == (method, "/some/path", "q=1")
    assert request.values("Accept-Encoding") == ("identity",)
    assert request.values("User-Agent") == (f"ociregistry/{__version__}",)
    assert request.values("X-Ours") == ("1",)
    assert (response.status, response.url, response.upstream) == (200, f"{upstream.url}/some/path?q=1", "reg.example")
    assert (response.header("x-theirs"), len(response.headers("X-Theirs"))) == ("a", 2)
    assert (response.header("missing"), response.headers("missing")) == ("", [])
    assert await response.collect(len(BODY)) == (BODY if method == "GET" else b"")
    if method == "GET":
        assert response.length == len(BODY)


@pytest.mark.parametrize("framing", ["chunked", "close"])
@on_reactor
async def test_unknown_length_is_none(network: Network, upstream: ScriptedRegistry, framing: str) -> None:
    upstream.script("*", Reply(200, BODY))
    upstream.script("*", NoLength(framing))  # type: ignore[arg-type]  # one of the two
    response = await get(network, upstream.url)
    assert response.length is None
    assert await response.collect(len(BODY)) == BODY


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip"])
@on_reactor
async def test_encoded_body_is_refused(
    network: Network, upstream: ScriptedRegistry, method: str, encoding: str
) -> None:
    upstream.script("*", Reply(200, gzip.compress(BODY), (("Content-Encoding", encoding),)))
    with pytest.raises(Unavailable, match=f"^reg.example: it sent Content-Encoding .*{encoding}"):
        await get(network, upstream.url, method)


@on_reactor
async def test_identity_encoding_is_accepted(network: Network, upstream: ScriptedRegistry) -> None:
    upstream.script("*", Reply(200, BODY, (("Content-Encoding", "Identity"),)))
    assert await (await get(network, upstream.url)).collect(len(BODY)) == BODY


@on_reactor
async def test_redirect_is_not_followed(network: Network, upstream: ScriptedRegistry) -> None:
    upstream.script("*", Reply(307, b"", (("Location", "/elsewhere"),)))
    assert (await get(network, upstream.url)).header("location") == "/elsewhere"
    assert len(upstream.requests) == 1


@on_reactor
async def test_no_cookie_is_sent_back(network: Network, upstream: ScriptedRegistry) -> None:
    """To neither the same nor another host; a load balancer's cookies have no meaning for a registry client."""
    cookies = [f"one=1; Path=/; Domain={domain}" for domain in ("127.0.0.1", "localhost", ".local")]
    upstream.script("*", Reply(200, b"", tuple(("Set-Cookie", cookie) for cookie in ("sid=secret", *cookies))))
    http = network.http("reg.example")
    for _ in range(3):
        await (await http.send("GET", f"{upstream.url}/a", {})).discard()
    assert [request.values("Cookie") for request in upstream.requests] == [()] * 3


# Signatures cover these exact characters.
@pytest.mark.parametrize(
    "query",
    ["a=%2F&b=%2B+%20", "X-Amz-Signature=0af%2F~-_.!*'()", "sig=a%2Bb%2fc%3D%3D&se=2026%3A01", "a=b=c&d&e=", "%7E"],
)
@on_reactor
async def test_url_is_sent_unchanged(network: Network, upstream: ScriptedRegistry, query: str) -> None:
    upstream.script("*", Reply(200))
    await (await get(network, f"{upstream.url}/a?{query}")).discard()
    assert upstream.requests[0].query == query


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("after", [0, 1000, len(BODY) - 1])
@on_reactor
async def test_lost_connection_in_body_is_an_error(
    network: Network, upstream: ScriptedRegistry, after: int, reset: bool
) -> None:
    upstream.script("*", Reply(200, BODY))
    upstream.script("*", Cut(after, reset=reset))
    response = await get(network, upstream.url)
    with pytest.raises(Unavailable, match=r"^reg.example: (the connection broke|it closed the connection)$"):
        await response.collect(len(BODY))


@on_reactor
async def test_truncated_chunked_body_is_an_error(network: Network, upstream: ScriptedRegistry) -> None:
    upstream.script("*", Reply(200, BODY))
    upstream.script("*", NoLength("chunked"))
    upstream.script("*", Cut(70_000))
    with pytest.raises(Unavailable):
        await (await get(network, upstream.url)).collect(len(BODY))


@on_reactor
async def test_body_shorter_than_content_length_is_an_error(network: Network, upstream: ScriptedRegistry) -> None:
    upstream.script("*", Reply(200, BODY))
    upstream.script("*", Declare(+5))
    with pytest.raises(Unavailable):
        await (await get(network, upstream.url)).collect(len(BODY) + 5)


@pytest.mark.parametrize("reset", [False, True])
@on_reactor
async def test_connection_closed_without_response_is_an_error(
    network: Network, upstream: ScriptedRegistry, reset: bool
) -> None:
    upstream.script("*", Cut(None, reset=reset))
    with pytest.raises(Unavailable, match=r"^reg.example: (the connection broke|it closed the connection)$"):
        await get(network, upstream.url)
    assert len(upstream.requests) == 2


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("used", [False, True])
@on_reactor
async def test_connection_closed_once_without_response_is_retried(
    network: Network, upstream: ScriptedRegistry, method: str, reset: bool, used: bool
) -> None:
    """Connections of the pool and new ones are alike.

    Envoy answered 503 where an upstream closed the connection just then (envoyproxy/envoy#1979).
    """
    upstream.script("*", Reply(200, BODY))
    http = network.http("reg.example")
    if used:
        await (await http.send("HEAD", upstream.url, {})).discard()
    upstream.script("*", Cut(None, reset=reset), times=1)
    response = await http.send(method, upstream.url, {})
    assert await response.collect(len(BODY)) == (BODY if method == "GET" else b"")
    assert len(upstream.requests) == 2 + used


@on_reactor
async def test_post_is_not_retried(network: Network, upstream: ScriptedRegistry) -> None:
    upstream.script("*", Reply(200, BODY))
    upstream.script("*", Cut(None), times=1)
    with pytest.raises(Unavailable):
        await network.http("reg.example").send("POST", upstream.url, {}, b"grant_type=refresh_token")
    assert len(upstream.requests) == 1


@on_reactor
async def test_headers_time_out_after_60_seconds(network: Network, upstream: ScriptedRegistry, clock: Clock) -> None:
    upstream.script("*", Hold())
    options = RequestOptions(wanted=Wanted(lambda error: None))
    http = network.http("reg.example", clock=clock)
    sending = Deferred.fromCoroutine(http.send("GET", upstream.url, {}, options=options))
    await until(lambda: upstream.requests)
    clock.advance(59.9)
    assert not sending.called
    clock.advance(0.1)
    with pytest.raises(Unavailable, match=r"^reg.example: no response in time$"):
        await sending
    assert clock.getDelayedCalls() == []


@on_reactor
async def test_body_has_its_own_timeout(network: Network, upstream: ScriptedRegistry, clock: Clock) -> None:
    upstream.script("*", Reply(200, BODY))
    hold = Hold(1000)
    upstream.script("*", hold)
    response = await network.http("reg.example", clock=clock).send("GET", upstream.url, {})
    clock.advance(9)
    hold.release.set()
    assert await response.collect(len(BODY)) == BODY


@pytest.mark.parametrize(("scheme", "kind"), [("https", NoTls), ("http", Unavailable)])
@on_reactor
async def test_refused_connection(network: Network, upstream: ScriptedRegistry, scheme: str, kind: type) -> None:
    upstream.close()
    with pytest.raises(Unavailable, match=r"^reg.example: the connection was refused$") as refused:
        await get(network, f"{scheme}://{upstream.host}/")
    assert type(refused.value) is kind


@on_reactor
async def test_plain_text_answer_to_tls_hello(network: Network, upstream: ScriptedRegistry) -> None:
    with pytest.raises(NoTls, match=r"^reg.example: TLS failed: "):
        await get(network, f"https://{upstream.host}/")
    assert upstream.requests == ()


@on_reactor
async def test_untrusted_certificate(network: Network, secure: ScriptedRegistry) -> None:
    with pytest.raises(Unavailable) as refused:
        await get(network, secure.url)
    assert refused.value.message == (
        "reg.example: TLS failed: the certificate of CN=127.0.0.1 is refused: its issuer is not trusted"
    )
    assert not isinstance(refused.value, NoTls)
    assert secure.requests == ()


@on_reactor
async def test_certificate_for_another_host(network: Network, authority: Authority) -> None:
    with ScriptedRegistry(tls=authority.server_context("elsewhere.example")) as upstream:
        with pytest.raises(Unavailable) as refused:
            await network.http("reg.example", trust=authority.ca).send("GET", upstream.url, {})
        assert refused.value.message == (
            "reg.example: TLS failed: the certificate of CN=elsewhere.example is refused: it is for another host name"
        )
        assert not isinstance(refused.value, NoTls)
        assert upstream.requests == ()


@on_reactor
async def test_no_answer_to_tls_hello(network: Network, silent: socket.socket, clock: Clock) -> None:
    http = network.http("reg.example", clock=clock)
    url = f"https://127.0.0.1:{silent.getsockname()[1]}/"
    sending = Deferred.fromCoroutine(http.send("GET", url, {}))
    connection = await accept(silent)
    clock.advance(30)
    with pytest.raises(Unavailable, match=r"^reg.example: no response in time$") as refused:
        await sending
    assert not isinstance(refused.value, NoTls)
    connection.close()


@on_reactor
async def test_response_that_is_not_http(network: Network, upstream: ScriptedRegistry) -> None:
    upstream.script("*", Reply(200, b"", (("Content-Length", "many"),)))
    upstream.script("*", Header("X", "y"))
    with pytest.raises(Unavailable, match=r"^reg.example: "):
        await get(network, upstream.url)


@on_reactor
async def test_discarding_a_short_body_keeps_the_connection(network: Network, upstream: ScriptedRegistry) -> None:
    upstream.script("*", Reply(404, b"x" * 60_000))
    http = network.http("reg.example")
    for _ in range(3):
        await (await http.send("GET", upstream.url, {})).discard()
    assert upstream.connections == 1


@on_reactor
async def test_discarding_a_long_body_closes_the_connection(network: Network, upstream: ScriptedRegistry) -> None:
    upstream.script("*", Reply(404, bytes(64 * 1024 * 1024)))
    response = await get(network, upstream.url)
    await response.discard()
    await response.body.ended
    assert upstream.requests[0].sent < 60_000_000


@on_reactor
async def test_collect_has_a_limit(network: Network, upstream: ScriptedRegistry) -> None:
    upstream.script("*", Reply(200, BODY))
    assert await (await get(network, upstream.url)).collect(len(BODY)) == BODY
    with pytest.raises(Unavailable, match=f"longer than {len(BODY) - 1} bytes"):
        await (await get(network, upstream.url)).collect(len(BODY) - 1)
