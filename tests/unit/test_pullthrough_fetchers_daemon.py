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
from ociregistry.store.store import Store
from tests.unit.support.bodies import connected, end
from tests.unit.support.daemon_clients import APP, BUILT, DATA, IMAGE, LAYER, Scene
from tests.unit.support.doubles import on_reactor, until
from tests.unit.support.loads import Loads, image_of, index_of, settle


@pytest.fixture
def scene(store: Store, root: Path, clock: Clock) -> Scene:
    """Return a fetcher with a daemon on the store."""
    return Scene(store, root, clock)


@on_reactor
async def test_stored_manifest_is_not_requested(scene: Scene, store: Store) -> None:
    await store.keep(IMAGE, APP)
    assert await scene.manifest() == FoundManifest(IMAGE, hit=True)
    assert scene.asked == []


@on_reactor
async def test_manifest_through_the_daemon(scene: Scene) -> None:
    waiting = scene.manifest()
    (await scene.call(1)).answer(IMAGE)
    assert await waiting == FoundManifest(IMAGE, hit=False)
    assert scene.asked == [f"manifest {APP}"]


@pytest.mark.parametrize("error", [ManifestUnknown("not there"), Denied("not allowed"), Unavailable("down")])
@on_reactor
async def test_daemon_error_is_passed_on(scene: Scene, error: RegistryError) -> None:
    waiting: list[Deferred[Any]] = [scene.manifest(), scene.blob()]
    for call in (await scene.call(2), scene.daemon.calls[0]):
        call.refuse(error)
    for one in waiting:
        with pytest.raises(type(error)) as failed:
            await one
        assert failed.value is error
    assert len(scene.asked) == 2


@on_reactor
async def test_slow_manifest_is_requested_again_until_the_timeout(scene: Scene, clock: Clock) -> None:
    waiting = scene.manifest()
    for count in (1, 2, 3):
        call = await scene.call(count)
        assert not waiting.called
        clock.advance(25)
        call.refuse(Unavailable("the upstream gave no answer within 25 s"))
    with pytest.raises(Unavailable, match="no answer within 25 s"):
        await waiting
    waiting = scene.manifest()
    call = await scene.call(4)
    clock.advance(25)
    call.refuse(Unavailable("no answer"))
    (await scene.call(5)).answer(IMAGE)
    assert (await waiting).manifest == IMAGE


@on_reactor
async def test_referrers(scene: Scene) -> None:
    index = index_of((image_of(b"{}"), ""))
    for count, (answer, expected) in enumerate([(index, index), (ManifestUnknown("none"), None)], 1):
        waiting = Deferred.fromCoroutine(scene.fetcher.referrers(APP.repository, IMAGE.digest))
        call = await scene.call(count)
        call.refuse(answer) if isinstance(answer, Exception) else call.answer(answer)
        assert await waiting == expected
    waiting = Deferred.fromCoroutine(scene.fetcher.referrers(APP.repository, IMAGE.digest))
    (await scene.call(3)).refuse(Unavailable("down"))
    with pytest.raises(Unavailable, match="down"):
        await waiting


@on_reactor
async def test_blob_progress_then_wait_until_stored(scene: Scene) -> None:
    waiting = scene.blob()
    body, _ = await scene.sends(1, DATA[:1000])
    body.dataReceived(DATA[1000:])
    end(body)
    await until(lambda: sum(scene.advance) == len(DATA))
    await scene.looks_on(waiting)
    scene.stores()
    await scene.looks(waiting)
    await waiting
    assert scene.advance == [1000, len(DATA) - 1000]
    assert scene.asked == [f"blob {APP.repository} {LAYER} 0"]


@on_reactor
async def test_partly_stored_blob_is_awaited(scene: Scene) -> None:
    waiting = scene.blob()
    body, _ = await scene.sends(1, DATA)
    end(body)
    scene.stores(data=DATA[:-1])
    await scene.looks_on(waiting)
    scene.stores()
    await scene.looks(waiting)
    await waiting


