"""Serving: one response per request, whatever the handler or the client does."""

from __future__ import annotations

import json
from functools import partial

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry import __version__
from ociregistry.context import NO_VIA, Context, Priority, Via
from ociregistry.errors import BlobUnknown, NameInvalid, RangeUnsatisfiable, RegistryError, Unavailable
from ociregistry.log import json_line
from ociregistry.pullthrough.waiting import CacheStatus
from ociregistry.web.exchange import InMemory, SizeOnly
from ociregistry.web.resource import Answer
from ociregistry.web.site import RegistrySite
from tests.unit.support.common import texts
from tests.unit.support.raw_clients import Growing, Handler, RawClient, site

DATA = bytes(range(256)) * 8
TAGGED = {"Content-Type": "text/x", "ETag": '"sha256:abc"'}
A, B = f"ociregistry-{'a' * 16}", f"ociregistry-{'b' * 16}"


@pytest.fixture
def handler() -> Handler:
    """Return the request handler."""
    return Handler()


@pytest.fixture
def server(handler: Handler, clock: Clock) -> RegistrySite:
    """Return the server."""
    return site(handler, clock)


def test_status_headers_and_body(handler: Handler, server: RegistrySite) -> None:
    handler.give = lambda: Answer(200, InMemory(DATA), TAGGED)
    got = RawClient(server).ask("/v2/x%3Ay?ns=a%2Fb").got()
    assert handler.asked == [("GET", b"/v2/x%3Ay")]
    assert (got.version, got.status, got.body) == ("HTTP/1.1", 200, DATA)
    assert got.headers.pop("date")
    assert got.headers == {
        "content-type": "text/x",
        "etag": '"sha256:abc"',
        "content-length": "2048",
        "docker-distribution-api-version": "registry/2.0",
        "server": f"ociregistry/{__version__}",
        "x-content-type-options": "nosniff",
    }


def test_head_response_has_no_body(handler: Handler, server: RegistrySite) -> None:
    content = Growing(2048)
    handler.give = lambda: Answer(200, content, TAGGED, ranged=True)
    client = RawClient(server).ask("/v2/x", "HEAD", Range="bytes=0-9")
    got = client.got("HEAD")
    assert (got.status, got.headers["content-length"], got.headers["accept-ranges"]) == (200, "2048", "bytes")
    assert content.closed == 1
    # No byte of a body is left that the client would take for the next response.
    handler.give = lambda: Answer(200, SizeOnly(77))
    client.ask("/v2/y", "HEAD")
    handler.give = lambda: Answer(200, InMemory(b"z"))
    client.ask("/v2/z")
    answers = client.all_got("HEAD", "HEAD", "GET")
    assert [answer.headers["content-length"] for answer in answers] == ["2048", "77", "1"]
    assert answers[2].body == b"z"


def test_error_response_to_head_has_no_body(handler: Handler, server: RegistrySite) -> None:
    handler.give = lambda: BlobUnknown("not there")
    got = RawClient(server).ask("/v2/x", "HEAD").got("HEAD")
    assert got.status == 404
    assert int(got.headers["content-length"]) > 0


@pytest.mark.parametrize("method", ["PUT", "POST", "PATCH", "DELETE", "OPTIONS", "NONSENSE"])
def test_other_methods_are_refused(handler: Handler, server: RegistrySite, method: str) -> None:
    for path in ("/v2/x", "/health", "/nowhere"):
        got = RawClient(server).ask(path, method).got(method)
        assert (got.status, got.headers["allow"], got.error["code"]) == (405, "GET, HEAD", "UNSUPPORTED")
    assert handler.asked == []


def test_error_is_a_response_and_one_log_line(handler: Handler, server: RegistrySite, events: list[LogEvent]) -> None:
    handler.give = lambda: Unavailable("docker.io: the connection was refused", 7)
    got = RawClient(server).ask("/v2/a/manifests/1?ns=docker.io").got()
    assert (got.status, got.headers["retry-after"]) == (503, "7")
    assert got.error == {"code": "UNAVAILABLE", "message": "docker.io: the connection was refused", "detail": None}
    assert texts(events, LogLevel.error) == [
        "GET /v2/a/manifests/1?ns=docker.io: 503 UNAVAILABLE: docker.io: the connection was refused"
    ]


@pytest.mark.expect_logged_failures
def test_defect_is_a_500_with_one_traceback(handler: Handler, server: RegistrySite, events: list[LogEvent]) -> None:
    handler.give = lambda: ZeroDivisionError("a secret")
    client = RawClient(server).ask("/v2/x")
    got = client.got()
    assert (got.status, got.error["code"]) == (500, "UNKNOWN")
    assert b"secret" not in client.received
    assert [event["log_failure"].type for event in events if "log_failure" in event] == [ZeroDivisionError]
    told = json.loads(json_line(events[-1]))
    assert (told["level"], told["exception"], told["uri"]) == ("critical", "ZeroDivisionError", "/v2/x")
    assert told["traceback"].splitlines()[-1] == "builtins.ZeroDivisionError: a secret"
    # The connection stays usable.
    handler.give = lambda: Answer(200, InMemory(b"hello"))
    assert client.ask("/v2/x").all_got("GET", "GET")[1].body == b"hello"


