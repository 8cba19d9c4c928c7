"""Undecided images: several indexes, restarts, requests through the API, and completion policies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ociregistry.context import NO_VIA, Via
from ociregistry.manifests import Manifest
from ociregistry.names import Digest, Upstream
from ociregistry.platforms import Platform
from ociregistry.pullthrough.cache import PullThrough
from ociregistry.pullthrough.completion import CompletionPolicy
from ociregistry.pullthrough.listings import Listings
from ociregistry.store.snapshot import Snapshot
from ociregistry.store.store import Store
from ociregistry.web.api import V2
from ociregistry.web.resource import Answer
from tests.unit.support.common import REACTOR, image, on_reactor, until
from tests.unit.support.demands import AMD64, APP, ARM64, ATTESTATION, INDEX, MACHINE, S390X, SHARED, Demands
from tests.unit.support.http_agents import INSTANCE
from tests.unit.support.loads import image_of, index_of, settle
from tests.unit.support.registries import MemoryRegistries
from tests.unit.test_web_api import ask

ALL = (AMD64, ARM64, S390X, ATTESTATION)
OWN_ARM64, OWN_S390X = b"layer of arm64", b"layer of s390x"
CACHE = Via((f"ociregistry-{'f' * 16}",))


@pytest.fixture
def demands(root: Path, store: Store, clock: Clock) -> Iterator[Demands]:
    """Return a demand on a linux/amd64 machine."""
    demands = Demands(root, store, clock)
    yield demands
    demands.stop()


# Several indexes


@on_reactor
async def test_nested_index_images_are_decided_together(demands: Demands) -> None:
    inner = index_of((AMD64, "linux/amd64"), (ARM64, "linux/arm64"))
    outer = index_of((inner, ""), (S390X, "linux/s390x"))
    await demands.get(outer, tag="1")
    await demands.get(inner)
    await demands.get(AMD64, ARM64, S390X)
    assert demands.pending == ["linux/amd64", "linux/arm64", "linux/s390x"]
    await demands.wait(20)
    # The inner index's timer ends first, but waits for the outer one.
    await demands.get(outer, tag="1", hit=True)
    await demands.wait(20)
    assert demands.completing == ["linux/amd64"]
    await demands.wait(10)
    assert (demands.completing, demands.pending) == (["linux/amd64"], [])


@on_reactor
async def test_layer_decides_for_the_outer_index(demands: Demands) -> None:
    inner = index_of((AMD64, "linux/amd64"), (ARM64, "linux/arm64"))
    await demands.get(index_of((inner, ""), (S390X, "linux/s390x")), tag="1")
    await demands.get(inner)
    await demands.get(AMD64, ARM64, S390X)
    await demands.get_layers(OWN_ARM64)
    assert (demands.completing, demands.pending) == (["linux/arm64"], [])


@on_reactor
async def test_image_of_two_indexes_is_wanted_if_wanted_in_one(demands: Demands) -> None:
    await demands.get(INDEX, tag="1")
    await demands.get(index_of((ARM64, "linux/arm64")), tag="only-arm64")
    await demands.get(AMD64, S390X)
    await demands.get(ARM64)
    await demands.wait()
    # In one it is one of several images, in the other the only one.
    assert (demands.completing, demands.pending) == (["linux/amd64", "linux/arm64"], [])


@on_reactor
async def test_image_of_two_indexes_waits_for_the_later_timer(demands: Demands) -> None:
    other = index_of((S390X, "linux/s390x"), (ARM64, "linux/arm64"))
    await demands.get(INDEX, tag="1")
    await demands.get(other, tag="2")
    await demands.get(ARM64, S390X)
    await demands.wait(20)
    await demands.get(other, tag="2", hit=True)
    await demands.wait(10)
    assert (demands.completing, demands.pending) == ([], ["linux/arm64", "linux/s390x"])
    await demands.wait(20)
    assert (demands.completing, demands.pending) == ([], [])


@on_reactor
async def test_layer_shared_in_one_index_does_not_decide_in_another(demands: Demands) -> None:
    await demands.get(INDEX, tag="1")
    await demands.get(index_of((ARM64, "linux/arm64")), tag="only-arm64")
    await demands.get(ARM64, AMD64)
    await demands.get_layers(SHARED)
    assert demands.completing == []


@on_reactor
async def test_base_layer_decides_only_among_requested_images(
    demands: Demands,
) -> None:
    """Pulling one image of a common base does not pull the others."""
    base = b"layer of the base"
    older, newer = image_of(b"config 1", base, b"layer 1"), image_of(b"config 2", base, b"layer 2")
    await demands.get(index_of((AMD64, "linux/amd64"), (older, "linux/arm64")), tag="1")
    await demands.get(index_of((S390X, "linux/amd64"), (newer, "linux/arm64")), tag="2")
    # The older image is present as metadata, requested some time ago.
    await demands.get(older)
    await demands.get(AMD64)
    await demands.wait()
    assert (demands.completing, demands.pending) == (["linux/amd64"], [])
    await demands.get(newer, S390X)
    await demands.get_layers(base)
    assert demands.completing == sorted([newer.digest, "linux/amd64"])
    # A layer unique to it decides at any time.
    await demands.get_layers(b"layer 1")
    assert demands.completing == sorted([newer.digest, older.digest, "linux/amd64"])


# Restarts and stops


async def request_before_restart(root: Path, *manifests: Manifest, wanted: tuple[Manifest, ...] = ()) -> None:
    """Request manifests in a process that ends before the decision."""
    clock = Clock()
    store = Store(root, clock, REACTOR)
    store.startService()
    demands = Demands(root, store, clock)
    await demands.get(INDEX, tag="1")
    for one in wanted:
        await demands.get(one)
        await demands.wait()
    await demands.get(*manifests)
    demands.stop()
    await settle(store)
    store.stopService()


@on_reactor
async def test_decision_is_made_30_seconds_after_a_restart(
    root: Path, open_store: Callable[[], Store], clock: Clock
) -> None:
    await request_before_restart(root, ARM64)
    store = open_store()
    assert set(store.undecided) == {ARM64.digest}
    demands = Demands(root, store, clock)
    await settle(store)
    assert demands.pending == ["linux/arm64"]
    await demands.wait(29.875)
    assert (demands.completing, demands.pending) == ([], ["linux/arm64"])
    await demands.wait(0.125)
    assert (demands.completing, demands.pending, demands.wanted(ARM64)) == (["linux/arm64"], [], [True])
    demands.stop()


@pytest.mark.parametrize(
    ("asked", "wanted", "completing"),
    [
        (ALL, (), ["linux/amd64"]),
        ((ARM64, S390X), (), []),
        ((ARM64,), (S390X,), ["linux/s390x"]),
    ],
)
@on_reactor
async def test_decision_after_restart_is_the_same(
    root: Path,
    open_store: Callable[[], Store],
    clock: Clock,
    asked: tuple[Manifest, ...],
    wanted: tuple[Manifest, ...],
    completing: list[str],
) -> None:
    await request_before_restart(root, *asked, wanted=wanted)
    store = open_store()
    demands = Demands(root, store, clock)
    await settle(store)
    await demands.wait()
    assert (demands.completing, demands.pending) == (completing, [])
    demands.stop()


@on_reactor
async def test_undecided_image_without_record_is_dropped(
    root: Path, open_store: Callable[[], Store], clock: Clock
) -> None:
    await request_before_restart(root, ARM64)
    (root / "img" / ARM64.digest.hex).unlink()
    demands = Demands(root, open_store(), clock)
    await until(lambda: not demands.store.undecided)
    await settle(demands.store)
    assert (demands.completing, demands.pending) == ([], [])
    demands.stop()


@on_reactor
async def test_undecided_image_without_index_is_wanted(
    root: Path, open_store: Callable[[], Store], clock: Clock
) -> None:
    await request_before_restart(root, ARM64)
    (root / "fat" / INDEX.digest.hex).unlink()
    demands = Demands(root, open_store(), clock)
    await settle(demands.store)
    assert (demands.completing, demands.pending) == (["linux/arm64"], [])
    demands.stop()


@on_reactor
async def test_stop_keeps_files_and_leaves_no_delayed_call(root: Path, store: Store, clock: Clock) -> None:
    before = list(clock.getDelayedCalls())
    demands = Demands(root, store, clock)
    await demands.get(INDEX, tag="1")
    await demands.get(AMD64, ARM64)
    assert len(clock.getDelayedCalls()) > len(before) + 1
    demands.stop()
    assert clock.getDelayedCalls() == before
    assert demands.pending == ["linux/amd64", "linux/arm64"]
    # Also not after a request that is answered later.
    await demands.get(S390X)
    await demands.get_layers(OWN_ARM64)
    assert clock.getDelayedCalls() == before
    assert (demands.completing, demands.pending) == ([], ["linux/amd64", "linux/arm64"])


# Through the API


@pytest.fixture
def v2(demands: Demands, cache: PullThrough, upstreams: MemoryRegistries, clock: Clock) -> V2:
    """Return the API."""
    return V2(cache, Listings(demands.store, upstreams, clock), demands.demand, Upstream("docker.io"), INSTANCE)


class Api:
    """Send requests to the API and answer those to the upstream."""

    def __init__(self, v2: V2, demands: Demands, upstreams: MemoryRegistries) -> None:
        self._v2 = v2
        self._demands = demands
        self._upstreams = upstreams

    async def manifests(self, *manifests: Manifest, method: str = "GET", via: Via = NO_VIA, tag: str = "") -> None:
        """Request manifests by digest, or by `tag`."""
        for one in manifests:
            asked = await self._asked(f"manifests/{tag or one.digest}", method, via)
            if not asked.called:
                self._upstreams[-1].answer(one)
            assert (await asked).status == 200
        await settle(self._demands.store)

    async def _asked(self, what: str, method: str, via: Via) -> Deferred[Answer]:
        """Send a request; answer the upstream's request if there is one."""
        count = len(self._upstreams)
        asked = ask(self._v2, f"/v2/team/app/{what}", method=method, via=via)
        await until(lambda: asked.called or len(self._upstreams) > count)
        return asked

    async def blob(self, data: bytes, method: str = "GET", via: Via = NO_VIA) -> None:
        """Request a blob and read it."""
        asked = await self._asked(f"blobs/{Digest.of(data)}", method, via)
        if method == "HEAD":
            self._upstreams[-1].answer(len(data))
        elif not asked.called:
            self._upstreams[-1].stream(len(data)).send(data).end()
        (await asked).content.close()
        await settle(self._demands.store)


