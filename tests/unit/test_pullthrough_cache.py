"""The pull-through cache: hits need no network, concurrent misses share one fetch, waits are bounded."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.errors import BlobUnknown, Denied, ManifestUnknown, RegistryError, Unavailable
from ociregistry.names import Digest
from ociregistry.pullthrough.cache import FoundBlob, FoundManifest, FoundSize, PullThrough
from ociregistry.pullthrough.waiting import CacheStatus
from ociregistry.store.blobs import StoredBlob
from ociregistry.store.files import Files, SharedFile
from ociregistry.store.lookups import Counts
from ociregistry.store.store import Store
from tests.images import make_image
from tests.unit.support.common import failed, image, manifest, on_reactor, texts, until
from tests.unit.support.registries import MemoryRegistries, downloads_ended

BUILT = make_image("cache")
IMAGE, OTHER = manifest(BUILT), manifest(make_image("other"))
DATA = BUILT.layers[0].data
DIGEST = Digest(BUILT.layers[0].digest)
APP, ELSEWHERE = image("reg.example/team/app:1"), image("else.example/team/app:1")


def manifest_of(cache: PullThrough, url: str = str(APP)) -> Deferred[FoundManifest]:
    """Request a manifest."""
    return Deferred.fromCoroutine(cache.manifest(image(url)))


def blob_of(cache: PullThrough, url: str = str(APP)) -> Deferred[FoundBlob]:
    """Request the blob."""
    return Deferred.fromCoroutine(cache.blob(image(url).repository, DIGEST))


def size_of(cache: PullThrough, url: str = str(APP)) -> Deferred[FoundSize]:
    """Request the size of the blob."""
    return Deferred.fromCoroutine(cache.blob_size(image(url).repository, DIGEST))


ASKS: tuple[Callable[[PullThrough], Deferred[Any]], ...] = (manifest_of, blob_of, size_of)


async def asked(upstreams: MemoryRegistries, count: int = 1) -> None:
    """Wait until `count` requests have been sent."""
    await until(lambda: len(upstreams) >= count)
    assert len(upstreams) == count


def put_blob(root: Path) -> None:
    """Write the blob into the store."""
    (root / "blobs" / DIGEST.hex).write_bytes(DATA)


APP_BY_DIGEST = image(f"reg.example/team/app@{IMAGE.digest}")
ONE_OF_THREE = (CacheStatus.MISS, CacheStatus.SHARED, CacheStatus.SHARED)
"""Of clients that ask for the same at the same time."""


@on_reactor
async def test_manifest_is_fetched_once_and_stored(
    store: Store, cache: PullThrough, upstreams: MemoryRegistries, events: list[LogEvent]
) -> None:
    waiting = [manifest_of(cache) for _ in range(3)]
    await asked(upstreams)
    upstreams[0].answer(IMAGE)
    assert [await one for one in waiting] == [FoundManifest(IMAGE, status) for status in ONE_OF_THREE]
    assert await manifest_of(cache) == FoundManifest(IMAGE, CacheStatus.HIT)
    assert await manifest_of(cache, f"reg.example/team/app@{IMAGE.digest}") == FoundManifest(IMAGE, CacheStatus.HIT)
    assert upstreams.asked == [f"manifest {APP}"]
    assert store.counts == Counts(lists=0, images=1)
    assert texts(events, LogLevel.debug)[:2] == [
        f"pulling manifest from upstream: {APP}",
        f"serving manifest from cache: {APP}",
    ]


@on_reactor
async def test_cached_tag_is_not_checked(cache: PullThrough, upstreams: MemoryRegistries, store: Store) -> None:
    await store.keep(IMAGE, APP)
    for _ in range(2):
        assert (await manifest_of(cache)).manifest == IMAGE
    assert len(upstreams) == 0


@pytest.mark.parametrize("error", [ManifestUnknown("not there"), Unavailable("down", 77)])
@on_reactor
async def test_failed_manifest_fetch_reaches_all_waiters(
    cache: PullThrough, upstreams: MemoryRegistries, error: RegistryError
) -> None:
    waiting = [manifest_of(cache) for _ in range(2)]
    await asked(upstreams)
    upstreams[0].refuse(error)
    for one in waiting:
        with pytest.raises(type(error)) as failed:
            await one
        assert failed.value is error
    # The failure is not cached.
    again = manifest_of(cache)
    await asked(upstreams, 2)
    upstreams[1].answer(IMAGE)
    assert (await again).manifest == IMAGE


@on_reactor
async def test_manifest_that_cannot_be_stored_is_not_served(
    cache: PullThrough, upstreams: MemoryRegistries, root: Path
) -> None:
    waiting = manifest_of(cache)
    await asked(upstreams)
    (root / "img").rmdir()
    upstreams[0].answer(IMAGE)
    with pytest.raises(Unavailable, match=f"^{APP}: cannot be stored: "):
        await waiting
    (root / "img").mkdir()


@on_reactor
async def test_blob_is_fetched_once_for_all_repositories(
    cache: PullThrough, upstreams: MemoryRegistries, lookups: list[Digest]
) -> None:
    waiting = [blob_of(cache), blob_of(cache), blob_of(cache, str(ELSEWHERE))]
    await until(lambda: len(lookups) == 3)
    await asked(upstreams)
    upstreams[0].stream(len(DATA)).send(DATA).end()
    statuses = []
    for one in waiting:
        found = await one
        statuses.append(found.cache_status)
        assert await found.content.more_than(len(DATA) - 1) == len(DATA)
        assert await found.content.read(0, 10) == DATA[:10]
        found.content.close()
    assert sorted(status.value for status in statuses) == [status.value for status in ONE_OF_THREE]
    await downloads_ended(cache)
    found = await blob_of(cache, str(ELSEWHERE))
    assert (found.cache_status.is_hit, len(upstreams)) == (True, 1)
    found.content.close()


@on_reactor
async def test_client_that_joins_the_background_is_a_miss_and_the_next_one_shares(
    cache: PullThrough, upstreams: MemoryRegistries
) -> None:
    kept = Deferred.fromCoroutine(cache.fetch_manifest(APP_BY_DIGEST))
    await asked(upstreams)
    found = manifest_of(cache, str(APP_BY_DIGEST))
    upstreams[0].answer(IMAGE)
    await kept
    assert await found == FoundManifest(IMAGE, CacheStatus.MISS)
    fetched = Deferred.fromCoroutine(cache.fetch(APP.repository, DIGEST))
    await asked(upstreams, 2)
    sending = upstreams[1].stream(len(DATA)).send(DATA[:-1])
    blobs = [await blob_of(cache), await blob_of(cache)]
    assert [blob.cache_status for blob in blobs] == [CacheStatus.MISS, CacheStatus.SHARED]
    for blob in blobs:
        blob.content.close()
    # Nor does the one begin anew that comes when the first clients have gone.
    late = await blob_of(cache)
    assert late.cache_status is CacheStatus.SHARED
    late.content.close()
    sending.send(DATA[-1:]).end()
    await fetched


@pytest.mark.parametrize("error", [BlobUnknown("not there"), Unavailable("down")])
@on_reactor
async def test_blob_missing_in_one_repository_is_fetched_from_another(
    cache: PullThrough, upstreams: MemoryRegistries, error: RegistryError, lookups: list[Digest]
) -> None:
    first = blob_of(cache)
    await asked(upstreams)
    second = blob_of(cache, str(ELSEWHERE))
    await until(lambda: len(lookups) == 2)
    upstreams[0].refuse(error)
    with pytest.raises(type(error)):
        await first
    await asked(upstreams, 2)
    assert upstreams[1].what == f"{ELSEWHERE.repository} {DIGEST}"
    upstreams[1].stream(len(DATA)).send(DATA).end()
    found = await second
    assert await found.content.more_than(len(DATA) - 1) == len(DATA)
    found.content.close()
    await downloads_ended(cache)


@on_reactor
async def test_download_finished_during_lookup_is_a_hit(
    cache: PullThrough, upstreams: MemoryRegistries, store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = blob_of(cache)
    await asked(upstreams)
    looked: Deferred[None] = Deferred()
    really_look = store.blob

    async def look_slowly(digest: Digest) -> StoredBlob | None:
        found = await really_look(digest)
        monkeypatch.undo()
        await looked
        return found

    monkeypatch.setattr(store, "blob", look_slowly)
    second = blob_of(cache)
    upstreams[0].stream(len(DATA)).send(DATA).end()
    (await first).content.close()
    await downloads_ended(cache)
    looked.callback(None)
    found = await second
    assert (found.cache_status.is_hit, len(upstreams)) == (True, 1)
    found.content.close()


@on_reactor
async def test_blob_size(cache: PullThrough, upstreams: MemoryRegistries, lookups: list[Digest]) -> None:
    waiting = [size_of(cache), size_of(cache)]
    await until(lambda: len(lookups) == 2)
    await asked(upstreams)
    upstreams[0].answer(4711)
    statuses = [(await one).cache_status.value for one in waiting]
    assert sorted(statuses) == [status.value for status in ONE_OF_THREE[:2]]
    # The size of a blob in flight is known without a request.
    followed = blob_of(cache)
    await asked(upstreams, 2)
    sending = upstreams[1].stream(len(DATA))
    content = (await followed).content
    assert await size_of(cache) == FoundSize(len(DATA), CacheStatus.SHARED)
    sending.send(DATA).end()
    await content.more_than(len(DATA) - 1)
    content.close()
    await downloads_ended(cache)
    assert await size_of(cache) == FoundSize(len(DATA), CacheStatus.HIT)
    assert upstreams.asked == [f"blob_size {APP.repository} {DIGEST}", f"blob {APP.repository} {DIGEST}"]


@on_reactor
async def test_disallowed_upstream_is_denied_even_for_cached_content(store: Store, clock: Clock, root: Path) -> None:
    await store.keep(IMAGE, APP)
    put_blob(root)
    upstreams = MemoryRegistries("else.example")
    cache = PullThrough(store, upstreams, clock)
    for denied in (manifest_of(cache), blob_of(cache), size_of(cache)):
        with pytest.raises(Denied):
            await denied
    found = await blob_of(cache, str(ELSEWHERE))
    assert (found.cache_status.is_hit, len(upstreams)) == (True, 0)
    found.content.close()


@on_reactor
async def test_client_times_out_after_25_seconds_and_fetch_continues(
    store: Store, cache: PullThrough, upstreams: MemoryRegistries, clock: Clock, root: Path
) -> None:
    waiting: list[Deferred[Any]] = []
    for number, ask in enumerate(ASKS, 1):
        waiting.append(ask(cache))
        await asked(upstreams, number)
    clock.advance(24.9)
    assert not any(one.called for one in waiting)
    clock.advance(0.1)
    for late in waiting:
        with pytest.raises(Unavailable, match="no answer within 25 s"):
            await late
    upstreams[0].answer(IMAGE)
    upstreams[1].stream(len(DATA)).send(DATA).end()
    upstreams[2].answer(len(DATA))
    await until(lambda: store.counts.images == 1 and (root / "blobs" / DIGEST.hex).exists())
    await downloads_ended(cache)
    assert (await manifest_of(cache)).cache_status.is_hit
    found = await blob_of(cache)
    assert found.cache_status.is_hit
    found.content.close()
    assert len(upstreams) == 3


@on_reactor
async def test_each_client_has_its_own_deadline(
    cache: PullThrough, upstreams: MemoryRegistries, clock: Clock
) -> None:
    early = manifest_of(cache)
    await asked(upstreams)
    clock.advance(20)
    late = manifest_of(cache)
    clock.advance(5)
    with pytest.raises(Unavailable):
        await early
    clock.advance(10)
    assert not late.called
    upstreams[0].answer(IMAGE)
    assert (await late).manifest == IMAGE
    assert len(upstreams) == 1


@on_reactor
async def test_unawaited_late_failure_is_one_log_line(
    cache: PullThrough, upstreams: MemoryRegistries, clock: Clock, events: list[LogEvent]
) -> None:
    for number, ask in enumerate(ASKS, 1):
        late = ask(cache)
        await asked(upstreams, number)
        clock.advance(25)
        with pytest.raises(Unavailable):
            await late
    for number, call in enumerate(upstreams):
        call.refuse(Unavailable(f"down {number}"))
    assert texts(events, LogLevel.error) == ["down 0", "down 1", "down 2"]


@on_reactor
async def test_disk_that_does_not_finish_a_write_is_not_told_as_a_silent_upstream(
    cache: PullThrough, store: Store, upstreams: MemoryRegistries, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, released = threading.Event(), threading.Event()
    sync = Files.sync

    def hang(self: Files, file: SharedFile) -> None:
        began.set()
        released.wait()
        sync(self, file)

    monkeypatch.setattr(Files, "sync", hang)
    answer = manifest_of(cache)
    await asked(upstreams)
    upstreams[0].answer(IMAGE)
    try:
        await until(began.is_set)
        for _ in range(25):
            clock.advance(1)
        with pytest.raises(Unavailable, match="the upstream, or the disk, where a write takes long, gave no answer"):
            await answer
    finally:
        released.set()
    await until(lambda: store.counts.images == 1)


@pytest.mark.parametrize("ask", ASKS)
def test_client_is_answered_while_the_disk_does_not_answer(
    cache: PullThrough, store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch, ask: Callable[..., Deferred[Any]]
) -> None:
    async def never(wanted: object) -> None:
        await Deferred()

    monkeypatch.setattr(store, "manifest", never)
    monkeypatch.setattr(store, "blob", never)
    answer = ask(cache)
    clock.advance(25)
    assert not answer.called
    clock.advance(1)
    assert "the disk gave no answer within 25 s" in failed(answer, Unavailable).message
