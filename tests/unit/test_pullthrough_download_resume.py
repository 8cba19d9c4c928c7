"""Interrupted downloads resume at the byte where they broke."""

from __future__ import annotations

from pathlib import Path

import pytest
from twisted.internet.error import ConnectionLost
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.errors import BlobUnknown, Unavailable
from ociregistry.names import Digest
from ociregistry.pullthrough.cache import PullThrough
from ociregistry.store.store import Store
from tests.unit.support.common import manifest, on_reactor, texts, until
from tests.unit.support.registries import MemoryRegistries, downloads_ended
from tests.unit.test_pullthrough_download import (
    APP,
    BUILT,
    DATA,
    DIGEST,
    SIZE,
    begin,
    blobs,
    failure,
    get,
    partials,
    read_all,
)

ASKED = f"blob {APP.repository} {DIGEST}"


async def again(upstreams: MemoryRegistries, clock: Clock, count: int) -> None:
    """Wait until `count` requests have been sent, without advancing the clock."""

    def gone_out() -> bool:
        clock.advance(0)
        return len(upstreams) >= count

    await until(gone_out)
    assert len(upstreams) == count


@pytest.mark.parametrize("why", [ConnectionLost(), None])
@on_reactor
async def test_broken_download_is_resumed_with_range(
    cache: PullThrough, upstreams: MemoryRegistries, clock: Clock, why: Exception | None
) -> None:
    content, sending = await begin(cache, upstreams)
    sending.send(DATA[:1000])
    assert await content.more_than(0) == 1000
    waiting = content.more_than(1000)
    sending.end(why)
    await again(upstreams, clock, 2)
    assert upstreams.asked == [ASKED, f"{ASKED} from 1000"]
    upstreams[1].stream(SIZE, 1000).send(DATA[1000:]).end()
    assert await waiting > 1000
    assert await read_all(content) == DATA
    content.close()


@on_reactor
async def test_upstream_without_ranges_is_read_from_the_start(
    cache: PullThrough, upstreams: MemoryRegistries, clock: Clock
) -> None:
    content, sending = await begin(cache, upstreams)
    sending.send(DATA[:1000])
    await content.more_than(0)
    sending.end(ConnectionLost())
    await again(upstreams, clock, 2)
    sending = upstreams[1].stream(SIZE, 0)
    waiting = content.more_than(1000)
    for start in range(0, 1500, 300):
        assert not waiting.called
        sending.send(DATA[start : start + 300])
        await until(lambda: sending.body._received == [])
    assert await waiting <= 1500
    sending.send(DATA[1500:]).end()
    assert await read_all(content) == DATA
    content.close()


@on_reactor
async def test_watched_retries_are_at_most_five_seconds_apart(
    cache: PullThrough, upstreams: MemoryRegistries, clock: Clock
) -> None:
    content, sending = await begin(cache, upstreams)
    sending.send(DATA[:1000])
    await content.more_than(0)
    sending.end(ConnectionLost())
    await again(upstreams, clock, 2)
    for count in range(2, 30):
        upstreams[-1].refuse(Unavailable("down"))
        clock.advance(5)
        await again(upstreams, clock, count + 1)
    upstreams[-1].stream(SIZE, 1000).send(DATA[1000:]).end()
    assert await read_all(content) == DATA
    content.close()


@on_reactor
async def test_unwatched_download_ends_after_five_minutes_and_keeps_partial(
    cache: PullThrough, upstreams: MemoryRegistries, clock: Clock, events: list[LogEvent], root: Path
) -> None:
    content, sending = await begin(cache, upstreams)
    sending.send(DATA[:1000])
    await content.more_than(0)
    content.close()
    sending.end(ConnectionLost())
    await again(upstreams, clock, 2)
    clock.advance(300)
    upstreams[1].refuse(Unavailable("reg.example: down"))
    await until(lambda: texts(events, LogLevel.error))
    assert texts(events, LogLevel.error) == ["reg.example: down"]
    assert (root / "pulls" / "0" / DIGEST.hex).read_bytes() == DATA[:1000]
    asked = get(cache)
    await again(upstreams, clock, 3)
    assert upstreams.asked[2] == f"{ASKED} from 1000"
    upstreams[2].stream(SIZE, 1000).send(DATA[1000:]).end()
    content = (await asked).content
    assert await read_all(content) == DATA
    content.close()
    await downloads_ended(cache)
    assert (blobs(root), partials(root)) == ([DATA], [])


