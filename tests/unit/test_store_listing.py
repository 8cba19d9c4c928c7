"""The listing of the images: the image URLs of `list`, in each order, made from memory and not too often."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from twisted.internet.task import Clock

from ociregistry.store.listing import Listing, Order
from ociregistry.store.records import Dates
from ociregistry.store.store import Store
from tests.unit.support.command_lines import run
from tests.unit.support.common import REACTOR, image, on_reactor
from tests.unit.support.stores import StoreDir, day, image_of, list_of

A, B, C, D = (
    (f"config {name}".encode(), f"layer {name}".encode() * size)
    for name, size in zip("abcd", (1, 9, 5, 3), strict=True)
)


@pytest.fixture
def store_dir(root: Path) -> StoreDir:
    """Return a store with images of every kind."""
    store_dir = StoreDir(root)
    a = store_dir.image(A, "a:1", "a:2", created=day(1), pulled=day(5))
    b = store_dir.image(B, "b@", created=day(2), pulled=day(2), wanted=True)
    # Another platform, of which only the config is here.
    store_dir.blobs(C[0])
    c = store_dir.put(image_of(*C), "b@", created=day(2), wanted=False)
    store_dir.put(list_of(b, c), "b:1", created=day(3), pulled=day(9))
    # A tag that means another image by now, and shares a layer with the first.
    d = store_dir.image(D, "a:2", "d:old", created=day(0.5), confirmed=day(40))
    assert a != d
    # An index of which no image is here.
    store_dir.put(list_of(image_of(b"config x", b"layer x")), "none:1")
    return store_dir


async def listed(store: Store) -> Listing:
    """Return the listing."""
    return await store.listing.list()


@on_reactor
async def test_listing_has_the_rows_of_list(
    store_dir: StoreDir, open_store: Callable[..., Store], capfd: pytest.CaptureFixture[str]
) -> None:
    found = await listed(open_store())
    told: list[dict[str, Any]] = json.loads(run(capfd, "--image-path", store_dir.root, "list", "--json").out)
    rows = {row["url"]: row for row in told}
    images = found.orders[Order.URL]
    assert [one.url for one in images] == sorted(rows)
    assert len(images) == 7
    for one in images:
        row = rows[one.url]
        assert ("list" if one.is_list else "image", one.size) == (row["kind"], row["size"])
        assert (one.created.isoformat(), one.pulled.isoformat()) == (row["created"], row["pulled"])
        assert len(one.images) == row["images"]


@on_reactor
async def test_each_order_has_all_images(store_dir: StoreDir, open_store: Callable[..., Store]) -> None:
    found = await listed(open_store())
    for order in Order:
        images = found.orders[order]
        assert {one.url for one in images} == {one.url for one in found.orders[Order.URL]}
        assert list(images) == sorted(images, key=attrgetter(order.value, "url"))


@on_reactor
async def test_times_in_the_future_count_as_now(root: Path, open_store: Callable[..., Store]) -> None:
    store_dir = StoreDir(root)
    store_dir.image(A, "a:1", created=day(20_000), pulled=day(20_000))
    before = datetime.now(UTC)
    (one,) = (await listed(open_store())).orders[Order.URL]
    assert before <= one.created == one.pulled <= datetime.now(UTC)


@on_reactor
async def test_image_that_was_just_kept_is_listed(store: Store) -> None:
    dates = Dates(day(1), day(2))
    await store.keep(image_of(*A), image("reg.example/a:1"), dates, wanted=True)
    (one,) = (await listed(store)).orders[Order.URL]
    assert (one.url, one.created) == ("reg.example/a:1", day(1))


@on_reactor
async def test_listing_is_given_again_for_a_while(store_dir: StoreDir, clock: Clock) -> None:
    store = Store(store_dir.root, clock, REACTOR)
    store.startService()
    try:
        both = store.listing.list(), store.listing.list()
        first = await both[0]
        assert await both[1] is first
        clock.advance(1.9)
        assert await listed(store) is first
        clock.advance(0.2)
        assert await listed(store) is not first
    finally:
        store.stopService()


@on_reactor
async def test_listing_that_took_long_is_given_again_for_longer(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes a twentieth of a core at most."""
    times = iter((0.0, 1.0))
    monkeypatch.setattr(time, "thread_time", lambda: next(times))
    first = await listed(store)
    clock.advance(19.9)
    assert await listed(store) is first


@on_reactor
async def test_disk_that_hangs_does_not_hold_it_up(store: Store) -> None:
    """The page is what an operator looks at then."""
    released = Event()
    reads = [store._threads.read(released.wait) for _ in range(100)]
    try:
        assert (await listed(store)).orders[Order.URL] == []
    finally:
        released.set()
    for read in reads:
        await read


def test_store_is_not_looked_at(store_dir: StoreDir, open_store: Callable[..., Store], tmp_path: Path) -> None:
    """A listing is made from memory, so that a disk that hangs does not stop the page."""
    store = open_store()
    entries, seen = store._index.entries(), store._refresh.seen
    os.rename(store_dir.root, tmp_path / "gone")
    try:
        assert len(Listing.make(entries, seen, datetime.now(UTC)).orders[Order.URL]) == 7
    finally:
        os.rename(tmp_path / "gone", store_dir.root)
