"""What a store uses of the disk: all its files count, a walk is cut into slices, and it rests between them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from twisted.internet.task import Clock

from ociregistry.store.threads import Threads
from ociregistry.store.usage import Usage, UsageMeter, Walk
from tests.unit.support.common import REACTOR, on_reactor, turn, until

HEX = "0" * 64


def fill(root: Path) -> None:
    """Write a blob, records, a partial with its note, a damaged blob, links, and a file of another program."""
    for path, size in (
        (f"blobs/{HEX}", 1000),
        ("blobs/.syncthing.part.tmp", 1),
        (f"fat/{HEX}", 20),
        (f"img/{HEX}", 30),
        (f"pulls/0/{HEX}", 400),
        (f"pulls/0/{HEX}.note", 5),
        (f"pulls/1/bad/{HEX}", 6000),
        ("elsewhere/file", 9_000_000),
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(bytes(size))
    (root / "blobs" / f"1{HEX[1:]}").symlink_to("/bin/sh")
    (root / "pulls" / "0" / "loop").symlink_to(root)


LINKS = len("/bin/sh")


def test_every_file_of_the_store_counts(tmp_path: Path) -> None:
    fill(tmp_path)
    loop = len(str(tmp_path))
    found, _ = Walk(tmp_path, lambda: 0.0).go_on()
    assert found == Usage(1000 + 1 + 20 + 30 + 400 + 5 + 6000 + LINKS + loop, 2)


def test_folders_may_be_links_or_missing(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / HEX).write_bytes(b"12345")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "blobs").symlink_to(tmp_path / "elsewhere")
    assert Walk(tmp_path / "store", lambda: 0.0).go_on()[0] == Usage(5, 1)


def test_folder_that_cannot_be_read_is_no_empty_one(tmp_path: Path) -> None:
    (tmp_path / "blobs").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        Walk(tmp_path, lambda: 0.0).go_on()


def test_walk_is_cut_into_slices(tmp_path: Path) -> None:
    """With a clock on which each file takes 30 ms, a slice has four files."""
    (tmp_path / "blobs").mkdir()
    for number in range(10):
        (tmp_path / "blobs" / f"{number:064}").write_bytes(b"12")
    ticks = iter(range(1000))
    walk = Walk(tmp_path, lambda: next(ticks) * 0.03)
    slices = [walk.go_on() for _ in range(3)]
    assert [found for found, _ in slices] == [None, None, Usage(20, 10)]
    assert all(0.1 <= took < 0.15 for _, took in slices[:2])


@pytest.fixture
def threads(clock: Clock) -> Iterator[Threads]:
    """Return the threads of a store."""
    threads = Threads(REACTOR, clock)
    threads.start()
    yield threads
    threads.stop()


@pytest.fixture
def meter(tmp_path: Path, threads: Threads, clock: Clock) -> Iterator[UsageMeter]:
    """Return a meter of an empty store."""
    (tmp_path / "blobs").mkdir()
    meter = UsageMeter(tmp_path, threads, clock)
    yield meter
    meter.stop()


@pytest.mark.parametrize(("took", "after"), [(0.0, 5), (0.002, 5), (0.015, 15), (0.058, 60), (30.0, 60)])
@on_reactor
async def test_store_is_measured_again_the_sooner_the_faster_it_goes(
    meter: UsageMeter, clock: Clock, monkeypatch: pytest.MonkeyPatch, took: float, after: int
) -> None:
    walks = []

    def go_on(self: Walk) -> tuple[Usage | None, float]:
        walks.append(clock.seconds())
        return Usage(len(walks), 1), took

    monkeypatch.setattr(Walk, "go_on", go_on)
    began = clock.seconds()
    meter.start()
    for _ in range(after):
        await until_idle(meter)
        assert len(walks) == 1
        clock.advance(1)
    await until(lambda: meter.latest == Usage(2, 1))
    assert walks == [began, began + after]


@on_reactor
async def test_change_of_a_small_store_is_known_within_five_seconds(
    meter: UsageMeter, tmp_path: Path, clock: Clock
) -> None:
    assert meter.latest is None
    meter.start()
    await until(lambda: meter.latest is not None)
    assert meter.latest == Usage(0, 0)
    (tmp_path / "blobs" / HEX).write_bytes(b"123")
    clock.advance(4)
    await turn()
    assert meter.latest == Usage(0, 0)
    clock.advance(1)
    await until(lambda: meter.latest == Usage(3, 1))


@on_reactor
async def test_clock_of_the_reactor_does_not_cut_a_walk(
    meter: UsageMeter, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A walk that rests keeps a folder open. Another thread advances that clock as it likes, in tests."""
    (tmp_path / "blobs" / HEX).write_bytes(b"123")
    scandir = os.scandir

    def advanced(folder: str) -> object:
        clock.rightNow += 10
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", advanced)
    meter.start()
    await until(lambda: meter.latest == Usage(3, 1))


@on_reactor
async def test_what_cannot_be_read_is_unknown(meter: UsageMeter, tmp_path: Path, clock: Clock) -> None:
    meter.start()
    await until(lambda: meter.latest is not None)
    (tmp_path / "blobs").rmdir()
    (tmp_path / "blobs").write_bytes(b"")
    clock.advance(60)
    await until(lambda: meter.latest is None)
    (tmp_path / "blobs").unlink()
    clock.advance(60)
    await until(lambda: meter.latest == Usage(0, 0))


@on_reactor
async def test_walk_rests_nine_times_as_long_as_it_works(
    meter: UsageMeter, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices = []

    def go_on(self: Walk) -> tuple[Usage | None, float]:
        slices.append(clock.seconds())
        return (Usage(1, 1), 0.2) if len(slices) == 3 else (None, 0.2)

    monkeypatch.setattr(Walk, "go_on", go_on)
    meter.start()
    for step in range(40):
        await until_idle(meter)
        clock.advance(0.1)
        if step == 10:
            assert len(slices) == 1
    await until(lambda: meter.latest is not None)
    assert slices == pytest.approx([0, 1.8, 3.6])


async def until_idle(meter: UsageMeter) -> None:
    """Wait until the meter rests: its thread has returned."""
    threads = meter._threads
    await until(lambda: not threads._reads and not threads._waiting)
