"""Loading many images: concurrency limits, order, progress and cancellation."""

from __future__ import annotations

from pathlib import Path

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from ociregistry.errors import Unavailable
from ociregistry.names import ImageReference
from ociregistry.platforms import ALL
from ociregistry.pullthrough.cache import FoundManifest, PullThrough
from ociregistry.pullthrough.fetchers import CacheFetcher
from ociregistry.pullthrough.listings import Listings
from ociregistry.pullthrough.loader import LoadResult, LoadStatus
from ociregistry.store.store import Store
from tests.images import make_image, make_index
from tests.unit.support.common import REACTOR, manifest, on_reactor, turn, until
from tests.unit.support.loads import Loads, MemoryFetcher, settle
from tests.unit.support.registries import MemoryRegistries

URLS = [f"reg.example/app{number}:1" for number in range(7)]
IMAGES = [make_image(url, layers=3) for url in URLS]


@pytest.fixture
def fetcher(store: Store, root: Path) -> MemoryFetcher:
    """Return a fetcher with the images."""
    fetcher = MemoryFetcher(store, root)
    for url, built in zip(URLS, IMAGES, strict=True):
        fetcher.add(url, built)
    return fetcher


@pytest.fixture
def loads(store: Store, fetcher: MemoryFetcher) -> Loads:
    """Return a loader over it."""
    return Loads(store, fetcher)


async def wait_for_requests(fetcher: MemoryFetcher, count: int) -> None:
    """Wait until `count` requests wait."""
    await until(lambda: len(fetcher.waiting) == count)


async def wait_for_outcomes(loads: Loads, count: int) -> None:
    """Wait until `count` images have ended."""
    await until(lambda: len(loads.progress.outcomes) == count)


@pytest.mark.parametrize("concurrent", [1, 2, 5, 50])
@on_reactor
async def test_number_of_concurrent_images(
    loads: Loads, fetcher: MemoryFetcher, store: Store, concurrent: int
) -> None:
    fetcher.held.add("manifest")
    loading = loads.load(*URLS, concurrent=concurrent, connections=50)
    for begun in range(len(URLS)):
        most = min(concurrent, len(URLS) - begun)
        await wait_for_requests(fetcher, most)
        await settle(store)
        assert list(fetcher.waiting) == [f"manifest {url}" for url in URLS[begun : begun + most]]
        # An image occupies its slot until its blobs are loaded, not only its manifest.
        fetcher.release(f"manifest {URLS[begun]}")
    assert [outcome.ended for outcome in await loading] == [LoadStatus.LOADED] * 7
    assert fetcher.most["manifest"] == min(concurrent, 7)


@on_reactor
async def test_image_occupies_its_slot_until_blobs_are_loaded(
    loads: Loads, fetcher: MemoryFetcher, store: Store
) -> None:
    fetcher.held.add("blob")
    loading = loads.load(*URLS[:2], concurrent=1)
    await until(lambda: len(fetcher.waiting) == 4)
    await settle(store)
    assert f"manifest {URLS[1]}" not in fetcher.asked
    fetcher.held.clear()
    fetcher.release()
    assert len(await loading) == 2


@pytest.mark.parametrize("connections", [1, 3, 100])
@on_reactor
async def test_number_of_concurrent_blobs_of_all_images(
    loads: Loads, fetcher: MemoryFetcher, store: Store, connections: int
) -> None:
    fetcher.held.add("blob")
    loading = loads.load(*URLS, concurrent=7, connections=connections)
    most = min(connections, 7 * 4)
    await until(lambda: len(fetcher.waiting) == most)
    while not loading.called:
        await settle(store)
        assert len(fetcher.waiting) <= connections
        fetcher.release()
        await turn()
    assert [outcome.blobs for outcome in await loading] == [4] * 7
    assert fetcher.most["blob"] == most


@on_reactor
async def test_failed_image_frees_its_slot(loads: Loads, fetcher: MemoryFetcher) -> None:
    for url in URLS[:3]:
        fetcher.errors[f"manifest {url}"] = Unavailable("down")
    for blob in IMAGES[3].blobs:
        fetcher.errors[f"blob reg.example/app3@{blob.digest}"] = Unavailable("down")
    outcomes = await loads.load(*URLS, concurrent=1, connections=1)
    assert [outcome.ended for outcome in outcomes] == [LoadStatus.FAILED] * 4 + [LoadStatus.LOADED] * 3


@on_reactor
async def test_progress_order_is_completion_result_order_is_request(loads: Loads, fetcher: MemoryFetcher) -> None:
    fetcher.held.add("manifest")
    loading = loads.load(*URLS[:4], concurrent=4)
    await until(lambda: len(fetcher.waiting) == 4)
    for ended, number in enumerate((2, 0, 3, 1), 1):
        fetcher.release(f"manifest {URLS[number]}")
        await wait_for_outcomes(loads, ended)
    outcomes = await loading
    assert [outcome.name for outcome in outcomes] == URLS[:4]
    assert [outcome.name for outcome in loads.progress.outcomes] == [URLS[2], URLS[0], URLS[3], URLS[1]]
    assert sorted(loads.progress.outcomes, key=lambda one: one.name) == outcomes


@on_reactor
async def test_no_images(loads: Loads) -> None:
    assert await loads.load() == []
    assert loads.progress.outcomes == []