@pytest.mark.parametrize(
    ("asked", "where", "body"),
    [
        ("bytes=500-1499", "bytes 500-1499/2048", DATA[500:1500]),
        ("bytes=500-", "bytes 500-2047/2048", DATA[500:]),
        ("bytes=-500", "bytes 1548-2047/2048", DATA[-500:]),
        ("bytes=0-", "bytes 0-2047/2048", DATA),
    ],
)
def test_partial_content(handler: Handler, server: RegistrySite, asked: str, where: str, body: bytes) -> None:
    handler.give = lambda: Answer(200, InMemory(DATA), TAGGED, ranged=True)
    got = RawClient(server).ask("/v2/x", Range=asked).got()
    assert (got.status, got.headers["content-range"], got.body) == (206, where, body)
    assert got.headers["content-length"] == str(len(body))
    assert got.headers["etag"] == TAGGED["ETag"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Range": "bytes=0-1,5-6"},
        {"Range": "nonsense"},
        {"Range": "bytes=0-1", "If_Range": '"another"'},
        {"Range": "bytes=0-1", "If_Range": "Sun, 01 Mar 2026 22:17:30 GMT"},
    ],
)
def test_whole_content(handler: Handler, server: RegistrySite, headers: dict[str, str]) -> None:
    handler.give = lambda: Answer(200, InMemory(DATA), TAGGED, ranged=True)
    got = RawClient(server).ask("/v2/x", **headers).got()
    assert (got.status, got.body, got.headers["accept-ranges"]) == (200, DATA, "bytes")
    assert "content-range" not in got.headers


def test_if_range_of_unchanged_content(handler: Handler, server: RegistrySite) -> None:
    handler.give = lambda: Answer(200, InMemory(DATA), TAGGED, ranged=True)
    assert RawClient(server).ask("/v2/x", Range="bytes=0-1", If_Range=TAGGED["ETag"]).got().status == 206


def test_ranges_of_documents_are_ignored(handler: Handler, server: RegistrySite) -> None:
    handler.give = lambda: Answer(200, InMemory(DATA))
    got = RawClient(server).ask("/v2/x", Range="bytes=0-1").got()
    assert (got.status, got.body) == (200, DATA)
    assert "accept-ranges" not in got.headers


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (BlobUnknown("not there"), LogLevel.info),
        (NameInvalid("no name"), LogLevel.info),
        (Unavailable("too slow"), LogLevel.error),
    ],
)
def test_failed_request_is_one_log_line(
    handler: Handler, server: RegistrySite, events: list[LogEvent], error: RegistryError, level: object
) -> None:
    """What a client asks for in vain is no error of this server."""
    handler.give = lambda: error
    RawClient(server).ask("/v2/x")
    assert texts(events) == [f"GET /v2/x: {error.status} {error.code}: {error.message}"]
    assert [event["log_level"] for event in events] == [level]


def test_unsatisfiable_range(handler: Handler, server: RegistrySite, events: list[LogEvent]) -> None:
    content = Growing(2048)
    handler.give = lambda: Answer(200, content, TAGGED, ranged=True)
    got = RawClient(server).ask("/v2/x", Range="bytes=5000-").got()
    assert (got.status, got.headers["content-range"]) == (416, "bytes */2048")
    assert got.error["code"] == RangeUnsatisfiable.code
    assert content.closed == 1
    assert (len(texts(events, LogLevel.info)), len(texts(events))) == (1, 1)


def test_headers_are_sent_before_the_first_byte(handler: Handler, server: RegistrySite) -> None:
    content = Growing(10)
    handler.give = lambda: Answer(200, content)
    client = RawClient(server).ask("/v2/x")
    assert (client.got().status, client.got().body) == (200, b"")
    content.grow(b"01234")
    assert client.got().body == b"01234"
    content.grow(b"56789")
    assert client.got().whole
    assert content.closed == 1


def test_client_disconnects_during_the_handler(
    handler: Handler, server: RegistrySite, events: list[LogEvent]
) -> None:
    asked: Deferred[Answer] = Deferred()
    handler.give = lambda: asked
    client = RawClient(server).ask("/v2/x")
    client.leave()
    assert not asked.called
    content = Growing(10)
    asked.callback(Answer(200, content))
    assert content.closed == 1
    assert client.received == b""
    assert server.in_flight.idle().called
    assert texts(events, LogLevel.error) == []


