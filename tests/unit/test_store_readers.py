"""Readers of a blob that is being downloaded: what came last is read from memory."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from twisted.internet.task import Clock

from ociregistry.names import Digest, Repository, Upstream
from ociregistry.store.readers import PartialReader, Tail
from ociregistry.store.smallblobs import LARGEST_SMALL
from ociregistry.store.sockets import MOST_PIECES
from ociregistry.store.store import Store
from tests.unit.support.common import on_reactor

DATA = bytes(range(256)) * 400
FIRST = 70_000
SOURCE = Repository(Upstream("reg.example"), "team/app")
ZEROS = bytes(len(DATA))

Read = Callable[[PartialReader, int, int], Awaitable[bytes]]


async def by_read(reader: PartialReader, offset: int, count: int) -> bytes:
    """Read bytes as the producer does for TLS."""
    return await reader.read(offset, count)


async def by_send(reader: PartialReader, offset: int, count: int) -> bytes:
    """Let the bytes be sent to a socket, and receive them."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sent = await reader.send(ours.fileno(), offset, count, in_thread=False)
        return theirs.recv(sent, socket.MSG_WAITALL)


@pytest.mark.parametrize("read", [by_read, by_send])
@on_reactor
async def test_what_was_appended_last_is_read_from_memory(store: Store, root: Path, read: Read) -> None:
    assert len(DATA) > LARGEST_SMALL
    partial = await store.new_partial(Digest.of(DATA), len(DATA), SOURCE)
    reader = partial.reader()
    await partial.append(DATA[:FIRST])
    await partial.append(DATA[FIRST:-9], DATA[-9:])
    [path] = (root / "pulls").rglob(Digest.of(DATA).hex)
    # The file no longer has the bytes, so that it shows from where they come.
    path.write_bytes(ZEROS)
    assert await read(reader, FIRST, 100) == DATA[FIRST : FIRST + 100]
    assert await read(reader, FIRST + 10, len(DATA)) == DATA[FIRST + 10 :]
    assert await read(reader, len(DATA) - 9, 100) == DATA[-9:]
    assert await read(reader, FIRST - 10, 10) == ZEROS[:10]
    await partial.verify()
    assert await read(reader, len(DATA) - 1, 1) == DATA[-1:]
    partial.close()
    assert await read(reader, FIRST, 100) == ZEROS[:100]
    reader.close()


@pytest.mark.parametrize("count", [1, 2, 4, 100])
def test_tail_has_what_was_appended_last(count: int) -> None:
    tail = Tail()
    tail.readers = 1
    assert not tail.at(0, count)
    for pieces in itertools.product((b"a", b"bcd"), (b"ef", b"ghijk"), (b"l",)):
        tail.replace(5, pieces)
        data = b"".join(pieces)
        found = {at: b"".join(tail.at(at, count)) for at in range(20)}
        assert found == {at: data[at - 5 :][:count] if at >= 5 else b"" for at in range(20)}
    tail.clear()
    assert not tail.at(5, count)


def test_tail_of_tiny_pieces_is_not_kept() -> None:
    tail = Tail()
    tail.readers = 1
    tail.replace(0, (b"a",) * MOST_PIECES)
    assert len(tail.at(0, 2 * MOST_PIECES)) == MOST_PIECES
    tail.replace(MOST_PIECES, (b"a",) * (MOST_PIECES + 1))
    assert not tail.at(0, 1)
    assert not tail.at(MOST_PIECES, 1)


@on_reactor
async def test_what_was_appended_last_is_kept_only_for_readers(store: Store, root: Path) -> None:
    partial = await store.new_partial(Digest.of(DATA), len(DATA), SOURCE)
    [path] = (root / "pulls").rglob(Digest.of(DATA).hex)

    async def append(data: bytes) -> bool:
        """Append, and return whether it is in memory afterwards, for a reader that comes then."""
        start = partial.length
        await partial.append(data)
        os.truncate(path, 0)
        os.truncate(path, partial.length)
        reader = partial.reader()
        try:
            return await reader.read(start, len(data)) == data
        finally:
            reader.close()

    assert not await append(b"a background download")
    first, second = partial.reader(), partial.reader()
    assert await append(b"for two")
    first.close()
    assert await append(b"for one")
    second.close()
    assert not await append(b"for none")
    partial.close()


@on_reactor
async def test_stalled_download_does_not_keep_what_was_appended_last(store: Store, root: Path) -> None:
    clock = Clock()
    partial = await store.new_partial(Digest.of(DATA), len(DATA), SOURCE)
    reader = partial.reader()
    for start in (0, FIRST):
        await partial.append(DATA[start : start + FIRST])
        [path] = (root / "pulls").rglob(Digest.of(DATA).hex)
        path.write_bytes(ZEROS)
        partial.checkpoint(clock)
        assert await reader.read(start, 10) == DATA[start : start + 10]
    partial.checkpoint(clock)
    assert await reader.read(FIRST, 10) == ZEROS[:10]
    reader.close()
    partial.close()


@on_reactor
async def test_wrong_bytes_that_were_cut_off_are_not_read(store: Store, root: Path) -> None:
    partial = await store.new_partial(Digest.of(DATA), len(DATA), SOURCE)
    reader = partial.reader()
    await partial.append(DATA[:FIRST])
    await partial.note_mirror()
    await partial.append(b"wrong")
    assert await partial.cut_mirrored()
    [path] = (root / "pulls").rglob(Digest.of(DATA).hex)
    assert path.stat().st_size == FIRST
    # Without any bytes there, the read would wait for those of another machine.
    os.truncate(path, len(DATA))
    assert await reader.read(FIRST, 5) == bytes(5)
    reader.close()
    partial.close()