@pytest.mark.parametrize("pieces", [1, 7])
@on_reactor
async def test_expected_bytes_equal_received_bytes(
    loads: Loads, fetcher: MemoryFetcher, root: Path, pieces: int
) -> None:
    fetcher.pieces = pieces
    multi = make_index("progress")
    fetcher.add("reg.example/multi:1", multi)
    urls = [*URLS, "reg.example/multi:1"]
    present = IMAGES[0].layers[0]
    (root / "blobs" / present.digest.removeprefix("sha256:")).write_bytes(present.data)
    outcomes = await loads.load(*urls, wanted=ALL, concurrent=3)
    sizes = {url: sum(len(blob.data) for blob in one.blobs) for url, one in zip(URLS, IMAGES, strict=True)}
    sizes["reg.example/multi:1"] = sum(len(blob.data) for blob in multi.blobs)
    sizes[URLS[0]] -= len(present.data)
    assert loads.progress.expected == loads.progress.received == sizes
    assert {outcome.name: outcome.bytes for outcome in outcomes} == sizes


@on_reactor
async def test_nothing_is_expected_of_present_images(loads: Loads) -> None:
    await loads.load(URLS[0])
    expected = loads.progress.expected.copy()
    await loads.load(URLS[0])
    assert loads.progress.expected == expected
    assert [outcome.ended for outcome in loads.progress.outcomes] == [LoadStatus.LOADED, LoadStatus.PRESENT]


async def interrupted(loading: Deferred[list[LoadResult]]) -> BaseException:
    """Cancel loading and return the error."""
    loading.cancel()
    with pytest.raises(Exception) as ended:  # noqa: PT011  # the caller checks the type
        await loading
    return ended.value


@pytest.mark.parametrize("kind", ["manifest", "blob", "referrers"])
@pytest.mark.parametrize(("concurrent", "connections"), [(1, 1), (3, 2), (7, 50)])
@on_reactor
async def test_cancelling_stops_all_requests(
    loads: Loads, fetcher: MemoryFetcher, store: Store, kind: str, concurrent: int, connections: int
) -> None:
    fetcher.held.add(kind)
    loading = loads.load(*URLS, signatures=True, concurrent=concurrent, connections=connections)
    await until(lambda: fetcher.waiting)
    await settle(store)
    under_way = len(fetcher.waiting)
    error = await interrupted(loading)
    assert isinstance(error, CancelledError), repr(error)
    await settle(store)
    # The log is checked after each test.
    assert fetcher.cancelled >= under_way
    assert fetcher.running.total() == 0
    assert loads.progress.outcomes == []


@pytest.mark.parametrize("kind", ["manifest", "blob"])
@on_reactor
async def test_cancelling_starts_no_new_requests(
    loads: Loads, fetcher: MemoryFetcher, store: Store, kind: str
) -> None:
    fetcher.held.add(kind)
    loading = loads.load(*URLS, concurrent=1, connections=1)
    await until(lambda: fetcher.waiting)
    await settle(store)
    asked = list(fetcher.asked)
    await interrupted(loading)
    await settle(store)
    assert fetcher.asked == asked


@on_reactor
async def test_loading_resumes_after_cancelling(loads: Loads, fetcher: MemoryFetcher, store: Store) -> None:
    held = {f"manifest {URLS[3]}", f"blob reg.example/app2@{IMAGES[2].blobs[1].digest}"}
    fetcher.held |= held
    loading = loads.load(*URLS, concurrent=2)
    await until(lambda: fetcher.waiting.keys() == held)
    await settle(store)
    await interrupted(loading)
    fetcher.held.clear()
    fetcher.waiting.clear()
    asked = len(fetcher.asked)
    outcomes = await loads.load(*URLS, concurrent=2)
    assert [outcome.blobs for outcome in outcomes] == [0, 0, 1, 4, 4, 4, 4]
    assert f"manifest {URLS[2]}" not in fetcher.asked[asked:]


@on_reactor
async def test_cancelling_sends_no_further_requests_upstream(
    store: Store, cache: PullThrough, upstreams: MemoryRegistries, clock: Clock
) -> None:
    pulling = CacheFetcher(cache, Listings(store, upstreams, clock), 60.0, clock)
    loading = Loads(store, pulling).load(*URLS, concurrent=7)
    await until(lambda: len(upstreams) == 7)
    loading.cancel()
    with pytest.raises(CancelledError):
        await loading
    for call in upstreams:
        call.answer(manifest(IMAGES[0]))
    await until(lambda: store.counts.images == 1)
    assert len(upstreams) == 7


@on_reactor
async def test_cancelling_drops_queued_images(
    store: Store, cache: PullThrough, upstreams: MemoryRegistries, clock: Clock
) -> None:
    pulling = CacheFetcher(cache, Listings(store, upstreams, clock), 60.0, clock)
    loading = Loads(store, pulling).load(*URLS, concurrent=1)
    await until(lambda: len(upstreams) == 1)
    loading.cancel()
    with pytest.raises(CancelledError):
        await loading
    await turn()
    assert upstreams.asked == [f"manifest {URLS[0]}"]


class Refusing(MemoryFetcher):
    """Fetcher whose requests fail immediately."""

    async def manifest(self, image: ImageReference) -> FoundManifest:
        """Fail as with an open circuit breaker."""
        if not self.asked:
            self.asked.append(str(image))
            await turn()
        raise Unavailable(f"{image}: the link is down")


@on_reactor
async def test_thousand_immediate_failures_do_not_overflow_the_stack(store: Store, root: Path) -> None:
    """Each failure starts the next image; nested calls would exceed the recursion limit."""
    urls = [f"reg.example/none:{number}" for number in range(1000)]
    outcomes = await Loads(store, Refusing(store, root)).load(*urls).addTimeout(60, REACTOR)
    assert [outcome.name for outcome in outcomes] == urls
    assert {outcome.ended for outcome in outcomes} == {LoadStatus.FAILED}
