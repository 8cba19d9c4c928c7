"""`--always-pull-latest`: the tag `latest` is checked upstream; the cached image is served if that fails."""

from __future__ import annotations

import errno
import os
from datetime import UTC, datetime, timedelta
from typing import NoReturn

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.context import Context, Via
from ociregistry.errors import Denied, LoopDetected, ManifestUnknown, RegistryError, Unavailable
from ociregistry.names import Upstream
from ociregistry.pullthrough.cache import FoundManifest, Policy, PullThrough
from ociregistry.pullthrough.listings import Listings
from ociregistry.pullthrough.waiting import CacheStatus
from ociregistry.store.records import Dates
from ociregistry.store.store import Store
from ociregistry.web.api import V2
from tests.images import make_image, make_index
from tests.unit.support.common import image, manifest, on_reactor, texts, turn, until
from tests.unit.support.demands import NoDemand
from tests.unit.support.http_agents import INSTANCE
from tests.unit.support.registries import MemoryRegistries
from tests.unit.test_pullthrough_cache import asked, manifest_of
from tests.unit.test_pullthrough_cache_down import Host
from tests.unit.test_web_api import ask

LATEST = image("reg.example/team/app:latest")
IMAGE, OTHER = manifest(make_image("latest")), manifest(make_index("latest"))
HEAD = f"manifest_digest {LATEST}"
ERRORS = [
    Unavailable("reg.example: it answered 503"),
    ManifestUnknown("reg.example: it answered 404"),
    Denied("reg.example: it has a forbidden address"),
]


@pytest.fixture
def cache(store: Store, upstreams: MemoryRegistries, clock: Clock) -> PullThrough:
    """Return a cache that checks `latest`."""
    return PullThrough(store, upstreams, clock, Policy(always_pull_latest=True))


def pull(cache: PullThrough) -> Deferred[FoundManifest]:
    """Pull the image by the tag."""
    return manifest_of(cache, str(LATEST))


def stale(why: str) -> str:
    """Return the expected log line."""
    return f"serving {LATEST} from the cache, unchecked: {why}"


@on_reactor
async def test_unchanged_tag_is_not_fetched(
    cache: PullThrough, upstreams: MemoryRegistries, store: Store, events: list[LogEvent]
) -> None:
    await store.keep(IMAGE, LATEST)
    for count in (1, 2):
        pulling = pull(cache)
        await asked(upstreams, count)
        upstreams[-1].answer(IMAGE.digest)
        assert await pulling == FoundManifest(IMAGE, CacheStatus.HIT)
    assert upstreams.asked == [HEAD] * 2
    assert texts(events, LogLevel.warn) == []


@on_reactor
async def test_moved_tag_is_fetched_by_digest_and_stored(
    cache: PullThrough, upstreams: MemoryRegistries, store: Store
) -> None:
    await store.keep(IMAGE, LATEST)
    pulling = pull(cache)
    await asked(upstreams)
    upstreams[0].answer(OTHER.digest)
    await asked(upstreams, 2)
    assert upstreams.asked == [HEAD, f"manifest {LATEST.repository}@{OTHER.digest}"]
    upstreams[1].answer(OTHER)
    assert await pulling == FoundManifest(OTHER, CacheStatus.MISS)
    assert await store.manifest(LATEST) == OTHER
    # The next request is a check against the new digest.
    pulling = pull(cache)
    await asked(upstreams, 3)
    upstreams[2].answer(OTHER.digest)
    assert await pulling == FoundManifest(OTHER, CacheStatus.HIT)


@on_reactor
async def test_upstream_without_digest_header_is_asked_by_tag(
    cache: PullThrough, upstreams: MemoryRegistries, store: Store
) -> None:
    await store.keep(IMAGE, LATEST)
    pulling = pull(cache)
    await asked(upstreams)
    upstreams[0].answer(None)
    await asked(upstreams, 2)
    assert upstreams.asked == [HEAD, f"manifest {LATEST}"]
    upstreams[1].answer(OTHER)
    assert (await pulling).manifest == OTHER
    assert await store.manifest(LATEST) == OTHER


@on_reactor
async def test_missing_tag_is_fetched_as_usual(cache: PullThrough, upstreams: MemoryRegistries, clock: Clock) -> None:
    pulling = pull(cache)
    await asked(upstreams)
    assert upstreams.asked == [f"manifest {LATEST}"]
    # There is no cached image to fall back to.
    clock.advance(24)
    assert not pulling.called
    upstreams[0].answer(IMAGE)
    assert await pulling == FoundManifest(IMAGE, CacheStatus.MISS)