@on_reactor
async def test_blob_not_stored_in_time(scene: Scene) -> None:
    waiting = scene.blob()
    body, _ = await scene.sends(1, DATA)
    end(body)
    await scene.looks(waiting)
    with pytest.raises(
        Unavailable, match=f"^{APP.repository}@{LAYER}: the daemon did not store it; its log says why"
    ):
        await waiting
    assert scene.clock.seconds() == pytest.approx(60, abs=1)


@on_reactor
async def test_empty_blob_is_requested(scene: Scene) -> None:
    empty = Digest.of(b"")
    waiting = scene.blob(empty, 0)
    body, _ = await scene.sends(1, b"")
    end(body)
    scene.stores(empty, b"")
    await scene.looks(waiting)
    await waiting
    assert (scene.asked, scene.advance) == ([f"blob {APP.repository} {empty} 0"], [])


@on_reactor
async def test_stalled_blob_is_resumed(scene: Scene) -> None:
    waiting = scene.blob()
    body, _ = await scene.sends(1, DATA[:1000])
    # A slow upstream of the daemon: after ten seconds the connection ends, but the daemon is asked again.
    scene.clock.advance(10)
    end(body, ConnectionLost())
    body, _ = await scene.sends(2, b"")
    scene.clock.advance(10)
    end(body, ConnectionLost())
    body, _ = await scene.sends(3, DATA[1000:])
    end(body)
    scene.stores()
    await scene.looks(waiting)
    await waiting
    assert [words.rpartition(" ")[2] for words in scene.asked] == ["0", "1000", "1000"]
    assert sum(scene.advance) == len(DATA)


@on_reactor
async def test_progress_restarts_the_idle_timeout(scene: Scene) -> None:
    waiting = scene.blob()
    for count in range(1, 8):
        body, _ = await scene.sends(count, DATA[count : count + 1])
        scene.clock.advance(50)
        end(body, ConnectionLost())
    body, _ = await scene.sends(8, b"")
    scene.clock.advance(9)
    end(body, ConnectionLost())
    body, _ = await scene.sends(9, b"")
    scene.clock.advance(9)
    end(body, ConnectionLost())
    with pytest.raises(Unavailable):
        await waiting
    assert len(scene.asked) == 9


@on_reactor
async def test_blob_without_progress_fails_after_the_timeout(scene: Scene) -> None:
    waiting = scene.blob()
    body, _ = await scene.sends(1, DATA[:1000])
    end(body, ConnectionLost())
    body, _ = await scene.sends(2, b"")
    scene.clock.advance(7.9)
    end(body, ConnectionLost())
    with pytest.raises(Unavailable):
        await waiting
    assert len(scene.asked) == 2


@on_reactor
async def test_blob_unknown_on_resume(scene: Scene) -> None:
    waiting = scene.blob()
    body, _ = await scene.sends(1, DATA[:1000])
    end(body, ConnectionLost())
    (await scene.call(2)).refuse(BlobUnknown("the upstream answered 404"))
    with pytest.raises(BlobUnknown, match="the upstream answered 404"):
        await waiting


@on_reactor
async def test_cancelling_closes_the_connection(scene: Scene) -> None:
    waiting = scene.blob()
    _, connection = await scene.sends(1, DATA[:1000])
    waiting.cancel()
    with pytest.raises(CancelledError):
        await waiting
    assert connection.closed


@on_reactor
async def test_image_is_loaded_through_the_daemon(scene: Scene, store: Store) -> None:
    loads = Loads(store, scene.fetcher)
    config = BUILT.blobs[0]
    # Another process has just written the blob; no record known to this process names it.
    scene.stores(Digest(config.digest), config.data)
    loading = loads.load(str(APP))
    (await scene.call(1)).answer(IMAGE)
    body, _ = connected()
    (await scene.call(2)).answer(body)
    body.dataReceived(DATA)
    end(body)
    scene.stores()
    await until(lambda: loads.told.came_of[str(APP)] == len(DATA))
    while not loading.called:
        await settle(store)
        scene.clock.advance(0.5)
    (outcome,) = await loading
    assert (outcome.ended, outcome.blobs, outcome.bytes) == (LoadStatus.LOADED, 1, len(DATA))
    assert scene.asked == [f"manifest {APP}", f"blob {APP.repository} {LAYER} 0"]
