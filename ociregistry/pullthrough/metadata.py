"""The metadata of an index: the manifests and configs of all its platforms, a few kB each.

Some clients read them all before they pull one platform (containerd's `ctr images pull` does): when the link is down,
an image of which one manifest is missing cannot be pulled by them, though all its layers are here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from ociregistry.errors import BlobUnknown, Denied, ManifestUnknown, RegistryError, Unavailable
from ociregistry.manifests import LARGEST_CONFIG, MEDIA_TYPES, Descriptor
from ociregistry.names import Digest, ImageReference, Repository, Upstream
from ociregistry.store.store import Store
from ociregistry.upstream.breaker import LinkDown

_MOST_CHILDREN = 200
"""Of one index; the largest in the field have about 40."""
_MOST_FAILURES = 10
"""Failures after which a manifest counts as one that cannot be had."""
_UNKNOWN_FOR = 3600.0
"""Seconds until a manifest that cannot be had is asked for again."""
_MOST_UNKNOWN = 10_000
_FIRST_WAIT = 30.0
_LONGEST_WAIT = 300.0
"""Seconds, at most, to the next try after failures, if the upstream does not ask for more."""


class MetadataFetcher(Protocol):
    """Brings manifests and configs into the store, after everything else. All methods raise `RegistryError`."""

    def fetch_manifest(self, image: ImageReference) -> Coroutine[Deferred[Any], Any, None]:
        """Return when the manifest is in the store, as one whose layers are not wanted."""

    def fetch_config(self, repository: Repository, config: Descriptor) -> Coroutine[Deferred[Any], Any, None]:
        """Return when the config is in the store."""


class Metadata:
    """Fetches what is missing of indexes: for each upstream one child of one index, then one of the next."""

    log = Logger(namespace="ociregistry.pullthrough")

    def __init__(self, store: Store, fetcher: MetadataFetcher, clock: IReactorTime) -> None:
        self._store = store
        self._fetcher = fetcher
        self._clock = clock
        self._queues: dict[Upstream, deque[_Index]] = {}
        self._waits: dict[Upstream, _Wait] = {}
        self._unknown: dict[Digest, float] = {}
        """Manifests that cannot be had, and until when they are not asked for."""
        self._failures: dict[Digest, int] = {}

    @property
    def incomplete(self) -> int:
        """How many indexes lack something."""
        return sum(map(len, self._queues.values()))

    @property
    def upstreams(self) -> list[Upstream]:
        """Those of which something is missing."""
        return list(self._queues)

    def error(self, upstream: Upstream) -> str:
        """Return why the last manifest of an upstream could not be fetched; the empty string if it could."""
        waiting = self._waits.get(upstream)
        return waiting.error if waiting is not None else ""

    async def look_at(
        self,
        index: Digest,
        repository: Repository,
        children: Sequence[Descriptor],
        first: Container[Digest] = (),
    ) -> None:
        """Have those `children` of an index fetched that are missing, with their configs; the `first` ones first."""
        ordered = sorted(children, key=lambda child: child.digest not in first)
        candidates = [child for child in ordered[:_MOST_CHILDREN] if child.media_type in MEDIA_TYPES]
        now = self._clock.seconds()
        digests = [child.digest for child in candidates if self._unknown.get(child.digest, now) <= now]
        missing = await self._store.lacking_metadata(dict.fromkeys(digests))
        self.forget(index)
        if missing:
            self._queues.setdefault(repository.upstream, deque()).append(_Index(index, repository, deque(missing)))

    def forget(self, index: Digest) -> None:
        """Fetch nothing more of an index."""
        for upstream, queue in list(self._queues.items()):
            kept = deque(one for one in queue if one.digest != index)
            if kept:
                self._queues[upstream] = kept
            else:
                del self._queues[upstream]

    async def fetch_next(self, upstream: Upstream) -> float | None:
        """Fetch one manifest with its config.

        Returns the seconds after which to go on: 0 when nothing stands against it, None when nothing is missing.
        """
        queue = self._queues.get(upstream)
        if not queue:
            return None
        waiting = self._waits.get(upstream)
        if waiting is not None and waiting.until > self._clock.seconds():
            return waiting.until - self._clock.seconds()
        index = queue.popleft()
        child = index.missing.popleft()
        # In turns: the next call is for another index.
        if index.missing:
            queue.append(index)
        elif not queue:
            del self._queues[upstream]
        try:
            await self._fetch(ImageReference(index.repository, child))
        except (ManifestUnknown, BlobUnknown, Denied) as error:
            self.log.debug("{index}: a platform is left out: {why}", index=index.digest, why=error.message)
            self._is_unknown(child)
        except Unavailable as error:
            self.log.debug("{index}: a platform is still missing: {why}", index=index.digest, why=error.message)
            if not self._has_failed(child, error):
                self._again(upstream, index, child)
            return self._wait(upstream, error)
        self._waits.pop(upstream, None)
        self._failures.pop(child, None)
        return 0.0

    async def _fetch(self, image: ImageReference) -> None:
        assert isinstance(image.reference, Digest)
        if self._store.entry(image.reference) is None:
            await self._fetcher.fetch_manifest(image)
        entry = self._store.entry(image.reference)
        config = entry.config if entry is not None else None
        if config is not None and config.size <= LARGEST_CONFIG:
            await self._fetcher.fetch_config(image.repository, config)

    def _again(self, upstream: Upstream, index: _Index, child: Digest) -> None:
        queue = self._queues.setdefault(upstream, deque())
        # The index may have been looked at anew meanwhile.
        known = next((one for one in queue if one.digest == index.digest), None)
        if known is None:
            queue.append(_Index(index.digest, index.repository, deque([child])))
        elif child not in known.missing:
            known.missing.append(child)

    def _has_failed(self, child: Digest, error: RegistryError) -> bool:
        """Count a failure; tell whether there were too many, on a link that was up."""
        if isinstance(error, LinkDown):
            return False
        if len(self._failures) >= _MOST_UNKNOWN:
            self._failures.clear()
        self._failures[child] = self._failures.get(child, 0) + 1
        if self._failures[child] < _MOST_FAILURES:
            return False
        self._is_unknown(child)
        return True

    def _is_unknown(self, child: Digest) -> None:
        self._failures.pop(child, None)
        if len(self._unknown) >= _MOST_UNKNOWN:
            self._unknown.clear()
        self._unknown[child] = self._clock.seconds() + _UNKNOWN_FOR

    def _wait(self, upstream: Upstream, error: Unavailable) -> float:
        before = self._waits.get(upstream)
        step = min(_LONGEST_WAIT, before.step * 2) if before is not None else _FIRST_WAIT
        wait = max(step, error.retry_after)
        self._waits[upstream] = _Wait(self._clock.seconds() + wait, step, error.message)
        return wait


@dataclass(frozen=True, slots=True)
class _Wait:
    """Why, and until when, an upstream is not asked."""

    until: float
    step: float
    """Seconds; the next wait is twice as long."""
    error: str


class _Index:
    """An index, and the manifests that it lacks."""

    def __init__(self, digest: Digest, repository: Repository, missing: deque[Digest]) -> None:
        self.digest = digest
        self.repository = repository
        self.missing = missing
