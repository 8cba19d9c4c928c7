"""The short way for hits: what takes it, what does not, and that it gives the same answers."""

from __future__ import annotations

import time
import tracemalloc
from functools import partial
from pathlib import Path

import pytest
from twisted.internet.address import UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent
from twisted.web.http import datetimeToString

from ociregistry.admin.requests import Kind, Outcome, Requests
from ociregistry.log import Seldom
from ociregistry.pullthrough.cache import Policy, PullThrough
from ociregistry.store.store import Store
from ociregistry.web.channel import InFlight, plain_request_line
from ociregistry.web.exchange import InMemory, Logged
from ociregistry.web.hits import Hits
from ociregistry.web.producer import SendLimits, Unsent
from ociregistry.web.resource import Answer
from ociregistry.web.site import RegistrySite
from tests.unit.support.common import image, on_reactor, texts, until
from tests.unit.support.hits import BLOB, IMAGE, MANIFEST, TAG, Connection, Served, request
from tests.unit.support.raw_clients import Growing, Handler, RawClient, site
from tests.unit.support.registries import MemoryRegistries

TARGETS = [TAG, MANIFEST, BLOB]


@pytest.fixture
def served(root: Path, store: Store, cache: PullThrough, clock: Clock) -> Served:
    """Return a site over the empty store."""
    return Served(root, store, cache, clock)


def sent_more_than(upstreams: MemoryRegistries, count: int) -> bool:
    """Tell whether more requests than these were sent to upstreams."""
    return len(upstreams) > count


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("target", TARGETS)
@on_reactor
async def test_repeated_request_takes_the_short_way_to_the_same_answer(
    served: Served, target: str, method: str
) -> None:
    await served.fill()
    first = await served.remember(target, method)
    asked = served.v2.asked
    for headers in (
        "",
        "Accept: */*\r\nUser-Agent: x\r\n",
        "connection: Keep-Alive\r\n",
        "Authorization: Basic eA==\r\n",
    ):
        assert await served.ask(request(target, method, headers)) == first
    assert served.v2.asked == asked
    # In two segments it takes the usual way.
    whole = request(target, method)
    assert await served.ask(whole[:-1], whole[-1:]) == first
    assert served.v2.asked == asked + 1


UNUSUAL = {
    "range": "Range: bytes=0-9\r\n",
    "a range of it all": "RANGE:bytes=0-\r\n",
    "a condition on a range": "If-Range: x\r\n",
    "a condition": f'If-None-Match: "{IMAGE.digest}"\r\n',
    "from another cache": "Via: 1.1 ociregistry-ffffffffffffffff\r\n",
    "expectation": "Expect: 100-continue\r\n",
    "length of no body": "Content-Length: 0\r\n",
    "type of no body": "Content-Type: text/plain\r\n",
    "last one": "Connection: close\r\n",
    "last one, in a list": "Connection: keep-alive, close\r\n",
    "last one, in two lines": "Connection: keep-alive\r\nConnection: close\r\n",
    "upgrade": "Connection: Upgrade\r\nUpgrade: h2c\r\n",
    "upgrade alone": "Upgrade: h2c\r\n",
    "trailers": "TE: trailers\r\n",
    "trailers to come": "Trailer: X\r\n",
    "cookie": "Cookie: a=b\r\n",
    "folded": "X: a\r\n b\r\n",
    "other bytes": "X: \xe4\r\n",
    "a tab": "X: a\tb\r\n",
    "a space before the colon": "X : a\r\n",
    "no colon": "X\r\n",
    "no name": ": x\r\n",
    "as many as Twisted takes": "a:\r\n" * 400,
    "more than Twisted takes": "a:\r\n" * 501,
    "large": f"X: {'x' * 4096}\r\n",
}


@pytest.mark.parametrize("headers", UNUSUAL.values(), ids=UNUSUAL)
@pytest.mark.parametrize("target", [TAG, BLOB])
@on_reactor
async def test_unusual_headers_take_the_usual_way(served: Served, target: str, headers: str) -> None:
    await served.fill()
    await served.remember(target)
    whole = request(target, headers=headers)
    assert plain_request_line(whole) is None
    answer = await served.ask(whole)
    assert answer == await served.ask(whole[:20], whole[20:])
    # Nor is the answer to such a request remembered for plain ones.
    assert (await served.ask(request(target))).startswith(b"HTTP/1.1 200 OK\r\n")


@on_reactor
async def test_body_in_chunks_takes_the_usual_way(served: Served) -> None:
    await served.fill()
    await served.remember(TAG)
    assert not await served.is_short(request(TAG, headers="Transfer-Encoding: chunked\r\n") + b"0\r\n\r\n")


