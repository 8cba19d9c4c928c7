"""A store to verify, and the findings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from twisted.internet.task import Clock

import ociregistry.store.store
import ociregistry.store.verify
from ociregistry.manifests import Manifest
from ociregistry.store.store import Store
from ociregistry.store.verify import Damaged, Findings
from tests.unit.support.common import REACTOR
from tests.unit.support.power_cuts import InlineThreads, result
from tests.unit.support.stores import StoreDir, Unsynced, day, image_of, list_of

SLICE = 10
ONE = (b"the config", b"a layer that is longer than a slice")
LAYER = ONE[1]
NAMES = ("a:1", "b:2", "b@")


def filled_store(root: Path) -> StoreDir:
    """Return a store with an image and an index."""
    store_dir = StoreDir(root)
    store_dir.put(list_of(store_dir.image(ONE, *NAMES, created=day(1), confirmed=day(2), pulled=day(3))), "a:3")
    return store_dir


@contextmanager
def opened(store_dir: StoreDir, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Start the store with thread functions run inline."""
    monkeypatch.setattr(ociregistry.store.verify, "_SLICE", SLICE)
    monkeypatch.setattr(ociregistry.store.store, "Threads", InlineThreads)
    store = Store(store_dir.root, clock, REACTOR, Unsynced())
    store.startService()
    yield store
    store.stopService()


def verified(store: Store, advance: Callable[[int, int], object] = lambda done, total: None) -> Findings:
    """Return the findings of a verification without rate limit."""
    return result(store.verify(None, advance, unspecified))


async def unspecified(damaged: Damaged) -> None:
    """Ignore damaged content."""


def quarantined(store_dir: StoreDir) -> set[str]:
    """Return the names of the quarantined files."""
    return {path.name for path in (store_dir.root / "pulls").glob("*/bad/*")}


def the_image(store_dir: StoreDir) -> tuple[Manifest, Path]:
    """Return the image and the path of its record."""
    return image_of(*ONE), store_dir.path(image_of(*ONE))
