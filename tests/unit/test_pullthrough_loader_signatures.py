"""Loading with signatures: cosign tags and referrers of an image are loaded if they exist."""

from __future__ import annotations

from pathlib import Path

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ociregistry.errors import ManifestUnknown, Unavailable
from ociregistry.manifests import Manifest
from ociregistry.names import Digest
from ociregistry.pullthrough.cache import PullThrough
from ociregistry.pullthrough.fetchers import CacheFetcher
from ociregistry.pullthrough.listings import Listings
from ociregistry.pullthrough.loader import LoadResult, LoadStatus
from ociregistry.store.store import Store
from tests.images import make_artifact, make_image, make_index
from tests.unit.support.common import image, manifest, on_reactor, until
from tests.unit.support.loads import Loads, MemoryFetcher, image_of, index_of
from tests.unit.support.registries import MemoryRegistries

APP = "reg.example/app:1"
BUILT = make_image("signed")
DIGEST = Digest(BUILT.manifest.digest)


@pytest.fixture
def fetcher(store: Store, root: Path) -> MemoryFetcher:
    """Return a fetcher with the image."""
    fetcher = MemoryFetcher(store, root)
    fetcher.add(APP, BUILT)
    return fetcher


@pytest.fixture
def loads(store: Store, fetcher: MemoryFetcher) -> Loads:
    """Return a loader over it."""
    return Loads(store, fetcher)


def tag(ending: str, digest: Digest = DIGEST) -> str:
    """Return the reference of a cosign tag of the manifest."""
    return f"reg.example/app:sha256-{digest.hex}.{ending}"


async def state(loads: Loads) -> LoadResult:
    """Load the image with signatures and return the outcome."""
    (outcome,) = await loads.load(APP, signatures=True)
    return outcome


@on_reactor
async def test_no_signatures_without_option(loads: Loads, fetcher: MemoryFetcher) -> None:
    fetcher.add(tag("sig"), make_image("signature"))
    (outcome,) = await loads.load(APP)
    assert (outcome.blobs, len(fetcher.asked)) == (3, 4)


@on_reactor
async def test_image_without_signatures(loads: Loads, fetcher: MemoryFetcher) -> None:
    assert (await state(loads)).ended is LoadStatus.LOADED
    asked = [f"manifest {tag(ending)}" for ending in ("sig", "att", "sbom")]
    assert fetcher.asked[4:] == [*asked, f"referrers reg.example/app@{DIGEST}"]
    assert (await state(loads)).ended is LoadStatus.PRESENT


@on_reactor
async def test_cosign_tags_are_loaded_with_blobs(loads: Loads, fetcher: MemoryFetcher, store: Store) -> None:
    for ending in ("sig", "att", "sbom"):
        data = [b"{}", ending.encode()]
        fetcher.put(tag(ending), image_of(*data), blobs=data)
    outcome = await state(loads)
    # All have the same config.
    assert (outcome.ended, outcome.blobs) == (LoadStatus.LOADED, 3 + 4)
    for ending in ("sig", "att", "sbom"):
        signature = await store.manifest(image(tag(ending)))
        assert signature is not None
        assert not await store.missing_blobs(signature)
    assert (await state(loads)).ended is LoadStatus.PRESENT


@on_reactor
async def test_referrers_are_loaded_with_blobs(loads: Loads, fetcher: MemoryFetcher, store: Store) -> None:
    artifact = make_artifact("sbom", BUILT.manifest)
    fetcher.add(f"reg.example/app@{artifact.manifest.digest}", artifact)
    fetcher.add_referrers(DIGEST, index_of((manifest(artifact), "")))
    outcome = await state(loads)
    assert (outcome.ended, outcome.blobs) == (LoadStatus.LOADED, 3 + 2)
    kept = await store.manifest(image(f"reg.example/app@{artifact.manifest.digest}"))
    assert kept == manifest(artifact)
    assert (await state(loads)).ended is LoadStatus.PRESENT


@on_reactor
async def test_referrer_that_disappeared_is_skipped(loads: Loads, fetcher: MemoryFetcher) -> None:
    fetcher.add_referrers(DIGEST, index_of((manifest(make_artifact("gone", BUILT.manifest)), "")))
    assert (await state(loads)).ended is LoadStatus.LOADED


