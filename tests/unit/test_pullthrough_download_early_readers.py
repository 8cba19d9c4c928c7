"""Early responses: a blob of known size is opened after ten seconds, even while the upstream does not answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionLost
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.context import Priority
from ociregistry.errors import BlobUnknown, RegistryError, Unavailable
from ociregistry.pullthrough.cache import Content, FoundBlob, PullThrough
from ociregistry.store.store import Store
from tests.unit.support.common import manifest, on_reactor, open_descriptors, texts, turn, until
from tests.unit.support.registries import MemoryRegistries, downloads_ended
from tests.unit.test_pullthrough_cache_stop import stop
from tests.unit.test_pullthrough_download import (
    APP,
    BUILT,
    DATA,
    DIGEST,
    SIZE,
    blobs,
    failure,
    get,
    partials,
    read_all,
)
from tests.unit.test_pullthrough_download_resume import ASKED, again, leave

GONE = BlobUnknown("reg.example: it answered 404")
ELSEWHERE = "else.example/team/app"


async def request_known_blob(cache: PullThrough, store: Store, upstreams: MemoryRegistries) -> Deferred[FoundBlob]:
    """Request the blob, whose size is known from a manifest, and wait for the upstream request."""
    if store.size_in(APP.repository, DIGEST) is None:
        await store.keep(manifest(BUILT), APP)
    before = len(upstreams)
    asked = get(cache)
    await until(lambda: len(upstreams) > before)
    return asked


async def opened_early(cache: PullThrough, store: Store, upstreams: MemoryRegistries, clock: Clock) -> Content:
    """Return the content opened before the upstream answered."""
    asked = await request_known_blob(cache, store, upstreams)
    clock.advance(9.875)
    await turn()
    assert not asked.called
    clock.advance(0.125)
    assert asked.called
    found = await asked
    assert (found.cache_status.is_hit, found.content.size) == (False, SIZE)
    return found.content


@on_reactor
async def test_blob_is_opened_after_ten_seconds_and_streamed_later(
    cache: PullThrough, store: Store, upstreams: MemoryRegistries, clock: Clock, root: Path
) -> None:
    content = await opened_early(cache, store, upstreams, clock)
    waiting = content.more_than(0)
    clock.advance(1000)
    assert not waiting.called
    sending = upstreams[0].stream(SIZE).send(DATA[:1000])
    assert await waiting == 1000
    assert await content.read(0, 1000) == DATA[:1000]
    sending.send(DATA[1000:]).end()
    assert await read_all(content) == DATA
    content.close()
    await downloads_ended(cache)
    assert (blobs(root), partials(root), upstreams.asked) == ([DATA], [], [ASKED])


@on_reactor
async def test_blob_of_unknown_size_waits_for_the_deadline(
    cache: PullThrough, upstreams: MemoryRegistries, clock: Clock
) -> None:
    asked = get(cache)
    await until(lambda: upstreams.calls)
    clock.advance(24.875)
    await turn()
    assert not asked.called
    clock.advance(0.125)
    with pytest.raises(Unavailable, match="no answer within 25 s"):
        await asked


@on_reactor
async def test_each_client_waits_ten_seconds(
    cache: PullThrough, store: Store, upstreams: MemoryRegistries, clock: Clock
) -> None:
    first = await request_known_blob(cache, store, upstreams)
    clock.advance(5)
    second = get(cache)
    await until(lambda: len(upstreams) == 1 and next(iter(cache.in_flight.values()))._connections._watchers == 2)
    clock.advance(5)
    assert (first.called, second.called) == (True, False)
    clock.advance(5)
    upstreams[0].stream(SIZE).send(DATA).end()
    for one in (first, second):
        content = (await one).content
        assert await read_all(content) == DATA
        content.close()
    await downloads_ended(cache)


@on_reactor
async def test_404_ends_early_reader_and_is_cached_for_a_minute(
    cache: PullThrough, store: Store, upstreams: MemoryRegistries, clock: Clock, events: list[LogEvent]
) -> None:
    content = await opened_early(cache, store, upstreams, clock)
    waiting = content.more_than(0)
    upstreams[0].refuse(GONE)
    with pytest.raises(BlobUnknown, match="it answered 404"):
        await waiting
    content.close()
    # The code that sends to the client logs it.
    assert texts(events, LogLevel.error) == []
    clock.advance(59.875)
    with pytest.raises(BlobUnknown, match="it answered 404"):
        await get(cache)
    assert len(upstreams) == 1
    elsewhere = get(cache, ELSEWHERE)
    await until(lambda: len(upstreams) == 2)
    upstreams[1].refuse(GONE)
    with pytest.raises(BlobUnknown):
        await elsewhere
    clock.advance(0.125)
    asked = get(cache)
    await again(upstreams, clock, 3)
    upstreams[2].stream(SIZE).send(DATA).end()
    content = (await asked).content
    assert await read_all(content) == DATA
    content.close()
    await downloads_ended(cache)


@pytest.mark.parametrize("error", [GONE, Unavailable("down")])
@on_reactor
async def test_404_without_early_reader_is_not_cached(
    cache: PullThrough, store: Store, upstreams: MemoryRegistries, error: RegistryError
) -> None:
    for count in (1, 2):
        asked = await request_known_blob(cache, store, upstreams)
        upstreams[-1].refuse(error)
        with pytest.raises(type(error)):
            await asked
        assert len(upstreams) == count


@on_reactor
async def test_unreachable_upstream_is_retried_for_early_readers(
    cache: PullThrough, store: Store, upstreams: MemoryRegistries, clock: Clock
) -> None:
    content = await opened_early(cache, store, upstreams, clock)
    waiting = content.more_than(0)
    for count in range(1, 10):
        upstreams[-1].refuse(Unavailable("down"))
        clock.advance(5)
        await again(upstreams, clock, count + 1)
        assert upstreams[-1].context.priority is Priority.URGENT
        assert upstreams[-1].timeout == 10
    assert not waiting.called
    upstreams[-1].stream(SIZE).send(DATA).end()
    assert await read_all(content) == DATA
    content.close()
    await downloads_ended(cache)


@on_reactor
async def test_retries_end_when_the_early_reader_leaves(
    cache: PullThrough, store: Store, upstreams: MemoryRegistries, clock: Clock, events: list[LogEvent]
) -> None:
    content = await opened_early(cache, store, upstreams, clock)
    content.close()
    clock.advance(300)
    upstreams[0].refuse(Unavailable("reg.example: down"))
    await downloads_ended(cache)
    assert texts(events, LogLevel.error) == ["reg.example: down"]
    assert len(upstreams) == 1
    # The failure is not cached for the blob.
    asked = await request_known_blob(cache, store, upstreams)
    upstreams[1].refuse(Unavailable("still"))
    with pytest.raises(Unavailable, match="still"):
        await asked


@on_reactor
async def test_404_on_retry_ends_early_reader(
    cache: PullThrough, store: Store, upstreams: MemoryRegistries, clock: Clock
) -> None:
    content = await opened_early(cache, store, upstreams, clock)
    upstreams[0].refuse(Unavailable("down"))
    await again(upstreams, clock, 2)
    upstreams[1].refuse(GONE)
    for waiting in (content.more_than(0), get(cache)):
        with pytest.raises(BlobUnknown):
            await waiting
    content.close()


@pytest.mark.parametrize("tries", [1, 2])
@on_reactor
async def test_size_mismatch_ends_early_reader(
    cache: PullThrough, store: Store, upstreams: MemoryRegistries, clock: Clock, root: Path, tries: int
) -> None:
    content = await opened_early(cache, store, upstreams, clock)
    if tries == 2:
        upstreams[0].refuse(Unavailable("down"))
        await again(upstreams, clock, 2)
    other = upstreams[-1].stream(SIZE + 1)
    assert f"{SIZE + 1} bytes" in (await failure(content, 0)).message
    assert other.connection.closed
    content.close()
    assert blobs(root) == []


@on_reactor
async def test_wrong_bytes_are_never_complete(
    cache: PullThrough, store: Store, upstreams: MemoryRegistries, clock: Clock
) -> None:
    content = await opened_early(cache, store, upstreams, clock)
    upstreams[0].stream(SIZE).send(DATA[:-1] + b"\xff").end()
    assert "digest" in (await failure(content, SIZE - 1)).message
    content.close()


@on_reactor
async def test_blob_finished_before_first_read(
    cache: PullThrough, store: Store, upstreams: MemoryRegistries, clock: Clock
) -> None:
    before = open_descriptors()
    content = await opened_early(cache, store, upstreams, clock)
    upstreams[0].stream(SIZE).send(DATA).end()
    await downloads_ended(cache)
    assert await content.more_than(SIZE - 1) == SIZE
    assert await read_all(content) == DATA
    content.close()
    await until(lambda: open_descriptors() <= before)


@pytest.mark.parametrize("late", [False, True])
@on_reactor
async def test_disconnected_early_reader_holds_no_file(
    cache: PullThrough, store: Store, upstreams: MemoryRegistries, clock: Clock, root: Path, late: bool
) -> None:
    before = open_descriptors()
    content = await opened_early(cache, store, upstreams, clock)
    if not late:
        content.close()
    sending = upstreams[0].stream(SIZE).send(DATA[:1000])
    if late:
        await content.more_than(0)
        content.close()
    sending.send(DATA[1000:]).end()
    await downloads_ended(cache)
    assert blobs(root) == [DATA]
    await until(lambda: open_descriptors() <= before)


@on_reactor
async def test_early_reader_resumes_partial_of_earlier_process(
    cache: PullThrough, store: Store, upstreams: MemoryRegistries, clock: Clock
) -> None:
    await leave(store, DATA[:5000])
    content = await opened_early(cache, store, upstreams, clock)
    assert upstreams.asked == [f"{ASKED} from 5000"]
    upstreams[0].refuse(Unavailable("down"))
    await again(upstreams, clock, 2)
    assert upstreams.asked[1] == f"{ASKED} from 5000"
    sending = upstreams[1].stream(SIZE, 5000)
    assert await content.more_than(0) == 5000
    sending.send(DATA[5000:7000]).end(ConnectionLost())
    await again(upstreams, clock, 3)
    upstreams[2].stream(SIZE, 7000).send(DATA[7000:]).end()
    assert await read_all(content) == DATA
    content.close()
    await downloads_ended(cache)


@on_reactor
async def test_stop_ends_early_reader(
    cache: PullThrough, store: Store, upstreams: MemoryRegistries, clock: Clock
) -> None:
    content = await opened_early(cache, store, upstreams, clock)
    waiting = content.more_than(0)
    await stop(cache, clock)
    with pytest.raises(Unavailable, match="stopping"):
        await waiting
    content.close()


@on_reactor
async def test_last_byte_of_a_download_of_unknown_size_waits_for_the_digest(
    cache: PullThrough, store: Store, upstreams: MemoryRegistries, clock: Clock
) -> None:
    """The download began before a manifest told the size, which a later client knows."""
    first = get(cache)
    first.addErrback(lambda failure: failure.trap(RegistryError))
    await until(lambda: upstreams)
    sending = upstreams[0].stream(None)
    await store.keep(manifest(BUILT), APP)
    asked = get(cache)
    (download,) = cache.in_flight.values()
    await until(lambda: download.clients == 2)
    clock.advance(10)
    content = (await asked).content
    assert content.size == SIZE
    sending.send(bytes(SIZE))
    assert await content.more_than(0) == SIZE - 1
    last = content.more_than(SIZE - 1)
    sending.send(bytes(SIZE))
    await turn()
    assert not last.called
    sending.end()
    with pytest.raises(RegistryError):
        await last
    content.close()


@on_reactor
async def test_reader_that_expects_another_size_gets_no_last_byte(
    cache: PullThrough, upstreams: MemoryRegistries
) -> None:
    first = get(cache)
    await until(lambda: upstreams)
    sending = upstreams[0].stream(None)
    (download,) = cache.in_flight.values()
    readers = [download.early_reader(size) for size in (SIZE - 1, SIZE + 1)]
    sending.send(DATA).end()
    for reader in readers:
        with pytest.raises(RegistryError, match=f"the blob has {SIZE} bytes, expected {reader.size}"):
            await reader.more_than(SIZE - 2)
        reader.close()
    content = (await first).content
    assert await read_all(content) == DATA
    content.close()
