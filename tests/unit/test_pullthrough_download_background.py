"""Background downloads: which connections they use, and the downloads in flight."""

from __future__ import annotations

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionLost
from twisted.internet.task import Clock

from ociregistry.context import Context, Priority
from ociregistry.errors import BlobUnknown, Unavailable
from ociregistry.names import Digest
from ociregistry.pullthrough.cache import PullThrough
from ociregistry.pullthrough.waiting import ANSWER_DEADLINE, DeadlineExceeded, within_deadline
from ociregistry.store.store import Store
from tests.images import make_image
from tests.unit.support.common import image, manifest, on_reactor, turn, until
from tests.unit.support.loads import settle
from tests.unit.support.registries import MemoryRegistries, downloads_ended

BUILT = make_image("extra", layers=3, layer_size=100_000)
APP = image("reg.example/app:1")
LAYERS = {Digest(one.digest): one.data for one in BUILT.layers}
ONE, TWO, THREE = LAYERS
CONFIG = Digest(BUILT.config.digest)
BACKGROUND, PRELOAD = Priority.BACKGROUND, Priority.PRELOAD


def fetch(cache: PullThrough, digest: Digest = ONE, *, priority: Priority = BACKGROUND) -> Deferred[None]:
    """Fetch a blob without a client."""
    return Deferred.fromCoroutine(cache.fetch(APP.repository, digest, Context(priority=priority)))


async def respond(upstreams: MemoryRegistries, number: int = -1) -> None:
    """Answer the request with the blob."""
    call = upstreams.calls[number]
    data = next(blob.data for blob in BUILT.blobs if blob.digest in call.what)
    call.stream(len(data)).send(data).end()


@pytest.mark.parametrize("priority", [Priority.METADATA, BACKGROUND, PRELOAD])
@on_reactor
async def test_priority_selects_reserved_or_blob_connections(
    cache: PullThrough, store: Store, upstreams: MemoryRegistries, priority: Priority
) -> None:
    await store.keep(manifest(BUILT), APP)
    fetching = fetch(cache, priority=priority)
    await until(lambda: len(upstreams) == 1)
    assert upstreams[0].reserved is (priority is not PRELOAD)
    await respond(upstreams)
    await fetching
    assert await store.holds(ONE, len(LAYERS[ONE]))


@on_reactor
async def test_default_priority_uses_reserved_connections(cache: PullThrough, upstreams: MemoryRegistries) -> None:
    fetching = Deferred.fromCoroutine(cache.fetch(APP.repository, ONE))
    await until(lambda: len(upstreams) == 1)
    assert upstreams[0].reserved
    await respond(upstreams)
    await fetching


@pytest.mark.parametrize("priority", [Priority.METADATA, BACKGROUND, PRELOAD])
@on_reactor
async def test_config_uses_reserved_connections(
    cache: PullThrough, store: Store, upstreams: MemoryRegistries, priority: Priority
) -> None:
    await store.keep(manifest(BUILT), APP)
    fetching = fetch(cache, CONFIG, priority=priority)
    await until(lambda: len(upstreams) == 1)
    assert upstreams[0].reserved
    await respond(upstreams)
    await fetching


async def resumed_over_reserved(
    cache: PullThrough, store: Store, upstreams: MemoryRegistries, clock: Clock, priority: Priority
) -> bool:
    """Return whether a broken download is resumed over the reserved connections."""
    await store.keep(manifest(BUILT), APP)
    fetching = fetch(cache, priority=priority)
    await until(lambda: len(upstreams) == 1)
    upstreams[0].stream(len(LAYERS[ONE])).send(LAYERS[ONE][:1000]).end(ConnectionLost())
    for _ in range(100):
        await settle(store)
        if len(upstreams) > 1:
            break
        clock.advance(1)
    assert upstreams[1].what.endswith(" from 1000")
    upstreams[1].stream(len(LAYERS[ONE]), 1000).send(LAYERS[ONE][1000:]).end()
    await fetching
    return upstreams[1].reserved


@on_reactor
async def test_resumed_download_keeps_blob_connection(
    cache: PullThrough, store: Store, upstreams: MemoryRegistries, clock: Clock
) -> None:
    assert not await resumed_over_reserved(cache, store, upstreams, clock, priority=PRELOAD)


@on_reactor
async def test_resumed_background_download_keeps_reserved_connection(
    cache: PullThrough, store: Store, upstreams: MemoryRegistries, clock: Clock
) -> None:
    assert await resumed_over_reserved(cache, store, upstreams, clock, priority=BACKGROUND)


@on_reactor
async def test_concurrent_fetches_are_in_flight(
    cache: PullThrough, store: Store, upstreams: MemoryRegistries
) -> None:
    await store.keep(manifest(BUILT), APP)
    assert cache.in_flight.keys() == frozenset()
    fetching = [fetch(cache, digest, priority=PRELOAD) for digest in LAYERS]
    await until(lambda: len(upstreams) == 3)
    assert cache.in_flight.keys() == LAYERS.keys()
    # A second fetch of one of them shares the download.
    fetching.append(fetch(cache, TWO))
    await settle(store)
    for number in range(3):
        await respond(upstreams, number)
    for one in fetching:
        await one
    await downloads_ended(cache)
    assert (frozenset(cache.in_flight), len(upstreams)) == (frozenset(), 3)


@on_reactor
async def test_failed_fetch_is_no_longer_in_flight(
    cache: PullThrough, store: Store, upstreams: MemoryRegistries
) -> None:
    await store.keep(manifest(BUILT), APP)
    fetching = fetch(cache, priority=PRELOAD)
    await until(lambda: len(upstreams) == 1)
    upstreams[0].refuse(BlobUnknown("not there"))
    with pytest.raises(BlobUnknown):
        await fetching
    await downloads_ended(cache)
    assert cache.in_flight.keys() == frozenset()


@on_reactor
async def test_present_blob_needs_no_connection(
    cache: PullThrough, store: Store, upstreams: MemoryRegistries
) -> None:
    await store.keep(manifest(BUILT), APP)
    fetching = fetch(cache, priority=PRELOAD)
    await until(lambda: len(upstreams) == 1)
    await respond(upstreams)
    await fetching
    await downloads_ended(cache)
    for priority in (BACKGROUND, PRELOAD):
        await fetch(cache, priority=priority)
    assert (frozenset(cache.in_flight), len(upstreams)) == (frozenset(), 1)


@on_reactor
async def test_deadline_exceeded_differs_from_other_failures(
    cache: PullThrough, upstreams: MemoryRegistries, clock: Clock
) -> None:
    waiting = Deferred.fromCoroutine(cache.manifest(APP))
    await until(lambda: len(upstreams) == 1)
    clock.advance(ANSWER_DEADLINE)
    with pytest.raises(DeadlineExceeded) as late:
        await waiting
    assert (late.value.status, late.value.code) == (503, "UNAVAILABLE")
    waiting = Deferred.fromCoroutine(cache.manifest(APP))
    await turn()
    upstreams[0].refuse(Unavailable("down"))
    with pytest.raises(Unavailable) as failed:
        await waiting
    assert type(failed.value) is Unavailable
    assert len(upstreams) == 1


def test_answer_just_before_the_deadline(clock: Clock) -> None:
    waiting: Deferred[str] = Deferred()
    answered = Deferred.fromCoroutine(within_deadline(waiting, clock, APP))
    clock.advance(ANSWER_DEADLINE - 0.1)
    assert not answered.called
    waiting.callback("answer")
    assert answered.result == "answer"
    assert clock.getDelayedCalls() == []
