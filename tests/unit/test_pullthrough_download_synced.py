"""What has come of a blob is synced in time, however it came: a power cut loses no more than the last of it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

import ociregistry.store.partials
import ociregistry.store.store
from ociregistry.pullthrough.cache import Content, PullThrough
from ociregistry.store.files import Files, SharedFile
from ociregistry.store.partials import Note
from ociregistry.store.paths import note_path
from ociregistry.store.store import Store
from tests.unit.support.common import on_reactor, turn, until
from tests.unit.support.power_cuts import InlineThreads
from tests.unit.support.registries import MemoryRegistries, Sending, downloads_ended
from tests.unit.test_pullthrough_cache_stop import stop
from tests.unit.test_pullthrough_download import DATA, DIGEST, begin, read_all


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sync after 1,000 bytes instead of 64 MiB."""
    monkeypatch.setattr(ociregistry.store.partials, "_SYNC_BYTES", 1000)


class SlowDisk(Files):
    """A disk whose syncs of a download's bytes wait while it is `busy`."""

    def __init__(self) -> None:
        self.syncs = 0
        """The number of syncs that have begun."""
        self._answers = threading.Event()
        self._answers.set()

    def busy(self) -> None:
        """Let the syncs wait from now on."""
        self._answers.clear()

    def answer(self) -> None:
        """Let them end."""
        self._answers.set()

    def sync_data(self, file: SharedFile) -> None:
        self.syncs += 1
        assert self._answers.wait(10)
        super().sync_data(file)


@pytest.fixture
def disk() -> SlowDisk:
    """The disk of `slow`, which is not busy yet."""
    return SlowDisk()


@pytest.fixture
def slow(open_store: Callable[..., Store], disk: SlowDisk, upstreams: MemoryRegistries, clock: Clock) -> PullThrough:
    """Return a cache whose store is on `disk`."""
    return PullThrough(open_store(files=disk), upstreams, clock)


def durable(root: Path) -> int:
    """Return how many bytes the note of the partial says are on disk."""
    (path,) = (root / "pulls").rglob(DIGEST.hex)
    note = Note.parse(note_path(path).read_bytes())
    assert note is not None
    return note.durable


async def synced(root: Path, clock: Clock, count: int) -> None:
    """Advance the clock by seconds until `count` bytes are on disk."""

    def are() -> bool:
        clock.advance(1)
        return durable(root) == count

    await until(are)


async def begin_with(cache: PullThrough, upstreams: MemoryRegistries, count: int) -> tuple[Content, Sending]:
    """Begin a download, of which `count` bytes have come."""
    content, sending = await begin(cache, upstreams)
    await bring(content, sending, 0, count)
    return content, sending


async def bring(content: Content, sending: Sending, start: int, stop: int) -> None:
    """Send these bytes of the blob; return when the client can read them."""
    sending.send(DATA[start:stop])
    await content.more_than(stop - 1)


@on_reactor
async def test_bytes_that_arrived_at_once_are_synced_though_no_more_come(
    cache: PullThrough, upstreams: MemoryRegistries, clock: Clock, root: Path
) -> None:
    content, _sending = await begin_with(cache, upstreams, 50_000)
    assert durable(root) == 0
    clock.advance(1)
    await until(lambda: durable(root) == 50_000)
    content.close()
    await stop(cache, clock)


