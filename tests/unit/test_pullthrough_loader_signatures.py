"""Loading with signatures: what tags and referrers say of an image is brought, too, and need not be there."""

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
from ociregistry.pullthrough.loader import LoadStatus, Outcome
from ociregistry.store.store import Store
from tests.images import make_artifact, make_image, make_index
from tests.unit.support.doubles import image, manifest, on_reactor, until
from tests.unit.support.loads import Loads, Shelf, image_of, index_of
from tests.unit.support.registries import MemoryRegistries

APP = "reg.example/app:1"
BUILT = make_image("signed")
DIGEST = Digest(BUILT.manifest.digest)


@pytest.fixture
def shelf(store: Store, root: Path) -> Shelf:
    """What upstreams have: the image."""
    shelf = Shelf(store, root)
    shelf.add(APP, BUILT)
    return shelf


@pytest.fixture
def loads(store: Store, shelf: Shelf) -> Loads:
    """Loads from there."""
    return Loads(store, shelf)


def tag(ending: str, digest: Digest = DIGEST) -> str:
    """Where cosign keeps what it says of a manifest."""
    return f"reg.example/app:sha256-{digest.hex}.{ending}"


async def state(loads: Loads) -> Outcome:
    """How the image is loaded with its signatures."""
    (outcome,) = await loads.load(APP, signatures=True)
    return outcome


@on_reactor
async def test_without_being_told_to_nobody_asks_for_them(loads: Loads, shelf: Shelf) -> None:
    shelf.add(tag("sig"), make_image("signature"))
    (outcome,) = await loads.load(APP)
    assert (outcome.blobs, len(shelf.asked)) == (3, 4)


@on_reactor
async def test_that_there_are_none_is_fine(loads: Loads, shelf: Shelf) -> None:
    assert (await state(loads)).ended is LoadStatus.LOADED
    asked = [f"manifest {tag(ending)}" for ending in ("sig", "att", "sbom")]
    assert shelf.asked[4:] == [*asked, f"referrers reg.example/app@{DIGEST}"]
    assert (await state(loads)).ended is LoadStatus.PRESENT


@on_reactor
async def test_what_stands_under_tags_is_brought_with_its_blobs(loads: Loads, shelf: Shelf, store: Store) -> None:
    for ending in ("sig", "att", "sbom"):
        data = [b"{}", ending.encode()]
        shelf.put(tag(ending), image_of(*data), blobs=data)
    outcome = await state(loads)
    # The config is the same of all.
    assert (outcome.ended, outcome.blobs) == (LoadStatus.LOADED, 3 + 4)
    for ending in ("sig", "att", "sbom"):
        signature = await store.manifest(image(tag(ending)))
        assert signature is not None
        assert not await store.lacking(signature)
    assert (await state(loads)).ended is LoadStatus.PRESENT


@on_reactor
async def test_what_refers_to_it_is_brought_with_its_blobs(loads: Loads, shelf: Shelf, store: Store) -> None:
    artifact = make_artifact("sbom", BUILT.manifest)
    shelf.add(f"reg.example/app@{artifact.manifest.digest}", artifact)
    shelf.refer(DIGEST, index_of((manifest(artifact), "")))
    outcome = await state(loads)
    assert (outcome.ended, outcome.blobs) == (LoadStatus.LOADED, 3 + 2)
    kept = await store.manifest(image(f"reg.example/app@{artifact.manifest.digest}"))
    assert kept == manifest(artifact)
    assert (await state(loads)).ended is LoadStatus.PRESENT


@on_reactor
async def test_a_referrer_that_has_gone_meanwhile_is_fine(loads: Loads, shelf: Shelf) -> None:
    shelf.refer(DIGEST, index_of((manifest(make_artifact("gone", BUILT.manifest)), "")))
    assert (await state(loads)).ended is LoadStatus.LOADED


@on_reactor
async def test_a_referrer_of_another_kind_is_left_alone(loads: Loads, shelf: Shelf) -> None:
    other = Manifest(Digest.of(b"other"), "application/vnd.other", b"other", (), ())
    shelf.refer(DIGEST, index_of((other, "")))
    assert (await state(loads)).ended is LoadStatus.LOADED
    assert not any(str(other.digest) in words for words in shelf.asked)


