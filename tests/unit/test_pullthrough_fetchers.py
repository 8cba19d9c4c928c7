"""Fetchers without a daemon: this process pulls, with an idle timeout, and reports progress."""

from __future__ import annotations

from pathlib import Path

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ociregistry.context import Priority
from ociregistry.errors import BlobUnknown, ManifestUnknown, RegistryError, Unavailable
from ociregistry.manifests import Manifest
from ociregistry.names import Digest
from ociregistry.pullthrough.cache import FoundManifest, PullThrough
from ociregistry.pullthrough.fetchers import BackgroundFetcher, CacheFetcher, IdleTimeout
from ociregistry.pullthrough.listings import Listings
from ociregistry.pullthrough.waiting import CacheStatus
from ociregistry.store.store import Store
from tests.images import make_image
from tests.unit.support.common import image, manifest, on_reactor, turn, until
from tests.unit.support.loads import image_of, index_of
from tests.unit.support.registries import MemoryRegistries, downloads_ended

BUILT = make_image("supplied", layers=1, layer_size=200_000)
IMAGE = manifest(BUILT)
APP = image("reg.example/app:1")
LAYER = Digest(BUILT.layers[0].digest)
DATA = BUILT.layers[0].data


class FetcherHarness:
    """A fetcher over the cache, and the progress that it reports."""

    def __init__(self, store: Store, cache: PullThrough, upstreams: MemoryRegistries, clock: Clock) -> None:
        self._how = (cache, Listings(store, upstreams, clock), 60.0, clock)
        self.advance: list[int] = []
        self.pulling, self.background = CacheFetcher(*self._how), BackgroundFetcher(*self._how)

    def manifest(self, fetcher: CacheFetcher | None = None) -> Deferred[FoundManifest]:
        """Fetch the manifest."""
        return Deferred.fromCoroutine((fetcher or self.pulling).manifest(APP))

    def referrers(self) -> Deferred[Manifest | None]:
        """Fetch the referrers."""
        return Deferred.fromCoroutine(self.pulling.referrers(APP.repository, IMAGE.digest))

    def blob(
        self, fetcher: CacheFetcher | None = None, digest: Digest = LAYER, size: int = len(DATA)
    ) -> Deferred[None]:
        """Fetch the layer."""
        fetcher = fetcher or self.pulling
        return Deferred.fromCoroutine(fetcher.blob(APP.repository, digest, size, self.advance.append))


@pytest.fixture
def harness(store: Store, cache: PullThrough, upstreams: MemoryRegistries, clock: Clock) -> FetcherHarness:
    """Return a fetcher over the cache."""
    return FetcherHarness(store, cache, upstreams, clock)


async def asked(upstreams: MemoryRegistries, count: int = 1) -> None:
    """Wait until `count` requests have been sent."""
    await until(lambda: len(upstreams) == count)


async def advance(harness: FetcherHarness, count: int) -> None:
    """Wait until `count` bytes have been reported."""
    await until(lambda: sum(harness.advance) >= count)


async def passes(clock: Clock, seconds: float) -> None:
    """Advance the clock and let waiting code continue."""
    clock.advance(seconds)
    await turn()


def test_idle_timeout_restarts_on_progress(clock: Clock) -> None:
    patience = IdleTimeout(60, clock)
    assert (patience.left, patience.exhausted) == (60, False)
    clock.advance(59)
    assert (patience.left, patience.exhausted) == (1, False)
    patience.progress()
    assert patience.left == 60
    clock.advance(60)
    assert patience.exhausted
    clock.advance(1000)
    # Never 0, which would mean no wait at all.
    assert 0 < patience.left < 0.01


@on_reactor
async def test_stored_manifest_is_a_hit(harness: FetcherHarness, store: Store, upstreams: MemoryRegistries) -> None:
    await store.keep(IMAGE, APP)
    assert await harness.manifest() == FoundManifest(IMAGE, CacheStatus.HIT)
    assert len(upstreams) == 0


@on_reactor
async def test_slow_manifest_is_awaited_beyond_the_deadline(
    harness: FetcherHarness, upstreams: MemoryRegistries, clock: Clock
) -> None:
    waiting = harness.manifest()
    await asked(upstreams)
    for _ in range(2):
        await passes(clock, 25)
        assert not waiting.called
    upstreams[0].answer(IMAGE)
    # The first request is answered; there is no second one.
    assert await waiting == FoundManifest(IMAGE, CacheStatus.SHARED)
    assert len(upstreams) == 1


@on_reactor
async def test_manifest_wait_ends_with_the_idle_timeout(
    harness: FetcherHarness, upstreams: MemoryRegistries, clock: Clock
) -> None:
    waiting = harness.manifest()
    await asked(upstreams)
    for _ in range(2):
        await passes(clock, 25)
        assert not waiting.called
    await passes(clock, 10)
    with pytest.raises(Unavailable, match="no answer within 60 s"):
        await waiting
    assert len(upstreams) == 1
    upstreams[0].answer(IMAGE)


@pytest.mark.parametrize("error", [Unavailable("down"), ManifestUnknown("not there")])
@on_reactor
async def test_upstream_error_is_final(
    harness: FetcherHarness, upstreams: MemoryRegistries, error: RegistryError
) -> None:
    waiting = harness.manifest()
    await asked(upstreams)
    upstreams[0].refuse(error)
    with pytest.raises(type(error)) as failed:
        await waiting
    assert failed.value is error
    assert len(upstreams) == 1


@on_reactor
async def test_referrers(harness: FetcherHarness, store: Store, upstreams: MemoryRegistries) -> None:
    index = index_of((image_of(b"{}"), ""))
    waiting = harness.referrers()
    upstreams[0].answer(index)
    assert await waiting == index
    # They are stored for when the upstream cannot be reached.
    waiting = harness.referrers()
    upstreams[1].refuse(Unavailable("down"))
    assert await waiting == index
    assert store.counts.lists == 1


