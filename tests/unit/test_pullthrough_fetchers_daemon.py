"""Fetchers while a daemon runs on the store: the daemon pulls, stored content is not requested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionLost
from twisted.internet.task import Clock

from ociregistry.errors import BlobUnknown, Denied, ManifestUnknown, RegistryError, Unavailable
from ociregistry.names import Digest
from ociregistry.pullthrough.cache import FoundManifest
from ociregistry.pullthrough.loader import LoadStatus
from ociregistry.pullthrough.waiting import CacheStatus
from ociregistry.store.store import Store
from tests.unit.support.bodies import connected, end
from tests.unit.support.common import on_reactor, until
from tests.unit.support.daemon_clients import APP, BUILT, DATA, IMAGE, LAYER, DaemonFetcherHarness
from tests.unit.support.loads import Loads, image_of, index_of, settle


@pytest.fixture
def harness(store: Store, root: Path, clock: Clock) -> DaemonFetcherHarness:
    """Return a fetcher with a daemon on the store."""
    return DaemonFetcherHarness(store, root, clock)


@on_reactor
async def test_stored_manifest_is_not_requested(harness: DaemonFetcherHarness, store: Store) -> None:
    await store.keep(IMAGE, APP)
    assert await harness.manifest() == FoundManifest(IMAGE, CacheStatus.HIT)
    assert harness.asked == []


@on_reactor
async def test_manifest_through_the_daemon(harness: DaemonFetcherHarness) -> None:
    waiting = harness.manifest()
    (await harness.call(1)).answer(IMAGE)
    assert await waiting == FoundManifest(IMAGE, CacheStatus.MISS)
    assert harness.asked == [f"manifest {APP}"]


@pytest.mark.parametrize("error", [ManifestUnknown("not there"), Denied("not allowed"), Unavailable("down")])
@on_reactor
async def test_daemon_error_is_passed_on(harness: DaemonFetcherHarness, error: RegistryError) -> None:
    waiting: list[Deferred[Any]] = [harness.manifest(), harness.blob()]
    for call in (await harness.call(2), harness.daemon.calls[0]):
        call.refuse(error)
    for one in waiting:
        with pytest.raises(type(error)) as failed:
            await one
        assert failed.value is error
    assert len(harness.asked) == 2


@on_reactor
async def test_slow_manifest_is_requested_again_until_the_timeout(
    harness: DaemonFetcherHarness, clock: Clock
) -> None:
    waiting = harness.manifest()
    for count in (1, 2, 3):
        call = await harness.call(count)
        assert not waiting.called
        clock.advance(25)
        call.refuse(Unavailable("the upstream gave no answer within 25 s"))
    with pytest.raises(Unavailable, match="no answer within 25 s"):
        await waiting
    waiting = harness.manifest()
    call = await harness.call(4)
    clock.advance(25)
    call.refuse(Unavailable("no answer"))
    (await harness.call(5)).answer(IMAGE)
    assert (await waiting).manifest == IMAGE


@on_reactor
async def test_referrers(harness: DaemonFetcherHarness) -> None:
    index = index_of((image_of(b"{}"), ""))
    for count, (answer, expected) in enumerate([(index, index), (ManifestUnknown("none"), None)], 1):
        waiting = Deferred.fromCoroutine(harness.fetcher.referrers(APP.repository, IMAGE.digest))
        call = await harness.call(count)
        call.refuse(answer) if isinstance(answer, Exception) else call.answer(answer)
        assert await waiting == expected
    waiting = Deferred.fromCoroutine(harness.fetcher.referrers(APP.repository, IMAGE.digest))
    (await harness.call(3)).refuse(Unavailable("down"))
    with pytest.raises(Unavailable, match="down"):
        await waiting


@on_reactor
async def test_blob_progress_then_wait_until_stored(harness: DaemonFetcherHarness) -> None:
    waiting = harness.blob()
    body, _ = await harness.respond(1, DATA[:1000])
    body.dataReceived(DATA[1000:])
    end(body)
    await until(lambda: sum(harness.advance) == len(DATA))
    await harness.scan_without_result(waiting)
    harness.store_blob()
    await harness.wait_until_done(waiting)
    await waiting
    assert harness.advance == [1000, len(DATA) - 1000]
    assert harness.asked == [f"blob {APP.repository} {LAYER} 0"]


@on_reactor
async def test_partly_stored_blob_is_awaited(harness: DaemonFetcherHarness) -> None:
    waiting = harness.blob()
    body, _ = await harness.respond(1, DATA)
    end(body)
    harness.store_blob(data=DATA[:-1])
    await harness.scan_without_result(waiting)
    harness.store_blob()
    await harness.wait_until_done(waiting)
    await waiting


@on_reactor
async def test_blob_not_stored_in_time(harness: DaemonFetcherHarness) -> None:
    waiting = harness.blob()
    body, _ = await harness.respond(1, DATA)
    end(body)
    await harness.wait_until_done(waiting)
    with pytest.raises(
        Unavailable, match=f"^{APP.repository}@{LAYER}: the daemon did not store it; its log says why"
    ):
        await waiting
    assert harness.clock.seconds() == pytest.approx(60, abs=1)


@on_reactor
async def test_empty_blob_is_requested(harness: DaemonFetcherHarness) -> None:
    empty = Digest.of(b"")
    waiting = harness.blob(empty, 0)
    body, _ = await harness.respond(1, b"")
    end(body)
    harness.store_blob(empty, b"")
    await harness.wait_until_done(waiting)
    await waiting
    assert (harness.asked, harness.advance) == ([f"blob {APP.repository} {empty} 0"], [])


@on_reactor
async def test_stalled_blob_is_resumed(harness: DaemonFetcherHarness) -> None:
    waiting = harness.blob()
    body, _ = await harness.respond(1, DATA[:1000])
    # A slow upstream of the daemon: after ten seconds the connection ends, but the daemon is asked again.
    harness.clock.advance(10)
    end(body, ConnectionLost())
    body, _ = await harness.respond(2, b"")
    harness.clock.advance(10)
    end(body, ConnectionLost())
    body, _ = await harness.respond(3, DATA[1000:])
    end(body)
    harness.store_blob()
    await harness.wait_until_done(waiting)
    await waiting
    assert [words.rpartition(" ")[2] for words in harness.asked] == ["0", "1000", "1000"]
    assert sum(harness.advance) == len(DATA)


@on_reactor
async def test_progress_restarts_the_idle_timeout(harness: DaemonFetcherHarness) -> None:
    waiting = harness.blob()
    for count in range(1, 8):
        body, _ = await harness.respond(count, DATA[count : count + 1])
        harness.clock.advance(50)
        end(body, ConnectionLost())
    body, _ = await harness.respond(8, b"")
    harness.clock.advance(9)
    end(body, ConnectionLost())
    body, _ = await harness.respond(9, b"")
    harness.clock.advance(9)
    end(body, ConnectionLost())
    with pytest.raises(Unavailable):
        await waiting
    assert len(harness.asked) == 9


@on_reactor
async def test_blob_without_progress_fails_after_the_timeout(harness: DaemonFetcherHarness) -> None:
    waiting = harness.blob()
    body, _ = await harness.respond(1, DATA[:1000])
    end(body, ConnectionLost())
    body, _ = await harness.respond(2, b"")
    harness.clock.advance(7.9)
    end(body, ConnectionLost())
    with pytest.raises(Unavailable):
        await waiting
    assert len(harness.asked) == 2


@on_reactor
async def test_blob_unknown_on_resume(harness: DaemonFetcherHarness) -> None:
    waiting = harness.blob()
    body, _ = await harness.respond(1, DATA[:1000])
    end(body, ConnectionLost())
    (await harness.call(2)).refuse(BlobUnknown("the upstream answered 404"))
    with pytest.raises(BlobUnknown, match="the upstream answered 404"):
        await waiting


@on_reactor
async def test_cancelling_closes_the_connection(harness: DaemonFetcherHarness) -> None:
    waiting = harness.blob()
    _, connection = await harness.respond(1, DATA[:1000])
    waiting.cancel()
    with pytest.raises(CancelledError):
        await waiting
    assert connection.closed


@on_reactor
async def test_image_is_loaded_through_the_daemon(harness: DaemonFetcherHarness, store: Store) -> None:
    loads = Loads(store, harness.fetcher)
    config = BUILT.blobs[0]
    # Another process has just written the blob; no record known to this process names it.
    harness.store_blob(Digest(config.digest), config.data)
    loading = loads.load(str(APP))
    (await harness.call(1)).answer(IMAGE)
    body, _ = connected()
    (await harness.call(2)).answer(body)
    body.dataReceived(DATA)
    end(body)
    harness.store_blob()
    await until(lambda: loads.progress.received[str(APP)] == len(DATA))
    while not loading.called:
        await settle(store)
        harness.clock.advance(0.5)
    (outcome,) = await loading
    assert (outcome.ended, outcome.blobs, outcome.bytes) == (LoadStatus.LOADED, 1, len(DATA))
    assert harness.asked == [f"manifest {APP}", f"blob {APP.repository} {LAYER} 0"]
