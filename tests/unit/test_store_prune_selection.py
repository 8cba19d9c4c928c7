"""Criteria for pruning: an operator's conditions, and eviction of the least recently pulled images."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ociregistry.manifests import Manifest
from ociregistry.names import Digest
from ociregistry.store.prune import Criteria, EvictionPolicy, Plan, PruneSet, Withheld, prune, size_of
from ociregistry.store.snapshot import Snapshot
from tests.unit.support.stores import StoreDir, Unsynced, calls_of, day, image_of, in_memory, list_of, named, url_of

SIZE = 100_000
"""Bytes per blob, large enough that records hardly matter."""
NOW = day(100)


@pytest.fixture
def store_dir(tmp_path: Path) -> StoreDir:
    """Return an empty store."""
    return StoreDir(tmp_path / "store")


def blob(seed: object, size: int = SIZE) -> bytes:
    """Return a large blob."""
    return f"{seed} ".encode().ljust(size, b".")


def taken(snapshot: Snapshot, choose: Criteria) -> list[str]:
    """Return the pruned image URLs, without the host."""
    return [row.url.removeprefix("reg.example/") for row in choose(snapshot).plan.rows]


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


def test_all_conditions_must_match(store_dir: StoreDir) -> None:
    store_dir.image((b"1",), "a:old", "b:old", created=day(1), pulled=day(5))
    store_dir.image((b"2",), "a:new", created=day(9), pulled=day(5))
    store_dir.image((b"3",), "a:used", created=day(1), pulled=day(9))
    snapshot, matches = store_dir.snapshot(), named("a")
    assert taken(snapshot, Criteria(matches)) == ["a:new", "a:old", "a:used"]
    assert taken(snapshot, Criteria(created_before=day(5))) == ["a:old", "a:used", "b:old"]
    assert taken(snapshot, Criteria(pulled_before=day(6))) == ["a:new", "a:old", "b:old"]
    assert taken(snapshot, Criteria(matches, day(5))) == ["a:old", "a:used"]
    assert taken(snapshot, Criteria(matches, None, day(6))) == ["a:new", "a:old"]
    assert taken(snapshot, Criteria(None, day(5), day(6))) == ["a:old", "b:old"]
    assert taken(snapshot, Criteria(matches, day(5), day(6))) == ["a:old"]
    assert taken(snapshot, Criteria()) == ["a:new", "a:old", "a:used", "b:old"]


def test_before_is_exclusive(store_dir: StoreDir) -> None:
    store_dir.image((b"1",), "a:1", created=day(5), pulled=day(6))
    assert taken(store_dir.snapshot(), Criteria(created_before=day(5))) == []
    assert taken(store_dir.snapshot(), Criteria(created_before=day(5.001))) == ["a:1"]
    assert taken(store_dir.snapshot(), Criteria(pulled_before=day(6))) == []
    assert taken(store_dir.snapshot(), Criteria(pulled_before=day(6.001))) == ["a:1"]


def test_each_url_has_its_own_date(store_dir: StoreDir) -> None:
    image = store_dir.image((b"1",), "a:1", created=day(1))
    store_dir.put(image, "b:1", created=day(5))
    store_dir.prune(Criteria(created_before=day(3)))
    assert store_dir.names(image) == {"b:1"}


@pytest.mark.parametrize("used", ["left", "both"])
def test_unused_for_considers_indexes_with_their_images(store_dir: StoreDir, used: str) -> None:
    """An index may be requested without its images, and an image by digest without its index."""
    when = {name: day(9 if name == used else 1) for name in ("left", "right", "both")}
    left, right = (store_dir.image((name.encode(),), "a@", pulled=when[name]) for name in ("left", "right"))
    both = store_dir.put(list_of(left, right), "a:1", pulled=when["both"])
    store_dir.prune(Criteria(pulled_before=day(5)))
    assert (store_dir.names(both), store_dir.names(left)) == ({"a:1"}, {"a@"})
    if used == "both":
        assert store_dir.names(right) == {"a@"}
    store_dir.prune(Criteria(pulled_before=day(10)))
    assert [store_dir.names(one) for one in (left, right, both)] == [None] * 3


@pytest.mark.parametrize("used", ["outer", "image"])
def test_unused_for_considers_nested_indexes(store_dir: StoreDir, used: str) -> None:
    image = store_dir.image((b"image",), "a@", pulled=day(9 if used == "image" else 1))
    inner = store_dir.put(list_of(image), "a@", pulled=day(1))
    outer = store_dir.put(list_of(inner), "a:1", pulled=day(9 if used == "outer" else 1))
    store_dir.prune(Criteria(pulled_before=day(5)))
    assert [store_dir.names(one) for one in (outer, inner, image)] == [{"a:1"}, {"a@"}, {"a@"}]


def test_newer_index_protects_its_older_image(store_dir: StoreDir) -> None:
    """When a tag moves to a new index, some images usually belong to the old index too."""
    image = store_dir.image((b"1",), "a@", created=day(1))
    store_dir.put(list_of(image), "a:1", created=day(1), confirmed=day(1))
    new = store_dir.put(list_of(image, seed="new"), "a:1", created=day(9), confirmed=day(9))
    store_dir.prune(Criteria(created_before=day(5)))
    assert (store_dir.names(new), store_dir.names(image), store_dir.has(b"1")) == ({"a:1"}, {"a@"}, [True])


# Eviction


def fill(store_dir: StoreDir, count: int = 10) -> list[bytes]:
    """Create images a0:1 to a9:1 with one blob each, pulled one after the other."""
    blobs = [blob(number) for number in range(count)]
    for number, one in enumerate(blobs):
        store_dir.image((one,), f"a{number}:1", pulled=day(number))
    return blobs


def test_least_recently_pulled_goes_until_nine_tenths_remain(store_dir: StoreDir) -> None:
    blobs = fill(store_dir)
    size = size_of(store_dir.snapshot())
    assert store_dir.prune(policy(size)).rows == ()
    plan = store_dir.prune(policy(size - 1))
    assert [row.url for row in plan.rows] == [url_of("a0:1"), url_of("a1:1")]
    assert store_dir.has(*blobs) == [False] * 2 + [True] * 8
    assert size_of(store_dir.snapshot()) <= 0.9 * (size - 1) < size_of(store_dir.snapshot()) + SIZE + 1000
    assert store_dir.prune(policy(size - 1)).rows == ()


def test_everything_evictable_goes_if_not_enough(store_dir: StoreDir) -> None:
    blobs = fill(store_dir)
    store_dir.prune(policy(0, "a3"))
    assert store_dir.has(*blobs) == [number == 3 for number in range(10)]


def test_unused_images_go_regardless_of_size(store_dir: StoreDir) -> None:
    blobs = fill(store_dir)
    assert store_dir.prune(policy()).rows == ()
    store_dir.prune(policy(pulled_before=day(4)))
    assert store_dir.has(*blobs) == [False] * 4 + [True] * 6
    store_dir.prune(policy(size_of(store_dir.snapshot()) - 1, pulled_before=day(5)))
    assert store_dir.has(*blobs) == [False] * 5 + [True] * 5


# System clock errors


@pytest.mark.parametrize(("max_share", "most"), [(50, 5), (30, 3), (79, 7), (1, 3), (99, 9), (100, 10)])
def test_nothing_is_pruned_by_age_beyond_max_share(store_dir: StoreDir, max_share: int, most: int) -> None:
    """A few images may always be pruned."""
    blobs = fill(store_dir)
    if most < 10:
        plan = store_dir.prune(policy(pulled_before=day(most + 0.5), max_share=max_share))
        assert plan.withheld == Withheld(most + 1, 10, "which is more than max_share")
        assert store_dir.has(*blobs) == [True] * 10
    plan = store_dir.prune(policy(pulled_before=day(most - 0.5), max_share=max_share))
    assert (len(plan.records), plan.withheld) == (most, None)


def test_index_counts_as_one_image_for_max_share(store_dir: StoreDir) -> None:
    """Otherwise a few indexes would count as many images."""
    lists = []
    for number in range(8):
        images = [store_dir.image((blob((number, part)),), f"a{number}@", pulled=day(number)) for part in range(5)]
        lists.append(store_dir.put(list_of(*images), f"a{number}:1", pulled=day(number)))
    plan = store_dir.prune(policy(pulled_before=day(5), max_share=50))
    assert plan.withheld == Withheld(5, 8, "which is more than max_share")
    plan = store_dir.prune(policy(pulled_before=day(4), max_share=50))
    assert ([store_dir.names(one) is None for one in lists], plan.withheld) == ([True] * 4 + [False] * 4, None)


def test_nothing_is_pruned_by_age_without_recent_pulls(store_dir: StoreDir) -> None:
    """Not even a few. Dates in the future come from a wrong clock and do not count."""
    blobs = fill(store_dir, 2)
    store_dir.image((b"future",), "b:1", pulled=day(4000))
    store_dir.image((b"kept",), "c:1", pulled=day(1))
    choose = policy(None, "c", pulled_before=day(50), max_share=50)
    assert store_dir.prune(choose).withheld == Withheld(2, 4, "and none at all was pulled since")
    assert store_dir.has(*blobs) == [True, True]
    store_dir.image((b"kept",), "c:1", pulled=day(99))
    plan = store_dir.prune(choose)
    assert (store_dir.has(*blobs), plan.withheld) == ([False, False], None)


def test_eviction_by_size_ignores_max_share(store_dir: StoreDir) -> None:
    blobs = fill(store_dir)
    plan = store_dir.prune(policy(5 * SIZE, pulled_before=NOW, max_share=50))
    assert plan.withheld is not None
    assert store_dir.has(*blobs) == [False] * 6 + [True] * 4


def test_image_with_a_pull_now_and_one_in_the_future_is_protected(store_dir: StoreDir) -> None:
    image = store_dir.image((blob("image"),), "a@", pulled=NOW)
    store_dir.put(list_of(image), "a:1", pulled=day(4000))
    assert store_dir.prune(policy(1)).rows == ()


def last_pull(store_dir: StoreDir, image: Manifest) -> datetime:
    """Return the time of the last pull in its record's file."""
    return datetime.fromtimestamp(store_dir.path(image).stat().st_mtime, UTC)