@pytest.fixture
def api(v2: V2, demands: Demands, upstreams: MemoryRegistries) -> Api:
    """Return a client."""
    return Api(v2, demands, upstreams)


@on_reactor
async def test_api_requests_reach_the_demand(api: Api, demands: Demands) -> None:
    await api.manifests(INDEX, tag="1")
    await api.manifests(*ALL)
    assert demands.pending == ["linux/amd64", "linux/arm64", "linux/s390x", "unknown/unknown"]
    assert demands.wanted(*ALL) == [False] * 4
    await api.blob(OWN_S390X)
    assert demands.wanted(*ALL) == [False, False, True, False]
    assert demands.pending == []


@on_reactor
async def test_head_request_is_ignored(api: Api, demands: Demands) -> None:
    await api.manifests(INDEX, tag="1")
    await api.manifests(AMD64, ARM64, method="HEAD")
    await api.blob(OWN_ARM64, method="HEAD")
    await demands.wait()
    assert (demands.completing, demands.pending, demands.wanted(AMD64, ARM64)) == ([], [], [False, False])


@on_reactor
async def test_head_of_index_does_not_restart_the_timer(api: Api, demands: Demands) -> None:
    await api.manifests(INDEX, tag="1")
    await api.manifests(ARM64)
    await demands.wait(20)
    await api.manifests(INDEX, tag="1", method="HEAD")
    await demands.wait(10)
    assert demands.completing == ["linux/arm64"]


