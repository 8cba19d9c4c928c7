"""GET /health: store counts and missing content at the time of the request."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ociregistry import __version__
from ociregistry.context import FROM_CLIENT
from ociregistry.names import Digest
from ociregistry.pullthrough.completion import Completion, Incomplete
from ociregistry.pullthrough.loader import PreloadProgress
from ociregistry.store.lookups import Counts
from ociregistry.store.space import Room
from ociregistry.store.store import Store
from ociregistry.web.api import health
from ociregistry.web.resource import Handler
from tests.images import make_image
from tests.unit.support.common import fired, image, manifest, on_reactor
from tests.unit.support.completions import FakeBlobFetcher

STARTED = datetime(2026, 3, 1, 22, 17, 30, 999_999, tzinfo=UTC)
BUILT = make_image("health")
ROOM = Room(size=100, free=10, reserve=7, full=False)


def health_document(handler: Handler, method: str = "GET") -> Any:
    """Return the document."""
    answer = fired(Deferred.fromCoroutine(handler(method, b"/health", {}, FROM_CLIENT)))
    assert (answer.status, answer.headers, answer.cache_status) == (200, {"Content-Type": "application/json"}, None)
    return json.loads(fired(answer.content.read(0, answer.content.size)))


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_health_document(method: str) -> None:
    handler = health(lambda: Counts(2, 3), lambda: Incomplete(1, 5), lambda: None, lambda: ROOM, list, STARTED)
    assert health_document(handler, method) == {
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


@on_reactor
async def test_health_is_current(store: Store, clock: Clock, tmp_path: Any) -> None:
    completion = Completion(store, FakeBlobFetcher(tmp_path), clock)
    handler = health(lambda: store.counts, lambda: completion.incomplete, lambda: None, lambda: ROOM, list, STARTED)

    def figures() -> list[int]:
        return [health_document(handler)[key] for key in ("lists", "images", "incomplete_images", "missing_bytes")]

    assert figures() == [0, 0, 0, 0]
    app, what = image("reg.example/team/app:1"), manifest(BUILT)
    await store.keep(what, app)
    assert figures() == [0, 1, 0, 0]
    await completion.complete(what.digest, app.repository)
    assert figures() == [0, 1, 1, sum(len(blob.data) for blob in BUILT.blobs)]
    assert store.pending == {Digest(BUILT.manifest.digest): app.repository}


def test_preload_progress_is_current() -> None:
    progress = [PreloadProgress(images=7, loaded=0, failed=0)]
    handler = health(lambda: Counts(0, 0), lambda: Incomplete(0, 0), lambda: progress[0], lambda: ROOM, list, STARTED)
    # Also before there is any progress.
    assert health_document(handler)["preload"] == {"images": 7, "loaded": 0, "failed": 0}
    progress[0] = PreloadProgress(images=7, loaded=5, failed=2)
    assert health_document(handler)["preload"] == {"images": 7, "loaded": 5, "failed": 2}


def test_without_preloading_there_is_no_progress() -> None:
    handler = health(lambda: Counts(0, 0), lambda: Incomplete(0, 0), lambda: None, lambda: ROOM, list, STARTED)
    assert "preload" not in health_document(handler)


def test_degraded_with_reasons_is_still_200() -> None:
    """What is cached is served, so the daemon stays ready."""
    faults: list[str] = []
    handler = health(
        lambda: Counts(0, 0), lambda: Incomplete(0, 0), lambda: None, lambda: ROOM, lambda: faults, STARTED
    )
    assert health_document(handler)["status"] == "ok"
    faults.append("the disk is full")
    document = health_document(handler)
    assert (document["status"], document["reasons"]) == ("degraded", ["the disk is full"])
