"""Fetchers: where loaded images come from, pulled by this process or by the daemon on the same store."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from twisted.internet import defer
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater

from ociregistry.context import Context, Priority
from ociregistry.errors import AirGapped, ManifestUnknown, Unavailable
from ociregistry.manifests import OCI_INDEX, Descriptor, Manifest
from ociregistry.names import Digest, ImageReference, Repository, Upstream
from ociregistry.pullthrough.cache import FoundManifest, PullThrough
from ociregistry.pullthrough.listings import Listings
from ociregistry.pullthrough.waiting import CacheStatus, DeadlineExceeded
from ociregistry.store.store import Store
from ociregistry.upstream.daemon_client import DaemonClient

T = TypeVar("T")


_SLOW = 8.0
"""Seconds after which a failure means that the upstream is slow; after a faster failure, a retry is useless."""
_PATIENT = Context(patient=True)
_CHECK_AGAIN = 0.05
"""Seconds from one check of whether the store has a blob to the next."""

Advance = Callable[[int], object]
"""A callback that is called with the number of bytes received since its last call."""


class Fetcher(Protocol):
    """Fetches manifests and blobs into the store. All methods raise `RegistryError`."""

    async def manifest(self, image: ImageReference) -> FoundManifest:
        """Fetch the manifest that `image` refers to."""

    async def referrers(self, repository: Repository, digest: Digest) -> Manifest | None:
        """Return the index of the referrers of the manifest `digest`; None where the upstream does not offer one."""

    async def blob(self, repository: Repository, digest: Digest, size: int, advance: Advance) -> None:
        """Fetch a blob of `size` bytes; return when it is in the store."""


class IdleTimeout:
    """Measures the time since the last progress."""

    def __init__(self, seconds: float, clock: IReactorTime) -> None:
        self._seconds = seconds
        self._clock = clock
        self.progress()

    def progress(self) -> None:
        """Restart the time, as something came."""
        self._until = self._clock.seconds() + self._seconds

    @property
    def left(self) -> float:
        """The seconds left, at least 0.001."""
        return max(0.001, self._until - self._clock.seconds())

    @property
    def exhausted(self) -> bool:
        """Whether there was no progress for too long."""
        return self._clock.seconds() >= self._until


class CacheFetcher:
    """Fetches by this process' cache, as for a client that waits up to `patience` seconds without progress."""

    def __init__(self, cache: PullThrough, listings: Listings, patience: float, clock: IReactorTime) -> None:
        self._cache = cache
        self._listings = listings
        self._patience = patience
        self._clock = clock

    async def manifest(self, image: ImageReference) -> FoundManifest:
        """See `Fetcher.manifest`."""
        return await self._retry_while_slow(image, lambda: self._cache.manifest(image, _PATIENT))

    async def referrers(self, repository: Repository, digest: Digest) -> Manifest | None:
        """See `Fetcher.referrers`."""
        what = f"{repository}@{digest}"
        try:
            found = await self._retry_while_slow(
                what, lambda: self._listings.referrers(repository, digest, "", _PATIENT)
            )
        except (ManifestUnknown, AirGapped):
            return None
        return Manifest.parse(found.data, OCI_INDEX)

    async def blob(self, repository: Repository, digest: Digest, size: int, advance: Advance) -> None:
        """See `Fetcher.blob`."""
        what = f"{repository}@{digest}"
        found = await self._retry_while_slow(what, lambda: self._cache.blob(repository, digest, _PATIENT))
        try:
            at = 0
            while at < size:
                coming = found.content.more_than(at).addTimeout(self._patience, self._clock)
                try:
                    upto = await coming
                except defer.TimeoutError:
                    raise Unavailable(f"{what}: no byte came for {self._patience:g} s") from None
                advance(upto - at)
                at = upto
        finally:
            found.content.close()
        await self._cache.fetch(repository, digest)

    async def _retry_while_slow(self, what: object, ask: Callable[[], Coroutine[Deferred[Any], Any, T]]) -> T:
        """Return the result of `ask`; call it again while the upstream is only slow.

        Raises:
            RegistryError: it failed; `Unavailable` where there was no answer in time.
        """
        idle = IdleTimeout(self._patience, self._clock)
        while True:
            try:
                return await Deferred.fromCoroutine(ask()).addTimeout(idle.left, self._clock)
            except DeadlineExceeded:
                continue
            except defer.TimeoutError:
                raise Unavailable(f"{what}: the upstream gave no answer within {self._patience:g} s") from None


