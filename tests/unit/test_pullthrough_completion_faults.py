"""Completion across restarts, removed records, disk failures and defects."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.errors import Unavailable
from ociregistry.names import Digest, Repository, Upstream
from ociregistry.platforms import Platform
from ociregistry.pullthrough.cache import PullThrough
from ociregistry.pullthrough.completion import Completion, CompletionPolicy, Incomplete
from ociregistry.pullthrough.demand import Demand
from ociregistry.pullthrough.listings import Listings
from ociregistry.store.store import Store
from ociregistry.store.workdir import PendingFiles
from ociregistry.web.api import V2
from tests.unit.support.common import on_reactor, record, texts, turn, until
from tests.unit.support.completions import (
    APP,
    CONFIG,
    DATA,
    ELSEWHERE,
    IMAGE,
    LARGE,
    OTHER,
    SMALL,
    FakeBlobFetcher,
    pending,
    pulled,
)
from tests.unit.support.http_agents import INSTANCE
from tests.unit.support.registries import MemoryRegistries, downloads_ended
from tests.unit.test_web_api import ask

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@on_reactor
async def test_pending_images_are_resumed_at_start(
    store: Store, blob_fetcher: FakeBlobFetcher, clock: Clock, root: Path
) -> None:
    await store.keep(IMAGE, APP)
    await store.add_pending(IMAGE.digest, APP.repository)
    completion = Completion(store, blob_fetcher, clock)
    assert completion.incomplete.images == 1
    completion.startService()
    for blob in (CONFIG, SMALL, LARGE):
        await blob_fetcher.bring(blob)
    await until(lambda: not pending(root))
    completion.stopService()


@on_reactor
async def test_stop_keeps_the_rest_for_the_next_start(
    completion: Completion, store: Store, blob_fetcher: FakeBlobFetcher, clock: Clock, root: Path
) -> None:
    await pulled(completion, store)
    await blob_fetcher.bring(CONFIG)
    await until(lambda: len(blob_fetcher.asked) == 2)
    completion.stopService()
    assert blob_fetcher.cancelled == 1
    assert pending(root) == [IMAGE.digest.hex]
    again = Completion(store, blob_fetcher, clock)
    again.startService()
    for blob in (SMALL, LARGE):
        await blob_fetcher.bring(blob)
    await until(lambda: not pending(root))
    again.stopService()


@pytest.mark.parametrize("started", [True, False])
def test_stop_when_idle_leaves_no_delayed_call(
    store: Store, blob_fetcher: FakeBlobFetcher, clock: Clock, started: bool
) -> None:
    looking = list(clock.getDelayedCalls())
    completion = Completion(store, blob_fetcher, clock)
    if started:
        completion.startService()
    completion.stopService()
    assert clock.getDelayedCalls() == looking


@on_reactor
async def test_pending_image_without_record_is_dropped(
    store: Store, blob_fetcher: FakeBlobFetcher, clock: Clock, root: Path
) -> None:
    await store.keep(IMAGE, APP)
    await store.add_pending(IMAGE.digest, APP.repository)
    record(root, IMAGE.digest).unlink()
    assert await store.manifest(APP) is None
    completion = Completion(store, blob_fetcher, clock)
    completion.startService()
    await until(lambda: not pending(root))
    assert (blob_fetcher.asked, completion.incomplete) == ([], Incomplete(0, 0))
    completion.stopService()


def failing(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this operation on pending files fail with a full disk."""

    def fail(*arguments: object) -> NoReturn:
        raise FULL

    monkeypatch.setattr(PendingFiles, function, fail)


