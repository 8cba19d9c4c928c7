"""The HTTP server: paths, connections, request bodies and timeouts."""

from __future__ import annotations

import json

import pytest
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry import __version__
from ociregistry.web import channel
from ociregistry.web.exchange import InMemory
from ociregistry.web.resource import Answer
from ociregistry.web.site import RegistrySite
from tests.unit.support.common import texts
from tests.unit.support.raw_clients import Growing, Handler, RawClient, site


@pytest.fixture
def handler() -> Handler:
    """Return the request handler."""
    return Handler()


@pytest.fixture
def server(handler: Handler, clock: Clock) -> RegistrySite:
    """Return the server."""
    return site(handler, clock)


@pytest.mark.parametrize("path", ["/v2", "/v2/", "/v2/a/b/c", "/v2//", "/v2/%2e%2e/x", "/v2/../health"])
def test_api_is_below_v2(handler: Handler, server: RegistrySite, path: str) -> None:
    assert RawClient(server).ask(path).got().body == b"hello"
    assert handler.asked == [("GET", path.encode())]


@pytest.mark.parametrize("path", ["http://cache:8080/v2/a", "HTTPS://u:p@[::1]/v2/a?n=1", "http://else.example/v2/a"])
def test_absolute_form_is_served_as_origin_form(handler: Handler, server: RegistrySite, path: str) -> None:
    assert RawClient(server).ask(path).got().body == b"hello"
    assert handler.asked == [("GET", b"/v2/a")]


@pytest.mark.parametrize(
    "path", ["/", "/v1/", "/v2x", "/favicon.ico", "//v2/", "/%76%32x", "http://v2/", "http:/v2/", "ftp://x/v2/"]
)
def test_other_paths_are_404(handler: Handler, server: RegistrySite, path: str, events: list[LogEvent]) -> None:
    got = RawClient(server).ask(path).got()
    assert (got.status, got.error["code"]) == (404, "NOT_FOUND")
    assert handler.asked == []
    assert "b'" not in got.error["message"]
    assert (len(texts(events, LogLevel.info)), len(texts(events))) == (1, 1)


def test_health(server: RegistrySite) -> None:
    got = RawClient(server).ask("/health").got()
    assert (got.status, got.headers["content-type"]) == (200, "application/json")
    assert json.loads(got.body) == {
        "status": "ok",
        "reasons": [],
        "version": __version__,
        "started": "2026-03-01T22:17:30+00:00",
        "lists": 2,
        "images": 3,
        "incomplete_images": 1,
        "missing_bytes": 5,
        "pending_images": 0,
        "incomplete_indexes": 0,
        "disk": {"size": 100, "free": 10, "reserve": 7, "full": False},
    }
    assert RawClient(server).ask("/health", "HEAD").got("HEAD").status == 200


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(("path", "status", "text"), [("/livez", 200, b"ok\n"), ("/readyz", 503, b"stopping\n")])
def test_probes_are_plain_text_and_logged_at_debug(
    server: RegistrySite, events: list[LogEvent], method: str, path: str, status: int, text: bytes
) -> None:
    got = RawClient(server).ask(path, method).got(method)
    assert (got.status, got.headers["content-type"]) == (status, "text/plain; charset=utf-8")
    assert (got.body, int(got.headers["content-length"])) == (text if method == "GET" else b"", len(text))
    (line,) = texts(events)
    assert line.startswith(f"{method} {path} ns=- {status} ")
    assert texts(events, LogLevel.debug) == [line]


def test_keep_alive(server: RegistrySite) -> None:
    client = RawClient(server)
    for _ in range(3):
        client.ask("/v2/")
    assert [got.body for got in client.all_got("GET", "GET", "GET")] == [b"hello"] * 3
    assert not client.ended


def test_pipelined_requests_are_answered_in_order(handler: Handler, server: RegistrySite) -> None:
    first, second = Growing(5), InMemory(b"later")
    contents = iter((first, second))
    handler.give = lambda: Answer(200, next(contents))
    client = RawClient(server).send(b"GET /v2/1 HTTP/1.1\r\nHost: a\r\n\r\nGET /v2/2 HTTP/1.1\r\nHost: a\r\n\r\n")
    first.grow(b"first")
    assert [got.body for got in client.all_got("GET", "GET")] == [b"first", b"later"]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_connection_close(server: RegistrySite, version: str) -> None:
    close = b"" if version == "1.0" else b"Connection: close\r\n"
    client = RawClient(server).send(b"GET /v2/ HTTP/%b\r\nHost: a\r\n%b\r\n" % (version.encode(), close))
    assert client.got().body == b"hello"
    assert client.ended


