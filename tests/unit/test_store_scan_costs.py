"""What records cost: how often files are opened, read and parsed, and what a scan without changes does."""

from __future__ import annotations

import gc
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.task import Clock

import ociregistry.commands.list
import ociregistry.commands.prune
import ociregistry.manifests
import ociregistry.store.records
from ociregistry.manifests import OCI_MANIFEST, Manifest
from ociregistry.names import Digest
from ociregistry.store import records as recordfiles
from ociregistry.store import scan
from ociregistry.store.blobs import BlobFolder
from ociregistry.store.index import Entry
from ociregistry.store.records import Record
from ociregistry.store.scan import ForeignFiles, ScanResult, Signature, scan_changes
from ociregistry.store.store import Store
from tests.images import make_image
from tests.unit.support.archives import to_json
from tests.unit.support.command_lines import run
from tests.unit.support.common import image, manifest, on_reactor, until
from tests.unit.support.daemons import Daemons
from tests.unit.support.stores import StoreDir, calls_of, list_of

LAYERS = 10
NGINX = image("docker.io/library/nginx:1")


@pytest.fixture
def store_dir(root: Path) -> StoreDir:
    """Return an empty store."""
    return StoreDir(root)


def layered(seed: str) -> Manifest:
    """Return an image whose blobs no store has."""
    config, *layers = (
        {"mediaType": "application/vnd.example", "digest": Digest.of(f"{seed} {number}".encode()), "size": 1000}
        for number in range(LAYERS + 1)
    )
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers}
    return Manifest.parse(to_json(document), OCI_MANIFEST)


def put_many(store_dir: StoreDir, count: int) -> None:
    """Add images that are metadata."""
    for number in range(count):
        store_dir.put(layered(str(number)), f"app{number}@", wanted=False)


def test_each_record_is_opened_and_read_once_and_parsed_with_its_manifest(
    store_dir: StoreDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of that again for each thread, process and command that reads the store."""
    put_many(store_dir, 20)
    counts: Counter[str] = Counter()

    def counted(module: Any, name: str) -> None:
        really = getattr(module, name)

        def called(*arguments: Any) -> Any:
            counts[name] += 1
            return really(*arguments)

        monkeypatch.setattr(module, name, called)

    counted(os, "open")
    counted(os, "read")
    counted(os, "fstat")
    counted(os, "close")
    for module in (ociregistry.store.records, ociregistry.manifests):
        counted(module, "parse_json")
    assert len(scan_changes(store_dir.root, {}, ForeignFiles()).read) == 20
    assert counts == {"open": 20, "fstat": 20, "read": 20, "close": 20, "parse_json": 40}


def test_reading_takes_few_calls_a_descriptor(store_dir: StoreDir) -> None:
    put_many(store_dir, 10)
    few = calls_of(lambda: scan_changes(store_dir.root, {}, ForeignFiles()))
    put_many(store_dir, 30)
    many = calls_of(lambda: scan_changes(store_dir.root, {}, ForeignFiles()))
    assert (many - few) / 20 < 150 + 20 * LAYERS


def test_scan_without_changes_takes_few_calls_and_opens_nothing(
    store_dir: StoreDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs every second, beside the hits."""

    def idle(count: int) -> int:
        put_many(store_dir, count)
        foreign = ForeignFiles()
        known = scan_changes(store_dir.root, {}, foreign)
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", None)
            return calls_of(lambda: scan_changes(store_dir.root, known.seen, foreign))

    few = idle(10)
    assert (idle(60) - few) / 50 <= 4


class Scans:
    """Records the scans of a store, and holds them before they return while `hold` is set."""

    def __init__(self, store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        self._clock = clock
        self._due = len(clock.getDelayedCalls())
        self.scanned = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()
        self.known: list[Mapping[str, Signature]] = []
        self.results: list[ScanResult] = []
        really_scan = scan_changes

        def scan_recorded(
            root: Path, known: Mapping[str, Signature], foreign: ForeignFiles, blobs: BlobFolder | None
        ) -> ScanResult:
            self.known.append(known)
            self.results.append(really_scan(root, known, foreign, blobs))
            self.scanned.set()
            self.go_on.wait(10)
            return self.results[-1]

        monkeypatch.setattr(scan, "scan_changes", scan_recorded)

    def begin(self) -> None:
        """Start a scan."""
        self.scanned.clear()
        self._clock.advance(1)

    async def end(self) -> None:
        """Wait until it has been applied."""
        self.go_on.set()
        await until(lambda: len(self._clock.getDelayedCalls()) == self._due)


@on_reactor
async def test_idle_reactor_copies_nothing_for_a_scan(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.keep(manifest(make_image("idle")), NGINX)
    scans = Scans(store, clock, monkeypatch)
    for _ in range(3):
        scans.begin()
        await scans.end()
    assert scans.known[2] is scans.results[1].seen
    assert [len(result.read) for result in scans.results] == [1, 0, 0]


@on_reactor
async def test_record_that_cannot_be_read_during_a_scan_is_read_by_the_next(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scan saw it as it is known, and nothing on the disk changes afterwards."""
    kept = manifest(make_image("unreadable"))
    await store.keep(kept, NGINX)
    scans = Scans(store, clock, monkeypatch)
    scans.begin()
    await scans.end()
    scans.go_on.clear()
    scans.begin()
    await until(scans.scanned.is_set)

    def fail(*args: object) -> Record:
        raise OSError("too little memory")

    with monkeypatch.context() as patch:
        patch.setattr(recordfiles, "read_record", fail)
        assert await store.manifest(NGINX) is None
    await scans.end()
    scans.begin()
    await scans.end()
    assert await store.manifest(NGINX) == kept


# Garbage collection


@on_reactor
async def test_running_daemon_collects_no_garbage_in_its_index(store_dir: StoreDir, daemons: Daemons) -> None:
    put_many(store_dir, 20)
    try:
        daemons.start()
        assert gc.isenabled()
        assert not any(isinstance(one, Entry) for one in gc.get_objects())
    finally:
        gc.unfreeze()


def test_commands_that_read_the_store_and_end_collect_no_garbage(
    store_dir: StoreDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    put_many(store_dir, 1)
    enabled: list[bool] = []

    def printed(lines: Iterable[str]) -> None:
        enabled.extend(gc.isenabled() for _ in lines)

    for module in (ociregistry.commands.list, ociregistry.commands.prune):
        monkeypatch.setattr(module, "print_lines", printed)
    for command in (["list"], ["prune", "--pattern", ".", "--dry-run"]):
        kept = gc.get_freeze_count()
        assert run(capfd, "--image-path", store_dir.root, *command).status == 0
        assert gc.get_freeze_count() > kept
    assert (enabled, gc.isenabled()) == ([False] * 3, True)


# Commands


def looked_at(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> int:
    """Return how many files `work` looks at one by one."""
    count = 0
    really = os.lstat

    def lstat(path: str | Path) -> os.stat_result:
        nonlocal count
        count += 1
        return really(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", lstat)
        work()
    return count


def test_list_looks_at_blobs_only_where_it_prints_what_is_missing(
    store_dir: StoreDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for number in range(5):
        one = store_dir.image((b"config %d" % number, b"layer"), wanted=True)
        store_dir.put(list_of(one), f"app{number}:1")

    def listing(*options: str) -> int:
        return looked_at(monkeypatch, lambda: run(capfd, "--image-path", store_dir.root, "list", *options))

    assert listing("--long") - listing() == 10