@on_reactor
async def test_referrer_of_unknown_media_type_is_skipped(loads: Loads, fetcher: MemoryFetcher) -> None:
    other = Manifest(Digest.of(b"other"), "application/vnd.other", b"other", (), ())
    fetcher.add_referrers(DIGEST, index_of((other, "")))
    assert (await state(loads)).ended is LoadStatus.LOADED
    assert not any(str(other.digest) in words for words in fetcher.asked)


@on_reactor
async def test_signatures_of_index_and_its_image_are_requested(loads: Loads, fetcher: MemoryFetcher) -> None:
    multi = make_index("signed list")
    fetcher.add(APP, multi)
    await state(loads)
    amd64, arm64 = (Digest(one.manifest.digest) for one in multi.images)
    asked = [words for words in fetcher.asked if words.startswith("referrers ")]
    assert asked == [f"referrers reg.example/app@{digest}" for digest in (multi.manifest.digest, amd64)]
    assert f"manifest {tag('sig', Digest(multi.manifest.digest))}" in fetcher.asked
    assert f"manifest {tag('sig', amd64)}" in fetcher.asked
    assert not any(arm64.hex in words for words in fetcher.asked)


@on_reactor
async def test_no_cosign_tag_for_sha512(loads: Loads, fetcher: MemoryFetcher) -> None:
    data = BUILT.manifest.data
    digest = Digest.of(data, "sha512")
    url = f"reg.example/app@{digest}"
    fetcher.put(url, Manifest.parse(data, BUILT.manifest.media_type, digest))
    (outcome,) = await loads.load(url, signatures=True)
    assert outcome.ended is LoadStatus.LOADED
    assert [words for words in fetcher.asked if "blob" not in words] == [
        f"manifest {url}",
        f"referrers reg.example/app@{digest}",
    ]


@on_reactor
async def test_unavailable_upstream_fails_the_image(loads: Loads, fetcher: MemoryFetcher) -> None:
    fetcher.errors[f"manifest {tag('att')}"] = Unavailable("reg.example: down")
    outcome = await state(loads)
    assert (outcome.ended, outcome.why, outcome.again) == (LoadStatus.FAILED, "reg.example: down", True)
    # Its own blobs are loaded nevertheless.
    assert outcome.blobs == 3


class Offline:
    """An upstream that is unavailable, requested by this process."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self.upstreams = MemoryRegistries()
        cache = PullThrough(store, self.upstreams, clock)
        self.loads = Loads(store, CacheFetcher(cache, Listings(store, self.upstreams, clock), 60.0, clock))

    async def load(self, error: Exception) -> tuple[LoadResult, list[str]]:
        """Return the outcome of the image and the requests to the upstream."""
        loading = Deferred.fromCoroutine(state(self.loads))
        for _ in range(20):
            await until(lambda: loading.called or any(not call.result.called for call in self.upstreams))
            for call in self.upstreams:
                if not call.result.called:
                    call.refuse(error)
        return await loading, self.upstreams.asked


@on_reactor
async def test_cached_signatures_suffice_when_upstream_is_unavailable(
    loads: Loads, fetcher: MemoryFetcher, store: Store, clock: Clock
) -> None:
    for ending in ("sig", "att", "sbom"):
        fetcher.put(tag(ending), image_of(b"{}"), blobs=[b"{}"])
    artifact = make_artifact("sbom", BUILT.manifest)
    fetcher.add(f"reg.example/app@{artifact.manifest.digest}", artifact)
    index = index_of((manifest(artifact), ""))
    fetcher.add_referrers(DIGEST, index)
    await state(loads)
    # As stored by the daemon and by `CacheFetcher`.
    await store.keep(index, image(f"reg.example/app:sha256-{DIGEST.hex}"))
    outcome, asked = await Offline(store, clock).load(Unavailable("reg.example: down"))
    assert (outcome.ended, outcome.why) == (LoadStatus.PRESENT, "")
    assert asked == [f"referrers reg.example/app {DIGEST}"]


@on_reactor
async def test_upstream_without_referrers_api(
    loads: Loads, fetcher: MemoryFetcher, store: Store, clock: Clock
) -> None:
    await loads.load(APP)
    outcome, asked = await Offline(store, clock).load(ManifestUnknown("it answered 404"))
    assert (outcome.ended, len(asked)) == (LoadStatus.PRESENT, 4)
