"""Caches that are chained: who stands between us and the client is told to every upstream, and a circle ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ociregistry.errors import Circle
from ociregistry.names import Digest
from ociregistry.pullthrough.cache import PullThrough
from ociregistry.pullthrough.listings import Listings
from ociregistry.store.store import Store
from ociregistry.via import NOBODY, Chain
from tests.images import make_image
from tests.unit.doubles import image, manifest, on_reactor, until
from tests.unit.registries import MemoryRegistries, landed

BUILT = make_image("chain")
DIGEST = Digest(BUILT.layers[0].digest)
APP = image("reg.example/team/app:1")
CHAIN = Chain(("ociregistry-fedcba9876543210",))
CIRCLE = Circle("reg.example: it leads back to this server", "1.1 ociregistry-0123456789abcdef")

Ask = Callable[[PullThrough, Listings, Chain], Any]

REQUESTS: dict[str, Ask] = {
    "manifest": lambda cache, listings, chain: cache.manifest(APP, chain),
    "blob": lambda cache, listings, chain: cache.blob(APP.repository, DIGEST, chain),
    "blob_size": lambda cache, listings, chain: cache.blob_size(APP.repository, DIGEST, chain),
    "tags": lambda cache, listings, chain: listings.tags(APP.repository, None, "", chain),
    "referrers": lambda cache, listings, chain: listings.referrers(APP.repository, manifest(BUILT).digest, "", chain),
}


@pytest.mark.parametrize("chain", [NOBODY, CHAIN])
@pytest.mark.parametrize("kind", REQUESTS)
@on_reactor
async def test_an_upstream_is_asked_for_who_asked_us_and_a_circle_is_an_answer(
    store: Store, upstreams: MemoryRegistries, cache: PullThrough, clock: Clock, kind: str, chain: Chain
) -> None:
    listings = Listings(store, upstreams, clock)
    asked = Deferred.fromCoroutine(REQUESTS[kind](cache, listings, chain))
    await until(lambda: len(upstreams))
    (call,) = upstreams
    assert (call.kind, call.chain) == (kind, chain)
    call.refuse(CIRCLE)
    with pytest.raises(Circle):
        await asked
    await landed(cache)
    assert len(upstreams) == 1
