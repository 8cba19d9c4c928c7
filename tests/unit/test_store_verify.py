"""Verifying blobs: quarantine of damaged ones, concurrent changes, rate and cancellation."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ociregistry.names import Digest
from ociregistry.store.files import Files
from ociregistry.store.store import Store
from ociregistry.store.verify import DamagedOutcome, Findings, note_verified
from tests.unit.support.common import REACTOR, fired, on_reactor, open_descriptors
from tests.unit.support.irregular import IRREGULAR, put_irregular
from tests.unit.support.power_cuts import result
from tests.unit.support.stores import StoreDir, Unsynced, image_of
from tests.unit.support.verifications import (
    LAYER,
    ONE,
    SLICE,
    filled_store,
    opened,
    quarantined,
    unspecified,
    verified,
)


@pytest.fixture
def store_dir(root: Path) -> StoreDir:
    """Return a store with an image and an index."""
    return filled_store(root)


@pytest.fixture
def store(store_dir: StoreDir, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Return the store started, with thread functions run inline."""
    with opened(store_dir, clock, monkeypatch) as store:
        yield store


# Sound


def test_sound_store_is_unchanged(store_dir: StoreDir, store: Store) -> None:
    store_dir.blobs(b"nobody's")
    wide = store_dir.root / "blobs" / Digest.of(b"wide", "sha512").hex
    wide.write_bytes(b"wide")
    before = {path: path.stat().st_mtime_ns for path in store_dir.root.rglob("*") if path.name != "pulls"}
    progress: list[tuple[int, int]] = []
    size = sum(map(len, (*ONE, b"nobody's", b"wide")))
    findings = verified(store, lambda done, total: progress.append((done, total)))
    assert findings == Findings(records=2, blobs=4, bytes=size)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert (progress[-1], {total for _, total in progress}, len(progress) > 4) == ((size, size), {size}, True)


def test_other_file_names_are_ignored(store_dir: StoreDir, store: Store) -> None:
    for folder in ("blobs", "fat", "img"):
        (store_dir.root / folder / ".syncthing.x.tmp").write_bytes(b"{")
    assert verified(store).damaged == []


def test_missing_blob_is_no_damage(store_dir: StoreDir, store: Store) -> None:
    store_dir.blob(LAYER).unlink()
    findings = verified(store)
    assert (findings.damaged, findings.missing) == ([], {image_of(*ONE).digest: {Digest.of(LAYER): len(LAYER)}})


# Blobs


@pytest.mark.parametrize(
    "damage",
    [
        *(lambda data, at=at: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in (0, 9, 10, 25, 34)),
        *(lambda data, size=size: data[:size] for size in (0, 1, SLICE, 2 * SLICE, len(LAYER) - 1)),
        lambda data: data + b"\0",
        lambda data: data + data,
        lambda data: bytes(len(data)),
    ],
)
def test_damaged_blob_is_quarantined(store_dir: StoreDir, store: Store, damage: Callable[[bytes], bytes]) -> None:
    store_dir.blob(LAYER).write_bytes(damage(LAYER))
    findings = verified(store)
    (damaged,) = findings.damaged
    digest = Digest.of(LAYER)
    assert (damaged.path, damaged.digest, damaged.is_blob, damaged.images) == (
        store_dir.blob(LAYER),
        digest,
        True,
        (),
    )
    assert f"its {len(damage(LAYER))} bytes do not have the digest {digest}" in damaged.why
    assert store_dir.has(*ONE) == [True, False]
    assert (store_dir.root / "pulls" / "0" / "bad" / digest.hex).read_bytes() == damage(LAYER)
    assert findings.missing == {image_of(*ONE).digest: {Digest.of(LAYER): len(LAYER)}}
    assert result(store.blob(digest)) is None
    assert verified(store).damaged == []