def test_last_pull_in_the_future_is_set_to_now(store_dir: StoreDir) -> None:
    """So that the image is unused one day; but not where most are in the future, as it is the clock that is wrong."""
    future, other = (store_dir.image((name,), f"{name.decode()}:1", pulled=day(4000)) for name in (b"f", b"o"))
    used = store_dir.image((b"used",), "used:1", pulled=day(99))
    now = NOW + timedelta(hours=1)
    prune(store_dir.root, policy(10**9), Unsynced(), now)
    assert [last_pull(store_dir, one) for one in (future, other, used)] == [day(4000), day(4000), day(99)]
    more = store_dir.image((b"more",), "more:1", pulled=day(99))
    prune(store_dir.root, policy(10**9), Unsynced(), now)
    assert [last_pull(store_dir, one) for one in (future, other, used, more)] == [now, now, day(99), day(99)]


def test_dates_in_the_future_count_as_now(store_dir: StoreDir) -> None:
    store_dir.image((b"1",), "a:1", created=day(4000), pulled=day(4000))
    snapshot = Snapshot.read(store_dir.root, NOW)
    before, after = NOW - timedelta(hours=1), NOW + timedelta(hours=1)
    assert taken(snapshot, Criteria(created_before=before)) == taken(snapshot, Criteria(pulled_before=before)) == []
    assert taken(snapshot, Criteria(None, after, after)) == ["a:1"]


