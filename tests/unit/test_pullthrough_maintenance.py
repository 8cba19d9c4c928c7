"""Scheduled pruning: intervals, eviction by age and size, images in use, and system clock errors."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.names import Digest
from ociregistry.pullthrough.cache import PullThrough
from ociregistry.store.prune import Plan
from ociregistry.store.store import Store
from tests.images import Image, make_image, make_index
from tests.unit.support.doubles import image, on_reactor, texts, until
from tests.unit.support.loads import Shelf, settle
from tests.unit.support.maintenance import DAY, Keeping, pruning
from tests.unit.support.registries import MemoryRegistries, landed

OLD, NEW, MULTI = make_image("old", layer_size=50_000), make_image("new", layer_size=50_000), make_index("multi")


@pytest.fixture
def keeping(store: Store, cache: PullThrough, root: Path, clock: Clock) -> Keeping:
    """Return maintenance of an empty store."""
    return Keeping(store, cache, Shelf(store, root), root, clock)


@pytest.fixture
def prunes(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return the selections passed to a stub of `Store.prune`."""
    asked: list[object] = []

    async def prune(choose: object) -> Plan:
        asked.append(choose)
        return Plan((), (), {}, {})

    monkeypatch.setattr(store, "prune", prune)
    return asked


@on_reactor
async def test_prunes_at_each_interval(keeping: Keeping, prunes: list[object]) -> None:
    keeping.maintenance.reconfigure(pruning(every=3600), None)
    for times in range(3):
        await keeping.passes(3599)
        assert len(prunes) == times
        await keeping.passes(1)
        assert len(prunes) == times + 1
    keeping.maintenance.stopService()
    await keeping.passes(DAY)
    assert len(prunes) == 3


@on_reactor
async def test_without_settings_nothing_is_pruned(
    keeping: Keeping, prunes: list[object], clock: Clock, events: list[LogEvent]
) -> None:
    delayed = len(clock.getDelayedCalls())
    keeping.maintenance.reconfigure(None, None)
    await keeping.passes(0)
    assert len(clock.getDelayedCalls()) == delayed
    keeping.maintenance.stopService()
    keeping.maintenance.stopService()
    assert (prunes, texts(events)) == ([], [])


@on_reactor
async def test_new_settings_replace_old_ones(keeping: Keeping, prunes: list[object]) -> None:
    keeping.maintenance.reconfigure(pruning(every=3600), None)
    await keeping.passes(1800)
    keeping.maintenance.reconfigure(pruning(every=60), None)
    await keeping.passes(60)
    assert len(prunes) == 1
    keeping.maintenance.reconfigure(pruning(every=7200), None)
    await keeping.passes(3600)
    assert len(prunes) == 1
    keeping.maintenance.reconfigure(None, None)
    await keeping.passes(DAY)
    assert len(prunes) == 1
    keeping.maintenance.reconfigure(pruning(every=60), None)
    await keeping.passes(60)
    assert len(prunes) == 2
    keeping.maintenance.stopService()


@on_reactor
async def test_unchanged_reload_does_not_postpone_pruning(keeping: Keeping, prunes: list[object]) -> None:
    for _ in range(4):
        keeping.maintenance.reconfigure(pruning(every=3600), None)
        await keeping.passes(1800)
    keeping.maintenance.stopService()
    assert len(prunes) == 2


@on_reactor
async def test_unused_image_is_pruned_with_its_blobs(keeping: Keeping, root: Path, events: list[LogEvent]) -> None:
    await keeping.add("reg.example/old:1", OLD, ago=31 * DAY)
    await keeping.add("reg.example/new:1", NEW, ago=29 * DAY)
    keeping.maintenance.reconfigure(pruning(every=60), None)
    await keeping.passes(60)
    await until(lambda: keeping.here(OLD, NEW) == [False, True])
    await until(lambda: len(texts(events, LogLevel.warn)) == 1)
    assert {path.name for path in (root / "blobs").iterdir()} == {Digest(one.digest).hex for one in NEW.blobs}
    (line,) = [text for text in texts(events, LogLevel.info) if "pruned" in text]
    assert line.startswith("pruned reg.example/old:1, last pulled 20")
    (line,) = texts(events, LogLevel.warn)
    assert line.startswith("pruned 1 image URLs with 3 blobs: ")
    assert int(line.split()[7]) > sum(len(blob.data) for blob in OLD.blobs)
    # Nothing is logged when nothing is pruned.
    await keeping.passes(60)
    assert len(texts(events, LogLevel.warn)) == 1
    keeping.maintenance.stopService()