@pytest.mark.parametrize(
    "sent",
    [
        request(TAG, version="1.0"),
        request(TAG, "get"),
        request(TAG, "PUT"),
        request(TAG, "GET "),
        b"\r\n" + request(TAG),
        request(TAG).replace(b"\r\n", b"\n"),
        request(TAG) + b"\r\n",
        request(TAG) + request(TAG),
        request(TAG, headers="Transfer-Encoding: chunked\r\n"),
        request(TAG)[:-1],
    ],
)
def test_only_whole_plain_requests_are_recognized(sent: bytes) -> None:
    assert plain_request_line(request(TAG)) == f"GET {TAG} HTTP/1.1".encode()
    assert plain_request_line(sent) is None


@pytest.mark.parametrize("headers", [b"a: b\r\n" * 25 + b"Range: x\r\n", b"a:" + b" " * 3900 + b"\x01\r\n"])
def test_recognizing_takes_little_time(headers: bytes) -> None:
    """A hostile client must not be able to keep the process busy."""
    began = time.process_time()
    assert plain_request_line(b"GET /v2/ HTTP/1.1\r\n" + headers + b"\r\n") is None
    # Some microseconds; when each header doubled the time, it took 45 s.
    assert time.process_time() - began < 0.1


@pytest.mark.parametrize(
    "spelling",
    [
        TAG.replace("reg.example", "reg%2eexample"),
        TAG.replace("app", "%61pp"),
        f"http://cache:8080{TAG}",
        f"{TAG}&x=1",
        TAG.replace("reg.example", "REG.example"),
        "/v2/reg.example/team/app/manifests/1",
    ],
)
@on_reactor
async def test_each_spelling_of_a_target_is_remembered_by_itself(served: Served, spelling: str) -> None:
    await served.fill()
    await served.remember(TAG)
    first = await served.remember(spelling)
    asked = served.v2.asked
    assert await served.ask(request(spelling)) == first
    assert served.v2.asked == asked


@on_reactor
async def test_error_is_not_remembered(served: Served, upstreams: MemoryRegistries) -> None:
    await served.fill()
    for _ in range(2):
        assert not await served.is_short(request("/v2/team/app/manifests/UPPER:case"))


@on_reactor
async def test_commands_take_the_usual_way(served: Served) -> None:
    """They may have removed a file just now."""
    await served.fill()
    await served.remember(TAG)
    assert await served.is_short(request(TAG))
    assert not await served.is_short(request(TAG), address=UNIXAddress("/run/socket"))


@on_reactor
async def test_latest_that_is_to_be_checked_takes_the_usual_way(
    root: Path, store: Store, upstreams: MemoryRegistries, clock: Clock
) -> None:
    checks = PullThrough(store, upstreams, clock, Policy(always_pull_latest=True))
    served = Served(root, store, checks, clock)
    await served.fill()
    await store.keep(IMAGE, image("reg.example/team/app:latest"))
    await served.remember(TAG)
    assert await served.is_short(request(TAG))
    latest = request(TAG.replace("/1?", "/latest?"))
    for _ in range(2):
        before, checks_before = served.v2.asked, len(upstreams)
        waiting = Deferred.fromCoroutine(served.ask(latest))
        await until(partial(sent_more_than, upstreams, checks_before))
        upstreams[checks_before].answer(IMAGE.digest)
        assert (await waiting).startswith(b"HTTP/1.1 200 OK\r\n")
        assert served.v2.asked == before + 1


@on_reactor
async def test_repository_in_which_the_image_is_not_known_takes_the_usual_way(served: Served) -> None:
    """It may have to be noted there, once an index of that repository names the image."""
    await served.fill()
    elsewhere = MANIFEST.replace("team/app", "team/other")
    for _ in range(2):
        assert not await served.is_short(request(elsewhere))


# What the log says


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("headers", "agent"),
    [
        ("User-Agent: containerd/v2.1\r\n", "containerd/v2.1"),
        ("Accept: user-agent: no\r\nuser-agent:skopeo \r\nUser-Agent: other\r\n", "skopeo"),
        (f"User-Agent: {'x' * 300}\r\n", "x" * 200),
        ("User-Agent: a\\n\r\n", "a\\\\n"),
        ("", "-"),
    ],
)
@on_reactor
async def test_both_ways_log_the_same_fields(
    served: Served, events: list[LogEvent], target: str, headers: str, agent: str
) -> None:
    await served.fill()
    whole = request(target, headers=headers)
    await served.remember(target)
    long = await served.ask(whole[:-1], whole[-1:])
    assert await served.is_short(whole)
    last = events[-2:]
    keys = ("method", "path", "ns", "status", "bytes", "milliseconds", "client", "user_agent", "cache_status")
    usual, short = ({key: event[key] for key in keys} for event in last)
    assert usual == short
    size = len(long.partition(b"\r\n\r\n")[2])
    assert (usual["user_agent"], usual["cache_status"], usual["bytes"]) == (agent, "hit", size)
    assert texts(last[:1]) == texts(last[1:])