def test_image_dated_in_the_future_is_not_protected(store_dir: StoreDir) -> None:
    """It is evicted last."""
    store_dir.image((blob("future"),), "b:1", pulled=day(4000))
    blobs = fill(store_dir, 3)
    store_dir.prune(policy(int(1.5 * SIZE), keep_pulled_since=day(99)))
    assert store_dir.has(*blobs, blob("future")) == [False] * 3 + [True]
    store_dir.prune(policy(SIZE // 2, keep_pulled_since=day(99)))
    assert store_dir.has(blob("future")) == [False]


# Protected images


def test_kept_image_stays_with_children_and_blobs(store_dir: StoreDir) -> None:
    image = store_dir.image((blob(1), blob(2)), "a@", pulled=day(1))
    many = store_dir.put(list_of(image), "a:1", pulled=day(1))
    other = store_dir.image((blob(1), blob(3)), "b@", pulled=day(1))
    store_dir.put(list_of(image, other), "b:1", pulled=day(1))
    store_dir.prune(policy(0, "a:1", pulled_before=NOW))
    assert (store_dir.names(image), store_dir.names(many), store_dir.names(other)) == ({"a@"}, {"a:1"}, None)
    assert store_dir.has(blob(1), blob(2), blob(3)) == [True, True, False]


def test_index_of_a_kept_image_stays(store_dir: StoreDir) -> None:
    image, sibling = store_dir.image((blob(1),), "a@", "a:amd64"), store_dir.image((blob(2),), "a@")
    many = store_dir.put(list_of(image, sibling), "a:1")
    store_dir.prune(policy(0, "a:amd64"))
    assert [store_dir.names(one) for one in (image, sibling, many)] == [{"a@", "a:amd64"}, {"a@"}, {"a:1"}]


def test_kept_by_the_listed_image_url(store_dir: StoreDir) -> None:
    old = store_dir.image((blob(1),), "a:1", confirmed=day(1))
    store_dir.image((blob(2),), "a:1", confirmed=day(2))
    store_dir.prune(replace(policy(0), keeps=lambda url: url == url_of("a@", old)))
    assert store_dir.names(old) is not None


@pytest.mark.parametrize("busy", ["image", "both", "tagged"])
def test_busy_image_stays_with_its_indexes(store_dir: StoreDir, busy: str) -> None:
    image, tagged = store_dir.image((blob(1),), "a@"), store_dir.image((blob(2),), "b:1")
    both = store_dir.put(list_of(image), "a:1")
    digest = {"image": image, "both": both, "tagged": tagged}[busy].digest
    store_dir.prune(policy(0, busy={digest}, pulled_before=NOW))
    stays = busy != "tagged"
    assert [store_dir.names(one) is not None for one in (image, both, tagged)] == [stays, stays, not stays]


@pytest.mark.parametrize("just_now", ["image", "both"])
def test_recently_pulled_image_stays(store_dir: StoreDir, just_now: str) -> None:
    when = {name: day(50 if name == just_now else 1) for name in ("image", "both")}
    image = store_dir.image((blob(1),), "a@", pulled=when["image"])
    both = store_dir.put(list_of(image), "a:1", pulled=when["both"])
    other = store_dir.image((blob(2),), "b:1", pulled=day(49))
    store_dir.prune(policy(0, pulled_before=NOW, keep_pulled_since=day(50)))
    assert [store_dir.names(one) is not None for one in (image, both, other)] == [True, True, False]


@pytest.mark.parametrize("why", ["busy", "just now"])
def test_nested_indexes_stay_together(store_dir: StoreDir, why: str) -> None:
    image = store_dir.image((blob(1),), "a@", pulled=day(50 if why == "just now" else 1))
    inner = store_dir.put(list_of(image), "a@", pulled=day(1))
    outer = store_dir.put(list_of(inner), "a:1", pulled=day(1))
    store_dir.prune(policy(0, busy={image.digest} if why == "busy" else frozenset(), keep_pulled_since=day(50)))
    assert [store_dir.names(one) is not None for one in (image, inner, outer)] == [True] * 3


def test_moved_tag_does_not_return_to_the_old_image(store_dir: StoreDir) -> None:
    """Clients that pinned the digest pull the old image by it."""
    store_dir.image((blob(1),), "a:1", confirmed=day(1), pulled=day(9))
    new = store_dir.image((blob(2),), "a:1", confirmed=day(2), pulled=day(2))
    store_dir.prune(policy(pulled_before=day(5)))
    assert store_dir.names(new) is None
    assert store_dir.meaning("a:1") is None


def test_image_with_its_own_tag_goes_at_the_next_run(store_dir: StoreDir) -> None:
    image = store_dir.image((blob(1),), "a@", "b:1")
    many = store_dir.put(list_of(image), "a:1")
    store_dir.prune(policy(0))
    assert (store_dir.names(many), store_dir.names(image)) == (None, {"b:1"})
    store_dir.prune(policy(0))
    assert (store_dir.names(image), store_dir.has(blob(1))) == (None, [False])


def test_shared_blobs_are_freed_with_their_last_image(store_dir: StoreDir) -> None:
    """So no more images are pruned than necessary."""
    shared = blob("shared", 10 * SIZE)
    for number in range(5):
        store_dir.image((blob(number), shared), f"a{number}:1", pulled=day(number))
    alone = blob("alone", 2 * SIZE)
    store_dir.image((alone,), "b:1", pulled=day(6))
    size = size_of(store_dir.snapshot())
    store_dir.prune(policy(size - SIZE, keep_pulled_since=day(7)))
    assert store_dir.has(*map(blob, range(5)), shared, alone) == [False, False, False, True, True, True, True]
    store_dir.prune(policy(3 * SIZE, keep_pulled_since=day(7)))
    assert store_dir.has(*map(blob, range(5)), shared, alone) == [False] * 6 + [True]


def test_blobs_mentioned_by_foreign_records_are_not_counted(store_dir: StoreDir) -> None:
    blobs = fill(store_dir)
    (store_dir.root / "img" / Digest.of(b"theirs").hex).write_text(f'{{"x": "{Digest.of(blobs[0]).hex}"}}')
    store_dir.prune(policy(8 * SIZE))
    assert size_of(store_dir.snapshot()) <= 0.9 * 8 * SIZE


def test_size_counts_records_and_their_blobs(store_dir: StoreDir) -> None:
    """Pruning images would not free orphaned blobs."""
    store_dir.image((b"12345",), "a:1")
    store_dir.put(list_of(), "a:2")
    store_dir.blobs(b"nobody's")
    records = sum(path.stat().st_size for folder in ("fat", "img") for path in (store_dir.root / folder).iterdir())
    assert size_of(store_dir.snapshot()) == 5 + records


def test_selection_is_linear_in_records(tmp_path: Path) -> None:
    store_dir = StoreDir(tmp_path)
    with store_dir.blob(b"large").open("wb") as file:
        file.truncate(1 << 40)

    def look(count: int, choose: EvictionPolicy | Criteria) -> int:
        images = [(image_of(b"%d" % number, b"shared"), [f"a{number}@"], day(1)) for number in range(count)]
        lists = [(list_of(one[0], images[0][0]), [f"a{number}:1"], day(2)) for number, one in enumerate(images)]
        snapshot = in_memory(tmp_path, *images, *lists)
        plans: list[Plan] = []

        def chosen() -> PruneSet:
            prune_set = choose(snapshot)
            plans.append(prune_set.plan)
            return prune_set

        calls = calls_of(chosen)
        assert len(plans[0].records) == 2 * count
        return calls

    for choose in (policy(1), policy(pulled_before=NOW), Criteria(pulled_before=NOW)):
        assert look(1000, choose) < 12 * look(100, choose)
