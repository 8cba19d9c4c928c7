"""The metadata of an index: the manifests and configs of all its platforms, a few kB each.

Some clients read all of them before they pull one platform, such as containerd's `ctr images pull`. While the link is
down, such clients cannot pull an image whose index lacks one manifest, even if all its layers are in the store.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cachetools import LRUCache, TTLCache
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from ociregistry.concurrency import Backoff
from ociregistry.errors import BlobUnknown, Denied, ManifestUnknown, RegistryError, Unavailable
from ociregistry.manifests import LARGEST_CONFIG, MEDIA_TYPES, Descriptor
from ociregistry.names import Digest, ImageReference, Repository, Upstream
from ociregistry.pullthrough.imageblobs import MOST_REFUSED
from ociregistry.store.store import Store
from ociregistry.upstream.breaker import LinkDown

_log = Logger(namespace="ociregistry.pullthrough")

_MOST_CHILDREN = 200
"""Children of one index that are considered, at most; the largest known indexes have about 40."""
_MOST_FAILURES = 10
"""Failures after which a manifest counts as unavailable."""
_UNKNOWN_FOR = 3600.0
"""Seconds until an unavailable manifest is requested again."""
_MOST_UNKNOWN = 10_000
"""Manifests, at most, that are remembered as unavailable, or with their failures."""
_BACKOFF = Backoff(first=30.0, longest=300.0)
"""To the next try after failures, unless the upstream's Retry-After is longer."""


class MetadataFetcher(Protocol):
    """Fetches manifests and configs into the store at the lowest priority. All methods raise `RegistryError`."""

    def fetch_manifest(self, image: ImageReference) -> Coroutine[Deferred[Any], Any, None]:
        """Fetch a manifest into the store, marked as one whose layers are not wanted."""

    def fetch_config(self, repository: Repository, config: Descriptor) -> Coroutine[Deferred[Any], Any, None]:
        """Fetch a config into the store."""


