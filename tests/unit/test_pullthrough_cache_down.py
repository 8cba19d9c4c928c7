"""A link that counts as down while requests wait: who waits is answered, and what comes later is kept."""

from __future__ import annotations

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ociregistry.context import FROM_CLIENT, Context, Via
from ociregistry.errors import LoopDetected
from ociregistry.names import Digest, ImageReference
from ociregistry.pullthrough.cache import FoundBlob, FoundManifest, PullThrough
from ociregistry.store.store import Store
from ociregistry.upstream.breaker import CircuitBreaker, LinkDown
from tests.images import make_image
from tests.unit.support.common import failed, image, manifest, on_reactor, until
from tests.unit.support.registries import Call, MemoryRegistries, downloads_ended

BUILT = make_image("down")
MANIFEST = manifest(BUILT)
LAYER = BUILT.layers[0]
SIZE = len(LAYER.data)
DIGEST = Digest(LAYER.digest)
APP = image("reg.example/team/app:1")
COMMAND = Context(patient=True)
PEER = Context(Via(("ociregistry-fedcba9876543210",)))
LOOP = LoopDetected("reg.example: a loop", "1.1 ociregistry-fedcba9876543210")


class Host:
    """The host of the upstream."""

    def __init__(self, clock: Clock) -> None:
        self.breaker = CircuitBreaker("reg.example:443", clock, lambda: 1.0)

    def down(self, call: Call) -> None:
        """Take the host down while it is asked."""
        self.breaker.enter("reg.example").failed("nothing came from it for 10 s")
        with pytest.raises(LinkDown) as down:
            self.breaker.enter("reg.example")
        assert call.context.wanted is not None
        call.context.wanted.link_down(down.value)


@pytest.fixture
def host(clock: Clock) -> Host:
    """Return the host."""
    return Host(clock)


def ask_manifest(cache: PullThrough, context: Context = FROM_CLIENT) -> Deferred[FoundManifest]:
    """Request the manifest."""
    return Deferred.fromCoroutine(cache.manifest(APP, context))


def ask_blob(cache: PullThrough, context: Context = FROM_CLIENT) -> Deferred[FoundBlob]:
    """Request the layer."""
    return Deferred.fromCoroutine(cache.blob(APP.repository, DIGEST, context))


@on_reactor
async def test_late_manifest_is_kept(cache: PullThrough, upstreams: MemoryRegistries, host: Host) -> None:
    clients = [ask_manifest(cache), ask_manifest(cache), ask_manifest(cache, COMMAND)]
    await until(lambda: len(upstreams))
    host.down(upstreams[0])
    for client in clients[:2]:
        failed(client, LinkDown)
    with pytest.raises(LinkDown):
        await ask_manifest(cache)
    upstreams[0].answer(MANIFEST)
    assert (await clients[2]).manifest == MANIFEST
    assert (await ask_manifest(cache)).cache_status.is_hit
    assert len(upstreams) == 1


@on_reactor
async def test_missed_manifest_is_fetched_again_as_a_probe(
    cache: PullThrough, upstreams: MemoryRegistries, host: Host
) -> None:
    client = ask_manifest(cache)
    await until(lambda: len(upstreams))
    wanted = upstreams[0].context.wanted
    assert wanted is not None
    assert wanted.again is not None
    # The request is in flight still.
    assert wanted.again() is None
    upstreams[0].refuse(LinkDown("down", 1))
    with pytest.raises(LinkDown):
        await client
    probe = wanted.again()
    assert probe is not None
    probing = Deferred.fromCoroutine(probe)
    upstreams[1].answer(MANIFEST)
    await probing
    assert (await ask_manifest(cache)).cache_status.is_hit


@on_reactor
@pytest.mark.parametrize("missed", [APP, image(f"reg.example/team/app@{BUILT.manifest.digest}")])
async def test_probe_does_not_fetch_what_the_store_has_meanwhile(
    cache: PullThrough, upstreams: MemoryRegistries, store: Store, missed: ImageReference
) -> None:
    """A tag that was loaded after the miss would move to what the upstream has."""
    client = Deferred.fromCoroutine(cache.manifest(missed))
    await until(lambda: len(upstreams))
    wanted = upstreams[0].context.wanted
    upstreams[0].refuse(LinkDown("down", 1))
    with pytest.raises(LinkDown):
        await client
    await store.keep(MANIFEST, APP)
    assert wanted is not None
    assert wanted.again is not None
    assert wanted.again() is None
    assert len(upstreams) == 1


