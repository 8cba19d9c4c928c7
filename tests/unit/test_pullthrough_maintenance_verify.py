"""Scheduled verification: due dates across restarts, quarantine and repair of damaged content."""

from __future__ import annotations

import errno
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.errors import Unavailable
from ociregistry.names import Digest
from ociregistry.pullthrough.cache import PullThrough
from ociregistry.store.files import Files
from ociregistry.store.store import Store
from ociregistry.store.verify import Findings
from tests.images import make_image
from tests.unit.support.common import on_reactor, texts, until
from tests.unit.support.loads import MemoryFetcher, settle
from tests.unit.support.maintenance import DAY, MaintenanceHarness, pruning, verifying

APP, OTHER = make_image("app"), make_image("other")
URL = "reg.example/app:1"


@pytest.fixture
def fetcher(store: Store, root: Path) -> MemoryFetcher:
    """Return a fetcher with the images."""
    fetcher = MemoryFetcher(store, root)
    fetcher.add(URL, APP)
    return fetcher


@pytest.fixture
def harness(store: Store, cache: PullThrough, fetcher: MemoryFetcher, root: Path, clock: Clock) -> MaintenanceHarness:
    """Return maintenance of an empty store."""
    return MaintenanceHarness(store, cache, fetcher, root, clock)


class Verified:
    """Stub of verification that records the read rates."""

    def __init__(self, harness: MaintenanceHarness) -> None:
        self._harness = harness
        self.rates: list[float | None] = []
        self.error: OSError | None = None
        self.last: datetime | None = None

    async def verify(self, max_rate: float | None, advance: object, found: object) -> Findings:
        """Replaces `Store.verify`."""
        self.rates.append(max_rate)
        assert len(self.rates) < 20, "over and over again"
        if self.error is not None:
            raise self.error
        self.last = self._harness.now()
        return Findings()

    async def last_verified(self, now: datetime) -> datetime:
        """Replaces `Store.last_verified`."""
        self.last = self.last or now
        return self.last


@pytest.fixture
def verified(harness: MaintenanceHarness, store: Store, monkeypatch: pytest.MonkeyPatch) -> Verified:
    """Replace verification by the stub."""
    verified = Verified(harness)
    monkeypatch.setattr(store, "verify", verified.verify)
    monkeypatch.setattr(store, "last_verified", verified.last_verified)
    return verified


@on_reactor
async def test_verifies_at_each_interval_with_max_rate(harness: MaintenanceHarness, verified: Verified) -> None:
    harness.maintenance.reconfigure(None, verifying(every=7 * DAY, max_rate=20_000_000))
    for times in range(3):
        await harness.advance(7 * DAY - 1)
        assert len(verified.rates) == times
        await harness.advance(1)
        assert len(verified.rates) == times + 1
    assert verified.rates == [20_000_000] * 3
    harness.maintenance.reconfigure(None, None)
    await harness.advance(99 * DAY)
    assert len(verified.rates) == 3


@pytest.mark.parametrize(("ago", "due"), [(6 * DAY, DAY), (3600, 7 * DAY - 3600), (-DAY, 7 * DAY)])
@on_reactor
async def test_due_date_survives_restarts(
    harness: MaintenanceHarness, ago: float, due: float, events: list[LogEvent]
) -> None:
    await harness.add(URL, APP)
    harness.verified(ago)
    for _ in range(2):
        harness.restart().reconfigure(None, verifying())
        await harness.advance(due / 2 - 1)
        assert texts(events, LogLevel.info) == []
    await harness.advance(2)
    await until(lambda: texts(events, LogLevel.info))
    assert texts(events, LogLevel.info) == ["verified 1 record and 3 blobs, damaged: 0"]
    state = harness.maintenance.state
    assert (state.verified_records, state.verified_blobs, state.damaged, state.damaged_in_all) == (1, 3, 0, 0)
    await until(lambda: harness.maintenance.state.next_verify is not None)
    harness.maintenance.stopService()


@on_reactor
async def test_due_date_is_told(harness: MaintenanceHarness) -> None:
    harness.verified(6 * DAY)
    harness.maintenance.reconfigure(None, verifying())
    await harness.advance(1)
    state = harness.maintenance.state
    assert state.last_verify is not None
    assert state.next_verify is not None
    assert state.next_verify - state.last_verify == timedelta(days=7)
    harness.maintenance.reconfigure(None, None)
    assert harness.maintenance.state.next_verify is None


