"""Scans: every second the store takes over changes of its records by other processes."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.names import Digest
from ociregistry.store import records as recordfiles
from ociregistry.store import scan
from ociregistry.store.blobs import BlobFolder
from ociregistry.store.lookups import Counts
from ociregistry.store.records import Record
from ociregistry.store.scan import ForeignFiles, ScanResult, Signature
from ociregistry.store.store import Store
from tests.images import make_image
from tests.unit.support.common import image, manifest, on_reactor, record, texts, until

IMAGE, OTHER = manifest(make_image("store")), manifest(make_image("other"))
NGINX, APP = image("docker.io/library/nginx:1"), image("quay.io/app:1")


async def scan_once(clock: Clock) -> None:
    """Advance the clock by a second and wait until scan and free-space check have scheduled their next run."""
    due = len(clock.getDelayedCalls())
    clock.advance(1)
    await until(lambda: len(clock.getDelayedCalls()) == due)


@on_reactor
async def test_scan_takes_over_changes_of_other_processes(
    store: Store, root: Path, clock: Clock, open_store: Callable[[], Store]
) -> None:
    other = open_store()
    await store.keep(IMAGE, NGINX)
    await other.keep(OTHER, APP)
    assert await store.manifest(APP) is None
    await scan_once(clock)
    assert await store.manifest(APP) == OTHER
    await other.keep(OTHER, NGINX)
    await scan_once(clock)
    assert await store.manifest(NGINX) == OTHER
    record(root, OTHER.digest).unlink()
    await scan_once(clock)
    assert store.tags(APP.repository) == []
    assert await store.manifest(NGINX) == IMAGE


@on_reactor
async def test_damaged_record_hides_no_other_and_is_logged_once(
    store: Store, root: Path, clock: Clock, events: list[LogEvent]
) -> None:
    await store.keep(IMAGE, NGINX)
    await store.keep(OTHER, APP)
    whole = record(root, IMAGE.digest).read_bytes()
    record(root, IMAGE.digest).write_bytes(whole[:50])
    for _ in range(3):
        await scan_once(clock)
    assert len(texts(events, LogLevel.warn)) == 1
    assert store.counts == Counts(lists=0, images=1)
    record(root, IMAGE.digest).write_bytes(whole)
    await scan_once(clock)
    assert await store.manifest(NGINX) == IMAGE


@on_reactor
async def test_many_foreign_files_are_logged_in_one_line(
    store: Store, root: Path, clock: Clock, events: list[LogEvent]
) -> None:
    for number in range(50):
        record(root, Digest(f"sha256:{number:064x}")).write_text("not ours")
    for _ in range(3):
        await scan_once(clock)
    (text,) = texts(events, LogLevel.warn)
    first = record(root, Digest(f"sha256:{0:064x}"))
    assert text.startswith(
        f"ignored, 50 files in {root}/img are no records that can be served, the first is {first}: not JSON"
    )


@on_reactor
async def test_write_during_a_scan_is_not_lost(store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scan reads the folders before the write and applies its result after it."""
    await store.keep(OTHER, APP)
    has_read, go_on = threading.Event(), threading.Event()
    really_scan = scan.scan_changes

    def scan_slowly(
        root: Path, known: Mapping[str, Signature], foreign: ForeignFiles, blobs: BlobFolder | None
    ) -> ScanResult:
        found = really_scan(root, known, foreign, blobs)
        has_read.set()
        go_on.wait(10)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(scan, "scan_changes", scan_slowly)
        due = len(clock.getDelayedCalls())
        clock.advance(1)
        await until(has_read.is_set)
        await store.keep(IMAGE, NGINX)
        await store.keep(OTHER, NGINX)
        go_on.set()
        await until(lambda: len(clock.getDelayedCalls()) == due)
    for _ in range(2):
        assert await store.manifest(NGINX) == OTHER
        assert await store.manifest(image(f"docker.io/library/nginx@{IMAGE.digest}")) == IMAGE
        assert store.counts == Counts(lists=0, images=2)
        await scan_once(clock)


@on_reactor
async def test_failed_scan_is_logged_and_the_next_one_runs(
    store: Store, root: Path, clock: Clock, events: list[LogEvent], open_store: Callable[[], Store]
) -> None:
    other = open_store()
    (root / "fat").rmdir()
    (root / "fat").touch()
    for _ in range(3):
        await scan_once(clock)
    lines = [line for line in texts(events, LogLevel.error) if "cannot scan the store" in line]
    assert len(lines) == 1
    (root / "fat").unlink()
    (root / "fat").mkdir()
    await other.keep(IMAGE, NGINX)
    await scan_once(clock)
    assert await store.manifest(NGINX) == IMAGE


@on_reactor
async def test_temporarily_unreadable_record_is_a_hit_again(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With too little memory, nothing on disk changes that a scan could notice."""
    await store.keep(IMAGE, NGINX)
    await scan_once(clock)

    def fail(*args: object) -> Record:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with monkeypatch.context() as patch:
        patch.setattr(recordfiles, "read_record", fail)
        assert await store.manifest(NGINX) is None
    await scan_once(clock)
    assert await store.manifest(NGINX) == IMAGE