BODY = b"x" * 100_000
FORMS = (b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=b", b"application/json", b"")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["POST", "PUT", "GET"])
def test_request_body_is_discarded(handler: Handler, server: RegistrySite, form: bytes, method: str) -> None:
    head = b"%b /v2/a HTTP/1.1\r\nHost: a\r\nContent-Type: %b\r\n" % (method.encode(), form)
    client = RawClient(server).send(head + b"Content-Length: %d\r\n\r\n" % len(BODY))
    for _ in range(10):
        client.send(BODY[:10_000])
    expected = 200 if method == "GET" else 405
    assert client.got(method).status == expected
    # Chunked as well; the connection stays usable.
    client.send(head + b"Transfer-Encoding: chunked\r\n\r\n" + b"2710\r\n%b\r\n" % BODY[:10_000] * 10 + b"0\r\n\r\n")
    client.ask("/v2/")
    assert [got.status for got in client.all_got(method, method, "GET")] == [expected, expected, 200]


def test_request_body_is_not_buffered(server: RegistrySite) -> None:
    client = RawClient(server).send(b"PUT /v2/a HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n")
    for _ in range(50):
        client.send(BODY[:10_000])
    (request,) = client.channel.requests
    assert request.content.read() == b""
    assert request.content.tell() == 0


@pytest.mark.parametrize(
    "garbage",
    [
        b"\r\n\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\n\r\n",
        b"\xff" * 100 + b"\r\n\r\n",
        b"x" * 20_000,
        b"GET / HTTP/9\r\n\r\n",
    ],
)
def test_malformed_request_gets_400(handler: Handler, server: RegistrySite, garbage: bytes) -> None:
    RawClient(server).send(garbage)
    assert RawClient(server).ask("/v2/").got().body == b"hello"


def test_two_content_lengths_are_refused(handler: Handler, server: RegistrySite) -> None:
    """They allow request smuggling."""
    client = RawClient(server).send(
        b"GET /v2/ HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    )
    assert client.received.startswith(b"HTTP/1.1 400 ")
    assert handler.asked == []


def test_tls_hello_is_refused_immediately(handler: Handler, server: RegistrySite) -> None:
    """Go clients then fall back to plain HTTP immediately, instead of after ten seconds."""
    client = RawClient(server).send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500))
    got = client.got()
    assert (got.status, got.whole, client.ended) == (400, True, True)
    assert handler.asked == []


def test_request_times_out_after_30_seconds(server: RegistrySite, clock: Clock) -> None:
    client = RawClient(server).send(b"GET /v2/ HTTP/1.1\r\n")
    for _ in range(29):
        clock.advance(1)
        client.send(b"X: y\r\n")
    assert not client.ended
    clock.advance(1)
    assert client.ended


def test_response_time_does_not_count(handler: Handler, server: RegistrySite, clock: Clock) -> None:
    content = Growing(5)
    handler.give = lambda: Answer(200, content)
    client = RawClient(server).ask("/v2/")
    clock.advance(50)
    assert not client.ended
    content.grow(b"hello")
    assert client.got().whole


def test_idle_timeout_exceeds_that_of_clients(server: RegistrySite, clock: Clock) -> None:
    client = RawClient(server).ask("/v2/")
    for _ in range(12):
        clock.advance(10)
    assert not client.ended
    client.ask("/v2/")
    assert len(client.all_got("GET", "GET")) == 2
    for _ in range(20):
        clock.advance(10)
    assert client.ended


def test_connections_per_address_are_limited(server: RegistrySite, monkeypatch: pytest.MonkeyPatch) -> None:
    assert channel.MOST_CONNECTIONS >= 1000
    monkeypatch.setattr(channel, "MOST_CONNECTIONS", 5)
    clients = [RawClient(server) for _ in range(5)]
    assert not any(client.ended for client in clients)
    assert RawClient(server).ended
    clients[0].leave()
    clients[1].leave()
    assert not RawClient(server).ended


def test_no_delayed_call_is_left_behind(server: RegistrySite, clock: Clock) -> None:
    for data in (b"", b"GET /v2/ HTTP/1.1\r\n", b"GET /v2/ HTTP/1.1\r\nHost: a\r\n\r\n"):
        RawClient(server).send(data).leave()
    assert clock.getDelayedCalls() == []