@on_reactor
async def test_future_date_postpones_by_at_most_one_interval(
    harness: MaintenanceHarness, events: list[LogEvent]
) -> None:
    """The clock was wrong when the date was noted."""
    harness.verified(-3650 * DAY)
    harness.maintenance.reconfigure(None, verifying(every=7 * DAY))
    await harness.advance(7 * DAY - 1)
    assert texts(events, LogLevel.info) == []
    await harness.advance(1)
    await until(lambda: texts(events, LogLevel.info))
    harness.maintenance.stopService()


@pytest.mark.parametrize("ago", [7 * DAY, 400 * DAY])
@on_reactor
async def test_overdue_verification_runs_at_once(
    harness: MaintenanceHarness, ago: float, events: list[LogEvent]
) -> None:
    harness.verified(ago)
    harness.maintenance.reconfigure(None, verifying())
    await harness.advance(0)
    await until(lambda: texts(events, LogLevel.info))
    # The date is noted in the store, so that the next run is due in a week.
    found = await harness.store.last_verified(harness.now())
    assert abs((found - harness.now()).total_seconds()) < 60
    harness.restart().reconfigure(None, verifying())
    await harness.advance(6 * DAY)
    assert len(texts(events, LogLevel.info)) == 1
    harness.maintenance.stopService()


@on_reactor
async def test_first_due_date_survives_restarts(harness: MaintenanceHarness, events: list[LogEvent]) -> None:
    for _ in range(5):
        harness.restart().reconfigure(None, verifying(every=7 * DAY))
        await harness.advance(4 * DAY)
        await settle(harness.store)
    harness.maintenance.stopService()
    assert texts(events, LogLevel.info)


@on_reactor
async def test_new_settings_replace_old_ones(harness: MaintenanceHarness, verified: Verified) -> None:
    harness.maintenance.reconfigure(None, verifying(every=7 * DAY))
    await harness.advance(DAY)
    harness.maintenance.reconfigure(pruning(every=99 * DAY), verifying(every=2 * DAY, max_rate=5))
    await harness.advance(2 * DAY)
    assert verified.rates == [5]
    harness.maintenance.reconfigure(None, verifying(every=DAY))
    await harness.advance(DAY)
    assert verified.rates == [5, None]
    harness.maintenance.stopService()


@pytest.mark.parametrize("overdue", [False, True])
@on_reactor
async def test_disk_error_is_logged_and_retried(
    harness: MaintenanceHarness, verified: Verified, events: list[LogEvent], overdue: bool
) -> None:
    verified.last = harness.now() - timedelta(days=99) if overdue else harness.now()
    verified.error = OSError(5, "Input/output error")
    harness.maintenance.reconfigure(None, verifying(every=DAY))
    await harness.advance(0 if overdue else DAY)
    assert texts(events, LogLevel.error) == ["cannot verify the store: [Errno 5] Input/output error"]
    for _ in range(3):
        await harness.advance(DAY / 3 - 1)
    assert len(verified.rates) == 1
    verified.error = None
    await harness.advance(3)
    await harness.advance(0)
    assert len(verified.rates) == 2
    await harness.advance(DAY)
    assert len(verified.rates) == 3
    harness.maintenance.stopService()


def damage(root: Path, folder: str, digest: str) -> Path:
    """Overwrite a file in the store."""
    path = root / folder / Digest(digest).hex
    data = path.read_bytes()
    path.write_bytes(data[:-20] + b"x" * 20)
    return path


@on_reactor
async def test_damaged_content_is_quarantined_and_fetched_again(
    harness: MaintenanceHarness, fetcher: MemoryFetcher, root: Path, events: list[LogEvent]
) -> None:
    await harness.add(URL, APP)
    blob = damage(root, "blobs", APP.layers[0].digest)
    record = damage(root, "img", APP.manifest.digest)
    harness.maintenance.reconfigure(None, verifying(every=DAY))
    await harness.advance(DAY)
    await until(lambda: len(texts(events, LogLevel.error)) == 2)
    await until(lambda: blob.exists() and blob.read_bytes() == APP.layers[0].data)
    first, second = texts(events, LogLevel.error)
    # The record first, because it names the source of its blobs.
    assert first.startswith(f"quarantined: {record}: ")
    assert second.startswith(f"quarantined: {blob}: its {len(APP.layers[0].data)} bytes do not have the digest ")
    assert f"blob reg.example/app@{APP.layers[0].digest}" in fetcher.asked
    assert len(list((root / "pulls").glob("*/bad/*"))) == 2
    harness.maintenance.stopService()


