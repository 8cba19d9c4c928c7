"""Where images come from while a daemon runs on the store: it pulls, and what is here already it is not asked for."""

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
    """A daemon runs on the store."""
    return Scene(store, root, clock)


@on_reactor
async def test_a_manifest_that_is_here_is_not_asked_for(scene: Scene, store: Store) -> None:
    await store.keep(IMAGE, APP)
    assert await scene.manifest() == FoundManifest(IMAGE, hit=True)
    assert scene.asked == []


@on_reactor
async def test_a_manifest_that_the_daemon_brings(scene: Scene) -> None:
    waiting = scene.manifest()
    (await scene.call(1)).answer(IMAGE)
    assert await waiting == FoundManifest(IMAGE, hit=False)
    assert scene.asked == [f"manifest {APP}"]


@pytest.mark.parametrize("error", [ManifestUnknown("not there"), Denied("not allowed"), Unavailable("down")])
@on_reactor
async def test_what_the_daemon_says_is_passed_on(scene: Scene, error: RegistryError) -> None:
    waiting: list[Deferred[Any]] = [scene.manifest(), scene.blob()]
    for call in (await scene.call(2), scene.daemon.calls[0]):
        call.refuse(error)
    for one in waiting:
        with pytest.raises(type(error)) as failed:
            await one
        assert failed.value is error
    assert len(scene.asked) == 2


@on_reactor
async def test_a_manifest_that_takes_long_is_asked_for_again_but_not_for_ever(scene: Scene, clock: Clock) -> None:
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
async def test_a_blob_is_told_of_as_it_comes_and_is_waited_for_until_it_is_stored(scene: Scene) -> None:
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
async def test_a_half_stored_blob_is_waited_for(scene: Scene) -> None:
    waiting = scene.blob()
    body, _ = await scene.sends(1, DATA)
    end(body)
    scene.stores(data=DATA[:-1])
    await scene.looks_on(waiting)
    scene.stores()
    await scene.looks(waiting)
    await waiting


@on_reactor
async def test_a_blob_that_the_daemon_does_not_store_in_time(scene: Scene) -> None:
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
async def test_an_empty_blob_is_asked_for_too(scene: Scene) -> None:
    empty = Digest.of(b"")
    waiting = scene.blob(empty, 0)
    body, _ = await scene.sends(1, b"")
    end(body)
    scene.stores(empty, b"")
    await scene.looks(waiting)
    await waiting
    assert (scene.asked, scene.advance) == ([f"blob {APP.repository} {empty} 0"], [])


@on_reactor
async def test_after_a_stall_it_goes_on_where_it_was(scene: Scene) -> None:
    waiting = scene.blob()
    body, _ = await scene.sends(1, DATA[:1000])
    # The upstream of the daemon is slow: after ten seconds this connection is given up, not the daemon.
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
async def test_what_comes_gives_patience_again(scene: Scene) -> None:
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
async def test_a_blob_of_which_nothing_comes_fails_at_once_when_the_daemon_ends_it_at_once(scene: Scene) -> None:
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
async def test_a_blob_that_the_daemon_finds_no_more_in_the_middle(scene: Scene) -> None:
    waiting = scene.blob()
    body, _ = await scene.sends(1, DATA[:1000])
    end(body, ConnectionLost())
    (await scene.call(2)).refuse(BlobUnknown("the upstream answered 404"))
    with pytest.raises(BlobUnknown, match="the upstream answered 404"):
        await waiting


@on_reactor
async def test_an_end_in_the_middle_closes_the_connection(scene: Scene) -> None:
    waiting = scene.blob()
    _, connection = await scene.sends(1, DATA[:1000])
    waiting.cancel()
    with pytest.raises(CancelledError):
        await waiting
    assert connection.closed


@on_reactor
async def test_an_image_comes_whole_through_the_daemon(scene: Scene, store: Store) -> None:
    loads = Loads(store, scene.fetcher)
    config = BUILT.blobs[0]
    # Another process wrote it a moment ago, and no record that is known here names it.
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