@on_reactor
async def test_check_is_limited_to_five_seconds(
    cache: PullThrough, upstreams: MemoryRegistries, store: Store, clock: Clock, events: list[LogEvent]
) -> None:
    await store.keep(IMAGE, LATEST)
    pulling = pull(cache)
    await asked(upstreams)
    clock.advance(3)
    upstreams[0].answer(OTHER.digest)
    await asked(upstreams, 2)
    clock.advance(1.875)
    await turn()
    assert not pulling.called
    clock.advance(0.125)
    assert await pulling == FoundManifest(IMAGE, CacheStatus.STALE)
    assert texts(events, LogLevel.warn) == [stale("no answer within 5 s")]
    # A later answer is stored for the next request.
    upstreams[1].answer(OTHER)
    await until(lambda: store.counts.lists == 1)
    assert await store.manifest(LATEST) == OTHER


@pytest.mark.parametrize("at", ["HEAD", "GET"])
@pytest.mark.parametrize("error", ERRORS)
@on_reactor
async def test_failed_check_serves_cached_image(
    cache: PullThrough,
    upstreams: MemoryRegistries,
    store: Store,
    events: list[LogEvent],
    error: RegistryError,
    at: str,
) -> None:
    await store.keep(IMAGE, LATEST)
    pulling = pull(cache)
    await asked(upstreams)
    if at == "GET":
        upstreams[0].answer(OTHER.digest)
        await asked(upstreams, 2)
    upstreams[-1].refuse(error)
    assert await pulling == FoundManifest(IMAGE, CacheStatus.STALE)
    assert texts(events, LogLevel.warn) == [stale(error.message)]
    assert texts(events, LogLevel.error) == []
    assert await store.manifest(LATEST) == IMAGE


