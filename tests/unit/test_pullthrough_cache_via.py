"""Chained caches: the Via of a request is passed on upstream, and a loop is reported to the client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ociregistry.context import NO_VIA, Context, Via
from ociregistry.errors import LoopDetected
from ociregistry.names import Digest
from ociregistry.pullthrough.cache import PullThrough
from ociregistry.pullthrough.listings import Listings
from ociregistry.store.store import Store
from tests.images import make_image
from tests.unit.support.common import image, manifest, on_reactor, until
from tests.unit.support.registries import MemoryRegistries, downloads_ended

BUILT = make_image("chain")
DIGEST = Digest(BUILT.layers[0].digest)
APP = image("reg.example/team/app:1")
CHAIN = Via(("ociregistry-fedcba9876543210",))
LOOP = LoopDetected("reg.example: it leads back to this server", "1.1 ociregistry-0123456789abcdef")

Ask = Callable[[PullThrough, Listings, Context], Any]

REQUESTS: dict[str, Ask] = {
    "manifest": lambda cache, listings, context: cache.manifest(APP, context),
    "blob": lambda cache, listings, context: cache.blob(APP.repository, DIGEST, context),
    "blob_size": lambda cache, listings, context: cache.blob_size(APP.repository, DIGEST, context),
    "tags": lambda cache, listings, context: listings.tags(APP.repository, context=context),
    "referrers": lambda cache, listings, context: listings.referrers(
        APP.repository, manifest(BUILT).digest, "", context
    ),
}


@pytest.mark.parametrize("via", [NO_VIA, CHAIN])
@pytest.mark.parametrize("kind", REQUESTS)
@on_reactor
async def test_via_is_passed_on_and_loop_error_is_returned(
    store: Store, upstreams: MemoryRegistries, cache: PullThrough, clock: Clock, kind: str, via: Via
) -> None:
    listings = Listings(store, upstreams, clock)
    asked = Deferred.fromCoroutine(REQUESTS[kind](cache, listings, Context(via)))
    await until(lambda: len(upstreams))
    (call,) = upstreams
    assert (call.kind, call.context.via) == (kind, via)
    call.refuse(LOOP)
    with pytest.raises(LoopDetected):
        await asked
    await downloads_ended(cache)
    assert len(upstreams) == 1