@on_reactor
async def test_images_matching_keep_stay(keeping: Keeping) -> None:
    await keeping.add("reg.example/old:1", OLD, ago=99 * DAY)
    await keeping.add("reg.example/pinned/new:1", NEW, ago=99 * DAY)
    keeping.maintenance.reconfigure(pruning(every=60, keep="/pinned/,^quay"), None)
    await keeping.passes(60)
    await until(lambda: keeping.here(OLD, NEW) == [False, True])
    keeping.maintenance.stopService()


@on_reactor
async def test_least_recently_pulled_images_are_evicted(keeping: Keeping) -> None:
    await keeping.add("reg.example/old:1", OLD, ago=2 * DAY)
    await keeping.add("reg.example/new:1", NEW, ago=DAY)
    keeping.maintenance.reconfigure(pruning(every=60, unused_for=None, max_size=250_000), None)
    await keeping.passes(60)
    assert keeping.here(OLD, NEW) == [True, True]
    keeping.maintenance.reconfigure(pruning(every=60, unused_for=None, max_size=150_000), None)
    await keeping.passes(60)
    await until(lambda: keeping.here(OLD, NEW) == [False, True])
    keeping.maintenance.stopService()


@on_reactor
async def test_recently_pulled_image_stays_regardless_of_size(keeping: Keeping) -> None:
    await keeping.add("reg.example/old:1", OLD, ago=11 * 60)
    await keeping.add("reg.example/new:1", NEW, ago=8 * 60)
    keeping.maintenance.reconfigure(pruning(every=60, unused_for=None, max_size=1), None)
    await keeping.passes(60)
    await until(lambda: keeping.here(OLD, NEW) == [False, True])
    keeping.maintenance.stopService()


@on_reactor
async def test_image_with_a_blob_in_flight_stays(
    keeping: Keeping, cache: PullThrough, upstreams: MemoryRegistries, root: Path
) -> None:
    await keeping.add("reg.example/multi:1", MULTI, ago=99 * DAY)
    await keeping.add("reg.example/old:1", OLD, ago=99 * DAY)
    await keeping.add("reg.example/new:1", NEW, ago=99 * DAY)
    coming = [Digest(MULTI.images[1].layers[0].digest), Digest(NEW.layers[0].digest)]
    for digest in coming:
        (root / "blobs" / digest.hex).unlink()
    repository = image("else.example/any:1").repository
    fetching = [Deferred.fromCoroutine(cache.fetch(repository, digest)) for digest in coming]
    await until(lambda: len(upstreams) == 2)
    assert cache.in_flight == set(coming)
    keeping.maintenance.reconfigure(pruning(every=60), None)
    await keeping.passes(60)
    await until(lambda: keeping.here(OLD) == [False])
    # An index is pruned with all its images or not at all.
    assert keeping.here(MULTI, *MULTI.images, NEW) == [True, True, True, True]
    for call in upstreams:
        data = next(one.data for one in (*MULTI.blobs, *NEW.blobs) if call.what.endswith(one.digest))
        call.stream(len(data)).send(data).end()
    for one in fetching:
        await one
    await landed(cache)
    assert cache.in_flight == frozenset()
    await keeping.passes(60)
    await until(lambda: keeping.here(MULTI, *MULTI.images, NEW) == [False] * 4)
    keeping.maintenance.stopService()