@on_reactor
async def test_manifests_requested_by_another_cache_are_not_wanted(api: Api, demands: Demands) -> None:
    """Another cache requests them for its clients and completes its own images."""
    await api.manifests(INDEX, tag="1", via=CACHE)
    await api.manifests(*ALL, via=CACHE)
    await demands.wait(1)
    await demands.wait()
    assert (demands.completing, demands.pending) == ([], [])
    assert [demands.store.entry(one.digest).wanted for one in ALL] == [False] * 4  # type: ignore[union-attr]  # entries exist


@on_reactor
async def test_layers_requested_by_another_cache_are_ignored(api: Api, demands: Demands) -> None:
    await api.manifests(INDEX, tag="1")
    await api.manifests(*ALL, via=CACHE)
    for layer in (SHARED, OWN_ARM64):
        await api.blob(layer, via=CACHE)
        # This includes images of other platforms with the shared layer.
        await demands.wait(1)
        await demands.wait()
        assert (demands.pending, demands.completing) == ([], [])


@pytest.mark.parametrize("as_metadata", [False, True])
@on_reactor
async def test_image_pulled_by_another_cache_is_listed_once_complete(
    api: Api, demands: Demands, as_metadata: bool
) -> None:
    """Holds also if the manifest was stored as metadata of the index before."""
    await api.manifests(INDEX, tag="1", via=CACHE)
    if as_metadata:
        for one in ALL:
            await demands.store.keep(one, image(f"{APP}@{one.digest}"), wanted=False)
    await api.manifests(*ALL, via=CACHE)
    await api.blob(SHARED, via=CACHE)
    assert listed(demands) == []
    await api.blob(OWN_ARM64, via=CACHE)
    assert listed(demands) == [ARM64.digest]


