"""Wrong dates: tags that were confirmed while the clock was ahead or behind, here or on another machine."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ociregistry.manifests import Manifest
from ociregistry.names import Digest, ImageReference
from ociregistry.store.files import Files
from ociregistry.store.paths import record_path
from ociregistry.store.records import Dates, Record, read_record
from ociregistry.store.snapshot import Snapshot
from ociregistry.store.store import Store
from tests.images import make_image, make_index
from tests.unit.support.common import image, manifest, on_reactor, record

BEFORE, AFTER = manifest(make_image("before")), manifest(make_image("after"))
INDEX = manifest(make_index("dated"))
LATEST, BY_DIGEST = image("quay.io/app:latest"), image(f"quay.io/app@{BEFORE.digest}")
NOW = datetime(2026, 11, 30, tzinfo=UTC)
BOOTED = datetime(1970, 1, 1, 0, 1, tzinfo=UTC)
MINUTE, HOUR, TEN_YEARS = timedelta(minutes=1), timedelta(hours=1), timedelta(days=3650)


class Machine:
    """A store on a machine whose wall clock is set."""

    def __init__(self, open_store: Callable[..., Store], root: Path) -> None:
        self.now = NOW
        self.root = root
        self._open = open_store
        self.restart()

    def restart(self) -> None:
        """Open the store in another process."""
        self.store = self._open(now=lambda: self.now)

    async def meanings(self, tag: ImageReference = LATEST) -> set[Digest | None]:
        """Return what the tag means in this process, in another one, and for a command."""
        found = {one.digest if (one := await self.store.manifest(tag)) else None}
        self.restart()
        found.add(one.digest if (one := await self.store.manifest(tag)) else None)
        return found | {Snapshot.read(self.root, self.now).index.meaning(str(tag))}


@pytest.fixture
def machine(open_store: Callable[..., Store], root: Path) -> Machine:
    """Return a machine with an empty store and the right time."""
    return Machine(open_store, root)


def put(root: Path, one: Record) -> None:
    """Write a record as rsync does."""
    path = record_path(root, one.manifest.digest, is_list=one.manifest.is_list)
    path.with_suffix(".new").write_bytes(one.render())
    path.with_suffix(".new").rename(path)


@pytest.mark.parametrize("ahead", [MINUTE, HOUR, TEN_YEARS])
@on_reactor
async def test_confirmation_wins_over_one_of_the_future(machine: Machine, ahead: timedelta) -> None:
    machine.now += ahead
    await machine.store.keep(BEFORE, LATEST)
    machine.now = NOW
    await machine.store.keep(AFTER, LATEST)
    assert await machine.meanings() == {AFTER.digest}
    # That time comes.
    machine.now += ahead + HOUR
    assert await machine.meanings() == {AFTER.digest}
    assert await machine.store.manifest(BY_DIGEST) == BEFORE


@on_reactor
async def test_confirmation_of_a_wrong_clock_wins_when_the_clock_is_right_again(machine: Machine) -> None:
    """The upstream said so later, even if the date says otherwise."""
    await machine.store.keep(BEFORE, LATEST)
    machine.now += TEN_YEARS
    await machine.store.keep(AFTER, LATEST)
    machine.now = NOW + HOUR
    assert await machine.meanings() == {AFTER.digest}


@on_reactor
async def test_confirmation_before_the_clock_was_set_wins(machine: Machine) -> None:
    await machine.store.keep(BEFORE, LATEST)
    machine.now = BOOTED
    machine.restart()
    await machine.store.keep(AFTER, LATEST)
    assert await machine.meanings() == {AFTER.digest}
    machine.now = NOW + HOUR
    assert await machine.meanings() == {AFTER.digest}


@on_reactor
async def test_tag_does_not_go_back_at_a_start_with_the_clock_not_set(machine: Machine) -> None:
    machine.now = BOOTED
    await machine.store.keep(BEFORE, LATEST)
    machine.now = NOW
    await machine.store.keep(AFTER, LATEST)
    machine.now = BOOTED
    assert await machine.meanings() == {AFTER.digest}


@on_reactor
async def test_same_manifest_is_confirmed_again(machine: Machine, root: Path) -> None:
    machine.now += TEN_YEARS
    await machine.store.keep(BEFORE, LATEST)
    machine.now = NOW
    await machine.store.keep(BEFORE, LATEST)
    assert read_record(record(root, BEFORE.digest)).images == {str(LATEST): Dates(NOW, NOW)}


@on_reactor
async def test_replica_with_a_date_of_the_future_loses(machine: Machine, root: Path) -> None:
    await machine.store.keep(AFTER, LATEST)
    put(root, Record(BEFORE, {}).confirm(LATEST, NOW + TEN_YEARS))
    machine.restart()
    assert await machine.meanings() == {AFTER.digest}


@pytest.mark.parametrize("ahead", [2 * MINUTE, TEN_YEARS])
@on_reactor
async def test_replica_with_a_date_of_the_future_is_copied_again(
    machine: Machine, root: Path, ahead: timedelta
) -> None:
    theirs = Record(BEFORE, {}).confirm(LATEST, NOW + ahead)
    put(root, theirs)
    machine.restart()
    assert await machine.meanings() == {BEFORE.digest}
    await machine.store.keep(AFTER, LATEST)
    put(root, theirs)
    machine.restart()
    assert await machine.meanings() == {AFTER.digest}
    machine.now += HOUR
    assert await machine.meanings() == {AFTER.digest}


@on_reactor
async def test_later_confirmation_of_a_replica_wins(machine: Machine, root: Path) -> None:
    await machine.store.keep(BEFORE, LATEST)
    put(root, Record(AFTER, {}).confirm(LATEST, NOW + 2 * MINUTE))
    machine.restart()
    assert await machine.meanings() == {AFTER.digest}


@on_reactor
async def test_of_dates_of_the_future_the_latest_wins(machine: Machine, root: Path) -> None:
    """The clock was not set yet; the dates are right."""
    put(root, Record(AFTER, {}).confirm(LATEST, NOW))
    put(root, Record(BEFORE, {}).confirm(LATEST, NOW - HOUR))
    machine.now = BOOTED
    machine.restart()
    assert await machine.meanings() == {AFTER.digest}


@pytest.mark.parametrize("after", [AFTER, INDEX])
@on_reactor
async def test_record_that_loses_its_tag_keeps_its_dates_and_last_pull(
    machine: Machine, root: Path, after: Manifest
) -> None:
    await machine.store.keep(BEFORE, LATEST)
    path = record(root, BEFORE.digest)
    os.utime(path, (1000, 1000))
    machine.now += HOUR
    await machine.store.keep(after, LATEST)
    assert read_record(path).images == {str(BY_DIGEST): Dates(NOW, NOW)}
    assert path.stat().st_mtime == 1000
    assert list((root / "pulls").glob("*/*.record")) == []


@on_reactor
async def test_tag_that_cannot_be_taken_follows_the_date(open_store: Callable[..., Store]) -> None:
    class Full(Files):
        def put(self, path: Path, data: bytes, temporary: Path) -> None:
            if path.name == BEFORE.digest.hex and path.exists():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().put(path, data, temporary)

    store = open_store(files=Full())
    await store.keep(BEFORE, LATEST)
    await store.keep(AFTER, LATEST)
    assert await store.manifest(LATEST) == AFTER


@on_reactor
async def test_list_of_referrers_keeps_its_tag(machine: Machine) -> None:
    """Without it, it would count as an index of images."""
    tag = image(f"quay.io/app:sha256-{BEFORE.digest.hex}")
    other = manifest(make_index("other"))
    await machine.store.keep(INDEX, tag)
    machine.now += HOUR
    await machine.store.keep(other, tag)
    entry = machine.store.entry(INDEX.digest)
    assert entry is not None
    assert entry.is_referrers
    assert await machine.meanings(tag) == {other.digest}
