"""Pipelined requests and the short way: which bytes are the beginning of a request."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from twisted.internet.task import Clock

from ociregistry.pullthrough.cache import Content
from ociregistry.web.exchange import InMemory
from ociregistry.web.resource import Answer
from tests.unit.support.raw_clients import Growing, Handler, RawClient, site


def test_end_of_a_request_that_looks_like_a_remembered_one(clock: Clock) -> None:
    """The quick answer to the first of two pipelined requests does not make the rest of the second a request."""
    handler, known = Handler(), InMemory(b"known")
    handler.give = lambda: Answer(200, known, repeat=lambda: known)
    client = RawClient(site(handler, clock)).ask("/v2/known").ask("/v2/known")
    assert len(handler.asked) == 1
    client.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /v2/other HTTP/1.1\r\nX-Text: ")
    client.ask("/v2/known")
    assert handler.asked[1:] == [("GET", b"/v2/other")]


def test_body_of_a_pipelined_request_that_looks_like_a_remembered_one(clock: Clock) -> None:
    """Else the sender of the body would make the next client of a proxy get the wrong answer."""
    handler, known = Handler(), InMemory(b"known")
    handler.give = lambda: Answer(200, known, repeat=lambda: known)
    client = RawClient(site(handler, clock)).ask("/v2/known").ask("/v2/known")
    body = b"GET /v2/known HTTP/1.1\r\nHost: cache\r\n\r\n"
    put = b"PUT /v2/other HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (len(body) + 1)
    client.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" + put)
    client.send(body)
    answers = client.all_got("GET", "GET", "GET")
    client.send(b"x")
    assert [one.status for one in answers] == [200, 200, 200]
    assert client.all_got("GET", "GET", "GET", "PUT")[-1].status == 405


def test_bytes_that_come_while_a_pipelined_request_is_answered(clock: Clock) -> None:
    """They are the next request, also after one that was answered at once."""
    handler, slow, known = Handler(), Growing(4), InMemory(b"known")
    contents: Iterator[Content] = iter([slow, known])
    handler.give = lambda: Answer(200, next(contents))
    client = RawClient(site(handler, clock))
    client.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /v2/slow HTTP/1.1\r\nHost: x\r\n\r\n")
    client.ask("/v2/known")
    slow.grow(b"slow")
    assert [one.body for one in client.all_got("GET", "GET", "GET")][1:] == [b"slow", b"known"]


@pytest.mark.parametrize("pipelined", [False, True])
def test_connection_takes_the_short_way_again(clock: Clock, pipelined: bool) -> None:
    handler, known = Handler(), InMemory(b"known")
    handler.give = lambda: Answer(200, known, repeat=lambda: known)
    client = RawClient(site(handler, clock)).ask("/v2/known")
    if pipelined:
        client.send(b"GET /v2/known HTTP/1.1\r\nHost: cache\r\n\r\n" * 2)
        slow = Growing(4)
        handler.give = lambda: Answer(200, slow)
        client.ask("/v2/slow")
        slow.grow(b"slow")
    asked = len(handler.asked)
    client.ask("/v2/known").ask("/v2/known")
    assert len(handler.asked) == asked


def test_answer_is_not_remembered_for_the_request_before(clock: Clock) -> None:
    """An unusual request is answered by its own rules."""
    handler, known, other = Handler(), InMemory(b"known"), InMemory(b"other")
    server = site(handler, clock)
    handler.give = lambda: Answer(200, known)
    client = RawClient(server).ask("/v2/known")
    handler.give = lambda: Answer(200, other, repeat=lambda: other)
    client.ask("/v2/other", Cookie="x")
    handler.give = lambda: Answer(200, known)
    assert RawClient(server).ask("/v2/known").got().body == b"known"
    assert len(handler.asked) == 3
