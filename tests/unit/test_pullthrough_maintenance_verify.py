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
from tests.unit.support.doubles import on_reactor, texts, until
from tests.unit.support.loads import Shelf, settle
from tests.unit.support.maintenance import DAY, Keeping, pruning, verifying

APP, OTHER = make_image("app"), make_image("other")
URL = "reg.example/app:1"


@pytest.fixture
def shelf(store: Store, root: Path) -> Shelf:
    """Return a fetcher with the images."""
    shelf = Shelf(store, root)
    shelf.add(URL, APP)
    return shelf


@pytest.fixture
def keeping(store: Store, cache: PullThrough, shelf: Shelf, root: Path, clock: Clock) -> Keeping:
    """Return maintenance of an empty store."""
    return Keeping(store, cache, shelf, root, clock)


class Verified:
    """Stub of verification that records the read rates."""

    def __init__(self, keeping: Keeping) -> None:
        self._keeping = keeping
        self.rates: list[float | None] = []
        self.error: OSError | None = None
        self.last: datetime | None = None

    async def verify(self, max_rate: float | None, advance: object, found: object) -> Findings:
        """Replaces `Store.verify`."""
        self.rates.append(max_rate)
        assert len(self.rates) < 20, "over and over again"
        if self.error is not None:
            raise self.error
        self.last = self._keeping.now()
        return Findings()

    async def last_verified(self, now: datetime) -> datetime:
        """Replaces `Store.last_verified`."""
        self.last = self.last or now
        return self.last


@pytest.fixture
def verified(keeping: Keeping, store: Store, monkeypatch: pytest.MonkeyPatch) -> Verified:
    """Replace verification by the stub."""
    verified = Verified(keeping)
    monkeypatch.setattr(store, "verify", verified.verify)
    monkeypatch.setattr(store, "last_verified", verified.last_verified)
    return verified


@on_reactor
async def test_verifies_at_each_interval_with_max_rate(keeping: Keeping, verified: Verified) -> None:
    keeping.maintenance.reconfigure(None, verifying(every=7 * DAY, max_rate=20_000_000))
    for times in range(3):
        await keeping.passes(7 * DAY - 1)
        assert len(verified.rates) == times
        await keeping.passes(1)
        assert len(verified.rates) == times + 1
    assert verified.rates == [20_000_000] * 3
    keeping.maintenance.reconfigure(None, None)
    await keeping.passes(99 * DAY)
    assert len(verified.rates) == 3


@pytest.mark.parametrize(("ago", "due"), [(6 * DAY, DAY), (3600, 7 * DAY - 3600), (-DAY, 8 * DAY)])
@on_reactor
async def test_due_date_survives_restarts(keeping: Keeping, ago: float, due: float, events: list[LogEvent]) -> None:
    await keeping.add(URL, APP)
    keeping.verified(ago)
    for _ in range(2):
        keeping.restart().reconfigure(None, verifying())
        await keeping.passes(due / 2 - 1)
        assert texts(events, LogLevel.info) == []
    await keeping.passes(2)
    await until(lambda: texts(events, LogLevel.info))
    assert texts(events, LogLevel.info) == ["verified 1 records and 3 blobs: 0 are damaged"]
    keeping.maintenance.stopService()


@on_reactor
async def test_future_date_postpones_by_at_most_one_interval(keeping: Keeping, events: list[LogEvent]) -> None:
    """The clock was wrong when the date was noted."""
    keeping.verified(-3650 * DAY)
    keeping.maintenance.reconfigure(None, verifying(every=7 * DAY))
    await keeping.passes(7 * DAY - 1)
    assert texts(events, LogLevel.info) == []
    await keeping.passes(1)
    await until(lambda: texts(events, LogLevel.info))
    keeping.maintenance.stopService()


