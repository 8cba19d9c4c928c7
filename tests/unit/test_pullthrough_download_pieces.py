"""A download writes what arrived while the disk was busy at once, and shows each byte as soon as it is written."""

from __future__ import annotations

import threading
from collections.abc import Callable

from twisted.internet.task import Clock

from ociregistry.pullthrough.cache import PullThrough
from ociregistry.store.files import Files, SharedFile
from ociregistry.store.store import Store
from tests.unit.support.common import on_reactor, until
from tests.unit.support.registries import MemoryRegistries, downloads_ended
from tests.unit.test_pullthrough_cache_stop import stop
from tests.unit.test_pullthrough_download import DATA, begin, read_all

MIB = 1024 * 1024


class Gate(Files):
    """A disk that writes blobs only once it is `opened`, and keeps what it was given to write."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.given: list[bytes] = []

    def write(self, file: SharedFile, data: bytes, offset: int) -> None:
        if data[:1] != b"{":
            self.given.append(data)
            assert self.opened.wait(60)
        super().write(file, data, offset)


@on_reactor
async def test_pieces_received_during_a_write_are_written_in_one_job(
    open_store: Callable[..., Store], upstreams: MemoryRegistries, clock: Clock
) -> None:
    disk = Gate()
    cache = PullThrough(open_store(files=disk), upstreams, clock)
    content, sending = await begin(cache, upstreams)
    pieces = [DATA[start : start + 1000] for start in range(0, len(DATA), 1000)]
    sending.send(pieces[0])
    await until(lambda: disk.given)
    for piece in pieces[1:]:
        sending.send(piece)
    sending.end()
    assert disk.given == pieces[:1]
    lengths: list[int] = []
    grown = content.more_than(0).addCallback(lengths.append)
    disk.opened.set()
    await grown
    await content.more_than(1000)
    # A reader is woken once for each job, however many pieces it has.
    assert lengths == [1000]
    assert await content.more_than(1000) >= len(DATA) - 1
    assert await read_all(content) == DATA
    # They are written as they were received, not copied.
    assert [id(piece) for piece in disk.given] == [id(piece) for piece in pieces]
    content.close()
    await downloads_ended(cache)


@on_reactor
async def test_memory_is_bounded_while_the_disk_hangs(
    open_store: Callable[..., Store], upstreams: MemoryRegistries, clock: Clock
) -> None:
    disk = Gate()
    cache = PullThrough(open_store(files=disk), upstreams, clock)
    content, sending = await begin(cache, upstreams, 100 * MIB)
    sent = 0
    while not sending.connection.paused:
        sending.send(bytes(MIB - 1))
        sent += MIB - 1
        await until(lambda: disk.given)
    # The first piece is being written; less than 2 MiB are unread.
    assert sent == 3 * (MIB - 1)
    disk.opened.set()
    await content.more_than(sent - 1)
    assert not sending.connection.paused
    content.close()
    await stop(cache, clock)


@on_reactor
async def test_each_byte_of_a_slow_upstream_is_readable_at_once(
    cache: PullThrough, upstreams: MemoryRegistries
) -> None:
    content, sending = await begin(cache, upstreams)
    for at in range(50):
        waiting = content.more_than(at)
        sending.send(DATA[at : at + 1])
        assert await waiting == at + 1
        assert await content.read(at, 10) == DATA[at : at + 1]
    sending.send(DATA[50:]).end()
    assert await read_all(content) == DATA
    content.close()