@on_reactor
async def test_image_pending_completion_stays(keeping: Keeping, store: Store) -> None:
    await keeping.add("reg.example/old:1", OLD, ago=99 * DAY)
    await keeping.add("reg.example/new:1", NEW, ago=99 * DAY)
    await store.add_pending(Digest(NEW.manifest.digest), image("reg.example/new:1").repository)
    keeping.maintenance.reconfigure(pruning(every=60), None)
    await keeping.passes(60)
    await until(lambda: keeping.here(OLD, NEW) == [False, True])
    await store.remove_pending(Digest(NEW.manifest.digest))
    await keeping.passes(60)
    await until(lambda: keeping.here(OLD, NEW) == [False, False])
    keeping.maintenance.stopService()


@on_reactor
async def test_disk_error_is_logged_and_next_run_succeeds(
    keeping: Keeping, root: Path, events: list[LogEvent]
) -> None:
    await keeping.add("reg.example/old:1", OLD, ago=99 * DAY)
    (root / "fat").rename(root / "elsewhere")
    (root / "fat").touch()
    keeping.maintenance.reconfigure(pruning(every=60), None)
    for times in (1, 2):
        await keeping.passes(60)
        await failed(events, times)
    assert keeping.here(OLD) == [True]
    (root / "fat").unlink()
    (root / "elsewhere").rename(root / "fat")
    await keeping.passes(60)
    await until(lambda: keeping.here(OLD) == [False])
    keeping.maintenance.stopService()


async def failed(events: list[LogEvent], times: int) -> None:
    """Wait until `times` failures of pruning have been logged."""
    # The store logs failed scans, too.
    await until(lambda: sum(text.startswith("cannot prune the store: ") for text in texts(events)) == times)


@on_reactor
async def test_stop_during_pruning_is_no_failure(
    keeping: Keeping, store: Store, monkeypatch: pytest.MonkeyPatch, events: list[LogEvent]
) -> None:
    under_way: list[Deferred[Plan]] = []

    async def prune(choose: object) -> Plan:
        under_way.append(Deferred())
        return await under_way[-1]

    monkeypatch.setattr(store, "prune", prune)
    keeping.maintenance.reconfigure(pruning(every=60), None)
    await keeping.passes(60)
    assert len(under_way) == 1
    keeping.maintenance.reconfigure(None, None)
    await settle(keeping.store)
    assert under_way[0].called
    await keeping.passes(DAY)
    assert (len(under_way), texts(events)) == (1, [])


@pytest.mark.expect_logged_failures
@on_reactor
async def test_defect_is_logged(
    keeping: Keeping, store: Store, monkeypatch: pytest.MonkeyPatch, events: list[LogEvent]
) -> None:
    async def prune(choose: object) -> Plan:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(store, "prune", prune)
    keeping.maintenance.reconfigure(pruning(every=60), None)
    await keeping.passes(60)
    assert texts(events, LogLevel.critical)[0].startswith("a defect in pruning the store")


# System clock errors


AHEAD = timedelta(days=3650)
JUMPED = "pruning by age skipped: the clock jumped by "


async def filled(keeping: Keeping) -> list[Image]:
    """Return ten images, one of them old, which is pruned at the first run with a trusted clock."""
    images = [make_image(f"of ten/{number}") for number in range(10)]
    for number, built in enumerate(images):
        await keeping.add(f"reg.example/app:{number}", built, ago=31 * DAY if number == 0 else number * DAY)
    return images


@on_reactor
async def test_clock_jump_ahead_and_back_prunes_nothing_by_age(keeping: Keeping, events: list[LogEvent]) -> None:
    """The run after the correction does not trust the clock either, only the next one."""
    images = await filled(keeping)
    keeping.maintenance.reconfigure(pruning(every=60), None)
    keeping.wrong = AHEAD
    await keeping.passes(60)
    assert texts(events, LogLevel.warn) == [f"{JUMPED}{AHEAD.total_seconds():.0f} s"]
    keeping.wrong = timedelta(0)
    await keeping.passes(60)
    assert texts(events, LogLevel.warn)[1:] == [f"{JUMPED}-{AHEAD.total_seconds():.0f} s"]
    assert keeping.here(*images) == [True] * 10
    await keeping.passes(60)
    await until(lambda: keeping.here(*images) == [False] + [True] * 9)
    keeping.maintenance.stopService()