@on_reactor
async def test_late_blob_of_unknown_size_is_kept(cache: PullThrough, upstreams: MemoryRegistries, host: Host) -> None:
    client = ask_blob(cache)
    command = ask_blob(cache, COMMAND)
    await until(lambda: len(upstreams))
    host.down(upstreams[0])
    with pytest.raises(LinkDown):
        await client
    with pytest.raises(LinkDown):
        await ask_blob(cache)
    assert not command.called
    upstreams[0].stream(SIZE).send(LAYER.data).end()
    (await command).content.close()
    await downloads_ended(cache)
    found = await ask_blob(cache)
    assert found.cache_status.is_hit
    found.content.close()
    assert len(upstreams) == 1


@on_reactor
async def test_headers_of_a_known_size_are_sent_when_the_link_goes_down(
    cache: PullThrough, upstreams: MemoryRegistries, store: Store, host: Host
) -> None:
    """To those that wait already; new clients get the error, as do other caches, which ask elsewhere."""
    await store.keep(MANIFEST, APP)
    client = ask_blob(cache)
    await until(lambda: len(upstreams) == 1)
    peer = ask_blob(cache, PEER)
    await until(lambda: len(upstreams) == 2)
    (call,) = (call for call in upstreams if call.kind == "blob")
    host.down(call)
    found = await client
    assert found.content.size == SIZE
    with pytest.raises(LinkDown):
        await peer
    with pytest.raises(LinkDown):
        await ask_blob(cache)
    call.stream(SIZE).send(LAYER.data).end()
    assert await found.content.more_than(SIZE - 1) == SIZE
    found.content.close()
    await downloads_ended(cache)


@pytest.mark.parametrize("kind", ["manifest", "blob"])
@on_reactor
async def test_cache_that_would_wait_for_itself_is_told(
    cache: PullThrough, upstreams: MemoryRegistries, kind: str
) -> None:
    """It joins a request that waits for it, perhaps through other caches; that request goes on."""
    ask = ask_manifest if kind == "manifest" else ask_blob
    client = ask(cache)
    await until(lambda: len(upstreams))
    peer = ask(cache, PEER)
    await until(lambda: len(upstreams) == 2)
    assert upstreams[1].kind == "loops"
    upstreams[1].answer(LOOP)
    with pytest.raises(LoopDetected):
        await peer
    assert not client.called
    if kind == "manifest":
        upstreams[0].answer(MANIFEST)
        await client
    else:
        upstreams[0].stream(SIZE).send(LAYER.data).end()
        found = await client
        assert isinstance(found, FoundBlob)
        found.content.close()
        await downloads_ended(cache)


@on_reactor
async def test_head_of_a_blob_in_flight_tells_of_the_loop(cache: PullThrough, upstreams: MemoryRegistries) -> None:
    """By it another cache looks; the size from the registry itself would hide that this one waits."""
    client = ask_blob(cache)
    await until(lambda: len(upstreams))
    head = Deferred.fromCoroutine(cache.blob_size(APP.repository, DIGEST, PEER))
    await until(lambda: len(upstreams) == 2)
    assert upstreams[1].kind == "loops"
    upstreams[1].answer(LOOP)
    with pytest.raises(LoopDetected):
        await head
    upstreams[0].stream(SIZE).send(LAYER.data).end()
    (await client).content.close()
    await downloads_ended(cache)


@on_reactor
async def test_head_that_joins_another_is_told_of_the_loop(cache: PullThrough, upstreams: MemoryRegistries) -> None:
    client = Deferred.fromCoroutine(cache.blob_size(APP.repository, DIGEST))
    await until(lambda: len(upstreams))
    peer = Deferred.fromCoroutine(cache.blob_size(APP.repository, DIGEST, PEER))
    await until(lambda: len(upstreams) == 2)
    upstreams[1].answer(LOOP)
    with pytest.raises(LoopDetected):
        await peer
    upstreams[0].answer(SIZE)
    assert (await client).size == SIZE


@on_reactor
async def test_ring_that_closes_later_is_found_by_a_second_look(
    cache: PullThrough, upstreams: MemoryRegistries, clock: Clock
) -> None:
    client = ask_manifest(cache)
    await until(lambda: len(upstreams))
    peer = ask_manifest(cache, PEER)
    await until(lambda: len(upstreams) == 2)
    upstreams[1].answer(None)
    clock.advance(1)
    await until(lambda: len(upstreams) == 3)
    upstreams[2].answer(LOOP)
    with pytest.raises(LoopDetected):
        await peer
    upstreams[0].answer(MANIFEST)
    await client


@on_reactor
async def test_command_looks_for_no_loop(cache: PullThrough, upstreams: MemoryRegistries) -> None:
    """It has a Via too, but waits for nothing else."""
    command = Context(PEER.via, patient=True)
    both = [ask_manifest(cache, command), ask_manifest(cache, command)]
    await until(lambda: len(upstreams))
    upstreams[0].answer(MANIFEST)
    for one in both:
        await one
    assert len(upstreams) == 1