@on_reactor
async def test_upstream_without_referrers(harness: FetcherHarness, upstreams: MemoryRegistries) -> None:
    for number, error in enumerate((ManifestUnknown("it answered 404"), Unavailable("down"))):
        waiting = harness.referrers()
        upstreams[number].refuse(error)
        if isinstance(error, ManifestUnknown):
            assert await waiting is None
            continue
        with pytest.raises(Unavailable):
            await waiting


@on_reactor
async def test_blob_progress_is_reported(
    harness: FetcherHarness, store: Store, cache: PullThrough, upstreams: MemoryRegistries
) -> None:
    await store.keep(IMAGE, APP)
    waiting = harness.blob()
    await asked(upstreams)
    # A client waits for it, so it uses a connection for blobs.
    assert not upstreams[0].reserved
    sending = upstreams[0].stream(len(DATA))
    for start in range(0, len(DATA), 50_000):
        sending.send(DATA[start : start + 50_000])
        await advance(harness, min(start + 50_000, len(DATA) - 1))
        assert not waiting.called
    sending.end()
    await waiting
    assert sum(harness.advance) == len(DATA)
    assert len(harness.advance) >= 4
    assert await store.holds(LAYER, len(DATA))
    await downloads_ended(cache)
    # For a present blob, all progress is reported at once.
    await harness.blob()
    assert harness.advance[-1] == len(DATA)
    assert len(upstreams) == 1


@on_reactor
async def test_progress_includes_partial_of_earlier_process(
    harness: FetcherHarness, store: Store, cache: PullThrough, upstreams: MemoryRegistries
) -> None:
    await store.keep(IMAGE, APP)
    first = await store.new_partial(LAYER, len(DATA), APP.repository)
    await first.append(DATA[:70_000])
    await first.sync()
    first.close()
    waiting = harness.blob()
    await asked(upstreams)
    assert upstreams.asked == [f"blob {APP.repository} {LAYER} from 70000"]
    upstreams[0].stream(len(DATA), 70_000).send(DATA[70_000:]).end()
    await waiting
    assert sum(harness.advance) == len(DATA)


@on_reactor
async def test_empty_blob(harness: FetcherHarness, store: Store, upstreams: MemoryRegistries) -> None:
    empty = image_of(b"{}", b"")
    await store.keep(empty, APP)
    waiting = harness.blob(digest=Digest.of(b""), size=0)
    await asked(upstreams)
    upstreams[0].stream(0).end()
    await waiting
    assert await store.holds(Digest.of(b""), 0)


@on_reactor
async def test_stalled_blob_fails_while_the_download_continues(
    harness: FetcherHarness, store: Store, cache: PullThrough, upstreams: MemoryRegistries, clock: Clock
) -> None:
    await store.keep(IMAGE, APP)
    waiting = harness.blob()
    await asked(upstreams)
    sending = upstreams[0].stream(len(DATA)).send(DATA[:1000])
    await until(lambda: harness.advance)
    await passes(clock, 59)
    sending.send(DATA[1000:2000])
    await until(lambda: sum(harness.advance) == 2000)
    await passes(clock, 59)
    assert not waiting.called
    await passes(clock, 1)
    with pytest.raises(Unavailable, match=f"^{APP.repository}@{LAYER}: no byte came for 60 s$"):
        await waiting
    assert cache.in_flight.keys() == {LAYER}
    # Without a waiter it has background priority.
    assert cache.in_flight[LAYER]._connections.priority is not Priority.CLIENT
    sending.send(DATA[2000:]).end()
    await downloads_ended(cache)
    assert cache.in_flight.keys() == frozenset()


@on_reactor
async def test_blob_unknown_upstream(
    harness: FetcherHarness, store: Store, cache: PullThrough, upstreams: MemoryRegistries
) -> None:
    await store.keep(IMAGE, APP)
    for number, fetcher in enumerate((harness.pulling, harness.background)):
        waiting = harness.blob(fetcher)
        await asked(upstreams, number + 1)
        upstreams[number].refuse(BlobUnknown("not there"))
        with pytest.raises(BlobUnknown):
            await waiting
    assert harness.advance == []
    await downloads_ended(cache)


@on_reactor
async def test_slow_blob_is_awaited_beyond_the_deadline(
    harness: FetcherHarness, cache: PullThrough, upstreams: MemoryRegistries, clock: Clock
) -> None:
    # No manifest of the repository tells its size, as with signature blobs that two manifests name.
    waiting = harness.blob()
    await asked(upstreams)
    await passes(clock, 25)
    given_up = waiting.called
    waiting.addErrback(lambda _: None)
    upstreams[0].stream(len(DATA)).send(DATA).end()
    await waiting
    await downloads_ended(cache)
    assert not given_up


@on_reactor
async def test_background_fetch_yields_to_clients(
    harness: FetcherHarness, store: Store, cache: PullThrough, upstreams: MemoryRegistries, root: Path
) -> None:
    await store.keep(IMAGE, APP)
    waiting = harness.blob(harness.background)
    await asked(upstreams)
    # It uses a connection for blobs, so that several may be fetched at once.
    assert not upstreams[0].reserved
    sending = upstreams[0].stream(len(DATA))
    await turn()
    client = (await cache.blob(APP.repository, LAYER)).content
    sending.send(DATA).end()
    await waiting
    assert harness.advance == [len(DATA)]
    assert (root / "blobs" / LAYER.hex).read_bytes() == DATA
    client.close()
    # A present blob needs no request.
    await harness.blob(harness.background)
    assert len(upstreams) == 1
