"""Pruning moved tags: a tag never returns to a former meaning."""

from __future__ import annotations

from pathlib import Path

import pytest

from ociregistry.store.prune import Criteria
from tests.unit.support.stores import StoreDir, by_name, day, list_of, url_of

ONE, TWO = (b"config", b"layer"), (b"another config", b"layer")


@pytest.fixture
def store_dir(tmp_path: Path) -> StoreDir:
    """Return an empty store."""
    return StoreDir(tmp_path / "store")


def test_pruned_tag_does_not_return_to_its_former_image(store_dir: StoreDir) -> None:
    oldest = store_dir.image(ONE, "a:1", "b:1", confirmed=day(1))
    old = store_dir.image(TWO, "a:1", confirmed=day(2))
    new = store_dir.put(list_of(), "a:1", confirmed=day(3))
    assert store_dir.meaning("a:1") == new.digest
    store_dir.prune(by_name("a:1"))
    assert (store_dir.meaning("a:1"), store_dir.names(old), store_dir.names(new)) == (None, None, None)
    assert store_dir.names(oldest) == {"b:1"}


@pytest.mark.parametrize("choose", [by_name("a:1"), Criteria(created_before=day(2))], ids=["pattern", "before"])
def test_pruned_tag_does_not_return_to_an_unselected_former_image(store_dir: StoreDir, choose: Criteria) -> None:
    """The newer image existed earlier, and another tag moved as well."""
    old = store_dir.image(ONE, "a:1", "a:2", created=day(3), confirmed=day(3))
    new = store_dir.image(TWO, "a:1", created=day(1), confirmed=day(4))
    other = store_dir.image((b"other",), "a:2", created=day(3), confirmed=day(4))
    store_dir.prune(choose)
    assert (store_dir.meaning("a:1"), store_dir.meaning("a:2"), store_dir.names(new)) == (None, other.digest, None)
    assert "a:1" not in (store_dir.names(old) or ())


def test_former_image_can_be_pruned_alone(store_dir: StoreDir) -> None:
    old = store_dir.image(ONE, "a:1", confirmed=day(1))
    new = store_dir.image(TWO, "a:1", confirmed=day(2))
    plan = store_dir.prune(Criteria(matches=lambda url: url == url_of("a@", old)))
    assert [row.url for row in plan.rows] == [url_of("a@", old)]
    assert (store_dir.names(old), store_dir.names(new), store_dir.meaning("a:1")) == (None, {"a:1"}, new.digest)


@pytest.mark.parametrize("names", [("a:1", "a:2"), ("a:1", "a@")])
def test_image_with_several_moved_tags_is_pruned_at_once(store_dir: StoreDir, names: tuple[str, ...]) -> None:
    """It is listed as one image URL, which is the one pruned."""
    old = store_dir.image(ONE, *names, confirmed=day(1))
    store_dir.image(TWO, "a:1", "a:2", confirmed=day(2))
    store_dir.prune(Criteria(matches=lambda url: url == url_of("a@", old)))
    assert url_of("a@", old) not in [row.url for row in store_dir.snapshot().rows]


def test_former_image_stays_if_conditions_do_not_match(store_dir: StoreDir) -> None:
    """A cluster that pins the digest pulls it daily; its record still has the tag that it came by."""
    pinned = store_dir.image(ONE, "a:1", confirmed=day(1), pulled=day(99))
    moved = store_dir.image(TWO, "a:1", confirmed=day(2), pulled=day(2))
    store_dir.prune(Criteria(pulled_before=day(50)))
    assert (store_dir.names(moved), store_dir.meaning("a:1") in (None, moved.digest)) == (None, True)
    assert (store_dir.names(pinned) is not None, store_dir.has(*ONE)) == (True, [True, True])