@on_reactor
async def test_syncs_are_a_second_apart(
    open_store: Callable[..., Store],
    disk: SlowDisk,
    upstreams: MemoryRegistries,
    clock: Clock,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They hold up the writes."""
    monkeypatch.setattr(ociregistry.store.store, "Threads", InlineThreads)
    cache = PullThrough(open_store(files=disk), upstreams, clock)
    content, sending = await begin(cache, upstreams)
    for second in range(3):
        for piece in range(second * 10, second * 10 + 10):
            assert disk.syncs == second
            await bring(content, sending, piece * 2000, piece * 2000 + 2000)
            clock.advance(0.1)
        clock.advance(0.001)
        assert (disk.syncs, durable(root)) == (second + 1, second * 20_000 + 20_000)
    content.close()
    await stop(cache, clock)


@on_reactor
async def test_a_few_bytes_are_synced_after_half_a_minute_though_no_more_come(
    cache: PullThrough, upstreams: MemoryRegistries, clock: Clock, root: Path
) -> None:
    content, _sending = await begin_with(cache, upstreams, 500)
    for _ in range(30):
        clock.advance(1)
        await turn()
    assert durable(root) == 0
    clock.advance(1)
    await until(lambda: durable(root) == 500)
    content.close()
    await stop(cache, clock)


@on_reactor
async def test_bytes_that_arrived_during_a_sync_are_synced_though_no_more_come(
    disk: SlowDisk, slow: PullThrough, upstreams: MemoryRegistries, clock: Clock, root: Path
) -> None:
    disk.busy()
    content, sending = await begin_with(slow, upstreams, 2000)
    clock.advance(1)
    await until(lambda: disk.syncs)
    await bring(content, sending, 2000, 50_000)
    for _ in range(3):
        clock.advance(1)
        await turn()
    # Never two at once.
    assert disk.syncs == 1
    disk.answer()
    await synced(root, clock, 50_000)
    content.close()
    await stop(slow, clock)


@on_reactor
async def test_last_note_of_a_stop_waits_for_a_sync_that_runs(
    disk: SlowDisk, slow: PullThrough, upstreams: MemoryRegistries, clock: Clock, root: Path
) -> None:
    """Otherwise the two would take the note's temporary file from each other, and a reboot lose what came."""
    disk.busy()
    content, sending = await begin_with(slow, upstreams, 2000)
    clock.advance(1)
    await bring(content, sending, 2000, 50_000)
    await until(lambda: disk.syncs)
    content.close()
    stopping = Deferred.fromCoroutine(stop(slow, clock))
    for _ in range(20):
        await turn()
    disk.answer()
    await stopping
    assert durable(root) == 50_000


@on_reactor
async def test_stop_syncs_nothing_twice(
    disk: SlowDisk, slow: PullThrough, upstreams: MemoryRegistries, clock: Clock, root: Path
) -> None:
    """A slow disk would take twice as long as a stop waits."""
    disk.busy()
    content, _sending = await begin_with(slow, upstreams, 50_000)
    clock.advance(1)
    await until(lambda: disk.syncs)
    content.close()
    stopping = Deferred.fromCoroutine(stop(slow, clock))
    await turn()
    disk.answer()
    await stopping
    assert (disk.syncs, durable(root)) == (1, 50_000)


class Scarce(Files):
    """A process without a descriptor for a note, while it is `full`."""

    full = failed = False

    def put(self, target: Path, data: bytes, temporary: Path) -> None:
        if self.full:
            self.failed = True
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        super().put(target, data, temporary)


@on_reactor
async def test_note_without_a_descriptor_is_written_later(
    open_store: Callable[..., Store], upstreams: MemoryRegistries, clock: Clock, root: Path
) -> None:
    """The bytes are on disk, so the download goes on."""
    disk = Scarce()
    cache = PullThrough(open_store(files=disk), upstreams, clock)
    disk.full = True
    content, sending = await begin_with(cache, upstreams, 2000)
    clock.advance(1)
    await until(lambda: disk.failed)
    await bring(content, sending, 2000, 4000)
    await bring(content, sending, 4000, 50_000)
    assert durable(root) == 0
    disk.full = False
    await synced(root, clock, 50_000)
    sending.send(DATA[50_000:]).end()
    assert await read_all(content) == DATA
    content.close()
    await downloads_ended(cache)


@on_reactor
async def test_note_of_another_partial_is_left_alone(
    disk: SlowDisk, slow: PullThrough, upstreams: MemoryRegistries, clock: Clock, root: Path
) -> None:
    """In a store that was replaced, it would promise bytes that were never synced."""
    content, _sending = await begin_with(slow, upstreams, 2000)
    (path,) = (root / "pulls").rglob(DIGEST.hex)
    note = Note(0, Files().boot(), len(DATA), "another")
    path.rename(root / "moved")
    path.write_bytes(DATA[:10])
    note_path(path).write_bytes(note.render())
    clock.advance(1)
    await until(lambda: disk.syncs)
    content.close()
    await stop(slow, clock)
    assert Note.parse(note_path(path).read_bytes()) == note
    assert path.read_bytes() == DATA[:10]