class BackgroundFetcher(CacheFetcher):
    """Fetches by this process' cache; blobs come in the background."""

    async def blob(self, repository: Repository, digest: Digest, size: int, advance: Advance) -> None:
        """See `Fetcher.blob`."""
        await self._cache.fetch(repository, digest, Context(priority=Priority.PRELOAD))
        advance(size)


class FetcherMetadata:
    """A `MetadataFetcher` that uses a `Fetcher`."""

    def __init__(self, store: Store, fetcher: Fetcher) -> None:
        self._store = store
        self._fetcher = fetcher

    async def fetch_manifest(self, image: ImageReference) -> None:
        """See `MetadataFetcher.fetch_manifest`."""
        found = await self._fetcher.manifest(image)
        if not found.manifest.is_list:
            await self._store.want(found.manifest.digest, wanted=False)

    async def fetch_config(self, repository: Repository, config: Descriptor) -> None:
        """See `MetadataFetcher.fetch_config`."""
        if not await self._store.holds(config.digest, config.size):
            await self._fetcher.blob(repository, config.digest, config.size, lambda count: None)


class DaemonFetcher:
    """Fetches by the daemon on the same store; manifests that the store has are not requested."""

    def __init__(
        self,
        store: Store,
        daemon: DaemonClient,
        patience: float,
        clock: IReactorTime,
        check: Callable[[Upstream], None],
    ) -> None:
        """Call `check` before each request; it raises `Denied` or `AirGapped` for upstreams not to be asked."""
        self._check = check
        self._store = store
        self._daemon = daemon
        self._patience = patience
        self._clock = clock

    async def manifest(self, image: ImageReference) -> FoundManifest:
        """See `Fetcher.manifest`."""
        stored = await self._store.manifest(image)
        if stored is not None:
            return FoundManifest(stored, CacheStatus.HIT)
        self._check(image.repository.upstream)
        idle = IdleTimeout(self._patience, self._clock)
        while True:
            began = self._clock.seconds()
            try:
                return FoundManifest(await self._daemon.manifest(image), CacheStatus.MISS)
            except Unavailable:
                if self._clock.seconds() - began < _SLOW or idle.exhausted:
                    raise

    async def referrers(self, repository: Repository, digest: Digest) -> Manifest | None:
        """See `Fetcher.referrers`."""
        try:
            self._check(repository.upstream)
            return await self._daemon.referrers(repository, digest)
        except (ManifestUnknown, AirGapped):
            return None

    async def blob(self, repository: Repository, digest: Digest, size: int, advance: Advance) -> None:
        """See `Fetcher.blob`."""
        self._check(repository.upstream)
        idle = IdleTimeout(self._patience, self._clock)
        at, done = 0, False
        while not done:
            began, before = self._clock.seconds(), at
            body = await self._daemon.blob(repository, digest, at)
            try:
                while data := await body.read():
                    at += len(data)
                    advance(len(data))
                    idle.progress()
                done = True
            except Unavailable:
                # The daemon may wait longer for a slow upstream than this connection waits for the daemon.
                if idle.exhausted or (at == before and self._clock.seconds() - began < _SLOW):
                    raise
            finally:
                body.abort()
        # The daemon sends the last byte once the digest is verified; it syncs and renames the blob after that.
        while not await self._store.holds(digest, size):
            if idle.exhausted:
                raise Unavailable(f"{repository}@{digest}: the daemon did not store it; its log says why")
            await deferLater(self._clock, _CHECK_AGAIN)
