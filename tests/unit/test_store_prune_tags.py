"""Pruning moved tags: a tag never returns to a former meaning."""

from __future__ import annotations

from pathlib import Path

import pytest

from ociregistry.store.prune import Selection
from tests.unit.support.stores import Stock, by_name, day, list_of, url_of

ONE, TWO = (b"config", b"layer"), (b"another config", b"layer")


@pytest.fixture
def stock(tmp_path: Path) -> Stock:
    """Return an empty store."""
    return Stock(tmp_path / "store")


def test_pruned_tag_does_not_return_to_its_former_image(stock: Stock) -> None:
    oldest = stock.image(ONE, "a:1", "b:1", confirmed=day(1))
    old = stock.image(TWO, "a:1", confirmed=day(2))
    new = stock.put(list_of(), "a:1", confirmed=day(3))
    assert stock.meaning("a:1") == new.digest
    stock.prune(by_name("a:1"))
    assert (stock.meaning("a:1"), stock.names(old), stock.names(new)) == (None, None, None)
    assert stock.names(oldest) == {"b:1"}


@pytest.mark.parametrize("choose", [by_name("a:1"), Selection(created_before=day(2))], ids=["pattern", "before"])
def test_pruned_tag_does_not_return_to_an_unselected_former_image(stock: Stock, choose: Selection) -> None:
    """The newer image existed earlier, and another tag moved as well."""
    old = stock.image(ONE, "a:1", "a:2", created=day(3), confirmed=day(3))
    new = stock.image(TWO, "a:1", created=day(1), confirmed=day(4))
    other = stock.image((b"other",), "a:2", created=day(3), confirmed=day(4))
    stock.prune(choose)
    assert (stock.meaning("a:1"), stock.meaning("a:2"), stock.names(new)) == (None, other.digest, None)
    assert "a:1" not in (stock.names(old) or ())


def test_former_image_can_be_pruned_alone(stock: Stock) -> None:
    old = stock.image(ONE, "a:1", confirmed=day(1))
    new = stock.image(TWO, "a:1", confirmed=day(2))
    plan = stock.prune(Selection(matches=lambda url: url == url_of("a@", old)))
    assert [row.url for row in plan.rows] == [url_of("a@", old)]
    assert (stock.names(old), stock.names(new), stock.meaning("a:1")) == (None, {"a:1"}, new.digest)


@pytest.mark.parametrize("names", [("a:1", "a:2"), ("a:1", "a@")])
def test_image_with_several_moved_tags_is_pruned_at_once(stock: Stock, names: tuple[str, ...]) -> None:
    """It is listed as one image URL, which is the one pruned."""
    old = stock.image(ONE, *names, confirmed=day(1))
    stock.image(TWO, "a:1", "a:2", confirmed=day(2))
    stock.prune(Selection(matches=lambda url: url == url_of("a@", old)))
    assert url_of("a@", old) not in [row.url for row in stock.inventory().rows]


def test_former_image_stays_if_conditions_do_not_match(stock: Stock) -> None:
    """A cluster that pins the digest pulls it daily; its record still has the tag that it came by."""
    pinned = stock.image(ONE, "a:1", confirmed=day(1), pulled=day(99))
    moved = stock.image(TWO, "a:1", confirmed=day(2), pulled=day(2))
    stock.prune(Selection(pulled_before=day(50)))
    assert (stock.names(moved), stock.meaning("a:1") in (None, moved.digest)) == (None, True)
    assert (stock.names(pinned) is not None, stock.has(*ONE)) == (True, [True, True])
