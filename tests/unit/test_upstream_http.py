"""Single requests over real connections: what is sent, what is refused, and what a failure is called."""

from __future__ import annotations

import gzip
import socket
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ociregistry import __version__
from ociregistry.errors import Unavailable
from ociregistry.upstream.http import NoTls, Response
from tests.certificates import Authority
from tests.unit.support.doubles import on_reactor, until
from tests.unit.support.wire import Network
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Cut, Declare, Header, Hold, NoLength, Reply

BODY = bytes(range(256)) * 400


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A host that the test accepts connections of, and then says nothing."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        listening.setblocking(False)
        yield listening


async def accept(listening: socket.socket) -> socket.socket:
    """A connection on which the client has said something."""
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
    """One request."""
    return await network.http("reg.example").send(method, url, {"X-Ours": "1"})


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@on_reactor
async def test_a_request_asks_for_bytes_as_they_are(
    network: Network, upstream: ScriptedRegistry, method: str
) -> None:
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
async def test_a_length_that_is_not_told_is_none(network: Network, upstream: ScriptedRegistry, framing: str) -> None:
    upstream.script("*", Reply(200, BODY))
    upstream.script("*", NoLength(framing))  # type: ignore[arg-type]  # it is one of the two
    response = await get(network, upstream.url)
    assert response.length is None
    assert await response.collect(len(BODY)) == BODY


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip"])
@on_reactor
async def test_an_encoded_body_is_refused(
    network: Network, upstream: ScriptedRegistry, method: str, encoding: str
) -> None:
    upstream.script("*", Reply(200, gzip.compress(BODY), (("Content-Encoding", encoding),)))
    with pytest.raises(Unavailable, match=f"^reg.example: it sent Content-Encoding .*{encoding}"):
        await get(network, upstream.url, method)


@on_reactor
async def test_identity_is_no_encoding(network: Network, upstream: ScriptedRegistry) -> None:
    upstream.script("*", Reply(200, BODY, (("Content-Encoding", "Identity"),)))
    assert await (await get(network, upstream.url)).collect(len(BODY)) == BODY


@on_reactor
async def test_nothing_is_followed(network: Network, upstream: ScriptedRegistry) -> None:
    upstream.script("*", Reply(307, b"", (("Location", "/elsewhere"),)))
    assert (await get(network, upstream.url)).header("location") == "/elsewhere"
    assert len(upstream.requests) == 1


@on_reactor
async def test_no_cookie_is_sent_back(network: Network, upstream: ScriptedRegistry) -> None:
    """Neither to who set it nor to anybody else: what a balancer means by it is none of a registry's business."""
    cookies = [f"one=1; Path=/; Domain={domain}" for domain in ("127.0.0.1", "localhost", ".local")]
    upstream.script("*", Reply(200, b"", tuple(("Set-Cookie", cookie) for cookie in ("sid=secret", *cookies))))
    http = network.http("reg.example")
    for _ in range(3):
        await (await http.send("GET", f"{upstream.url}/a", {})).discard()
    assert [request.values("Cookie") for request in upstream.requests] == [()] * 3


# Signatures are made over these very characters.
@pytest.mark.parametrize(
    "query",
    ["a=%2F&b=%2B+%20", "X-Amz-Signature=0af%2F~-_.!*'()", "sig=a%2Bb%2fc%3D%3D&se=2026%3A01", "a=b=c&d&e=", "%7E"],
)
@on_reactor
async def test_a_url_arrives_as_it_was_given(network: Network, upstream: ScriptedRegistry, query: str) -> None:
    upstream.script("*", Reply(200))
    await (await get(network, f"{upstream.url}/a?{query}")).discard()
    assert upstream.requests[0].query == query


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("after", [0, 1000, len(BODY) - 1])
@on_reactor
async def test_a_body_that_breaks_off_is_a_failure(
    network: Network, upstream: ScriptedRegistry, after: int, reset: bool
) -> None:
    upstream.script("*", Reply(200, BODY))
    upstream.script("*", Cut(after, reset=reset))
    response = await get(network, upstream.url)
    with pytest.raises(Unavailable, match=r"^reg.example: (the connection broke|it closed the connection)$"):
        await response.collect(len(BODY))


@on_reactor
async def test_chunks_that_break_off_are_a_failure(network: Network, upstream: ScriptedRegistry) -> None:
    upstream.script("*", Reply(200, BODY))
    upstream.script("*", NoLength("chunked"))
    upstream.script("*", Cut(70_000))
    with pytest.raises(Unavailable):
        await (await get(network, upstream.url)).collect(len(BODY))


@on_reactor
async def test_a_body_that_is_shorter_than_told_is_a_failure(network: Network, upstream: ScriptedRegistry) -> None:
    upstream.script("*", Reply(200, BODY))
    upstream.script("*", Declare(+5))
    with pytest.raises(Unavailable):
        await (await get(network, upstream.url)).collect(len(BODY) + 5)


