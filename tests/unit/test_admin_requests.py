"""Counts of answered requests: kinds, outcomes, histograms, and both ways of answering."""

from __future__ import annotations

import pytest
from twisted.internet.task import Clock

from ociregistry.admin.requests import BUCKETS, CutBy, Histogram, Kind, Outcome, Requests, Tally, kind_of, outcome_of
from ociregistry.errors import ManifestUnknown, Unavailable
from ociregistry.pullthrough.waiting import CacheStatus
from ociregistry.web.exchange import InMemory
from ociregistry.web.resource import Answer
from tests.unit.support.raw_clients import Growing, Handler, RawClient, site

DIGEST = "sha256:" + "0" * 64
MANIFEST = b"GET /v2/app/manifests/1 HTTP/1.1\r\nHost: x\r\n\r\n"
BLOB = f"GET /v2/app/blobs/{DIGEST} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v2/app/manifests/1", Kind.MANIFEST),
        ("/v2/team/blobs/manifests/1", Kind.MANIFEST),
        (f"/v2/a/b/c/blobs/{DIGEST}", Kind.BLOB),
        (f"/v2/manifests/blobs/{DIGEST}", Kind.BLOB),
        ("/v2/app/tags/list", Kind.OTHER),
        (f"/v2/app/referrers/{DIGEST}", Kind.OTHER),
        ("/v2/", Kind.OTHER),
        ("/v2/manifests/1", Kind.OTHER),
        ("/health", Kind.OTHER),
        ("", Kind.OTHER),
    ],
)
def test_kind_is_told_by_the_path(path: str, kind: Kind) -> None:
    assert kind_of(path) is kind


@pytest.mark.parametrize(
    ("status", "hit", "outcome"),
    [
        (200, True, Outcome.HIT),
        (206, False, Outcome.MISS),
        (200, None, Outcome.NONE),
        (404, None, Outcome.CLIENT_ERROR),
        (416, True, Outcome.CLIENT_ERROR),
        (503, None, Outcome.SERVER_ERROR),
    ],
)
def test_outcome_is_told_by_status_and_cache(status: int, hit: bool | None, outcome: Outcome) -> None:
    assert outcome_of(status, hit) is outcome


def test_bounds_of_buckets_are_included() -> None:
    histogram = Histogram()
    for seconds in (0.0, BUCKETS[0], BUCKETS[0] * 1.01, BUCKETS[-1], BUCKETS[-1] + 1):
        histogram.observe(seconds)
    assert (histogram.counts[:2], histogram.counts[-2:]) == ([2, 1], [1, 1])
    assert histogram.sum == pytest.approx(BUCKETS[0] * 2.01 + BUCKETS[-1] * 2 + 1)


def test_answer_at_once_counts_as_one_with_two_equal_times() -> None:
    one, other = Tally(), Tally()
    one.count_at_once(7, 0.02)
    other.count(7, 0.02, 0.02)
    for tally in (one, other):
        assert (tally.answers, tally.bytes, tally.first_byte.sum, tally.duration.sum) == (1, 7, 0.02, 0.02)
    assert one.duration.counts == other.duration.counts == one.first_byte.counts


def counted(requests: Requests) -> dict[tuple[Kind, Outcome], tuple[int, int]]:
    """Return the numbers of answers and bytes, where there are any."""
    return {
        (kind, outcome): (tally.answers, tally.bytes) for kind, outcome, tally in requests.tallies() if tally.answers
    }


@pytest.fixture
def handler() -> Handler:
    return Handler()


@pytest.mark.expect_logged_failures
def test_each_answer_counts_once(handler: Handler, clock: Clock) -> None:
    server = site(handler, clock)
    for give in (
        lambda: Answer(200, InMemory(b"hello"), cache_status=CacheStatus.HIT),
        lambda: Answer(200, InMemory(b"hello"), cache_status=CacheStatus.MISS),
        lambda: ManifestUnknown("absent"),
        lambda: Unavailable("away"),
        lambda: ValueError("a defect"),
    ):
        handler.give = give
        RawClient(server).send(MANIFEST)
    found = counted(server.requests)
    assert {key: answers for key, (answers, _) in found.items()} == {
        (Kind.MANIFEST, Outcome.HIT): 1,
        (Kind.MANIFEST, Outcome.MISS): 1,
        (Kind.MANIFEST, Outcome.CLIENT_ERROR): 1,
        (Kind.MANIFEST, Outcome.SERVER_ERROR): 2,
    }
    assert found[Kind.MANIFEST, Outcome.HIT] == found[Kind.MANIFEST, Outcome.MISS] == (1, 5)
    assert not any(server.requests.cut.values())


def test_times_are_those_of_first_and_last_byte(handler: Handler, clock: Clock) -> None:
    server, content = site(handler, clock), Growing(6)
    handler.give = lambda: Answer(200, content, cache_status=CacheStatus.MISS)
    RawClient(server).send(BLOB)
    clock.advance(2)
    content.grow(b"abc")
    clock.advance(20)
    content.grow(b"def")
    tally = server.requests.tally(Kind.BLOB, Outcome.MISS)
    assert (tally.answers, tally.bytes, tally.first_byte.sum, tally.duration.sum) == (1, 6, 2, 22)


def test_answer_that_the_server_cuts_is_counted_with_its_bytes(handler: Handler, clock: Clock) -> None:
    server, content = site(handler, clock), Growing(6)
    handler.give = lambda: Answer(200, content, cache_status=CacheStatus.MISS)
    RawClient(server).send(BLOB)
    content.grow(b"abc")
    content.fail(Unavailable("the link is down"))
    assert counted(server.requests) == {(Kind.BLOB, Outcome.MISS): (1, 3)}
    assert {key: count for key, count in server.requests.cut.items() if count} == {(Kind.BLOB, CutBy.SERVER): 1}


def test_client_that_leaves_is_counted(handler: Handler, clock: Clock) -> None:
    server, content = site(handler, clock), Growing(6)
    handler.give = lambda: Answer(200, content, cache_status=CacheStatus.MISS)
    client = RawClient(server)
    client.send(BLOB)
    content.grow(b"abc")
    client.leave()
    assert counted(server.requests) == {(Kind.BLOB, Outcome.MISS): (1, 3)}
    assert {key: count for key, count in server.requests.cut.items() if count} == {(Kind.BLOB, CutBy.CLIENT): 1}