@on_reactor
async def test_unwritable_pending_file_is_one_log_line_and_image_is_completed(
    completion: Completion,
    store: Store,
    blob_fetcher: FakeBlobFetcher,
    root: Path,
    events: list[LogEvent],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failing("write", monkeypatch)
    await pulled(completion, store)
    assert texts(events, LogLevel.error) == [
        f"cannot record that {IMAGE.digest} is incomplete: No space left on device"
    ]
    for blob in (CONFIG, SMALL, LARGE):
        await blob_fetcher.bring(blob)
    await until(lambda: not store.pending)


@on_reactor
async def test_unremovable_pending_file_is_one_log_line(
    completion: Completion,
    store: Store,
    blob_fetcher: FakeBlobFetcher,
    events: list[LogEvent],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failing("remove", monkeypatch)
    blob_fetcher.put(CONFIG)
    blob_fetcher.put(LARGE)
    await pulled(completion, store)
    await blob_fetcher.bring(SMALL)
    await until(lambda: texts(events, LogLevel.error))
    assert texts(events, LogLevel.error) == [
        f"cannot remove the pending image {IMAGE.digest}: No space left on device"
    ]
    await pulled(completion, store, OTHER, str(ELSEWHERE))
    await until(lambda: len(blob_fetcher.asked) == 2)


DEFECTS = [ZeroDivisionError(), PermissionError(errno.EACCES, os.strerror(errno.EACCES))]
NEXT = f"{APP.repository.upstream}/next:1"
"""Of the same upstream."""


@pytest.mark.expect_logged_failures
@pytest.mark.parametrize("error", DEFECTS)
@on_reactor
async def test_defect_does_not_stop_completion(
    completion: Completion, store: Store, blob_fetcher: FakeBlobFetcher, events: list[LogEvent], error: Exception
) -> None:
    await pulled(completion, store)
    await blob_fetcher.refuse(error, 1)
    await turn()
    assert len([event for event in events if event["log_level"] >= LogLevel.error]) == 1
    await pulled(completion, store, OTHER, NEXT)
    await until(lambda: len(blob_fetcher.asked) > 1)


@pytest.mark.expect_logged_failures
@pytest.mark.parametrize("error", DEFECTS)
@on_reactor
async def test_image_is_retried_after_a_defect(
    completion: Completion, store: Store, blob_fetcher: FakeBlobFetcher, clock: Clock, error: Exception
) -> None:
    await pulled(completion, store)
    await blob_fetcher.refuse(error, 1)
    await turn()
    clock.advance(30)
    await pulled(completion, store)
    await until(lambda: len(blob_fetcher.asked) > 1)


@on_reactor
async def test_image_added_meanwhile_is_next(
    completion: Completion, store: Store, blob_fetcher: FakeBlobFetcher, root: Path
) -> None:
    await pulled(completion, store)
    await until(lambda: blob_fetcher.asked)
    await pulled(completion, store, OTHER, NEXT)
    for blob in (CONFIG, SMALL, LARGE):
        await blob_fetcher.bring(blob)
    await until(lambda: pending(root) == [OTHER.digest.hex])
    # No time passes.
    await until(lambda: len(blob_fetcher.asked) == 4)


@on_reactor
async def test_upstreams_are_completed_in_parallel(
    completion: Completion, store: Store, blob_fetcher: FakeBlobFetcher
) -> None:
    await pulled(completion, store)
    await until(lambda: blob_fetcher.asked)
    await pulled(completion, store, OTHER, str(ELSEWHERE))
    await until(lambda: len(blob_fetcher.asked) == 2)


# With the cache


@on_reactor
async def test_client_and_completion_share_a_download(
    store: Store, cache: PullThrough, upstreams: MemoryRegistries, clock: Clock, root: Path
) -> None:
    completion = Completion(store, cache.fetch, clock)
    completion.startService()
    await pulled(completion, store)
    await until(lambda: len(upstreams) == 1)
    assert upstreams.asked == [f"blob {APP.repository} {CONFIG}"]
    # The client requests the large blob, which then goes first.
    asked = Deferred.fromCoroutine(cache.blob(APP.repository, LARGE))
    await until(lambda: len(upstreams) == 2)
    large = upstreams[1].stream(len(DATA[LARGE]))
    content = (await asked).content
    upstreams[0].stream(len(DATA[CONFIG])).send(DATA[CONFIG]).end()
    await until(lambda: cache._scheduler._changed._waiting)
    assert len(upstreams) == 2
    large.send(DATA[LARGE]).end()
    await content.more_than(content.size - 1)
    content.close()
    await until(lambda: len(upstreams) == 3)
    upstreams[2].stream(len(DATA[SMALL])).send(DATA[SMALL]).end()
    await until(lambda: not pending(root))
    assert upstreams.asked[2] == f"blob {APP.repository} {SMALL}"
    await downloads_ended(cache)
    completion.stopService()


@on_reactor
async def test_present_blob_is_not_fetched(
    cache: PullThrough, upstreams: MemoryRegistries, store: Store, root: Path
) -> None:
    await store.keep(IMAGE, APP)
    (root / "blobs" / SMALL.hex).write_bytes(DATA[SMALL])
    await cache.fetch(APP.repository, SMALL)
    assert len(upstreams) == 0


@on_reactor
async def test_fetch_failure_is_raised_and_not_logged(
    cache: PullThrough, upstreams: MemoryRegistries, events: list[LogEvent]
) -> None:
    fetched = Deferred.fromCoroutine(cache.fetch(APP.repository, SMALL))
    await until(lambda: upstreams.calls)
    upstreams[0].refuse(Unavailable("down"))
    with pytest.raises(Unavailable, match="down"):
        await fetched
    assert texts(events, LogLevel.error) == []


class PendingImages(Completion):
    """Keep the images that are added, and optionally fail."""

    def __init__(self) -> None:
        self.pending: list[tuple[Digest, Repository]] = []
        self.error: Exception | None = None
        self._policy = CompletionPolicy()

    def lacks_nothing(self, digest: Digest) -> bool:
        """Tell that nothing is known."""
        return False

    async def complete(self, digest: Digest, repository: Repository, *, hit: bool = True) -> None:
        """Record the call and fail if `error` is set."""
        self.pending.append((digest, repository))
        if self.error is not None:
            raise self.error


@pytest.mark.expect_logged_failures
@on_reactor
async def test_manifest_request_adds_the_image(
    store: Store, cache: PullThrough, upstreams: MemoryRegistries, clock: Clock
) -> None:
    pending_images = PendingImages()
    demand = Demand(store, pending_images, Platform("linux", "amd64"), clock)
    v2 = V2(cache, Listings(store, upstreams, clock), demand, Upstream("docker.io"), INSTANCE)

    await store.keep(IMAGE, APP)
    path = "/v2/team/app/manifests/1"
    assert (await ask(v2, path, method="HEAD")).status == 200
    assert pending_images.pending == []
    # A failure of it does not affect the client.
    pending_images.error = ZeroDivisionError()
    assert (await ask(v2, path)).status == 200
    assert pending_images.pending == [(IMAGE.digest, APP.repository)]