@on_reactor
async def test_full_disk_serves_cached_image(
    cache: PullThrough, upstreams: MemoryRegistries, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.keep(IMAGE, LATEST)

    async def keep(*what: object, **named: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store, "keep", keep)
    pulling = pull(cache)
    await asked(upstreams)
    upstreams[0].answer(OTHER.digest)
    await asked(upstreams, 2)
    upstreams[1].answer(OTHER)
    assert await pulling == FoundManifest(IMAGE, CacheStatus.STALE)


async def waiting_for_check(cache: PullThrough, count: int) -> None:
    """Wait until so many requests wait for the check."""
    await until(lambda: sum(map(len, cache._checks._requests._waiting.values())) == count)


async def pull_concurrently(
    cache: PullThrough, upstreams: MemoryRegistries, store: Store
) -> list[Deferred[FoundManifest]]:
    """Start three pulls, which share one request."""
    await store.keep(IMAGE, LATEST)
    pulling = [pull(cache) for _ in range(3)]
    await asked(upstreams)
    await waiting_for_check(cache, 3)
    assert upstreams.asked == [HEAD]
    return pulling


@on_reactor
async def test_concurrent_pulls_share_a_new_manifest(
    cache: PullThrough, upstreams: MemoryRegistries, store: Store, events: list[LogEvent]
) -> None:
    pulling = await pull_concurrently(cache, upstreams, store)
    upstreams[0].answer(OTHER.digest)
    await asked(upstreams, 2)
    upstreams[1].answer(OTHER)
    found = [await one for one in pulling]
    assert [one.manifest for one in found] == [OTHER] * 3
    assert sorted(one.cache_status.value for one in found) == ["miss", "shared", "shared"]
    assert len(upstreams) == 2
    pulling = [pull(cache) for _ in range(2)]
    await asked(upstreams, 3)
    await waiting_for_check(cache, 2)
    upstreams[2].refuse(ERRORS[0])
    assert [await one for one in pulling] == [FoundManifest(OTHER, CacheStatus.STALE)] * 2


@on_reactor
async def test_concurrent_pulls_share_an_unchanged_manifest(
    cache: PullThrough, upstreams: MemoryRegistries, store: Store
) -> None:
    pulling = await pull_concurrently(cache, upstreams, store)
    upstreams[0].answer(IMAGE.digest)
    assert [await one for one in pulling] == [FoundManifest(IMAGE, CacheStatus.HIT)] * 3


@on_reactor
async def test_unchanged_tag_is_taken_from_a_record_that_has_it_too(
    cache: PullThrough, upstreams: MemoryRegistries, store: Store
) -> None:
    """The other date is in the future, and would win once that time has come."""
    await store.keep(IMAGE, LATEST)
    future = datetime.now(UTC) + timedelta(days=1)
    await store.keep(OTHER, LATEST, Dates(future, future))
    assert store.disputed(LATEST)
    pulling = pull(cache)
    await asked(upstreams, 1)
    upstreams[0].answer(IMAGE.digest)
    assert await pulling == FoundManifest(IMAGE, CacheStatus.HIT)
    assert not store.disputed(LATEST)
    by_digest = f"{LATEST.repository}@{OTHER.digest}"
    entry = store.entry(OTHER.digest)
    assert entry is not None
    assert entry.images.keys() == {by_digest}


@pytest.mark.parametrize("url", ["reg.example/team/app:1", "reg.example/team/app:latest-1", "@"])
@on_reactor
async def test_other_references_are_not_checked(
    cache: PullThrough, upstreams: MemoryRegistries, store: Store, url: str
) -> None:
    url = f"{LATEST.repository}@{IMAGE.digest}" if url == "@" else url
    await store.keep(IMAGE, image(url))
    assert await manifest_of(cache, url) == FoundManifest(IMAGE, CacheStatus.HIT)
    assert len(upstreams) == 0


@pytest.mark.parametrize("policy", [Policy(), Policy(air_gapped=True), Policy(True, True)])
@on_reactor
async def test_no_check_without_option_or_when_air_gapped(
    store: Store, upstreams: MemoryRegistries, clock: Clock, policy: Policy
) -> None:
    await store.keep(IMAGE, LATEST)
    cache = PullThrough(store, upstreams, clock, policy)
    assert await pull(cache) == FoundManifest(IMAGE, CacheStatus.HIT)
    assert len(upstreams) == 0


@on_reactor
async def test_disallowed_upstream_is_denied(store: Store, clock: Clock) -> None:
    await store.keep(IMAGE, LATEST)
    upstreams = MemoryRegistries("else.example")
    with pytest.raises(Denied):
        await pull(PullThrough(store, upstreams, clock, Policy(always_pull_latest=True)))
    assert len(upstreams) == 0


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@on_reactor
async def test_unchecked_response_has_a_warning_header(
    cache: PullThrough, upstreams: MemoryRegistries, store: Store, clock: Clock, method: str
) -> None:
    await store.keep(IMAGE, LATEST)
    v2 = V2(cache, Listings(store, upstreams, clock), NoDemand(), Upstream("docker.io"), INSTANCE)
    for count, error in enumerate((None, *ERRORS), 1):
        asking = ask(v2, "/v2/team/app/manifests/latest", method=method)
        await asked(upstreams, count)
        if error is None:
            upstreams[-1].answer(IMAGE.digest)
        else:
            upstreams[-1].refuse(error)
        answer = await asking
        assert (answer.status, answer.headers["Docker-Content-Digest"]) == (200, IMAGE.digest)
        assert answer.headers.get("Warning") == ('110 - "Response is Stale"' if error else None)


@on_reactor
async def test_check_that_waits_for_the_cache_that_asks_is_told(
    cache: PullThrough, upstreams: MemoryRegistries, store: Store
) -> None:
    """Otherwise both would wait for 5 s, and serve the image unchecked."""
    await store.keep(IMAGE, LATEST)
    via = "ociregistry-fedcba9876543210"
    client = pull(cache)
    await until(lambda: len(upstreams))
    peer = Deferred.fromCoroutine(cache.manifest(LATEST, Context(Via((via,)))))
    await until(lambda: len(upstreams) == 2)
    upstreams[1].answer(LoopDetected("reg.example: a loop", f"1.1 {via}"))
    with pytest.raises(LoopDetected):
        await peer
    upstreams[0].answer(IMAGE.digest)
    assert (await client).cache_status.is_hit


@on_reactor
async def test_host_that_is_silent_is_waited_for_only_until_it_counts_as_down(
    cache: PullThrough, upstreams: MemoryRegistries, store: Store, clock: Clock
) -> None:
    """The check goes on; clients that come meanwhile get the image at once."""
    await store.keep(IMAGE, LATEST)
    client = pull(cache)
    await until(lambda: len(upstreams))
    host = Host(clock)
    host.down(upstreams[0])
    assert (await client).cache_status is CacheStatus.STALE
    assert (await pull(cache)).cache_status is CacheStatus.STALE
    assert len(upstreams) == 1
    host.breaker.answered()
    late = pull(cache)
    await waiting_for_check(cache, 1)
    upstreams[0].answer(IMAGE.digest)
    assert (await late).cache_status is CacheStatus.HIT