@pytest.mark.parametrize("ago", [7 * DAY, 400 * DAY])
@on_reactor
async def test_overdue_verification_runs_at_once(keeping: Keeping, ago: float, events: list[LogEvent]) -> None:
    keeping.verified(ago)
    keeping.maintenance.reconfigure(None, verifying())
    await keeping.passes(0)
    await until(lambda: texts(events, LogLevel.info))
    # The date is noted in the store, so that the next run is due in a week.
    found = await keeping.store.last_verified(keeping.now())
    assert abs((found - keeping.now()).total_seconds()) < 60
    keeping.restart().reconfigure(None, verifying())
    await keeping.passes(6 * DAY)
    assert len(texts(events, LogLevel.info)) == 1
    keeping.maintenance.stopService()


@on_reactor
async def test_first_due_date_survives_restarts(keeping: Keeping, events: list[LogEvent]) -> None:
    for _ in range(5):
        keeping.restart().reconfigure(None, verifying(every=7 * DAY))
        await keeping.passes(4 * DAY)
        await settle(keeping.store)
    keeping.maintenance.stopService()
    assert texts(events, LogLevel.info)


@on_reactor
async def test_new_settings_replace_old_ones(keeping: Keeping, verified: Verified) -> None:
    keeping.maintenance.reconfigure(None, verifying(every=7 * DAY))
    await keeping.passes(DAY)
    keeping.maintenance.reconfigure(pruning(every=99 * DAY), verifying(every=2 * DAY, max_rate=5))
    await keeping.passes(2 * DAY)
    assert verified.rates == [5]
    keeping.maintenance.reconfigure(None, verifying(every=DAY))
    await keeping.passes(DAY)
    assert verified.rates == [5, None]
    keeping.maintenance.stopService()


@pytest.mark.parametrize("overdue", [False, True])
@on_reactor
async def test_disk_error_is_logged_and_retried(
    keeping: Keeping, verified: Verified, events: list[LogEvent], overdue: bool
) -> None:
    verified.last = keeping.now() - timedelta(days=99) if overdue else keeping.now()
    verified.error = OSError(5, "Input/output error")
    keeping.maintenance.reconfigure(None, verifying(every=DAY))
    await keeping.passes(0 if overdue else DAY)
    assert texts(events, LogLevel.error) == ["cannot verify the store: [Errno 5] Input/output error"]
    for _ in range(3):
        await keeping.passes(DAY / 3 - 1)
    assert len(verified.rates) == 1
    verified.error = None
    await keeping.passes(3)
    await keeping.passes(0)
    assert len(verified.rates) == 2
    await keeping.passes(DAY)
    assert len(verified.rates) == 3
    keeping.maintenance.stopService()


def damage(root: Path, folder: str, digest: str) -> Path:
    """Overwrite a file in the store."""
    path = root / folder / Digest(digest).hex
    data = path.read_bytes()
    path.write_bytes(data[:-20] + b"x" * 20)
    return path


@on_reactor
async def test_damaged_content_is_quarantined_and_fetched_again(
    keeping: Keeping, shelf: Shelf, root: Path, events: list[LogEvent]
) -> None:
    await keeping.add(URL, APP)
    blob = damage(root, "blobs", APP.layers[0].digest)
    record = damage(root, "img", APP.manifest.digest)
    keeping.maintenance.reconfigure(None, verifying(every=DAY))
    await keeping.passes(DAY)
    await until(lambda: len(texts(events, LogLevel.error)) == 2)
    await until(lambda: blob.exists() and blob.read_bytes() == APP.layers[0].data)
    first, second = texts(events, LogLevel.error)
    # The record first, because it names the source of its blobs.
    assert first.startswith(f"quarantined: {record}: ")
    assert second.startswith(f"quarantined: {blob}: its {len(APP.layers[0].data)} bytes do not have the digest ")
    assert f"blob reg.example/app@{APP.layers[0].digest}" in shelf.asked
    assert len(list((root / "pulls").glob("*/bad/*"))) == 2
    keeping.maintenance.stopService()