@on_reactor
async def test_those_of_a_list_and_of_its_image_are_asked_for(loads: Loads, shelf: Shelf) -> None:
    multi = make_index("signed list")
    shelf.add(APP, multi)
    await state(loads)
    amd64, arm64 = (Digest(one.manifest.digest) for one in multi.images)
    asked = [words for words in shelf.asked if words.startswith("referrers ")]
    assert asked == [f"referrers reg.example/app@{digest}" for digest in (multi.manifest.digest, amd64)]
    assert f"manifest {tag('sig', Digest(multi.manifest.digest))}" in shelf.asked
    assert f"manifest {tag('sig', amd64)}" in shelf.asked
    assert not any(arm64.hex in words for words in shelf.asked)


@on_reactor
async def test_no_tag_is_made_of_another_algorithm(loads: Loads, shelf: Shelf) -> None:
    data = BUILT.manifest.data
    digest = Digest.of(data, "sha512")
    url = f"reg.example/app@{digest}"
    shelf.put(url, Manifest.parse(data, BUILT.manifest.media_type, digest))
    (outcome,) = await loads.load(url, signatures=True)
    assert outcome.ended is LoadStatus.LOADED
    assert [words for words in shelf.asked if "blob" not in words] == [
        f"manifest {url}",
        f"referrers reg.example/app@{digest}",
    ]


@on_reactor
async def test_an_upstream_that_does_not_say_whether_there_are_any_is_a_failure(loads: Loads, shelf: Shelf) -> None:
    shelf.errors[f"manifest {tag('att')}"] = Unavailable("reg.example: down")
    outcome = await state(loads)
    assert (outcome.ended, outcome.why, outcome.again) == (LoadStatus.FAILED, "reg.example: down", True)
    # Its own blobs are here, at least.
    assert outcome.blobs == 3


class Offline:
    """An upstream that answers nothing any more, asked by this process."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self.upstreams = MemoryRegistries()
        cache = PullThrough(store, self.upstreams, clock)
        self.loads = Loads(store, CacheFetcher(cache, Listings(store, self.upstreams, clock), 60.0, clock))

    async def load(self, error: Exception) -> tuple[Outcome, list[str]]:
        """How the image ends, and what the upstream was asked for."""
        loading = Deferred.fromCoroutine(state(self.loads))
        for _ in range(20):
            await until(lambda: loading.called or any(not call.result.called for call in self.upstreams))
            for call in self.upstreams:
                if not call.result.called:
                    call.refuse(error)
        return await loading, self.upstreams.asked


@on_reactor
async def test_with_all_in_the_cache_an_upstream_that_cannot_be_reached_is_fine(
    loads: Loads, shelf: Shelf, store: Store, clock: Clock
) -> None:
    for ending in ("sig", "att", "sbom"):
        shelf.put(tag(ending), image_of(b"{}"), blobs=[b"{}"])
    artifact = make_artifact("sbom", BUILT.manifest)
    shelf.add(f"reg.example/app@{artifact.manifest.digest}", artifact)
    index = index_of((manifest(artifact), ""))
    shelf.refer(DIGEST, index)
    await state(loads)
    # As the daemon keeps it, and `Pulling`.
    await store.keep(index, image(f"reg.example/app:sha256-{DIGEST.hex}"))
    outcome, asked = await Offline(store, clock).load(Unavailable("reg.example: down"))
    assert (outcome.ended, outcome.why) == (LoadStatus.PRESENT, "")
    assert asked == [f"referrers reg.example/app {DIGEST}"]


@on_reactor
async def test_an_upstream_without_referrers_is_fine(loads: Loads, shelf: Shelf, store: Store, clock: Clock) -> None:
    await loads.load(APP)
    outcome, asked = await Offline(store, clock).load(ManifestUnknown("it answered 404"))
    assert (outcome.ended, len(asked)) == (LoadStatus.PRESENT, 4)
