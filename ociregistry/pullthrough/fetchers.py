"""Where images that are loaded come from: this process pulls them, or the daemon on the same store does."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from twisted.internet import defer
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater

from ociregistry.errors import ManifestUnknown, Unavailable
from ociregistry.manifests import OCI_INDEX, Descriptor, Manifest
from ociregistry.names import Digest, ImageReference, Repository, Upstream
from ociregistry.pullthrough.cache import DeadlineExceeded, FoundManifest, PullThrough
from ociregistry.pullthrough.listings import Listings
from ociregistry.store.store import Store
from ociregistry.upstream.daemon_client import DaemonClient

T = TypeVar("T")


_SLOW = 8.0
"""Seconds after which an answer failed because the upstream is slow; one that fails sooner will fail again."""
_LOOK_AGAIN = 0.05
"""Seconds from one look at the store to the next."""

Advance = Callable[[int], object]
"""Is called with numbers of bytes that came."""


class Fetcher(Protocol):
    """Brings what is asked for into the store. All methods raise `RegistryError`."""

    async def manifest(self, image: ImageReference) -> FoundManifest:
        """The manifest that `image` means."""

    async def referrers(self, repository: Repository, digest: Digest) -> Manifest | None:
        """The index of what refers to the manifest `digest`; None where the upstream does not offer it."""

    async def blob(self, repository: Repository, digest: Digest, size: int, advance: Advance) -> None:
        """Returns when the blob of `size` bytes is in the store."""


class IdleTimeout:
    """Measures how long nothing came."""

    def __init__(self, seconds: float, clock: IReactorTime) -> None:
        self._seconds = seconds
        self._clock = clock
        self.progress()

    def progress(self) -> None:
        """Something came."""
        self._until = self._clock.seconds() + self._seconds

    @property
    def left(self) -> float:
        """Seconds, at least a little."""
        return max(0.001, self._until - self._clock.seconds())

    @property
    def exhausted(self) -> bool:
        """Whether nothing came for too long."""
        return self._clock.seconds() >= self._until


class CacheFetcher:
    """This process pulls, as for a client that waits `patience` seconds without progress."""

    def __init__(self, cache: PullThrough, listings: Listings, patience: float, clock: IReactorTime) -> None:
        self._cache = cache
        self._listings = listings
        self._seconds = patience
        self._clock = clock

    async def manifest(self, image: ImageReference) -> FoundManifest:
        """As `Supplier.manifest`."""
        return await self._retry_while_slow(image, lambda: self._cache.manifest(image))

    async def referrers(self, repository: Repository, digest: Digest) -> Manifest | None:
        """As `Supplier.referrers`."""
        what = f"{repository}@{digest}"
        try:
            found = await self._retry_while_slow(what, lambda: self._listings.referrers(repository, digest, ""))
        except ManifestUnknown:
            return None
        return Manifest.parse(found.data, OCI_INDEX)

    async def blob(self, repository: Repository, digest: Digest, size: int, advance: Advance) -> None:
        """As `Supplier.blob`."""
        what = f"{repository}@{digest}"
        found = await self._retry_while_slow(what, lambda: self._cache.blob(repository, digest))
        try:
            at = 0
            while at < size:
                coming = found.content.more_than(at).addTimeout(self._seconds, self._clock)
                try:
                    upto = await coming
                except defer.TimeoutError:
                    raise Unavailable(f"{what}: no byte came for {self._seconds:g} s") from None
                advance(upto - at)
                at = upto
        finally:
            found.content.close()
        await self._cache.fetch(repository, digest)

    async def _retry_while_slow(self, what: object, ask: Callable[[], Coroutine[Deferred[Any], Any, T]]) -> T:
        """What `ask` gives; it is asked again as long as the upstream is only slow."""
        patience = IdleTimeout(self._seconds, self._clock)
        while True:
            try:
                return await Deferred.fromCoroutine(ask()).addTimeout(patience.left, self._clock)
            except DeadlineExceeded:
                continue
            except defer.TimeoutError:
                raise Unavailable(f"{what}: the upstream gave no answer within {self._seconds:g} s") from None


class BackgroundFetcher(CacheFetcher):
    """This process pulls, after what clients wait for."""

    async def blob(self, repository: Repository, digest: Digest, size: int, advance: Advance) -> None:
        """As `Supplier.blob`."""
        await self._cache.fetch(repository, digest, extra=False)
        advance(size)


class FetcherMetadata:
    """Brings manifests and configs by a supplier, as `MetadataFetcher` has it."""

    def __init__(self, store: Store, fetcher: Fetcher) -> None:
        self._store = store
        self._fetcher = fetcher

    async def fetch_manifest(self, image: ImageReference) -> None:
        """As `MetadataFetcher.fetch_manifest`."""
        found = await self._fetcher.manifest(image)
        if not found.manifest.is_list:
            await self._store.want(found.manifest.digest, wanted=False)

    async def fetch_config(self, repository: Repository, config: Descriptor) -> None:
        """As `MetadataFetcher.fetch_config`."""
        if not await self._store.holds(config.digest, config.size):
            await self._fetcher.blob(repository, config.digest, config.size, lambda count: None)


class DaemonFetcher:
    """The daemon pulls; what is in the store already, it is not asked for."""

    def __init__(
        self,
        store: Store,
        daemon: DaemonClient,
        patience: float,
        clock: IReactorTime,
        check: Callable[[Upstream], None] = lambda upstream: None,
    ) -> None:
        """`check` raises `Denied` for an upstream that the daemon is not to be asked for."""
        self._check = check
        self._store = store
        self._daemon = daemon
        self._seconds = patience
        self._clock = clock

    async def manifest(self, image: ImageReference) -> FoundManifest:
        """As `Supplier.manifest`."""
        stored = await self._store.manifest(image)
        if stored is not None:
            return FoundManifest(stored, hit=True)
        self._check(image.repository.upstream)
        patience = IdleTimeout(self._seconds, self._clock)
        while True:
            began = self._clock.seconds()
            try:
                return FoundManifest(await self._daemon.manifest(image), hit=False)
            except Unavailable:
                if self._clock.seconds() - began < _SLOW or patience.exhausted:
                    raise

    async def referrers(self, repository: Repository, digest: Digest) -> Manifest | None:
        """As `Supplier.referrers`."""
        self._check(repository.upstream)
        try:
            return await self._daemon.referrers(repository, digest)
        except ManifestUnknown:
            return None

    async def blob(self, repository: Repository, digest: Digest, size: int, advance: Advance) -> None:
        """As `Supplier.blob`."""
        self._check(repository.upstream)
        patience = IdleTimeout(self._seconds, self._clock)
        at, done = 0, False
        while not done:
            began, before = self._clock.seconds(), at
            body = await self._daemon.blob(repository, digest, at)
            try:
                while data := await body.read():
                    at += len(data)
                    advance(len(data))
                    patience.progress()
                done = True
            except Unavailable:
                # It waits longer for a slow upstream than this connection does for it.
                if patience.exhausted or (at == before and self._clock.seconds() - began < _SLOW):
                    raise
            finally:
                body.abort()
        # The last byte goes out when the digest holds; then the daemon has to sync and rename it.
        while not await self._store.holds(digest, size):
            if patience.exhausted:
                raise Unavailable(f"{repository}@{digest}: the daemon did not store it; its log says why")
            await deferLater(self._clock, _LOOK_AGAIN)
