"""A blob for which the disk has no room: it ends as an upstream that is down does, and holds nothing up."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from twisted.internet.task import Clock

from ociregistry.errors import Unavailable
from ociregistry.pullthrough.cache import PullThrough
from ociregistry.store.files import Files, SharedFile
from ociregistry.store.store import Store
from tests.unit.doubles import on_reactor, until
from tests.unit.registries import MemoryRegistries
from tests.unit.test_pullthrough_download import DATA, SIZE, WHERE, begin, failure, get


class Full(Files):
    """A disk that takes the first thousand bytes of a file."""

    def write(self, file: SharedFile, data: bytes, offset: int) -> None:
        if offset + len(data) > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(file, data, offset)


@on_reactor
async def test_a_full_disk_ends_it(
    open_store: Callable[..., Store], upstreams: MemoryRegistries, clock: Clock
) -> None:
    content, sending = await begin(PullThrough(open_store(files=Full()), upstreams, clock), upstreams)
    sending.send(DATA[:1000])
    assert await content.more_than(0) == 1000
    sending.send(DATA[1000:])
    assert (await failure(content, 1000)).message == f"{WHERE}: cannot be stored: No space left on device"
    assert sending.connection.closed
    content.close()


class NoRoom(Files):
    """A disk on which no file can be made in pulls/."""

    def create(self, path: Path) -> SharedFile:
        if path.parent.parent.name == "pulls":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().create(path)


@on_reactor
async def test_a_blob_that_has_no_room_frees_its_connection(
    open_store: Callable[..., Store], upstreams: MemoryRegistries, clock: Clock
) -> None:
    asked = get(PullThrough(open_store(files=NoRoom()), upstreams, clock))
    await until(lambda: upstreams.calls)
    sending = upstreams[0].stream(SIZE)
    with pytest.raises(Unavailable, match="cannot be stored: No space"):
        await asked
    assert sending.connection.closed
