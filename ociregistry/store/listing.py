"""The images of a store in the orders in which an operator looks at them, made from memory in a thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from operator import attrgetter

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime

from ociregistry.concurrency import SingleFlight
from ociregistry.names import Digest, by_digest
from ociregistry.store.index import Entry, Index
from ociregistry.store.paths import digest_of
from ociregistry.store.scan import UNREAD, IndexRefresh, Signature
from ociregistry.store.threads import Threads

_FRESH = 2.0
"""Seconds for which a listing is given again."""
_SHARE = 0.05
"""The share of a core that making listings may take: the longer it takes, the longer a listing is given again."""


@dataclass(frozen=True, slots=True)
class ListedImage:
    """An image URL by which an image or index can be pulled."""

    url: str
    is_list: bool
    size: int
    """Size in bytes of the blobs, each counted once, without foreign layers."""
    created: datetime
    """Since when the URL means it."""
    pulled: datetime
    """Last pull of the image, of an index that names it, or of a manifest that it names."""
    images: Sequence[Digest]
    """The image itself, or those of the index; without images whose layers are not wanted in the store."""


class Order(Enum):
    """What the images are sorted by."""

    URL = "url"
    SIZE = "size"
    CREATED = "created"
    PULLED = "pulled"


@dataclass(frozen=True, slots=True)
class Listing:
    """The images of the store as they were in memory at one time."""

    orders: Mapping[Order, Sequence[ListedImage]]
    """All images in each order, the smallest value first; equal ones by URL."""

    @classmethod
    def make(cls, entries: Mapping[Digest, Entry], seen: Mapping[str, Signature], now: datetime) -> Listing:
        """List the image URLs of the records `entries`, whose files were `seen` with these signatures.

        As `list` does, it omits images that are kept as metadata alone and have no tag.
        """
        # An index of its own: the daemon's is changed meanwhile.
        index = Index(lambda: now)
        for digest, entry in entries.items():
            index.put(digest, entry)
        read = {path: signature for path, signature in seen.items() if signature != UNREAD}
        pulls = {digest_of(path): mtime for path, (_, _, mtime, _) in read.items()}
        images = sorted(_images(index, entries, pulls, now), key=attrgetter("url"))
        return cls({order: sorted(images, key=attrgetter(order.value)) for order in Order})


def _images(
    index: Index, entries: Mapping[Digest, Entry], pulls: Mapping[Digest, int], now: datetime
) -> Iterator[ListedImage]:
    def is_metadata(digest: Digest) -> bool:
        """Tell whether an image is here only because an index names it."""
        entry = entries[digest]
        return not entry.is_list and not entry.wanted and bool(index.parents(digest))

    for digest, entry in entries.items():
        below = index.descendants(digest) if entry.is_list else frozenset()
        above = index.ancestors(digest)
        tagged_only = is_metadata(digest)
        created: dict[str, datetime] = {}
        for noted, dates in entry.images.items():
            url = noted if index.meaning(noted) == digest else by_digest(noted, digest)
            if not tagged_only or "@" not in url:
                created[url] = min(dates.created, created.get(url, dates.created))
        if not created:
            continue
        images = tuple(one for one in (digest, *below) if not entries[one].is_list and not is_metadata(one))
        sizes = {blob: size for one in images for blob, size in entries[one].required.items()}
        size = sum(sizes.values())
        noted_pulls = [pulls[one] for one in (digest, *below, *above) if one in pulls]
        last = datetime.fromtimestamp(max(noted_pulls) / 1e9, UTC) if noted_pulls else now
        for url, since in created.items():
            yield ListedImage(url, entry.is_list, size, min(since, now), min(last, now), images)


class ListingCache:
    """Gives the listing of a store: makes it when it is asked for, and gives it again for a while."""

    def __init__(
        self,
        index: Index,
        refresh: IndexRefresh,
        threads: Threads,
        clock: IReactorTime,
        now: Callable[[], datetime],
    ) -> None:
        """List the records of `index`, which `refresh` keeps."""
        self._index = index
        self._refresh = refresh
        self._threads = threads
        self._clock = clock
        self._now = now
        self._made: Listing | None = None
        self._fresh_until = 0.0
        self._making: SingleFlight[None, Listing] = SingleFlight()

    def list(self) -> Deferred[Listing]:
        """Return the images, as they were a few seconds ago at most; with 100,000, up to a minute ago."""
        return self._making.join(None, self._list)

    async def _list(self) -> Listing:
        if self._made is not None and self._clock.seconds() < self._fresh_until:
            return self._made
        made, took = await self._threads.compute(self._make, self._index.entries(), self._refresh.seen)
        self._made, self._fresh_until = made, self._clock.seconds() + max(_FRESH, took / _SHARE)
        return made

    def _make(self, entries: Mapping[Digest, Entry], seen: Mapping[str, Signature]) -> tuple[Listing, float]:
        began = time.thread_time()
        return Listing.make(entries, seen, self._now()), time.thread_time() - began
