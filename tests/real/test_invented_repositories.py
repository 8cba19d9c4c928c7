"""Clients that ask for a cached digest by repositories that they invent: served, and nothing of it is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client import fetch
from tests.images import make_index
from tests.real.caches import Cache, cache_in, plain_image, pull, record

KEPT, NEXT = plain_image("invented/kept", 1000), plain_image("invented/next", 1000)
INDEX = make_index("invented")


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    """A cache for this test alone, with one image."""
    with cache_in(tmp_path) as cache:
        cache.upstream.add("team/app", KEPT, "1")
        pull(cache, "team/app", KEPT)
        yield cache


def test_invented_repositories_are_served_and_not_noted(cache: Cache) -> None:
    path = record(cache, KEPT.manifest)
    before, since, asked = path.read_bytes(), cache.log_size, len(cache.upstream.requests)
    wanted = [(f"manifests/{KEPT.manifest.digest}", KEPT.manifest.data)]
    wanted += [(f"blobs/{blob.digest}", blob.data) for blob in KEPT.blobs]
    for number in range(300):
        for what, data in wanted:
            answer = fetch(f"{cache.daemon.url}/v2/team-{number}/app/{what}?ns=host-{number}.invalid")
            assert (answer.status, answer.body) == (200, data)
    # Another record is written after what the requests would have written.
    cache.upstream.add("team/next", NEXT, "1")
    pull(cache, "team/next", NEXT)
    assert path.read_bytes() == before
    assert cache.errors(since) == []
    cache.upstream.close()
    answer = fetch(f"{cache.daemon.url}/v2/other/manifests/{KEPT.manifest.digest}?ns=host.invalid")
    assert answer.body == KEPT.manifest.data
    assert len(cache.upstream.requests) == asked + len(NEXT.blobs) + 1