def listed(demands: Demands) -> list[Digest]:
    """Return the images that `list`, `prune` and `export` name by digest."""
    return [row.stored.manifest.digest for row in Snapshot.read(demands.root).rows if not row.has_tag]


# Policies


@on_reactor
async def test_without_completion_nothing_is_completed(root: Path, store: Store, clock: Clock) -> None:
    demands = Demands(root, store, clock, MACHINE, CompletionPolicy(images=False))
    await demands.get(INDEX, tag="1")
    await demands.get(*ALL)
    await demands.get_layers(OWN_ARM64)
    await demands.wait()
    assert (demands.completing, demands.pending) == ([], [])
    # Images that the client did not pull are metadata, which `verify` does not miss.
    assert demands.wanted(*ALL) == [False, True, False, False]
    demands.stop()


@on_reactor
async def test_nothing_is_pending_with_configured_platforms(root: Path, store: Store, clock: Clock) -> None:
    policy = CompletionPolicy(platforms=(Platform("linux", "s390x"),))
    demands = Demands(root, store, clock, MACHINE, policy)
    await demands.get(INDEX, tag="1")
    await demands.get(AMD64, ARM64)
    assert (demands.completing, demands.pending) == ([], [])
    await demands.wait()
    assert (demands.completing, demands.wanted(AMD64, ARM64)) == ([], [False, False])
    # An image without an index is completed nevertheless.
    single = image_of(b"config of a single image", b"its layer")
    await demands.get(single, tag="single")
    await demands.wait(1)
    assert demands.completing == [single.digest]
    demands.stop()


@on_reactor
async def test_undecided_images_are_dropped_once_platforms_are_configured(
    root: Path, open_store: Callable[[], Store], clock: Clock
) -> None:
    await request_before_restart(root, ARM64)
    policy = CompletionPolicy(platforms=(Platform("linux", "amd64"),))
    demands = Demands(root, open_store(), clock, MACHINE, policy)
    await settle(demands.store)
    await demands.wait()
    assert (demands.completing, demands.pending, demands.wanted(ARM64)) == ([], [], [False])
    demands.stop()
