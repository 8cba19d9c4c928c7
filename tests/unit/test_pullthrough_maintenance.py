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
from ociregistry.pullthrough.maintenance import MaintenanceState
from ociregistry.store.prune import Plan
from ociregistry.store.store import Store
from tests.images import Image, make_image, make_index
from tests.unit.support.common import image, on_reactor, texts, until
from tests.unit.support.loads import MemoryFetcher, settle
from tests.unit.support.maintenance import DAY, MaintenanceHarness, pruning
from tests.unit.support.registries import MemoryRegistries, downloads_ended

OLD, NEW, MULTI = make_image("old", layer_size=50_000), make_image("new", layer_size=50_000), make_index("multi")


@pytest.fixture
def harness(store: Store, cache: PullThrough, root: Path, clock: Clock) -> MaintenanceHarness:
    """Return maintenance of an empty store."""
    return MaintenanceHarness(store, cache, MemoryFetcher(store, root), root, clock)


@pytest.fixture
def selections(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return the selections passed to a stub of `Store.prune`."""
    asked: list[object] = []

    async def prune(choose: object) -> Plan:
        asked.append(choose)
        return Plan((), (), {}, {})

    monkeypatch.setattr(store, "prune", prune)
    return asked


@on_reactor
async def test_prunes_at_each_interval(harness: MaintenanceHarness, selections: list[object]) -> None:
    harness.maintenance.reconfigure(pruning(every=3600), None)
    for times in range(3):
        await harness.advance(3599)
        assert len(selections) == times
        await harness.advance(1)
        assert len(selections) == times + 1
    harness.maintenance.stopService()
    await harness.advance(DAY)
    assert len(selections) == 3


@on_reactor
async def test_without_settings_nothing_is_pruned(
    harness: MaintenanceHarness, selections: list[object], clock: Clock, events: list[LogEvent]
) -> None:
    delayed = len(clock.getDelayedCalls())
    harness.maintenance.reconfigure(None, None)
    await harness.advance(0)
    assert len(clock.getDelayedCalls()) == delayed
    harness.maintenance.stopService()
    harness.maintenance.stopService()
    assert (selections, texts(events)) == ([], [])


@on_reactor
async def test_new_settings_replace_old_ones(harness: MaintenanceHarness, selections: list[object]) -> None:
    harness.maintenance.reconfigure(pruning(every=3600), None)
    await harness.advance(1800)
    harness.maintenance.reconfigure(pruning(every=60), None)
    await harness.advance(60)
    assert len(selections) == 1
    harness.maintenance.reconfigure(pruning(every=7200), None)
    await harness.advance(3600)
    assert len(selections) == 1
    harness.maintenance.reconfigure(None, None)
    await harness.advance(DAY)
    assert len(selections) == 1
    harness.maintenance.reconfigure(pruning(every=60), None)
    await harness.advance(60)
    assert len(selections) == 2
    harness.maintenance.stopService()


@on_reactor
async def test_unchanged_reload_does_not_postpone_pruning(
    harness: MaintenanceHarness, selections: list[object]
) -> None:
    for _ in range(4):
        harness.maintenance.reconfigure(pruning(every=3600), None)
        await harness.advance(1800)
    harness.maintenance.stopService()
    assert len(selections) == 2


@on_reactor
async def test_unused_image_is_pruned_with_its_blobs(
    harness: MaintenanceHarness, root: Path, events: list[LogEvent]
) -> None:
    await harness.add("reg.example/old:1", OLD, ago=31 * DAY)
    await harness.add("reg.example/new:1", NEW, ago=29 * DAY)
    began = harness.now()
    harness.maintenance.reconfigure(pruning(every=60), None)
    assert harness.maintenance.state == MaintenanceState(next_prune=began + timedelta(seconds=60))
    await harness.advance(60)
    await until(lambda: harness.here(OLD, NEW) == [False, True])
    await until(lambda: len(texts(events, LogLevel.warn)) == 1)
    state = harness.maintenance.state
    assert (state.last_prune, state.next_prune) == (began + timedelta(seconds=60), began + timedelta(seconds=120))
    assert (state.pruned_image_urls, state.pruned_blobs) == (1, 3)
    assert state.pruned_bytes > sum(len(blob.data) for blob in OLD.blobs)
    assert {path.name for path in (root / "blobs").iterdir()} == {Digest(one.digest).hex for one in NEW.blobs}
    (line,) = [text for text in texts(events, LogLevel.info) if "pruned" in text]
    assert line.startswith("pruned reg.example/old:1, last pulled 20")
    (line,) = texts(events, LogLevel.warn)
    assert line.startswith("pruned 1 image URL with 3 blobs, ")
    assert int(line.split()[7]) > sum(len(blob.data) for blob in OLD.blobs)
    # Nothing is logged when nothing is pruned.
    await harness.advance(60)
    assert len(texts(events, LogLevel.warn)) == 1
    assert harness.maintenance.state.pruned_image_urls == 1
    harness.maintenance.reconfigure(None, None)
    assert harness.maintenance.state.next_prune is None


@on_reactor
async def test_images_matching_keep_stay(harness: MaintenanceHarness) -> None:
    await harness.add("reg.example/old:1", OLD, ago=99 * DAY)
    await harness.add("reg.example/pinned/new:1", NEW, ago=99 * DAY)
    harness.maintenance.reconfigure(pruning(every=60, keep="/pinned/,^quay"), None)
    await harness.advance(60)
    await until(lambda: harness.here(OLD, NEW) == [False, True])
    harness.maintenance.stopService()


@on_reactor
async def test_least_recently_pulled_images_are_evicted(harness: MaintenanceHarness) -> None:
    await harness.add("reg.example/old:1", OLD, ago=2 * DAY)
    await harness.add("reg.example/new:1", NEW, ago=DAY)
    harness.maintenance.reconfigure(pruning(every=60, unused_for=None, max_size=250_000), None)
    await harness.advance(60)
    assert harness.here(OLD, NEW) == [True, True]
    harness.maintenance.reconfigure(pruning(every=60, unused_for=None, max_size=150_000), None)
    await harness.advance(60)
    await until(lambda: harness.here(OLD, NEW) == [False, True])
    harness.maintenance.stopService()


@on_reactor
async def test_recently_pulled_image_stays_regardless_of_size(harness: MaintenanceHarness) -> None:
    await harness.add("reg.example/old:1", OLD, ago=11 * 60)
    await harness.add("reg.example/new:1", NEW, ago=8 * 60)
    harness.maintenance.reconfigure(pruning(every=60, unused_for=None, max_size=1), None)
    await harness.advance(60)
    await until(lambda: harness.here(OLD, NEW) == [False, True])
    harness.maintenance.stopService()


@on_reactor
async def test_image_with_a_blob_in_flight_stays(
    harness: MaintenanceHarness, cache: PullThrough, upstreams: MemoryRegistries, root: Path
) -> None:
    await harness.add("reg.example/multi:1", MULTI, ago=99 * DAY)
    await harness.add("reg.example/old:1", OLD, ago=99 * DAY)
    await harness.add("reg.example/new:1", NEW, ago=99 * DAY)
    coming = [Digest(MULTI.images[1].layers[0].digest), Digest(NEW.layers[0].digest)]
    for digest in coming:
        (root / "blobs" / digest.hex).unlink()
    repository = image("else.example/any:1").repository
    fetching = [Deferred.fromCoroutine(cache.fetch(repository, digest)) for digest in coming]
    await until(lambda: len(upstreams) == 2)
    assert cache.in_flight.keys() == set(coming)
    harness.maintenance.reconfigure(pruning(every=60), None)
    await harness.advance(60)
    await until(lambda: harness.here(OLD) == [False])
    # An index is pruned with all its images or not at all.
    assert harness.here(MULTI, *MULTI.images, NEW) == [True, True, True, True]
    for call in upstreams:
        data = next(one.data for one in (*MULTI.blobs, *NEW.blobs) if call.what.endswith(one.digest))
        call.stream(len(data)).send(data).end()
    for one in fetching:
        await one
    await downloads_ended(cache)
    assert cache.in_flight.keys() == frozenset()
    await harness.advance(60)
    await until(lambda: harness.here(MULTI, *MULTI.images, NEW) == [False] * 4)
    harness.maintenance.stopService()


@on_reactor
async def test_image_pending_completion_stays(harness: MaintenanceHarness, store: Store) -> None:
    await harness.add("reg.example/old:1", OLD, ago=99 * DAY)
    await harness.add("reg.example/new:1", NEW, ago=99 * DAY)
    await store.add_pending(Digest(NEW.manifest.digest), image("reg.example/new:1").repository)
    harness.maintenance.reconfigure(pruning(every=60), None)
    await harness.advance(60)
    await until(lambda: harness.here(OLD, NEW) == [False, True])
    await store.remove_pending(Digest(NEW.manifest.digest))
    await harness.advance(60)
    await until(lambda: harness.here(OLD, NEW) == [False, False])
    harness.maintenance.stopService()


@on_reactor
async def test_disk_error_is_logged_and_next_run_succeeds(
    harness: MaintenanceHarness, root: Path, events: list[LogEvent]
) -> None:
    await harness.add("reg.example/old:1", OLD, ago=99 * DAY)
    (root / "fat").rename(root / "elsewhere")
    (root / "fat").touch()
    harness.maintenance.reconfigure(pruning(every=60), None)
    for times in (1, 2):
        await harness.advance(60)
        await failed(events, times)
    assert harness.here(OLD) == [True]
    (root / "fat").unlink()
    (root / "elsewhere").rename(root / "fat")
    await harness.advance(60)
    await until(lambda: harness.here(OLD) == [False])
    harness.maintenance.stopService()


async def failed(events: list[LogEvent], times: int) -> None:
    """Wait until `times` failures of pruning have been logged."""
    # The store logs failed scans, too.
    await until(lambda: sum(text.startswith("cannot prune the store: ") for text in texts(events)) == times)


@on_reactor
async def test_stop_during_pruning_is_no_failure(
    harness: MaintenanceHarness, store: Store, monkeypatch: pytest.MonkeyPatch, events: list[LogEvent]
) -> None:
    under_way: list[Deferred[Plan]] = []

    async def prune(choose: object) -> Plan:
        under_way.append(Deferred())
        return await under_way[-1]

    monkeypatch.setattr(store, "prune", prune)
    harness.maintenance.reconfigure(pruning(every=60), None)
    await harness.advance(60)
    assert len(under_way) == 1
    harness.maintenance.reconfigure(None, None)
    await settle(harness.store)
    assert under_way[0].called
    await harness.advance(DAY)
    assert (len(under_way), texts(events)) == (1, [])


@pytest.mark.expect_logged_failures
@on_reactor
async def test_defect_is_logged(
    harness: MaintenanceHarness, store: Store, monkeypatch: pytest.MonkeyPatch, events: list[LogEvent]
) -> None:
    async def prune(choose: object) -> Plan:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(store, "prune", prune)
    harness.maintenance.reconfigure(pruning(every=60), None)
    await harness.advance(60)
    assert texts(events, LogLevel.critical)[0].startswith("a defect in pruning the store")


# System clock errors


AHEAD = timedelta(days=3650)
JUMPED = "pruning by age skipped: the clock jumped by "


async def filled(harness: MaintenanceHarness) -> list[Image]:
    """Return ten images, one of them old, which is pruned at the first run with a trusted clock."""
    images = [make_image(f"of ten/{number}") for number in range(10)]
    for number, built in enumerate(images):
        await harness.add(f"reg.example/app:{number}", built, ago=31 * DAY if number == 0 else number * DAY)
    return images


@on_reactor
async def test_clock_jump_ahead_and_back_prunes_nothing_by_age(
    harness: MaintenanceHarness, events: list[LogEvent]
) -> None:
    """The run after the correction does not trust the clock either, only the next one."""
    images = await filled(harness)
    harness.maintenance.reconfigure(pruning(every=60), None)
    harness.clock_error = AHEAD
    await harness.advance(60)
    assert texts(events, LogLevel.warn) == [f"{JUMPED}{AHEAD.total_seconds():.0f} s"]
    harness.clock_error = timedelta(0)
    await harness.advance(60)
    assert texts(events, LogLevel.warn)[1:] == [f"{JUMPED}-{AHEAD.total_seconds():.0f} s"]
    assert harness.here(*images) == [True] * 10
    await harness.advance(60)
    await until(lambda: harness.here(*images) == [False] + [True] * 9)
    harness.maintenance.stopService()


@on_reactor
async def test_clock_error_between_runs_is_not_noticed(harness: MaintenanceHarness, events: list[LogEvent]) -> None:
    images = await filled(harness)
    harness.maintenance.reconfigure(pruning(every=60), None)
    await harness.advance(30)
    harness.clock_error = AHEAD
    await harness.advance(20)
    harness.clock_error = timedelta(0)
    await harness.advance(10)
    await until(lambda: harness.here(*images) == [False] + [True] * 9)
    harness.maintenance.stopService()


@pytest.mark.parametrize("seconds", [59, 61, -59, -61])
@on_reactor
async def test_small_clock_adjustment_is_trusted(
    harness: MaintenanceHarness, events: list[LogEvent], seconds: int
) -> None:
    images = await filled(harness)
    harness.maintenance.reconfigure(pruning(every=3600), None)
    harness.clock_error = timedelta(seconds=seconds)
    await harness.advance(3600)
    believed = abs(seconds) < 60
    await until(lambda: harness.here(*images) == [not believed] + [True] * 9)
    assert any(JUMPED in text for text in texts(events)) is not believed
    harness.maintenance.stopService()


@on_reactor
async def test_clock_jump_is_noticed_after_settings_change(
    harness: MaintenanceHarness, events: list[LogEvent]
) -> None:
    images = await filled(harness)
    harness.clock_error = AHEAD
    harness.maintenance.reconfigure(pruning(every=60), None)
    await harness.advance(30)
    harness.maintenance.reconfigure(pruning(every=50), None)
    await harness.advance(50)
    assert len(texts(events, LogLevel.warn)) == 1
    assert harness.here(*images) == [True] * 10
    harness.maintenance.stopService()


@on_reactor
async def test_clock_wrong_from_the_start_prunes_nothing_by_age(
    harness: MaintenanceHarness, events: list[LogEvent]
) -> None:
    """The refusal is logged once per state, also when images are pulled meanwhile."""
    images = await filled(harness)
    harness.clock_error = AHEAD
    maintenance = harness.restart()
    maintenance.reconfigure(pruning(every=60, max_share=50), None)
    for _ in range(3):
        await harness.advance(60)
    (line,) = texts(events, LogLevel.warn)
    assert line.startswith("pruning by age refused: 10 of 10 images would be removed, which is more than max_share: ")
    assert maintenance.state.prune_refused == "10 of 10 images would be removed, which is more than max_share"
    for number, built in enumerate(images[6:]):
        await harness.add(f"reg.example/app:{6 + number}", built)
    await harness.advance(60)
    (_, line) = texts(events, LogLevel.warn)
    assert line.startswith("pruning by age refused: 6 of 10 images would be removed, which is more than max_share: ")
    assert harness.here(*images) == [True] * 10
    # After the correction the clock is trusted; dates in the future do not count as old.
    harness.clock_error = timedelta(0)
    await harness.advance(60)
    assert JUMPED in texts(events, LogLevel.warn)[-1]
    await harness.advance(60)
    await until(lambda: harness.here(*images) == [False] + [True] * 9)
    maintenance.stopService()


@on_reactor
async def test_eviction_by_size_happens_despite_clock_jump(harness: MaintenanceHarness) -> None:
    """Except for images pulled just before the correction."""
    await harness.add("reg.example/old:1", OLD, ago=2 * DAY)
    await harness.add("reg.example/new:1", NEW, ago=60)
    harness.maintenance.reconfigure(pruning(every=60, max_size=1), None)
    harness.clock_error = timedelta(days=-1)
    await harness.advance(60)
    await until(lambda: harness.here(OLD, NEW) == [False, True])
    # Later, the date in the future protects it no more.
    await harness.advance(60)
    await until(lambda: harness.here(NEW) == [False])
    harness.maintenance.stopService()
