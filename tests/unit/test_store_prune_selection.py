"""Selection for pruning: an operator's conditions, and eviction of the least recently pulled images."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from ociregistry.names import Digest
from ociregistry.store.index import Inventory
from ociregistry.store.prune import EvictionPolicy, Plan, PruneSet, Selection, Withheld, size_of
from tests.unit.support.stores import Stock, calls_of, day, image_of, in_memory, list_of, named, url_of

SIZE = 100_000
"""Bytes per blob, large enough that records hardly matter."""
NOW = day(100)


@pytest.fixture
def stock(tmp_path: Path) -> Stock:
    """Return an empty store."""
    return Stock(tmp_path / "store")


def blob(seed: object, size: int = SIZE) -> bytes:
    """Return a large blob."""
    return f"{seed} ".encode().ljust(size, b".")


def taken(inventory: Inventory, choose: Selection) -> list[str]:
    """Return the pruned image URLs, without the host."""
    return [row.url.removeprefix("reg.example/") for row in choose(inventory).plan.rows]


def policy(
    max_size: int | None = None,
    *keep: str,
    pulled_before: datetime | None = None,
    busy: Set[Digest] = frozenset(),
    keep_pulled_since: datetime = NOW,
    max_share: int = 100,
) -> EvictionPolicy:
    """Return an eviction policy."""
    return EvictionPolicy(pulled_before, max_size, named(*keep), busy, keep_pulled_since, NOW, max_share)


# An operator's conditions


def test_all_conditions_must_match(stock: Stock) -> None:
    stock.image((b"1",), "a:old", "b:old", created=day(1), pulled=day(5))
    stock.image((b"2",), "a:new", created=day(9), pulled=day(5))
    stock.image((b"3",), "a:used", created=day(1), pulled=day(9))
    inventory, matches = stock.inventory(), named("a")
    assert taken(inventory, Selection(matches)) == ["a:new", "a:old", "a:used"]
    assert taken(inventory, Selection(created_before=day(5))) == ["a:old", "a:used", "b:old"]
    assert taken(inventory, Selection(pulled_before=day(6))) == ["a:new", "a:old", "b:old"]
    assert taken(inventory, Selection(matches, day(5))) == ["a:old", "a:used"]
    assert taken(inventory, Selection(matches, None, day(6))) == ["a:new", "a:old"]
    assert taken(inventory, Selection(None, day(5), day(6))) == ["a:old", "b:old"]
    assert taken(inventory, Selection(matches, day(5), day(6))) == ["a:old"]
    assert taken(inventory, Selection()) == ["a:new", "a:old", "a:used", "b:old"]


def test_before_is_exclusive(stock: Stock) -> None:
    stock.image((b"1",), "a:1", created=day(5), pulled=day(6))
    assert taken(stock.inventory(), Selection(created_before=day(5))) == []
    assert taken(stock.inventory(), Selection(created_before=day(5.001))) == ["a:1"]
    assert taken(stock.inventory(), Selection(pulled_before=day(6))) == []
    assert taken(stock.inventory(), Selection(pulled_before=day(6.001))) == ["a:1"]


def test_each_url_has_its_own_date(stock: Stock) -> None:
    image = stock.image((b"1",), "a:1", created=day(1))
    stock.put(image, "b:1", created=day(5))
    stock.prune(Selection(created_before=day(3)))
    assert stock.names(image) == {"b:1"}


@pytest.mark.parametrize("used", ["left", "both"])
def test_unused_for_considers_indexes_with_their_images(stock: Stock, used: str) -> None:
    """An index may be requested without its images, and an image by digest without its index."""
    when = {name: day(9 if name == used else 1) for name in ("left", "right", "both")}
    left, right = (stock.image((name.encode(),), "a@", pulled=when[name]) for name in ("left", "right"))
    both = stock.put(list_of(left, right), "a:1", pulled=when["both"])
    stock.prune(Selection(pulled_before=day(5)))
    assert (stock.names(both), stock.names(left)) == ({"a:1"}, {"a@"})
    if used == "both":
        assert stock.names(right) == {"a@"}
    stock.prune(Selection(pulled_before=day(10)))
    assert [stock.names(one) for one in (left, right, both)] == [None] * 3


@pytest.mark.parametrize("used", ["outer", "image"])
def test_unused_for_considers_nested_indexes(stock: Stock, used: str) -> None:
    image = stock.image((b"image",), "a@", pulled=day(9 if used == "image" else 1))
    inner = stock.put(list_of(image), "a@", pulled=day(1))
    outer = stock.put(list_of(inner), "a:1", pulled=day(9 if used == "outer" else 1))
    stock.prune(Selection(pulled_before=day(5)))
    assert [stock.names(one) for one in (outer, inner, image)] == [{"a:1"}, {"a@"}, {"a@"}]


def test_newer_index_protects_its_older_image(stock: Stock) -> None:
    """When a tag moves to a new index, some images usually belong to the old index too."""
    image = stock.image((b"1",), "a@", created=day(1))
    stock.put(list_of(image), "a:1", created=day(1), confirmed=day(1))
    new = stock.put(list_of(image, seed="new"), "a:1", created=day(9), confirmed=day(9))
    stock.prune(Selection(created_before=day(5)))
    assert (stock.names(new), stock.names(image), stock.has(b"1")) == ({"a:1"}, {"a@"}, [True])


# Eviction


def fill(stock: Stock, count: int = 10) -> list[bytes]:
    """Create images a0:1 to a9:1 with one blob each, pulled one after the other."""
    blobs = [blob(number) for number in range(count)]
    for number, one in enumerate(blobs):
        stock.image((one,), f"a{number}:1", pulled=day(number))
    return blobs


def test_least_recently_pulled_goes_until_nine_tenths_remain(stock: Stock) -> None:
    blobs = fill(stock)
    size = size_of(stock.inventory())
    assert stock.prune(policy(size)).rows == ()
    plan = stock.prune(policy(size - 1))
    assert [row.url for row in plan.rows] == [url_of("a0:1"), url_of("a1:1")]
    assert stock.has(*blobs) == [False] * 2 + [True] * 8
    assert size_of(stock.inventory()) <= 0.9 * (size - 1) < size_of(stock.inventory()) + SIZE + 1000
    assert stock.prune(policy(size - 1)).rows == ()


def test_everything_evictable_goes_if_not_enough(stock: Stock) -> None:
    blobs = fill(stock)
    stock.prune(policy(0, "a3"))
    assert stock.has(*blobs) == [number == 3 for number in range(10)]


def test_unused_images_go_regardless_of_size(stock: Stock) -> None:
    blobs = fill(stock)
    assert stock.prune(policy()).rows == ()
    stock.prune(policy(pulled_before=day(4)))
    assert stock.has(*blobs) == [False] * 4 + [True] * 6
    stock.prune(policy(size_of(stock.inventory()) - 1, pulled_before=day(5)))
    assert stock.has(*blobs) == [False] * 5 + [True] * 5


# System clock errors


@pytest.mark.parametrize(("max_share", "most"), [(50, 5), (30, 3), (79, 7), (1, 3), (99, 9), (100, 10)])
def test_nothing_is_pruned_by_age_beyond_max_share(stock: Stock, max_share: int, most: int) -> None:
    """A few images may always be pruned."""
    blobs = fill(stock)
    if most < 10:
        plan = stock.prune(policy(pulled_before=day(most + 0.5), max_share=max_share))
        assert plan.withheld == Withheld(most + 1, 10, "which is more than max_share")
        assert stock.has(*blobs) == [True] * 10
    plan = stock.prune(policy(pulled_before=day(most - 0.5), max_share=max_share))
    assert (len(plan.records), plan.withheld) == (most, None)


def test_index_counts_as_one_image_for_max_share(stock: Stock) -> None:
    """Otherwise a few indexes would count as many images."""
    lists = []
    for number in range(8):
        images = [stock.image((blob((number, part)),), f"a{number}@", pulled=day(number)) for part in range(5)]
        lists.append(stock.put(list_of(*images), f"a{number}:1", pulled=day(number)))
    plan = stock.prune(policy(pulled_before=day(5), max_share=50))
    assert plan.withheld == Withheld(5, 8, "which is more than max_share")
    plan = stock.prune(policy(pulled_before=day(4), max_share=50))
    assert ([stock.names(one) is None for one in lists], plan.withheld) == ([True] * 4 + [False] * 4, None)


def test_nothing_is_pruned_by_age_without_recent_pulls(stock: Stock) -> None:
    """Not even a few. Dates in the future come from a wrong clock and do not count."""
    blobs = fill(stock, 2)
    stock.image((b"future",), "b:1", pulled=day(4000))
    stock.image((b"kept",), "c:1", pulled=day(1))
    choose = policy(None, "c", pulled_before=day(50), max_share=50)
    assert stock.prune(choose).withheld == Withheld(2, 4, "and none at all was pulled since")
    assert stock.has(*blobs) == [True, True]
    stock.image((b"kept",), "c:1", pulled=day(99))
    plan = stock.prune(choose)
    assert (stock.has(*blobs), plan.withheld) == ([False, False], None)


def test_eviction_by_size_ignores_max_share(stock: Stock) -> None:
    blobs = fill(stock)
    plan = stock.prune(policy(5 * SIZE, pulled_before=NOW, max_share=50))
    assert plan.withheld is not None
    assert stock.has(*blobs) == [False] * 6 + [True] * 4


def test_image_dated_in_the_future_is_not_protected(stock: Stock) -> None:
    """It is evicted last."""
    stock.image((blob("future"),), "b:1", pulled=day(4000))
    blobs = fill(stock, 3)
    stock.prune(policy(int(1.5 * SIZE), keep_pulled_since=day(99)))
    assert stock.has(*blobs, blob("future")) == [False] * 3 + [True]
    stock.prune(policy(SIZE // 2, keep_pulled_since=day(99)))
    assert stock.has(blob("future")) == [False]


# Protected images


def test_kept_image_stays_with_children_and_blobs(stock: Stock) -> None:
    image = stock.image((blob(1), blob(2)), "a@", pulled=day(1))
    many = stock.put(list_of(image), "a:1", pulled=day(1))
    other = stock.image((blob(1), blob(3)), "b@", pulled=day(1))
    stock.put(list_of(image, other), "b:1", pulled=day(1))
    stock.prune(policy(0, "a:1", pulled_before=NOW))
    assert (stock.names(image), stock.names(many), stock.names(other)) == ({"a@"}, {"a:1"}, None)
    assert stock.has(blob(1), blob(2), blob(3)) == [True, True, False]


def test_index_of_a_kept_image_stays(stock: Stock) -> None:
    image, daemon_client = stock.image((blob(1),), "a@", "a:amd64"), stock.image((blob(2),), "a@")
    many = stock.put(list_of(image, daemon_client), "a:1")
    stock.prune(policy(0, "a:amd64"))
    assert [stock.names(one) for one in (image, daemon_client, many)] == [{"a@", "a:amd64"}, {"a@"}, {"a:1"}]


def test_kept_by_the_listed_image_url(stock: Stock) -> None:
    old = stock.image((blob(1),), "a:1", confirmed=day(1))
    stock.image((blob(2),), "a:1", confirmed=day(2))
    stock.prune(replace(policy(0), keeps=lambda url: url == url_of("a@", old)))
    assert stock.names(old) is not None


@pytest.mark.parametrize("busy", ["image", "both", "tagged"])
def test_busy_image_stays_with_its_indexes(stock: Stock, busy: str) -> None:
    image, tagged = stock.image((blob(1),), "a@"), stock.image((blob(2),), "b:1")
    both = stock.put(list_of(image), "a:1")
    digest = {"image": image, "both": both, "tagged": tagged}[busy].digest
    stock.prune(policy(0, busy={digest}, pulled_before=NOW))
    stays = busy != "tagged"
    assert [stock.names(one) is not None for one in (image, both, tagged)] == [stays, stays, not stays]


@pytest.mark.parametrize("just_now", ["image", "both"])
def test_recently_pulled_image_stays(stock: Stock, just_now: str) -> None:
    when = {name: day(50 if name == just_now else 1) for name in ("image", "both")}
    image = stock.image((blob(1),), "a@", pulled=when["image"])
    both = stock.put(list_of(image), "a:1", pulled=when["both"])
    other = stock.image((blob(2),), "b:1", pulled=day(49))
    stock.prune(policy(0, pulled_before=NOW, keep_pulled_since=day(50)))
    assert [stock.names(one) is not None for one in (image, both, other)] == [True, True, False]


@pytest.mark.parametrize("why", ["busy", "just now"])
def test_nested_indexes_stay_together(stock: Stock, why: str) -> None:
    image = stock.image((blob(1),), "a@", pulled=day(50 if why == "just now" else 1))
    inner = stock.put(list_of(image), "a@", pulled=day(1))
    outer = stock.put(list_of(inner), "a:1", pulled=day(1))
    stock.prune(policy(0, busy={image.digest} if why == "busy" else frozenset(), keep_pulled_since=day(50)))
    assert [stock.names(one) is not None for one in (image, inner, outer)] == [True] * 3


def test_moved_tag_does_not_return_to_the_old_image(stock: Stock) -> None:
    """Clients that pinned the digest pull the old image by it."""
    stock.image((blob(1),), "a:1", confirmed=day(1), pulled=day(9))
    new = stock.image((blob(2),), "a:1", confirmed=day(2), pulled=day(2))
    stock.prune(policy(pulled_before=day(5)))
    assert stock.names(new) is None
    assert stock.meaning("a:1") is None


def test_image_with_its_own_tag_goes_at_the_next_run(stock: Stock) -> None:
    image = stock.image((blob(1),), "a@", "b:1")
    many = stock.put(list_of(image), "a:1")
    stock.prune(policy(0))
    assert (stock.names(many), stock.names(image)) == (None, {"b:1"})
    stock.prune(policy(0))
    assert (stock.names(image), stock.has(blob(1))) == (None, [False])


def test_shared_blobs_are_freed_with_their_last_image(stock: Stock) -> None:
    """So no more images are pruned than necessary."""
    shared = blob("shared", 10 * SIZE)
    for number in range(5):
        stock.image((blob(number), shared), f"a{number}:1", pulled=day(number))
    alone = blob("alone", 2 * SIZE)
    stock.image((alone,), "b:1", pulled=day(6))
    size = size_of(stock.inventory())
    stock.prune(policy(size - SIZE, keep_pulled_since=day(7)))
    assert stock.has(*map(blob, range(5)), shared, alone) == [False, False, False, True, True, True, True]
    stock.prune(policy(3 * SIZE, keep_pulled_since=day(7)))
    assert stock.has(*map(blob, range(5)), shared, alone) == [False] * 6 + [True]


def test_blobs_mentioned_by_foreign_records_are_not_counted(stock: Stock) -> None:
    blobs = fill(stock)
    (stock.root / "img" / Digest.of(b"theirs").hex).write_text(f'{{"x": "{Digest.of(blobs[0]).hex}"}}')
    stock.prune(policy(8 * SIZE))
    assert size_of(stock.inventory()) <= 0.9 * 8 * SIZE


def test_size_counts_records_and_their_blobs(stock: Stock) -> None:
    """Pruning images would not free orphaned blobs."""
    stock.image((b"12345",), "a:1")
    stock.put(list_of(), "a:2")
    stock.blobs(b"nobody's")
    records = sum(path.stat().st_size for folder in ("fat", "img") for path in (stock.root / folder).iterdir())
    assert size_of(stock.inventory()) == 5 + records


def test_selection_is_linear_in_records(tmp_path: Path) -> None:
    stock = Stock(tmp_path)
    with stock.blob(b"large").open("wb") as file:
        file.truncate(1 << 40)

    def look(count: int, choose: EvictionPolicy | Selection) -> int:
        images = [(image_of(b"%d" % number, b"shared"), [f"a{number}@"], day(1)) for number in range(count)]
        lists = [(list_of(one[0], images[0][0]), [f"a{number}:1"], day(2)) for number, one in enumerate(images)]
        inventory = in_memory(tmp_path, *images, *lists)
        plans: list[Plan] = []

        def chosen() -> PruneSet:
            prune_set = choose(inventory)
            plans.append(prune_set.plan)
            return prune_set

        calls = calls_of(chosen)
        assert len(plans[0].records) == 2 * count
        return calls

    for choose in (policy(1), policy(pulled_before=NOW), Selection(pulled_before=NOW)):
        assert look(1000, choose) < 12 * look(100, choose)
