"""Free space: granted to downloads above the reserve, re-checked, and logged when it runs out."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.config.values import Reserve
from ociregistry.names import Digest, Repository, Upstream
from ociregistry.store.space import Room, Space
from ociregistry.store.store import Store
from ociregistry.store.threads import Threads
from tests.images import MIB
from tests.unit.support.common import REACTOR, on_reactor, texts, until

RESERVE = 10 * MIB


@dataclass
class Disk:
    """Stub of statvfs that counts calls; `make_room` frees `removable` bytes."""

    free: int = 100 * MIB
    total: int = 1000 * MIB
    removable: int = 0
    queries: int = 0
    asked: list[int] = field(default_factory=list)

    def statvfs(self, path: Path) -> SimpleNamespace:
        """Return 512-byte blocks, some reserved for root."""
        self.queries += 1
        blocks = self.free // 512
        return SimpleNamespace(
            f_frsize=512, f_bsize=4096, f_bavail=blocks, f_bfree=blocks + 99, f_blocks=self.total // 512
        )

    def make_room(self, missing: int) -> None:
        """Free the removable bytes."""
        self.asked.append(missing)
        self.free += self.removable
        self.removable = 0


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Return the disk."""
    disk = Disk()
    monkeypatch.setattr(os, "statvfs", disk.statvfs)
    return disk


@pytest.fixture
def space(disk: Disk, tmp_path: Path, clock: Clock) -> Iterator[Space]:
    """Return the space on the disk."""
    threads = Threads(REACTOR, Clock())
    threads.start()
    space = Space(tmp_path, Reserve(1.0, RESERVE), disk.make_room, threads, clock)
    space.start()
    yield space
    space.stop()
    threads.stop()


async def refused(space: Space, count: int | None) -> str:
    """Return the error that refuses `size` bytes."""
    with pytest.raises(OSError, match="has no room") as refused:
        await space.check(count)
    assert refused.value.errno == errno.ENOSPC
    return refused.value.strerror or ""


@on_reactor
async def test_space_above_the_reserve_is_granted(space: Space, tmp_path: Path) -> None:
    await space.check(90 * MIB)
    assert await refused(space, 90 * MIB + 1) == (
        f"the disk of {tmp_path} has no room: {90 * MIB + 1} bytes are needed and {90 * MIB} are free "
        f"beside the reserve of {RESERVE}"
    )


@on_reactor
async def test_refused_write_is_told_until_it_fits_or_is_wanted_no_more(
    space: Space, disk: Disk, clock: Clock
) -> None:
    assert space.refused == 0
    await refused(space, 95 * MIB)
    assert space.refused == 95 * MIB
    disk.free += 5 * MIB
    clock.advance(1)
    await until(lambda: space.refused == 0)
    await refused(space, 96 * MIB)
    clock.advance(299)
    assert space.refused == 96 * MIB
    clock.advance(1)
    assert space.refused == 0


@on_reactor
async def test_space_needed_by_others_is_not_reserved(space: Space, disk: Disk) -> None:
    """A slow download, or one with a false declared size, does not block others."""
    await space.check(90 * MIB)
    await space.check(90 * MIB)
    for _ in range(90):
        space.spend(MIB)
        disk.free -= MIB
    await refused(space, 1)
    with pytest.raises(OSError, match="has no room"):
        space.spend(1)


@on_reactor
async def test_granted_space_is_checked_again_while_writing(space: Space, disk: Disk, clock: Clock) -> None:
    await space.check(20 * MIB)
    disk.free = RESERVE + 2 * MIB
    # A free space measured a second ago is not trusted.
    clock.advance(1)
    space.spend(2 * MIB)
    disk.free = RESERVE
    with pytest.raises(OSError, match="has no room"):
        space.spend(1)


@on_reactor
async def test_disk_is_not_queried_for_each_piece(space: Space, disk: Disk) -> None:
    await space.check(80 * MIB)
    queries = disk.queries
    for _ in range(80):
        space.spend(MIB)
    assert disk.queries == queries


@pytest.mark.parametrize("count", [60 * MIB, None])
@on_reactor
async def test_room_is_made_before_refusing(space: Space, disk: Disk, count: int | None) -> None:
    disk.free, disk.removable = RESERVE, 60 * MIB
    await space.check(count)
    assert disk.asked == [count or 1]
    disk.free, disk.removable = RESERVE, 60 * MIB - 1
    await refused(space, 60 * MIB)


@on_reactor
async def test_room_is_made_while_writing(space: Space, disk: Disk, clock: Clock) -> None:
    await space.check(None)
    disk.free, disk.removable = RESERVE, MIB
    clock.advance(1)
    space.spend(MIB)
    assert disk.asked == [MIB]


@on_reactor
async def test_new_reserve_applies_immediately(space: Space) -> None:
    space.reconfigure(Reserve(0.02))
    await space.check(80 * MIB)
    space.reconfigure(Reserve(0.5))
    await refused(space, 1)


@on_reactor
async def test_full_disk_and_its_end_are_logged_once(
    space: Space, disk: Disk, clock: Clock, events: list[LogEvent]
) -> None:
    assert space.room == Room(disk.total, 100 * MIB, RESERVE, full=False)
    for free, full in (
        (RESERVE + 2 * MIB, False),
        (RESERVE + 2 * MIB - 512, True),
        (RESERVE + 3 * MIB, True),
        (0, True),
        (RESERVE + 4 * MIB, False),
        (RESERVE + 3 * MIB, False),
    ):
        disk.free, expected = free, Room(disk.total, free, RESERVE, full)
        clock.advance(1)
        # The default argument binds the value of this iteration; mypy infers no type for it.
        await until(lambda expected=expected: space.room == expected)  # type: ignore[misc]
    filled, emptied = texts(events, LogLevel.warn)
    assert "is full: 2.1 MB are free beside the reserve, so no larger download fits; what is cached" in filled
    assert "has room again: 4.2 MB are free beside the reserve, downloads resume" in emptied


@on_reactor
async def test_unreadable_disk_is_logged(
    space: Space, clock: Clock, events: list[LogEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "statvfs", fail)
    clock.advance(1)
    await until(lambda: texts(events, LogLevel.error))
    assert "cannot read the free disk space" in texts(events, LogLevel.error)[0]


# In the store

SOURCE = Repository(Upstream("reg.example"), "team/app")


@on_reactor
async def test_refused_piece_leaves_earlier_pieces_intact(
    disk: Disk, open_store: Callable[..., Store], root: Path
) -> None:
    store = open_store(reserve=Reserve(1.0, RESERVE))
    disk.free = RESERVE + 512
    await store.check_room(None)
    partial = await store.new_partial(Digest.of(b"x"), None, SOURCE)
    await partial.append(bytes(512))
    disk.free = RESERVE
    with pytest.raises(OSError, match="has no room"):
        await partial.append(b"d")
    assert (partial.length, partial.sound) == (512, True)
    assert (root / "pulls" / "0" / Digest.of(b"x").hex).read_bytes() == bytes(512)
    partial.close()
