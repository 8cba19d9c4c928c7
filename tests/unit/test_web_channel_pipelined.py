"""Pipelined requests and the short way: which bytes are the beginning of a request."""

from __future__ import annotations

from twisted.internet.task import Clock

from ociregistry.web.exchange import InMemory
from ociregistry.web.resource import Answer
from tests.unit.support.raw_clients import Handler, RawClient, site


def test_end_of_a_request_that_looks_like_a_remembered_one(clock: Clock) -> None:
    """The quick answer to the first of two pipelined requests does not make the rest of the second a request."""
    handler, known = Handler(), InMemory(b"known")
    handler.give = lambda: Answer(200, known, again=lambda: known)
    client = RawClient(site(handler, clock)).ask("/v2/known").ask("/v2/known")
    assert len(handler.asked) == 1
    client.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /v2/other HTTP/1.1\r\nX-Text: ")
    client.ask("/v2/known")
    assert handler.asked[1:] == [("GET", b"/v2/other")]
