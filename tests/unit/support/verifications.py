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
from tests.unit.support.doubles import REACTOR
from tests.unit.support.power_cuts import AtOnce, result
from tests.unit.support.stores import Stock, Unsynced, day, image_of, list_of

SLICE = 10
ONE = (b"the config", b"a layer that is longer than a slice")
LAYER = ONE[1]
NAMES = ("a:1", "b:2", "b@")


def stocked(root: Path) -> Stock:
    """Return a store with an image and an index."""
    stock = Stock(root)
    stock.put(list_of(stock.image(ONE, *NAMES, created=day(1), confirmed=day(2), pulled=day(3))), "a:3")
    return stock


@contextmanager
def opened(stock: Stock, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Start the store with thread functions run inline."""
    monkeypatch.setattr(ociregistry.store.verify, "_SLICE", SLICE)
    monkeypatch.setattr(ociregistry.store.store, "Threads", AtOnce)
    store = Store(stock.root, clock, REACTOR, Unsynced())
    store.startService()
    yield store
    store.stopService()


def verified(store: Store, advance: Callable[[int, int], object] = lambda done, total: None) -> Findings:
    """Return the findings of a verification without rate limit."""
    return result(store.verify(None, advance, unspecified))


async def unspecified(damaged: Damaged) -> None:
    """Ignore damaged content."""


def bad(stock: Stock) -> set[str]:
    """Return the names of the quarantined files."""
    return {path.name for path in (stock.root / "pulls").glob("*/bad/*")}


def the_image(stock: Stock) -> tuple[Manifest, Path]:
    """Return the image and the path of its record."""
    return image_of(*ONE), stock.path(image_of(*ONE))