@on_reactor
async def test_failed_repair_is_logged_and_others_continue(
    keeping: Keeping, shelf: Shelf, root: Path, events: list[LogEvent]
) -> None:
    await keeping.add(URL, APP)
    lost, found = sorted(APP.layers, key=lambda one: one.digest)
    for one in (lost, found):
        damage(root, "blobs", one.digest)
    shelf.errors[f"blob reg.example/app@{lost.digest}"] = Unavailable("reg.example: down")
    keeping.maintenance.reconfigure(None, verifying(every=DAY))
    await keeping.passes(DAY)
    path = root / "blobs" / Digest(found.digest).hex
    await until(lambda: path.exists() and path.read_bytes() == found.data)
    assert texts(events, LogLevel.error)[1] == f"cannot fetch {lost.digest} again: reg.example: down"
    assert not (root / "blobs" / Digest(lost.digest).hex).exists()
    (line,) = texts(events, LogLevel.info)
    assert line == "verified 1 records and 3 blobs: 2 are damaged"
    keeping.maintenance.stopService()


@on_reactor
async def test_stop_during_repair_is_no_failure(
    keeping: Keeping, shelf: Shelf, root: Path, events: list[LogEvent]
) -> None:
    await keeping.add(URL, APP)
    damage(root, "blobs", APP.layers[0].digest)
    shelf.held.add("blob")
    keeping.maintenance.reconfigure(None, verifying(every=DAY))
    await keeping.passes(DAY)
    await until(lambda: shelf.waiting)
    told = len(texts(events))
    keeping.maintenance.reconfigure(None, None)
    await settle(keeping.store)
    assert (shelf.cancelled, len(texts(events))) == (1, told)


@on_reactor
async def test_stop_during_verification_is_no_failure(
    keeping: Keeping, store: Store, events: list[LogEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way: list[Deferred[Findings]] = []

    async def verify(max_rate: float | None, advance: object, found: object) -> Findings:
        under_way.append(Deferred())
        return await under_way[-1]

    monkeypatch.setattr(store, "verify", verify)
    keeping.maintenance.reconfigure(None, verifying(every=DAY))
    await keeping.passes(DAY)
    keeping.maintenance.stopService()
    await settle(keeping.store)
    assert under_way[0].called
    assert texts(events) == []


@on_reactor
async def test_max_rate_limits_reading(keeping: Keeping, events: list[LogEvent]) -> None:
    await keeping.add(URL, make_image("large", layers=1, layer_size=90_000))
    keeping.maintenance.reconfigure(None, verifying(every=DAY, max_rate=1000))
    await keeping.passes(DAY)
    for _ in range(10):
        await keeping.passes(8)
    assert texts(events, LogLevel.info) == []
    for _ in range(10):
        await keeping.passes(8)
    await until(lambda: texts(events, LogLevel.info))
    keeping.maintenance.stopService()


@on_reactor
async def test_damaged_file_is_removed_when_quarantine_fails(
    keeping: Keeping, root: Path, events: list[LogEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The removal is logged and the file is fetched again."""
    rename = Files.rename

    def full(self: Files, path: Path, target: Path) -> None:
        if target.parent.name == "bad":
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(self, path, target)

    monkeypatch.setattr(Files, "rename", full)
    await keeping.add(URL, APP)
    blob = damage(root, "blobs", APP.layers[0].digest)
    record = damage(root, "img", APP.manifest.digest)
    keeping.maintenance.reconfigure(None, verifying(every=DAY))
    await keeping.passes(DAY)
    await until(lambda: len(texts(events, LogLevel.error)) == 2)
    await until(lambda: blob.exists() and blob.read_bytes() == APP.layers[0].data)
    for line, path in zip(texts(events, LogLevel.error), (record, blob), strict=True):
        assert line.startswith(f"removed, no space to quarantine it: {path}: ")
    assert list((root / "pulls").glob("*/bad/*")) == []
    keeping.maintenance.stopService()