def test_client_disconnects_during_the_body(handler: Handler, server: RegistrySite, events: list[LogEvent]) -> None:
    content = Growing(10)
    handler.give = lambda: Answer(200, content)
    client = RawClient(server).ask("/v2/x")
    content.grow(b"01")
    client.leave()
    assert content.closed == 1
    assert server.in_flight.idle().called
    content.grow(b"23")
    assert texts(events, LogLevel.error) == []


def test_traffic_counts_responses_in_progress(handler: Handler, server: RegistrySite) -> None:
    contents = [Growing(1), Growing(1)]
    answers = iter(contents)
    handler.give = lambda: Answer(200, next(answers))
    assert server.in_flight.idle().called
    clients = [RawClient(server).ask("/v2/x") for _ in contents]
    idle = server.in_flight.idle()
    contents[0].grow(b"x")
    assert not idle.called
    clients[1].leave()
    assert idle.called


def test_access_log_line(handler: Handler, server: RegistrySite, clock: Clock, events: list[LogEvent]) -> None:
    asked: Deferred[Answer] = Deferred()
    handler.give = lambda: asked
    client = RawClient(server).ask("/v2/a/blobs/x?ns=docker.io&last=y")
    clock.advance(1.5)
    asked.callback(Answer(200, InMemory(DATA), cache_status=CacheStatus.MISS))
    (line,) = texts(events, LogLevel.info)
    size = len(client.received.partition(b"\r\n\r\n")[2])
    assert line == f"GET /v2/a/blobs/x ns=docker.io 200 {size} bytes 1500 ms 192.0.2.1:40000 miss"
    for found, word in (
        (CacheStatus.HIT, "hit"),
        (CacheStatus.SHARED, "shared"),
        (CacheStatus.STALE, "stale"),
        (None, "-"),
    ):
        handler.give = partial(Answer, 200, InMemory(b""), cache_status=found)
        client.ask("/v2/")
        assert texts(events, LogLevel.info)[-1].endswith(f" ns=- 200 0 bytes 0 ms 192.0.2.1:40000 {word}")


def test_events_of_a_request_have_the_same_fields(
    handler: Handler, server: RegistrySite, clock: Clock, events: list[LogEvent]
) -> None:
    """Whether it succeeds, fails, or ends short."""
    own = {
        "method": "GET",
        "path": "/v2/a",
        "ns": "quay.io",
        "client": "192.0.2.1:40000",
        "user_agent": "podman",
        "milliseconds": 0,
    }
    short = Growing(5)
    told: list[tuple[Answer | Exception, dict[str, object]]] = [
        (Answer(200, InMemory(b"x")), {"status": 200, "bytes": 1, "cache_status": "-"}),
        (Unavailable("down"), {"status": 503, "code": "UNAVAILABLE", "why": "down"}),
        (Answer(200, short), {"bytes": 2}),
    ]
    short.grow(b"xx")
    short.fail(Unavailable("down"))
    for given, more in told:
        handler.give = lambda given=given: given  # type: ignore[misc]  # of this iteration
        RawClient(server).ask("/v2/a?ns=quay.io&last=y", User_Agent="podman")
        fields = {**own, **more, **({} if "cache_status" in more else {"uri": "/v2/a?ns=quay.io&last=y"})}
        assert {key: events[-1].get(key) for key in fields} == fields


@pytest.mark.parametrize(
    ("headers", "via"),
    [
        ([], NO_VIA),
        (["Via: 1.1 varnish"], NO_VIA),
        ([f"Via: 1.1 {A}"], Via((A,))),
        ([f"Via: 1.1 {A}, 1.1 {B}"], Via((A, B))),
        ([f"Via: 1.1 {B}", "Accept: */*", f"via: 1.1 varnish, 1.1 {A}"], Via((B, A))),
        # Repeated header lines are joined by commas: half a name must not be completed by the next line.
        (["Via: 1.1 ociregistry-", f"Via: {A[-16:]}"], NO_VIA),
        ([f"Via: 1.1 \xff\xfe, 1.1 {A}"], Via((A,))),
    ],
)
def test_via_is_passed_to_the_handler(handler: Handler, server: RegistrySite, headers: list[str], via: Via) -> None:
    request = "\r\n".join(["GET /v2/ HTTP/1.1", "Host: cache", *headers, "", ""])
    assert RawClient(server).send(request.encode("latin-1")).got().status == 200
    assert handler.contexts == [Context(via, Priority.CLIENT)]


@pytest.mark.parametrize(
    "path", ["/v2/a?ns=%0A2026%20[fake]", "/v2/a?ns=%1B[31m", "/v2/%0A?ns=%FF", "/v2/\\n?ns=%C2%85"]
)
def test_log_line_is_one_line_for_any_request(
    handler: Handler, server: RegistrySite, events: list[LogEvent], path: str
) -> None:
    for give in (lambda: Answer(200, InMemory(b"")), lambda: BlobUnknown("not there")):
        handler.give = give
        RawClient(server).ask(path)
    lines = texts(events)
    assert len(lines) == 2
    assert all(line.isprintable() and line.isascii() for line in lines)