@on_reactor
async def test_404_on_resume_is_unknown_blob(cache: PullThrough, upstreams: MemoryRegistries, clock: Clock) -> None:
    content, sending = await begin(cache, upstreams)
    sending.end(ConnectionLost())
    waiting = content.more_than(0)
    await again(upstreams, clock, 2)
    upstreams[1].refuse(BlobUnknown("gone"))
    with pytest.raises(BlobUnknown, match="gone"):
        await waiting
    content.close()


@on_reactor
async def test_digest_mismatch_after_resume_restarts_once(
    cache: PullThrough, upstreams: MemoryRegistries, clock: Clock, root: Path
) -> None:
    content, sending = await begin(cache, upstreams)
    sending.send(b"\0" + DATA[1:1000])
    await content.more_than(0)
    sending.end(ConnectionLost())
    await again(upstreams, clock, 2)
    upstreams[1].stream(SIZE, 1000).send(DATA[1000:]).end()
    # Its reader received wrong bytes, but never gets the last one.
    assert "digest" in (await failure(content, SIZE - 1)).message
    assert await content.read(0, 1) == b"\0"
    content.close()
    await again(upstreams, clock, 3)
    assert upstreams.asked[2] == ASKED
    upstreams[2].stream(SIZE).send(DATA).end()
    await downloads_ended(cache)
    assert blobs(root) == [DATA]
    assert len(upstreams) == 3


@on_reactor
async def test_size_change_on_resume_restarts(
    cache: PullThrough, upstreams: MemoryRegistries, clock: Clock, root: Path
) -> None:
    content, sending = await begin(cache, upstreams)
    sending.send(DATA[:1000])
    await content.more_than(0)
    sending.end(ConnectionLost())
    await again(upstreams, clock, 2)
    other = upstreams[1].stream(SIZE + 1, 1000)
    assert f"has {SIZE + 1} bytes, expected {SIZE}" in (await failure(content, 1000)).message
    assert other.connection.closed
    content.close()
    await again(upstreams, clock, 3)
    upstreams[2].stream(SIZE).send(DATA).end()
    await downloads_ended(cache)
    assert blobs(root) == [DATA]


async def leave(store: Store, data: bytes, size: int | None = SIZE, *, mirrored: bool = False) -> None:
    """Leave the partial of a process that was killed after it received `data`, from the registry or a mirror."""
    partial = await store.new_partial(DIGEST, size, APP.repository, mirrored=mirrored)
    await partial.append(data)
    await partial.sync()
    partial.close()


@on_reactor
async def test_partial_of_earlier_process_is_resumed(
    cache: PullThrough, upstreams: MemoryRegistries, store: Store, clock: Clock
) -> None:
    await leave(store, DATA[:5000])
    asked = get(cache)
    await again(upstreams, clock, 1)
    assert upstreams.asked == [f"{ASKED} from 5000"]
    sending = upstreams[0].stream(SIZE, 5000)
    content = (await asked).content
    # It is served while it is being hashed again.
    assert await content.more_than(0) == 5000
    assert await content.read(0, 5000) == DATA[:5000]
    (download,) = cache.in_flight.values()
    assert (download.length, download.received) == (5000, 0)
    sending.send(DATA[5000:6000])
    await content.more_than(5999)
    assert (download.length, download.received) == (6000, 1000)
    sending.send(DATA[6000:]).end()
    assert await read_all(content) == DATA
    content.close()


@pytest.mark.parametrize("has_manifest", [False, True])
@on_reactor
async def test_complete_partial_needs_no_upstream(
    cache: PullThrough, upstreams: MemoryRegistries, store: Store, root: Path, has_manifest: bool
) -> None:
    """The process was killed before the commit. The size is in the note, and perhaps in a manifest too."""
    if has_manifest:
        await store.keep(manifest(BUILT), APP)
    await leave(store, DATA)
    asked = get(cache)
    await until(lambda: asked.called or upstreams.calls)
    assert upstreams.asked == []
    content = (await asked).content
    assert await read_all(content) == DATA
    content.close()
    await downloads_ended(cache)
    assert blobs(root) == [DATA]


@on_reactor
async def test_partial_of_another_size_is_discarded(
    cache: PullThrough, upstreams: MemoryRegistries, store: Store, clock: Clock
) -> None:
    await store.keep(manifest(BUILT), APP)
    await leave(store, DATA[:5000], SIZE + 7)
    asked = get(cache)
    await again(upstreams, clock, 1)
    assert upstreams.asked == [ASKED]
    upstreams[0].stream(SIZE).send(DATA).end()
    content = (await asked).content
    assert await read_all(content) == DATA
    content.close()
    assert Digest.of(DATA) == DIGEST