@pytest.mark.parametrize("at", [0, 2 * SLICE])
def test_unreadable_blob_is_quarantined(
    store_dir: StoreDir, store: Store, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    pread = os.pread
    inode = store_dir.blob(LAYER).stat().st_ino

    def reads(file: int, count: int, offset: int) -> bytes:
        if os.fstat(file).st_ino == inode and offset == at:
            raise OSError(errno.EIO, "Input/output error")
        return pread(file, count, offset)

    monkeypatch.setattr(os, "pread", reads)
    findings = verified(store)
    assert [one.why for one in findings.damaged] == [f"cannot be read at byte {at}: Input/output error"]
    assert quarantined(store_dir) == {Digest.of(LAYER).hex}
    assert (findings.blobs, store_dir.has(*ONE)) == (2, [True, False])


@pytest.mark.parametrize("kind", IRREGULAR)
def test_blob_that_is_no_regular_file_is_quarantined(store_dir: StoreDir, store: Store, kind: str) -> None:
    put_irregular(store_dir.blob(LAYER), kind)
    findings = verified(store)
    assert [one.why for one in findings.damaged] == [f"cannot be opened: {IRREGULAR[kind]}"]
    assert quarantined(store_dir) == {Digest.of(LAYER).hex}
    assert findings.missing == {image_of(*ONE).digest: {Digest.of(LAYER): len(LAYER)}}
    assert (findings.records, findings.blobs) == (2, 2)


@pytest.mark.parametrize("which", ["record", "blob", "link"])
def test_damaged_file_that_cannot_be_moved_does_not_end_the_verification(
    store_dir: StoreDir, store: Store, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    path = store_dir.blob(LAYER)
    if which == "link":
        put_irregular(path, "link to itself")
    elif which == "blob":
        path.write_bytes(bytes(len(LAYER)))
    else:
        path = store_dir.root / "img" / image_of(*ONE).digest.hex
        path.write_bytes(path.read_bytes()[:-10])

    def fail(self: Files, source: Path, target: Path) -> None:
        assert (source, target.parent.name) == (path, "bad")
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(source))

    monkeypatch.setattr(Files, "rename", fail)
    findings = verified(store)
    (damaged,) = findings.damaged
    assert (damaged.path, damaged.outcome) == (path, DamagedOutcome.IN_PLACE)
    assert damaged.why.endswith("; it cannot be moved: Operation not permitted")
    assert os.path.lexists(path)
    assert (findings.records, findings.blobs) == ((1, 2) if which == "record" else (2, 2))


@pytest.mark.parametrize("how", ["replaced", "removed", "grown", "rewritten"])
def test_blob_changed_while_hashing_is_ignored(store_dir: StoreDir, store: Store, how: str) -> None:
    """Another process replaced, removed or is copying it."""
    path = store_dir.blob(LAYER)
    path.write_bytes(LAYER[:30])
    done = False

    def advance(count: int, total: int) -> None:
        nonlocal done
        if done or count <= len(ONE[0]) * (Digest.of(ONE[0]).hex < path.name):
            return
        done = True
        if how in ("replaced", "removed"):
            path.unlink()
        if how == "grown":
            with path.open("ab") as file:
                file.write(LAYER[30:33])
        elif how != "removed":
            path.write_bytes(LAYER)
            os.utime(path, (1, 1))

    findings = verified(store, advance)
    assert done
    assert (findings.damaged, quarantined(store_dir)) == ([], set())
    assert path.exists() == (how != "removed")


def test_blob_removed_before_its_turn_is_no_damage(store_dir: StoreDir, store: Store) -> None:
    first, second = sorted(ONE, key=lambda blob: Digest.of(blob).hex)
    findings = verified(store, lambda done, total: store_dir.blob(second).unlink(missing_ok=True))
    assert (findings.damaged, findings.blobs, findings.bytes) == ([], 1, len(first))


@pytest.mark.parametrize("error", [errno.ESTALE, errno.ENOENT])
def test_blob_that_another_machine_replaces_is_no_damage(
    store_dir: StoreDir, store: Store, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """On NFS and FUSE the old content is no more, although the file is open."""
    path, read = str(store_dir.blob(LAYER)), os.pread

    def fail(descriptor: int, count: int, offset: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{descriptor}") == path:
            raise OSError(error, os.strerror(error))
        return read(descriptor, count, offset)

    blobs = verified(store).blobs
    monkeypatch.setattr(os, "pread", fail)
    findings = verified(store)
    assert (findings.damaged, findings.blobs) == ([], blobs - 1)
    assert store_dir.blob(LAYER).exists()


def test_no_file_stays_open(store_dir: StoreDir, store: Store) -> None:
    store_dir.blob(LAYER).write_bytes(b"")
    before = open_descriptors()
    verified(store)
    assert open_descriptors() <= before


# Rate


def test_max_rate(store_dir: StoreDir, store: Store, clock: Clock) -> None:
    done: list[tuple[float, int]] = []
    verifying = Deferred.fromCoroutine(
        store.verify(2.0, lambda count, total: done.append((clock.seconds(), count)), unspecified)
    )
    total = sum(map(len, ONE))
    for _ in range(100 * total):
        if verifying.called:
            break
        clock.advance(0.25)
    assert fired(verifying).bytes == total
    assert clock.seconds() >= total / 2
    assert clock.seconds() < total / 2 + 1
    assert all(count <= 2 * moment + SLICE for moment, count in done)


def test_cancel_between_slices(store_dir: StoreDir, store: Store, clock: Clock) -> None:
    before = open_descriptors()
    verifying = Deferred.fromCoroutine(store.verify(1.0, lambda count, total: None, unspecified))
    clock.advance(5)
    verifying.addErrback(lambda failure: None)
    verifying.cancel()
    assert open_descriptors() <= before
    assert result(store.last_verified(LONG_AGO)) == LONG_AGO


# Time of the last run

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


def test_last_verified_survives_a_restart(store_dir: StoreDir, store: Store, clock: Clock) -> None:
    assert result(store.last_verified(LONG_AGO)) == LONG_AGO
    before = datetime.now(UTC) - timedelta(seconds=1)
    verified(store)
    now = datetime.now(UTC) + timedelta(seconds=1)
    last = result(store.last_verified(now))
    assert before < last < now
    again = Store(store_dir.root, clock, REACTOR, Unsynced())
    assert result(again.last_verified(now)) == last


@pytest.mark.parametrize("ahead", [timedelta(seconds=1), timedelta(days=3650)])
def test_time_in_the_future_counts_as_now(store_dir: StoreDir, store: Store, ahead: timedelta) -> None:
    """Also after a restart: else a daemon that is restarted often would never verify until then."""
    note_verified(store_dir.root, LONG_AGO + ahead)
    assert result(store.last_verified(LONG_AGO)) == LONG_AGO
    assert result(store.last_verified(LONG_AGO + 2 * ahead)) == LONG_AGO


def test_failed_run_does_not_count(store_dir: StoreDir, store: Store) -> None:
    (store_dir.root / "blobs").rename(store_dir.root / "elsewhere")
    with pytest.raises(FileNotFoundError):
        verified(store)
    assert result(store.last_verified(LONG_AGO)) == LONG_AGO


@on_reactor
async def test_verify_with_real_threads(store_dir: StoreDir, open_store: Callable[..., Store]) -> None:
    store_dir.blob(LAYER).write_bytes(b"x")
    findings = await open_store().verify(None, lambda done, total: None, unspecified)
    assert [one.digest for one in findings.damaged] == [Digest.of(LAYER)]