class Metadata:
    """Fetches missing metadata of indexes: per upstream in turns, one child of each index."""

    def __init__(self, store: Store, fetcher: MetadataFetcher, clock: IReactorTime) -> None:
        self._store = store
        self._fetcher = fetcher
        self._clock = clock
        self._queues: dict[Upstream, deque[_Index]] = {}
        self._waits: dict[Upstream, _Wait] = {}
        self._unknown: TTLCache[ImageReference, None, float] = TTLCache(
            _MOST_UNKNOWN, ttl=_UNKNOWN_FOR, timer=clock.seconds
        )
        """Unavailable manifests, and indexes with several of them, which are not requested for an hour."""
        self._failures: LRUCache[ImageReference, int] = LRUCache(_MOST_UNKNOWN)
        """The number of failures of each manifest since its last success."""

    @property
    def incomplete(self) -> int:
        """The number of indexes with missing metadata."""
        return sum(map(len, self._queues.values()))

    @property
    def upstreams(self) -> list[Upstream]:
        """The upstreams with missing metadata."""
        return list(self._queues)

    def error(self, upstream: Upstream) -> str:
        """Return the error of the last fetch from an upstream; the empty string if it succeeded."""
        waiting = self._waits.get(upstream)
        return waiting.error if waiting is not None else ""

    async def queue_missing(
        self,
        index: Digest,
        repository: Repository,
        children: Sequence[Descriptor],
        first: Container[Digest] = (),
    ) -> None:
        """Queue the missing ones of the `children` of an index, with their configs; those in `first` come first.

        Raises:
            OSError: the store cannot be read.
        """
        ordered = sorted(children, key=lambda child: child.digest not in first)
        candidates = [child for child in ordered[:_MOST_CHILDREN] if child.media_type in MEDIA_TYPES]
        if self.gave_up(index, repository):
            candidates = []
        known = (child.digest for child in candidates)
        digests = [digest for digest in known if ImageReference(repository, digest) not in self._unknown]
        missing = await self._store.missing_metadata(dict.fromkeys(digests))
        self.forget(index)
        if missing:
            self._queues.setdefault(repository.upstream, deque()).append(_Index(index, repository, deque(missing)))

    def gave_up(self, index: Digest, repository: Repository) -> bool:
        """Tell whether several manifests of an index were not in this repository in the last hour."""
        return ImageReference(repository, index) in self._unknown

    def forget(self, index: Digest) -> None:
        """Remove an index from the queue."""
        for upstream, queue in list(self._queues.items()):
            kept = deque(one for one in queue if one.digest != index)
            if kept:
                self._queues[upstream] = kept
            else:
                del self._queues[upstream]

    async def fetch_next(self, upstream: Upstream) -> float | None:
        """Fetch one manifest with its config.

        Returns:
            The seconds to wait before the next call; None when nothing is missing.
        """
        queue = self._queues.get(upstream)
        if not queue:
            return None
        waiting = self._waits.get(upstream)
        if waiting is not None and waiting.until > self._clock.seconds():
            return waiting.until - self._clock.seconds()
        index = queue.popleft()
        child = index.missing.popleft()
        image = ImageReference(index.repository, child)
        # Back to the end of the queue: the indexes take turns.
        if index.missing:
            queue.append(index)
        elif not queue:
            del self._queues[upstream]
        try:
            await self._fetch(image)
        except (ManifestUnknown, BlobUnknown, Denied) as error:
            _log.debug("{image}: platform skipped: {why}", image=index.digest, why=error.message)
            self._mark_unknown(image)
            self._count_unknown(index)
        except Unavailable as error:
            _log.debug("{image}: platform still missing: {why}", image=index.digest, why=error.message)
            if not self._count_failure(image, error):
                self._requeue(upstream, index, child)
            return self._back_off(upstream, error)
        self._waits.pop(upstream, None)
        self._failures.pop(image, None)
        return 0.0

    async def _fetch(self, image: ImageReference) -> None:
        assert isinstance(image.reference, Digest)
        if self._store.entry(image.reference) is None:
            await self._fetcher.fetch_manifest(image)
        entry = self._store.entry(image.reference)
        config = entry.config if entry is not None else None
        if config is not None and config.size <= LARGEST_CONFIG:
            await self._fetcher.fetch_config(image.repository, config)

    def _requeue(self, upstream: Upstream, index: _Index, child: Digest) -> None:
        """Put a child whose fetch failed back into the queue."""
        queue = self._queues.setdefault(upstream, deque())
        # `queue_missing` may have queued the index again meanwhile.
        known = next((one for one in queue if one.digest == index.digest), None)
        if known is None:
            queue.append(_Index(index.digest, index.repository, deque([child])))
        elif child not in known.missing:
            known.missing.append(child)

    def _count_unknown(self, index: _Index) -> None:
        """Count an unavailable manifest of an index, and request no more of it after several."""
        index.unknown += 1
        if index.unknown >= MOST_REFUSED:
            _log.debug("{image}: its other platforms are skipped", image=index.digest)
            self._unknown[ImageReference(index.repository, index.digest)] = None
            self.forget(index.digest)

    def _count_failure(self, child: ImageReference, error: RegistryError) -> bool:
        """Count a failure; tell whether there were too many. A link that is down does not count."""
        if isinstance(error, LinkDown):
            return False
        self._failures[child] = self._failures.get(child, 0) + 1
        if self._failures[child] < _MOST_FAILURES:
            return False
        self._mark_unknown(child)
        return True

    def _mark_unknown(self, child: ImageReference) -> None:
        """Note that a manifest is unavailable."""
        self._failures.pop(child, None)
        self._unknown[child] = None

    def _back_off(self, upstream: Upstream, error: Unavailable) -> float:
        """Return the seconds to wait after a failure, and note them."""
        before = self._waits.get(upstream)
        failures = before.failures + 1 if before is not None else 1
        wait = max(_BACKOFF.interval(failures), error.retry_after)
        self._waits[upstream] = _Wait(self._clock.seconds() + wait, failures, error.message)
        return wait


@dataclass(frozen=True, slots=True)
class _Wait:
    """The pause of an upstream after a failure."""

    until: float
    """Clock seconds."""
    failures: int
    """The number of failures in a row."""
    error: str


class _Index:
    """An index, and the manifests that are still to be fetched for it."""

    def __init__(self, digest: Digest, repository: Repository, missing: deque[Digest]) -> None:
        self.digest = digest
        self.repository = repository
        self.missing = missing
        self.unknown = 0
        """The number of manifests that the upstream did not have."""
