"""Which of the stored images an operator looks at: searched, sorted, and in pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ociregistry.store.listing import ListedImage, Listing, Order

ROWS = 100
"""Images on a page."""
_LONGEST_SEARCH = 200
"""Characters."""
_SPELLED = {order.value: order for order in Order}


@dataclass(frozen=True, slots=True)
class Selection:
    """What is looked at: image URLs that contain each word of `search`, in this order."""

    search: str = ""
    order: Order = Order.URL
    descending: bool = False
    page: int = 1

    @classmethod
    def parse(cls, search: str, sort: str, page: str) -> Selection:
        """Parse the fields of a form; what cannot be understood counts as not given.

        `sort` is `url`, `size`, `created` or `pulled`, after a `-` for the greatest first.
        """
        return cls(
            search.strip()[:_LONGEST_SEARCH],
            _SPELLED.get(sort.removeprefix("-"), Order.URL),
            sort.startswith("-"),
            int(page) if page.isascii() and page.isdigit() and len(page) < 9 else 1,
        )

    @property
    def sort(self) -> str:
        """The order as `parse` reads it."""
        return f"-{self.order.value}" if self.descending else self.order.value

    def by(self, order: Order) -> Selection:
        """Return the same, sorted by `order`: the other way round if it was already, names upwards, all else down."""
        descending = not self.descending if order is self.order else order is not Order.URL
        return replace(self, order=order, descending=descending, page=1)

    def on(self, page: int) -> Selection:
        """Return the same on another page."""
        return replace(self, page=page)


@dataclass(frozen=True, slots=True)
class Selected:
    """A page of the images that a selection has."""

    selection: Selection
    """With the number of a page that there is."""
    rows: Sequence[ListedImage]
    found: int
    """Images on all pages."""
    stored: int
    """All images, found or not."""

    @property
    def pages(self) -> int:
        """The number of pages, at least one."""
        return _pages(self.found)


def select(listing: Listing, selection: Selection) -> Selected:
    """Return the page of `listing` that `selection` says, or the last one if there are fewer."""
    images = listing.orders[selection.order]
    found = _found(images, selection.search) if selection.search else images
    page = min(max(1, selection.page), _pages(len(found)))
    first = (page - 1) * ROWS
    rows = found[::-1][first : first + ROWS] if selection.descending else found[first : first + ROWS]
    return Selected(selection.on(page), rows, len(found), len(images))


def _found(images: Sequence[ListedImage], search: str) -> Sequence[ListedImage]:
    # Each word once: this runs in the reactor's thread, and a store may have 10,000 images.
    words = dict.fromkeys(search.lower().split())
    # Names of repositories are in lower case; tags may have capitals.
    return [one for one in images if _contains(one.url.lower(), words)]


def _contains(url: str, words: Iterable[str]) -> bool:
    return all(word in url for word in words)


def _pages(found: int) -> int:
    return max(1, -(-found // ROWS))
