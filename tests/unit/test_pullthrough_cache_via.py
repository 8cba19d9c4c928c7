"""Caches that are chained: who stands between us and the client is told to every upstream, and a circle ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ociregistry.errors import LoopDetected
from ociregistry.names import Digest
from ociregistry.pullthrough.cache import PullThrough
from ociregistry.pullthrough.listings import Listings
from ociregistry.store.store import Store
from ociregistry.via import NO_VIA, Via
from tests.images import make_image
from tests.unit.support.doubles import image, manifest, on_reactor, until
from tests.unit.support.registries import MemoryRegistries, landed

BUILT = make_image("chain")
DIGEST = Digest(BUILT.layers[0].digest)
APP = image("reg.example/team/app:1")
CHAIN = Via(("ociregistry-fedcba9876543210",))
CIRCLE = LoopDetected("reg.example: it leads back to this server", "1.1 ociregistry-0123456789abcdef")

Ask = Callable[[PullThrough, Listings, Via], Any]

REQUESTS: dict[str, Ask] = {
    "manifest": lambda cache, listings, via: cache.manifest(APP, via),
    "blob": lambda cache, listings, via: cache.blob(APP.repository, DIGEST, via),
    "blob_size": lambda cache, listings, via: cache.blob_size(APP.repository, DIGEST, via),
    "tags": lambda cache, listings, via: listings.tags(APP.repository, None, "", via),
    "referrers": lambda cache, listings, via: listings.referrers(APP.repository, manifest(BUILT).digest, "", via),
}


@pytest.mark.parametrize("via", [NO_VIA, CHAIN])
@pytest.mark.parametrize("kind", REQUESTS)
@on_reactor
async def test_an_upstream_is_asked_for_who_asked_us_and_a_loop_is_an_answer(
    store: Store, upstreams: MemoryRegistries, cache: PullThrough, clock: Clock, kind: str, via: Via
) -> None:
    listings = Listings(store, upstreams, clock)
    asked = Deferred.fromCoroutine(REQUESTS[kind](cache, listings, via))
    await until(lambda: len(upstreams))
    (call,) = upstreams
    assert (call.kind, call.via) == (kind, via)
    call.refuse(CIRCLE)
    with pytest.raises(LoopDetected):
        await asked
    await landed(cache)
    assert len(upstreams) == 1
