"""Which images the page shows: searched, sorted, in pages; whatever the query says."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ociregistry.admin.images import ROWS, Selection, select
from ociregistry.store.listing import ListedImage, Listing, Order

START = datetime(2026, 1, 1, tzinfo=UTC)


def listing(*urls: str) -> Listing:
    """Return a listing of these images, of which each is larger and older than the one before."""
    images = [
        ListedImage(url, False, number, START - timedelta(days=number), START, ())
        for number, url in enumerate(urls, 1)
    ]
    keys = {Order.URL: "url", Order.SIZE: "size", Order.CREATED: "created", Order.PULLED: "pulled"}
    return Listing({order: sorted(images, key=lambda one: getattr(one, key)) for order, key in keys.items()})


def urls(of: Listing, **fields: str) -> list[str]:
    """Return the image URLs on the page for these fields."""
    selection = Selection.parse(fields.get("search", ""), fields.get("sort", ""), fields.get("page", ""))
    return [one.url for one in select(of, selection).rows]


def test_search_is_for_each_word_in_any_case() -> None:
    of = listing("quay.io/team/app:1", "quay.io/team/web:RC1", "docker.io/library/app:2")
    assert urls(of, search="app") == ["docker.io/library/app:2", "quay.io/team/app:1"]
    assert urls(of, search="  APP   quay ") == ["quay.io/team/app:1"]
    assert urls(of, search="rc1") == ["quay.io/team/web:RC1"]
    assert urls(of, search="nothing") == []
    assert len(urls(of, search=" ")) == 3
    # Not a pattern.
    assert urls(of, search=".*") == []


class Searched(str):
    """An image URL in lower case that counts the searches in it."""

    searches = 0

    def lower(self) -> Searched:
        return self

    def __contains__(self, word: str) -> bool:  # type: ignore[override]  # as that of str
        self.searches += 1
        return super().__contains__(word)


def test_repeated_word_is_looked_for_once() -> None:
    """A search runs in the reactor's thread, over 10,000 images."""
    url = Searched("quay.io/team/app:1")
    assert urls(listing(url), search="app APP " * 20 + "team") == [url]
    assert url.searches == 2


def test_sort_by_each_column() -> None:
    of = listing("b:1", "c:1", "a:1")
    assert urls(of) == urls(of, sort="url") == ["a:1", "b:1", "c:1"]
    assert urls(of, sort="-url") == ["c:1", "b:1", "a:1"]
    assert urls(of, sort="size") == ["b:1", "c:1", "a:1"]
    assert urls(of, sort="-size") == ["a:1", "c:1", "b:1"]
    assert urls(of, sort="created") == ["a:1", "c:1", "b:1"]
    assert urls(of, sort="-created", search="1") == ["b:1", "c:1", "a:1"]


def test_pages() -> None:
    of = listing(*(f"app{number:04}:1" for number in range(2 * ROWS + 1)))
    assert urls(of, page="1") == [f"app{number:04}:1" for number in range(ROWS)]
    assert urls(of, page="3") == [f"app{2 * ROWS:04}:1"]
    assert urls(of, page="3", sort="-url") == ["app0000:1"]
    selected = select(of, Selection(page=99))
    assert (selected.selection.page, selected.pages, len(selected.rows)) == (3, 3, 1)
    assert (selected.found, selected.stored) == (201, 201)
    none = select(of, Selection(search="x", page=2))
    assert (none.selection.page, none.pages, none.found, none.stored, none.rows) == (1, 1, 0, 201, [])


@pytest.mark.parametrize("page", ["", "0", "-1", "1.5", "x", "²", "1" * 5000, " 1"])
def test_no_number_is_the_first_page(page: str) -> None:
    of = listing(*(f"app{number:04}:1" for number in range(ROWS + 1)))
    assert urls(of, page=page)[0] == "app0000:1"


@given(st.text(), st.text(), st.text())
def test_any_query_selects_something(search: str, sort: str, page: str) -> None:
    selection = Selection.parse(search, sort, page)
    selected = select(listing("a:1"), selection)
    assert selected.found == len(selected.rows)
    assert Selection.parse(selection.search, selection.sort, str(selection.page)) == selection


def test_column_that_is_chosen_again_turns_round() -> None:
    selection = Selection(search="x", page=7)
    assert selection.by(Order.SIZE) == Selection("x", Order.SIZE, descending=True)
    assert selection.by(Order.SIZE).by(Order.SIZE) == Selection("x", Order.SIZE)
    assert selection.by(Order.URL) == Selection("x", descending=True)
    assert selection.by(Order.PULLED).by(Order.URL) == Selection("x")
