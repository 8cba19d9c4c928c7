"""Loading from an upstream that names content without end, or content that it does not have."""

from __future__ import annotations

from pathlib import Path

import pytest

from ociregistry.manifests import Manifest
from ociregistry.pullthrough.loader import LoadStatus
from ociregistry.store.store import Store
from tests.images import make_image
from tests.unit.support.common import on_reactor
from tests.unit.support.loads import Loads, MemoryFetcher, image_of, index_of

APP, NEXT = "reg.example/app:1", "reg.example/next:1"
GOOD = make_image("good")


@pytest.fixture
def fetcher(store: Store, root: Path) -> MemoryFetcher:
    """Return a fetcher with one good image."""
    fetcher = MemoryFetcher(store, root)
    fetcher.add(NEXT, GOOD)
    return fetcher


@pytest.fixture
def loads(store: Store, fetcher: MemoryFetcher) -> Loads:
    """Return a loader over it."""
    return Loads(store, fetcher)


def requests(fetcher: MemoryFetcher, kind: str) -> int:
    """Count the requests of a kind for the hostile image."""
    return sum(request.startswith(f"{kind} reg.example/app") for request in fetcher.asked)


@on_reactor
async def test_rest_of_an_image_is_not_requested_after_three_absent_blobs(
    loads: Loads, fetcher: MemoryFetcher
) -> None:
    fetcher.put(APP, image_of(*(b"blob %d" % number for number in range(2000))))
    hostile, good = await loads.load(APP, NEXT, connections=1)
    assert (hostile.ended, hostile.again, good.ended) == (LoadStatus.FAILED, False, LoadStatus.LOADED)
    assert "the upstream answered 404" in hostile.why
    assert requests(fetcher, "blob") == 3


@on_reactor
async def test_foreign_layers_are_not_requested_after_three_absent_ones(loads: Loads, fetcher: MemoryFetcher) -> None:
    plain = image_of(b"config", *(b"layer %d" % number for number in range(100)))
    data = plain.data.replace(b'"size"', b'"urls": ["https://foreign.example/"], "size"')
    fetcher.put(APP, Manifest.parse(data, plain.media_type), blobs=[b"config"])
    (outcome,) = await loads.load(APP)
    assert outcome.ended is LoadStatus.LOADED
    assert outcome.notes[0].startswith("without foreign layers: 100 blobs, ")
    assert requests(fetcher, "blob") == 4


@on_reactor
async def test_rest_of_an_index_is_not_requested_after_three_absent_manifests(
    loads: Loads, fetcher: MemoryFetcher
) -> None:
    absent = [image_of(b"absent %d" % number) for number in range(200)]
    fetcher.put(APP, index_of(*((one, "") for one in absent)))
    (outcome,) = await loads.load(APP)
    assert outcome.ended is LoadStatus.FAILED
    assert requests(fetcher, "manifest") == 4


@on_reactor
async def test_index_that_repeats_another_ends_after_a_thousand_manifests(
    loads: Loads, fetcher: MemoryFetcher
) -> None:
    """Four levels of 100 times the same: a hundred million manifests."""
    nested = [index_of()]
    for _ in range(4):
        nested.append(index_of(*[(nested[-1], "")] * 100))
    fetcher.put(APP, nested[-1], *nested[:-1])
    hostile, good = await loads.load(APP, NEXT)
    assert (hostile.ended, hostile.again, good.ended) == (LoadStatus.FAILED, False, LoadStatus.LOADED)
    assert hostile.why == "it names more than 1000 manifests"


@on_reactor
async def test_rest_of_the_referrers_is_not_requested_after_three_absent_ones(
    loads: Loads, fetcher: MemoryFetcher
) -> None:
    fetcher.add(APP, GOOD)
    absent = [image_of(b"absent %d" % number) for number in range(200)]
    (subject,) = (Manifest.parse(GOOD.manifest.data, GOOD.manifest.media_type),)
    fetcher.add_referrers(subject.digest, index_of(*((one, "") for one in absent)))
    (outcome,) = await loads.load(APP, signatures=True)
    assert outcome.ended is LoadStatus.LOADED
    # The image, three tags of cosign, and three of the 200.
    assert requests(fetcher, "manifest") == 7
