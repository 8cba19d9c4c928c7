"""Fixtures and hooks for the unit tests."""

from __future__ import annotations

import gc
import itertools
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from hypothesis import HealthCheck, settings
from twisted.internet.task import Clock
from twisted.logger import LogEvent, globalLogPublisher

from ociregistry.names import Digest
from ociregistry.pullthrough.cache import PullThrough
from ociregistry.pullthrough.completion import Completion
from ociregistry.store.blobs import StoredBlob
from ociregistry.store.store import Store
from tests.certificates import Authority
from tests.unit.support.common import REACTOR, RecordingObserver
from tests.unit.support.completions import FakeBlobFetcher
from tests.unit.support.daemons import Daemons
from tests.unit.support.registries import MemoryRegistries
from tests.unit.support.wire import Network
from tests.upstream import ScriptedRegistry

# A slow machine must not fail a test by a hypothesis deadline.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


def pytest_collection_finish() -> None:
    """Exclude imported modules from the garbage collection after every test, which would take 50 ms each."""
    gc.collect()
    gc.freeze()


_TESTS = itertools.count(1)


def pytest_runtest_logfinish() -> None:
    """Exclude reports and caches too; every 50 tests only, as recent objects may become garbage."""
    if next(_TESTS) % 50 == 0:
        gc.freeze()


@pytest.fixture
def clock() -> Clock:
    """Return a clock that advances only when the test advances it."""
    return Clock()


@pytest.fixture
def events() -> Iterator[list[LogEvent]]:
    """Return the list of events logged during the test."""
    observer = RecordingObserver()
    globalLogPublisher.addObserver(observer)
    yield observer.events
    globalLogPublisher.removeObserver(observer)


@pytest.fixture
def utc_plus_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set the local time zone to UTC+1."""
    monkeypatch.setenv("TZ", "XYZ-1")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Restore the handler of SIGINT afterwards, so that the tests can still be interrupted."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return the folder of the store."""
    return tmp_path / "store"


@pytest.fixture
def store(root: Path, clock: Clock) -> Iterator[Store]:
    """Return an empty store that scans its folders when `clock` advances."""
    store = Store(root, clock, REACTOR)
    store.startService()
    yield store
    store.stopService()


@pytest.fixture
def open_store(root: Path) -> Iterator[Callable[..., Store]]:
    """Return a function that opens a second store on the folder; its clock stands still, so it scans only once."""
    opened: list[Store] = []

    def open_another(**options: Any) -> Store:
        opened.append(Store(root, Clock(), REACTOR, **options))
        opened[-1].startService()
        return opened[-1]

    yield open_another
    for store in opened:
        store.stopService()


@pytest_twisted.async_yield_fixture
async def network() -> AsyncIterator[Network]:
    """Return a factory of clients on real connections."""
    network = Network()
    yield network
    await network.close()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """Return a certificate authority that is in no trust store."""
    return Authority(tmp_path)


@pytest.fixture
def secure(authority: Authority) -> Iterator[ScriptedRegistry]:
    """Return an upstream that speaks TLS with a certificate of `authority`."""
    with ScriptedRegistry(tls=authority.server_context("127.0.0.1")) as upstream:
        yield upstream


@pytest.fixture
def upstreams() -> MemoryRegistries:
    """Return in-memory upstreams that record all requests."""
    return MemoryRegistries()


@pytest.fixture
def cache(store: Store, upstreams: MemoryRegistries, clock: Clock) -> PullThrough:
    """Return a cache over the empty store."""
    return PullThrough(store, upstreams, clock, jitter=lambda: 1.0)


@pytest.fixture
def lookups(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[Digest]:
    """Return the digests of the blobs looked up in the store."""
    digests: list[Digest] = []
    original = store.blob

    async def record_lookup(digest: Digest) -> StoredBlob | None:
        found = await original(digest)
        digests.append(digest)
        return found

    monkeypatch.setattr(store, "blob", record_lookup)
    return digests


@pytest_twisted.async_yield_fixture
async def daemons(root: Path, clock: Clock) -> AsyncIterator[Daemons]:
    """Return a factory of daemons; stops them at the end."""
    daemons = Daemons(root, clock)
    yield daemons
    await daemons.stop_all()


@pytest.fixture
def blob_fetcher(root: Path) -> FakeBlobFetcher:
    """Return a blob fetcher whose results the test decides."""
    return FakeBlobFetcher(root)


@pytest.fixture
def completion(store: Store, blob_fetcher: FakeBlobFetcher, clock: Clock) -> Iterator[Completion]:
    """Return a running completion service."""
    completion = Completion(store, blob_fetcher, clock)
    completion.startService()
    yield completion
    completion.stopService()