def test_nothing_is_logged_where_the_log_has_no_requests(clock: Clock, events: list[LogEvent]) -> None:
    """The line of each request takes as long as all the rest of a hit."""
    handler, known = Handler(), InMemory(b"known")
    handler.give = lambda: Answer(200, known, repeat=lambda: known)
    RawClient(RegistrySite(handler, {}, 60, clock, lambda: False)).ask("/v2/known").ask("/v2/known")
    assert len(handler.asked) == 1
    assert texts(events) == []


@on_reactor
async def test_the_rest_of_a_hit_is_logged_with_its_user_agent(served: Served, events: list[LogEvent]) -> None:
    await served.fill()
    await served.remember(BLOB)
    connection = Connection(served.site)
    connection.transport.full = True
    connection.send(request(BLOB, headers="User-Agent: slow\r\n"))
    connection.transport.full = False
    connection.channel.resumeProducing()
    await until(lambda: connection.whole)
    assert (events[-1]["user_agent"], events[-1]["cache_status"]) == ("slow", "hit")


# What is remembered


@pytest.mark.parametrize("size", [5, 60_000])
def test_memory_is_bounded(clock: Clock, size: int) -> None:
    """Clients may send any number of long targets, and ask for as many manifests as there are."""
    most = 1_000_000
    limits = SendLimits(60, Unsent(clock), Seldom(clock), lambda: True, Requests())
    hits = Hits(InFlight(), limits, clock, most)
    head = b"HTTP/1.1 200 OK\r\nServer: x\r\nDate: x\r\nContent-Length: 5\r\n\r\n"
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(1000):
            target = f"/v2/team/app/manifests/1?x={number}".encode() + b"\\" * 3000
            line = b"GET %b HTTP/1.1" % target
            content = InMemory(bytes(size))
            hits.remember(
                line, head, content, partial(InMemory, content.data), Logged.of(b"GET", target, target, b"-", b"-")
            )
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most / 2 < after - before < most * 1.2


@pytest.mark.parametrize("size", [64 * 1024, 64 * 1024 + 1])
def test_large_answer_is_not_remembered(clock: Clock, size: int) -> None:
    """A few of them would displace all others."""
    handler, large = Handler(), InMemory(bytes(size))
    handler.give = lambda: Answer(200, large, repeat=lambda: large)
    client = RawClient(site(handler, clock)).ask("/v2/large").ask("/v2/large")
    assert [one.body for one in client.all_got("GET", "GET")] == [large.data] * 2
    assert len(handler.asked) == (1 if size == 64 * 1024 else 2)


def test_answer_by_earlier_settings_is_not_remembered(clock: Clock) -> None:
    """They change while it is awaited."""
    handler, known = Handler(), InMemory(b"known")
    waiting: Deferred[Answer] = Deferred()
    handler.give = lambda: waiting
    server = site(handler, clock)
    client = RawClient(server).ask("/v2/known")
    server.hits.forget()
    waiting.callback(Answer(200, known, repeat=lambda: known))
    handler.give = lambda: Answer(200, InMemory(b"other"))
    client.ask("/v2/known")
    assert [one.body for one in client.all_got("GET", "GET")] == [b"known", b"other"]


def test_content_of_another_size_takes_the_usual_way(clock: Clock) -> None:
    """Manifests may give a blob several sizes. The answer that is remembered has one in its head."""
    handler, known, longer = Handler(), InMemory(b"known"), Growing(6)
    handler.give = lambda: Answer(200, known, repeat=lambda: longer)
    client = RawClient(site(handler, clock)).ask("/v2/known").ask("/v2/known")
    assert [one.body for one in client.all_got("GET", "GET")] == [b"known", b"known"]
    assert len(handler.asked) == 2
    # It held a file open.
    assert longer.closed == 1


@on_reactor
async def test_date_is_that_of_each_answer(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    await served.fill()
    await served.remember(TAG)
    now = time.time()
    for later in (0, 1, 3600):
        monkeypatch.setattr(time, "time", lambda: now + later)  # noqa: B023  # it is called in this turn
        asked = served.v2.asked
        answer = Connection(served.site).send(request(TAG)).received
        assert served.v2.asked == asked
        assert b"\r\nDate: %b\r\n" % datetimeToString(now + later) in answer


# What is counted


@pytest.mark.parametrize(("target", "kind"), [(TAG, Kind.MANIFEST), (MANIFEST, Kind.MANIFEST), (BLOB, Kind.BLOB)])
@on_reactor
async def test_both_ways_count_alike(served: Served, target: str, kind: Kind) -> None:
    await served.fill()
    size = len((await served.remember(target)).partition(b"\r\n\r\n")[2])
    assert await served.is_short(request(target))
    await served.remember(target, "HEAD")
    assert await served.is_short(request(target, "HEAD"))
    tally = served.site.requests.tally(kind, Outcome.HIT)
    assert (tally.answers, tally.bytes) == (4, 2 * size)
    assert sum(other.answers for _, _, other in served.site.requests.tallies()) == 4