@on_reactor
async def test_failed_repair_is_logged_and_others_continue(
    harness: MaintenanceHarness, fetcher: MemoryFetcher, root: Path, events: list[LogEvent]
) -> None:
    await harness.add(URL, APP)
    lost, found = sorted(APP.layers, key=lambda one: one.digest)
    for one in (lost, found):
        damage(root, "blobs", one.digest)
    fetcher.errors[f"blob reg.example/app@{lost.digest}"] = Unavailable("reg.example: down")
    harness.maintenance.reconfigure(None, verifying(every=DAY))
    await harness.advance(DAY)
    path = root / "blobs" / Digest(found.digest).hex
    await until(lambda: path.exists() and path.read_bytes() == found.data)
    assert texts(events, LogLevel.error)[1] == f"cannot fetch {lost.digest} again: reg.example: down"
    assert not (root / "blobs" / Digest(lost.digest).hex).exists()
    (line,) = texts(events, LogLevel.info)
    assert line == "verified 1 record and 3 blobs, damaged: 2"
    assert harness.store.faults.sentences == [
        f"1 blob is damaged and could not be fetched again: {Digest(lost.digest).hex}"
    ]
    state = harness.maintenance.state
    assert (state.damaged, state.repaired, state.verified_bytes) == (2, 1, sum(len(one.data) for one in APP.blobs))
    harness.maintenance.stopService()


@on_reactor
async def test_stop_during_repair_is_no_failure(
    harness: MaintenanceHarness, fetcher: MemoryFetcher, root: Path, events: list[LogEvent]
) -> None:
    await harness.add(URL, APP)
    damage(root, "blobs", APP.layers[0].digest)
    fetcher.held.add("blob")
    harness.maintenance.reconfigure(None, verifying(every=DAY))
    await harness.advance(DAY)
    await until(lambda: fetcher.waiting)
    logged = len(texts(events))
    harness.maintenance.reconfigure(None, None)
    await settle(harness.store)
    assert (fetcher.cancelled, len(texts(events))) == (1, logged)


@on_reactor
async def test_stop_during_verification_is_no_failure(
    harness: MaintenanceHarness, store: Store, events: list[LogEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way: list[Deferred[Findings]] = []

    async def verify(max_rate: float | None, advance: object, found: object) -> Findings:
        under_way.append(Deferred())
        return await under_way[-1]

    monkeypatch.setattr(store, "verify", verify)
    harness.maintenance.reconfigure(None, verifying(every=DAY))
    await harness.advance(DAY)
    harness.maintenance.stopService()
    await settle(harness.store)
    assert under_way[0].called
    assert texts(events) == []


@on_reactor
async def test_max_rate_limits_reading(harness: MaintenanceHarness, events: list[LogEvent]) -> None:
    await harness.add(URL, make_image("large", layers=1, layer_size=90_000))
    harness.maintenance.reconfigure(None, verifying(every=DAY, max_rate=1000))
    await harness.advance(DAY)
    for _ in range(10):
        await harness.advance(8)
    assert texts(events, LogLevel.info) == []
    for _ in range(10):
        await harness.advance(8)
    await until(lambda: texts(events, LogLevel.info))
    harness.maintenance.stopService()


@on_reactor
async def test_damaged_file_is_removed_when_quarantine_fails(
    harness: MaintenanceHarness, root: Path, events: list[LogEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The removal is logged and the file is fetched again."""
    rename = Files.rename

    def full(self: Files, path: Path, target: Path) -> None:
        if target.parent.name == "bad":
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(self, path, target)

    monkeypatch.setattr(Files, "rename", full)
    await harness.add(URL, APP)
    blob = damage(root, "blobs", APP.layers[0].digest)
    record = damage(root, "img", APP.manifest.digest)
    harness.maintenance.reconfigure(None, verifying(every=DAY))
    await harness.advance(DAY)
    await until(lambda: len(texts(events, LogLevel.error)) == 2)
    await until(lambda: blob.exists() and blob.read_bytes() == APP.layers[0].data)
    for line, path in zip(texts(events, LogLevel.error), (record, blob), strict=True):
        assert line.startswith(f"removed, no space to quarantine it: {path}: ")
    assert list((root / "pulls").glob("*/bad/*")) == []
    harness.maintenance.stopService()
