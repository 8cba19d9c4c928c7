"""Blob requests with a range: accepted and refused answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ociregistry.context import FROM_CLIENT, Context, Priority
from ociregistry.errors import BlobUnknown, Unavailable
from ociregistry.upstream.http import DEFAULT_OPTIONS
from ociregistry.upstream.registry import BlobMismatch, BlobStream
from tests.unit.support.bodies import ScriptedAnswer, ScriptedExchanges
from tests.unit.support.common import failed, fired
from tests.unit.support.http_agents import client_over, registry_over
from tests.unit.test_upstream_client import REG, TOKEN
from tests.unit.test_upstream_registry import APP, LAYER

WHOLE: Mapping[str, Any] = {"data": b"0123456789"}
UPSTREAM = APP.upstream


def part(content_range: str, data: bytes = b"6789") -> dict[str, Any]:
    """Return a 206."""
    return {"status": 206, "data": data, "headers": {"Content-Range": content_range} if content_range else {}}


class Asked:
    """A registry with scripted answers, its requests and its clock."""

    def __init__(self, *answers: ScriptedAnswer, token: ScriptedAnswer = None) -> None:
        self.clock = Clock()
        self.http = ScriptedExchanges({REG: answers, TOKEN: [token]})
        self._registry = registry_over(client_over(self.http, self.clock), 1)

    def blob(
        self, start: int, context: Context = FROM_CLIENT, timeout: float = DEFAULT_OPTIONS.timeout
    ) -> Deferred[BlobStream]:
        """Request the blob."""
        return Deferred.fromCoroutine(self._registry.blob(APP, LAYER, context, start=start, timeout=timeout))

    @property
    def ranges(self) -> list[str | None]:
        """Return the Range headers sent."""
        return [sent.headers.get("Range") for sent in self.http.sent]


@pytest.mark.parametrize(("content_range", "size"), [("bytes 6-9/10", 10), ("bytes 6-9/*", None)])
def test_requested_range(content_range: str, size: int | None) -> None:
    asked = Asked(part(content_range))
    stream = fired(asked.blob(6))
    assert (stream.start, stream.size, fired(stream.body.read())) == (6, size, b"6789")
    assert asked.ranges == ["bytes=6-"]


def test_upstream_without_ranges_sends_the_whole_blob() -> None:
    asked = Asked(WHOLE)
    stream = fired(asked.blob(6))
    assert (stream.start, stream.size, fired(stream.body.read())) == (0, 10, b"0123456789")
    assert asked.ranges == ["bytes=6-"]


def test_no_range_header_from_offset_0() -> None:
    asked = Asked(WHOLE)
    assert fired(asked.blob(0)).start == 0
    assert asked.ranges == [None]


@pytest.mark.parametrize(
    "content_range",
    ["", "bytes 0-9/10", "bytes 7-9/10", "bytes */10", "items 6-9/10", "bytes 6-9", "bytes 6-9/" + "9" * 5000],
)
def test_wrong_range_is_requested_again_without_range(content_range: str) -> None:
    asked = Asked(part(content_range), WHOLE)
    stream = fired(asked.blob(6))
    assert (stream.start, fired(stream.body.read())) == (0, b"0123456789")
    assert asked.ranges == ["bytes=6-", None]


def test_unrequested_partial_content_is_an_error() -> None:
    failed(Asked(part("bytes 0-9/10", b"0123456789")).blob(0), Unavailable)


def test_416_means_another_blob() -> None:
    asked = Asked({"status": 416}, WHOLE)
    failed(asked.blob(10), BlobMismatch)
    # The only connection is free again.
    assert fired(asked.blob(0)).size == 10


@pytest.mark.parametrize("status", [401, 403, 404])
def test_404_is_unknown(status: int) -> None:
    failed(Asked({"status": status}).blob(6), BlobUnknown)


def test_every_request_of_a_download_has_its_priority_and_time_limit() -> None:
    asked = Asked(part("bytes 0-3/10"), WHOLE)
    fired(asked.blob(6, Context(priority=Priority.URGENT), 10.0))
    assert [(sent.options.timeout, sent.options.priority) for sent in asked.http.sent] == [
        (10.0, Priority.URGENT)
    ] * 2
