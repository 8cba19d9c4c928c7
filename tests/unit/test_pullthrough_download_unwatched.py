"""Unwatched downloads of unknown size end, because the body may be endless."""

from __future__ import annotations

from pathlib import Path

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

import ociregistry.pullthrough.transfer
from ociregistry.errors import Unavailable
from ociregistry.names import Digest
from ociregistry.pullthrough.cache import PullThrough
from ociregistry.store.partials import Partial
from ociregistry.store.store import Store
from tests.unit.support.common import manifest, on_reactor, texts, until
from tests.unit.support.registries import MemoryRegistries, downloads_ended
from tests.unit.test_pullthrough_download import (
    APP,
    BUILT,
    DATA,
    DIGEST,
    SIZE,
    WHERE,
    begin,
    blobs,
    get,
    partial_sizes,
    read_all,
)

ENDS = f"{WHERE}: download abandoned, no client is waiting and no manifest gives its size"


@on_reactor
async def test_unwatched_download_ends_and_partial_is_kept(
    cache: PullThrough, upstreams: MemoryRegistries, clock: Clock, root: Path, events: list[LogEvent]
) -> None:
    content, sending = await begin(cache, upstreams)
    sending.send(DATA[:1000])
    clock.advance(3600)
    await content.more_than(999)
    content.close()
    clock.advance(29)
    sending.send(DATA[1000:2000])
    await until(lambda: cache.in_flight[DIGEST].length == 2000)
    assert not sending.connection.closed
    clock.advance(1)
    sending.send(DATA[2000:3000])
    await downloads_ended(cache)
    assert sending.connection.closed
    assert texts(events, LogLevel.warn) == [ENDS]
    assert texts(events, LogLevel.error) == []
    assert partial_sizes(root) == [3000]
    asked = get(cache)
    await until(lambda: len(upstreams) == 2)
    assert upstreams.asked[1] == f"blob {APP.repository} {DIGEST} from 3000"
    upstreams[1].stream(SIZE, 3000).send(DATA[3000:]).end()
    content = (await asked).content
    assert await read_all(content) == DATA
    content.close()
    await downloads_ended(cache)
    assert blobs(root) == [DATA]


@on_reactor
async def test_returning_client_keeps_it_alive(cache: PullThrough, upstreams: MemoryRegistries, clock: Clock) -> None:
    content, sending = await begin(cache, upstreams)
    sending.send(DATA[:1000])
    content.close()
    clock.advance(20)
    content = (await get(cache)).content
    clock.advance(20)
    sending.send(DATA[1000:]).end()
    assert await read_all(content) == DATA
    content.close()
    assert len(upstreams) == 1


@on_reactor
async def test_background_fetch_keeps_it_alive(
    cache: PullThrough, upstreams: MemoryRegistries, clock: Clock, root: Path
) -> None:
    fetching = Deferred.fromCoroutine(cache.fetch(APP.repository, DIGEST))
    await until(lambda: upstreams.calls)
    sending = upstreams[0].stream(SIZE).send(DATA[:1000])
    await until(lambda: partial_sizes(root) == [1000])
    clock.advance(3600)
    sending.send(DATA[1000:]).end()
    await fetching
    assert blobs(root) == [DATA]


@on_reactor
async def test_known_size_keeps_it_alive(
    cache: PullThrough, upstreams: MemoryRegistries, store: Store, clock: Clock, root: Path
) -> None:
    await store.keep(manifest(BUILT), APP)
    content, sending = await begin(cache, upstreams)
    content.close()
    clock.advance(3600)
    sending.send(DATA[:1000])
    await until(lambda: partial_sizes(root) == [1000])
    clock.advance(3600)
    sending.send(DATA[1000:]).end()
    await downloads_ended(cache)
    assert blobs(root) == [DATA]


@on_reactor
async def test_broken_unwatched_download_is_not_resumed(
    cache: PullThrough, upstreams: MemoryRegistries, clock: Clock, root: Path
) -> None:
    content, sending = await begin(cache, upstreams)
    sending.send(DATA[:1000])
    await content.more_than(999)
    content.close()
    clock.advance(30)
    sending.end(ConnectionError())
    await downloads_ended(cache)
    assert len(upstreams) == 1
    assert partial_sizes(root) == [1000]


@on_reactor
async def test_paused_unwatched_download_ends(
    cache: PullThrough, upstreams: MemoryRegistries, clock: Clock, root: Path
) -> None:
    content, sending = await begin(cache, upstreams)
    content.close()
    first = Deferred.fromCoroutine(cache.blob(APP.repository, Digest.of(b"other")))
    await until(lambda: len(upstreams) == 2)
    other = upstreams[1].stream(5).send(b"o")
    followed = (await first).content
    sending.send(DATA[:1000])
    await until(lambda: partial_sizes(root) == [1000])
    clock.advance(30)
    other.send(b"ther").end()
    await followed.more_than(4)
    followed.close()
    await downloads_ended(cache)
    assert sending.connection.closed
    assert partial_sizes(root) == [1000]


@on_reactor
async def test_client_joining_while_it_ends_gets_a_new_connection(
    cache: PullThrough, upstreams: MemoryRegistries, clock: Clock, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The partial is being synced then; the client must not wait for bytes that never arrive."""
    content, sending = await begin(cache, upstreams)
    content.close()
    synced: Deferred[None] = Deferred()
    syncing: list[Partial] = []

    def sync(partial: Partial) -> Deferred[None]:
        syncing.append(partial)
        monkeypatch.undo()
        return synced

    monkeypatch.setattr(Partial, "sync", sync)
    clock.advance(31)
    sending.send(DATA[:1000])
    await until(lambda: syncing)
    asked = get(cache)
    waiting = [asked, get(cache)]
    synced.callback(None)
    await until(lambda: len(upstreams) == 2)
    upstreams[1].stream(SIZE, 1000).send(DATA[1000:]).end()
    for one in waiting:
        content = (await one).content
        assert await read_all(content) == DATA
        content.close()
    assert len(upstreams) == 2


@on_reactor
async def test_size_of_unsized_download_is_limited(
    cache: PullThrough, upstreams: MemoryRegistries, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ociregistry.pullthrough.transfer, "_LARGEST_UNKNOWN", 50_000)
    asked = get(cache)
    await until(lambda: upstreams.calls)
    sending = upstreams[0].stream(None).send(DATA[:50_000])
    await until(lambda: partial_sizes(root) == [50_000])
    sending.send(b"x")
    with pytest.raises(Unavailable, match="sent more than 50000 bytes"):
        await asked
    await downloads_ended(cache)
    assert sending.connection.closed
    assert partial_sizes(root) == []