@on_reactor
async def test_clock_error_between_runs_is_not_noticed(keeping: Keeping, events: list[LogEvent]) -> None:
    images = await filled(keeping)
    keeping.maintenance.reconfigure(pruning(every=60), None)
    await keeping.passes(30)
    keeping.wrong = AHEAD
    await keeping.passes(20)
    keeping.wrong = timedelta(0)
    await keeping.passes(10)
    await until(lambda: keeping.here(*images) == [False] + [True] * 9)
    keeping.maintenance.stopService()


@pytest.mark.parametrize("seconds", [59, 61, -59, -61])
@on_reactor
async def test_small_clock_adjustment_is_trusted(keeping: Keeping, events: list[LogEvent], seconds: int) -> None:
    images = await filled(keeping)
    keeping.maintenance.reconfigure(pruning(every=3600), None)
    keeping.wrong = timedelta(seconds=seconds)
    await keeping.passes(3600)
    believed = abs(seconds) < 60
    await until(lambda: keeping.here(*images) == [not believed] + [True] * 9)
    assert any(JUMPED in text for text in texts(events)) is not believed
    keeping.maintenance.stopService()


@on_reactor
async def test_clock_jump_is_noticed_after_settings_change(keeping: Keeping, events: list[LogEvent]) -> None:
    images = await filled(keeping)
    keeping.wrong = AHEAD
    keeping.maintenance.reconfigure(pruning(every=60), None)
    await keeping.passes(30)
    keeping.maintenance.reconfigure(pruning(every=50), None)
    await keeping.passes(50)
    assert len(texts(events, LogLevel.warn)) == 1
    assert keeping.here(*images) == [True] * 10
    keeping.maintenance.stopService()


@on_reactor
async def test_clock_wrong_from_the_start_prunes_nothing_by_age(keeping: Keeping, events: list[LogEvent]) -> None:
    """The refusal is logged once per state, also when images are pulled meanwhile."""
    images = await filled(keeping)
    keeping.wrong = AHEAD
    maintenance = keeping.restart()
    maintenance.reconfigure(pruning(every=60, max_share=50), None)
    for _ in range(3):
        await keeping.passes(60)
    (line,) = texts(events, LogLevel.warn)
    assert line.startswith("pruning by age refused: 10 of 10 images would go, which is more than max_share: ")
    for number, built in enumerate(images[6:]):
        await keeping.add(f"reg.example/app:{6 + number}", built)
    await keeping.passes(60)
    (_, line) = texts(events, LogLevel.warn)
    assert line.startswith("pruning by age refused: 6 of 10 images would go, which is more than max_share: ")
    assert keeping.here(*images) == [True] * 10
    # After the correction the clock is trusted; dates in the future do not count as old.
    keeping.wrong = timedelta(0)
    await keeping.passes(60)
    assert JUMPED in texts(events, LogLevel.warn)[-1]
    await keeping.passes(60)
    await until(lambda: keeping.here(*images) == [False] + [True] * 9)
    maintenance.stopService()


@on_reactor
async def test_eviction_by_size_happens_despite_clock_jump(keeping: Keeping) -> None:
    """Except for images pulled just before the correction."""
    await keeping.add("reg.example/old:1", OLD, ago=2 * DAY)
    await keeping.add("reg.example/new:1", NEW, ago=60)
    keeping.maintenance.reconfigure(pruning(every=60, max_size=1), None)
    keeping.wrong = timedelta(days=-1)
    await keeping.passes(60)
    await until(lambda: keeping.here(OLD, NEW) == [False, True])
    # Later, the date in the future protects it no more.
    await keeping.passes(60)
    await until(lambda: keeping.here(NEW) == [False])
    keeping.maintenance.stopService()