@pytest.mark.parametrize("reset", [False, True])
@on_reactor
async def test_a_connection_that_ends_without_an_answer_is_a_failure(
    network: Network, upstream: ScriptedRegistry, reset: bool
) -> None:
    upstream.script("*", Cut(None, reset=reset))
    with pytest.raises(Unavailable, match=r"^reg.example: (the connection broke|it closed the connection)$"):
        await get(network, upstream.url)


@on_reactor
async def test_headers_have_half_a_minute(network: Network, upstream: ScriptedRegistry, clock: Clock) -> None:
    upstream.script("*", Hold())
    sending = Deferred.fromCoroutine(network.http("reg.example", clock=clock).send("GET", upstream.url, {}))
    await until(lambda: upstream.requests)
    clock.advance(29.9)
    assert not sending.called
    clock.advance(0.1)
    with pytest.raises(Unavailable, match=r"^reg.example: no response in time$"):
        await sending
    assert clock.getDelayedCalls() == []


@on_reactor
async def test_the_body_has_its_own_time(network: Network, upstream: ScriptedRegistry, clock: Clock) -> None:
    upstream.script("*", Reply(200, BODY))
    hold = Hold(1000)
    upstream.script("*", hold)
    response = await network.http("reg.example", clock=clock).send("GET", upstream.url, {})
    clock.advance(9)
    hold.release.set()
    assert await response.collect(len(BODY)) == BODY


@pytest.mark.parametrize(("scheme", "kind"), [("https", NoTls), ("http", Unavailable)])
@on_reactor
async def test_a_refused_connection(network: Network, upstream: ScriptedRegistry, scheme: str, kind: type) -> None:
    upstream.close()
    with pytest.raises(Unavailable, match=r"^reg.example: the connection was refused$") as refused:
        await get(network, f"{scheme}://{upstream.host}/")
    assert type(refused.value) is kind


@on_reactor
async def test_a_plain_answer_to_the_tls_hello(network: Network, upstream: ScriptedRegistry) -> None:
    with pytest.raises(NoTls, match=r"^reg.example: TLS failed: "):
        await get(network, f"https://{upstream.host}/")
    assert upstream.requests == ()


@on_reactor
async def test_a_certificate_that_nobody_vouches_for(network: Network, secure: ScriptedRegistry) -> None:
    with pytest.raises(Unavailable) as refused:
        await get(network, secure.url)
    assert refused.value.message == (
        "reg.example: TLS failed: the certificate of CN=127.0.0.1 is refused: its issuer is not trusted"
    )
    assert not isinstance(refused.value, NoTls)
    assert secure.requests == ()


@on_reactor
async def test_a_certificate_for_another_host(network: Network, authority: Authority) -> None:
    with ScriptedRegistry(tls=authority.server_context("elsewhere.example")) as upstream:
        with pytest.raises(Unavailable) as refused:
            await network.http("reg.example", trust=authority.ca).send("GET", upstream.url, {})
        assert refused.value.message == (
            "reg.example: TLS failed: the certificate of CN=elsewhere.example is refused: it is for another host name"
        )
        assert not isinstance(refused.value, NoTls)
        assert upstream.requests == ()


@on_reactor
async def test_a_host_that_says_nothing_to_the_tls_hello(
    network: Network, silent: socket.socket, clock: Clock
) -> None:
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
async def test_an_answer_that_is_no_http(network: Network, upstream: ScriptedRegistry) -> None:
    upstream.script("*", Reply(200, b"", (("Content-Length", "many"),)))
    upstream.script("*", Header("X", "y"))
    with pytest.raises(Unavailable, match=r"^reg.example: "):
        await get(network, upstream.url)


@on_reactor
async def test_a_short_body_is_let_pass_and_the_connection_used_again(
    network: Network, upstream: ScriptedRegistry
) -> None:
    upstream.script("*", Reply(404, b"x" * 60_000))
    http = network.http("reg.example")
    for _ in range(3):
        await (await http.send("GET", upstream.url, {})).discard()
    assert upstream.connections == 1


@on_reactor
async def test_a_long_body_that_nobody_wants_is_cut_off(network: Network, upstream: ScriptedRegistry) -> None:
    upstream.script("*", Reply(404, bytes(64 * 1024 * 1024)))
    response = await get(network, upstream.url)
    await response.discard()
    await response.body.ended
    assert upstream.requests[0].sent < 60_000_000


@on_reactor
async def test_a_body_is_collected_up_to_its_limit(network: Network, upstream: ScriptedRegistry) -> None:
    upstream.script("*", Reply(200, BODY))
    assert await (await get(network, upstream.url)).collect(len(BODY)) == BODY
    with pytest.raises(Unavailable, match=f"longer than {len(BODY) - 1} bytes"):
        await (await get(network, upstream.url)).collect(len(BODY) - 1)
