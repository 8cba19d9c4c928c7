"""Loading images before clients pull them: the loader, and preloading by the daemon."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from twisted.application.service import Service
from twisted.internet.defer import (
    CancelledError,
    Deferred,
    DeferredList,
    DeferredSemaphore,
    FirstError,
    gatherResults,
    succeed,
)
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from ociregistry.config.values import count_text
from ociregistry.errors import AirGapped, BlobUnknown, Denied, ManifestUnknown, RegistryError, Unavailable
from ociregistry.imagelists.reading import ImageList
from ociregistry.manifests import LISTS, MEDIA_TYPES, Descriptor, Manifest
from ociregistry.names import Digest, ImageReference, Repository, Tag
from ociregistry.platforms import NO_PLATFORM, Platform, chosen
from ociregistry.pullthrough.fetchers import Fetcher, FetcherMetadata
from ociregistry.pullthrough.imageblobs import MOST_REFUSED, Refusals
from ociregistry.pullthrough.metadata import Metadata
from ociregistry.store.store import Store

_log = Logger(namespace="ociregistry.pullthrough")


class LoadStatus(Enum):
    """The result of loading an image."""

    LOADED = "loaded"
    PRESENT = "already there"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class LoadResult:
    """The result of loading the image `name`, with the numbers of fetched blobs and their bytes."""

    name: str
    ended: LoadStatus
    why: str = ""
    """The reason for a failure."""
    notes: tuple[str, ...] = ()
    """Remarks for the operator."""
    blobs: int = 0
    bytes: int = 0
    again: bool = False
    """Whether a failed image may succeed later."""

    def __str__(self) -> str:
        """Return one line for the operator."""
        loaded = " loaded" if self.ended is LoadStatus.FAILED else ""
        said = [f"{count_text(self.blobs, 'blob')}, {count_text(self.bytes, 'byte')}{loaded}"] if self.blobs else []
        said += [*self.notes, *([self.why.removeprefix(f"{self.name}: ")] if self.why else [])]
        return f"{self.ended.value}: {self.name}" + (f": {'; '.join(said)}" if said else "")


class Progress(Protocol):
    """Receives the progress of loading."""

    def expect(self, name: str, size: int) -> None:
        """Add `size` bytes to the expected total of the image `name`."""

    def advance(self, name: str, count: int) -> None:
        """Add `count` bytes to those received for the image `name`."""

    def ended(self, outcome: LoadResult) -> None:
        """Report the result of an image."""


class NullProgress:
    """Ignores all progress."""

    def expect(self, name: str, size: int) -> None:
        """Do nothing."""

    def advance(self, name: str, count: int) -> None:
        """Do nothing."""

    def ended(self, outcome: LoadResult) -> None:
        """Do nothing."""


def summary(outcomes: Sequence[LoadResult]) -> str:
    """Return one line with the number of images for each status."""
    return ", ".join(f"{sum(outcome.ended is how for outcome in outcomes)} {how.value}" for how in LoadStatus)


_DEEPEST = 4
"""Levels of indexes within indexes that are followed."""
_MOST_MANIFESTS = 1000
"""Manifests of one image, at most, with those of its platforms, nested indexes and signatures."""
_SIGNATURES = ("sig", "att", "sbom")
"""Suffixes of the tags under which cosign keeps signatures, attestations and SBOMs of an image."""


def without_foreign_layers(missing: Mapping[Digest, int]) -> str:
    """Return the remark that an image lacks the foreign layers `missing`, given with their sizes in bytes."""
    return (
        f"without foreign layers: {count_text(len(missing), 'blob')}, {count_text(sum(missing.values()), 'byte')}, "
        "which clients fetch from the URLs in the manifest"
    )


_TAG_UNKNOWN = "known by its digest alone: a client that asks for its tag needs the upstream"


@dataclass(slots=True)
class _LoadState:
    """What has been fetched for one image so far."""

    image: ImageReference
    asked: int = 0
    """The manifests that were asked for, whether they were fetched or in the store."""
    manifests: int = 0
    blobs: int = 0
    bytes: int = 0
    notes: list[str] = field(default_factory=list)
    offered: set[str] = field(default_factory=set)
    """The platforms that indexes offer."""
    found: set[Platform] = field(default_factory=set)
    """The wanted platforms that were found."""
    unspecified: bool = False
    """Whether an index names images without a platform."""

    @property
    def name(self) -> str:
        return str(self.image)

    def outcome(self, wanted: Sequence[Platform]) -> LoadResult:
        """Return the result where no request failed; failed if a wanted platform is missing."""
        tag_unknown = [_TAG_UNKNOWN] if isinstance(self.image.reference, Digest) else []
        notes = (*tag_unknown, *dict.fromkeys(self.notes))
        missing = [str(platform) for platform in wanted if platform not in self.found]
        if missing and self.offered and not self.unspecified:
            others = ", ".join(sorted(self.offered - {NO_PLATFORM})) or "none"
            why = f"no image for {', '.join(missing)}; available: {others}"
            return LoadResult(self.name, LoadStatus.FAILED, why, notes, self.blobs, self.bytes)
        ended = LoadStatus.LOADED if self.manifests or self.blobs else LoadStatus.PRESENT
        return LoadResult(self.name, ended, "", notes, self.blobs, self.bytes)


class Loader:
    """Loads images with all their blobs; of an index, the images for the `wanted` platforms."""

    def __init__(
        self,
        store: Store,
        fetcher: Fetcher,
        wanted: Sequence[Platform],
        *,
        signatures: bool,
        concurrent: int,
        connections: int,
        progress: Progress,
        clock: IReactorTime,
    ) -> None:
        """Load up to `concurrent` images and `connections` blobs at once; with `signatures`, their referrers too."""
        self._store = store
        self._fetcher = fetcher
        self._wanted = wanted
        self._signatures = signatures
        self._images = DeferredSemaphore(concurrent)
        self._blobs = DeferredSemaphore(connections)
        self._progress = progress
        self._clock = clock
        self._indexes: dict[Digest, tuple[Repository, Sequence[Descriptor]]] = {}
        """The loaded indexes: their repository and children."""

    async def load_metadata(self) -> list[str]:
        """Fetch the manifests and configs of the other platforms of all loaded indexes.

        Returns:
            One line for each upstream that failed for now; manifests that it does not have are no failure.

        Raises:
            OSError: the store cannot be read or written.
        """
        metadata = Metadata(self._store, FetcherMetadata(self._store, self._fetcher), self._clock)
        for index, (repository, children) in self._indexes.items():
            await metadata.queue_missing(index, repository, children)
        failed = []
        for upstream in metadata.upstreams:
            while (wait := await metadata.fetch_next(upstream)) == 0:
                pass
            if wait is not None:
                failed.append(f"{upstream}: {metadata.error(upstream)}")
        return failed

    async def load(self, images: Sequence[ImageReference]) -> list[LoadResult]:
        """Load the images; return their results in the same order."""
        running = [Deferred.fromCoroutine(self._load_in_turn(image)) for image in images]
        # Cancel in reverse order: releasing the semaphore starts the next waiter.
        running.reverse()
        try:
            return list(await gatherResults(running, consumeErrors=True))[::-1]
        except FirstError as error:
            for one in running:
                one.cancel()
            error.subFailure.raiseException()
            raise

    async def _load_in_turn(self, image: ImageReference) -> LoadResult:
        await self._images.acquire()
        try:
            await self._next_turn()
            outcome = await self._load(image)
        finally:
            self._images.release()
        self._progress.ended(outcome)
        return outcome

    async def _next_turn(self) -> None:
        """Continue in a new turn of the reactor.

        Releasing a semaphore calls the next waiter: a thousand that fail at once would overflow the stack.
        """
        await deferLater(self._clock, 0)

    async def _load(self, image: ImageReference) -> LoadResult:
        state = _LoadState(image)
        try:
            await self._load_manifest(image, state)
        except RegistryError as error:
            return _failed(state, error.message, again=isinstance(error, Unavailable))
        except OSError as error:
            return _failed(state, f"cannot be stored: {error.strerror or error}", again=True)
        return state.outcome(self._wanted)

    async def _load_manifest(self, image: ImageReference, state: _LoadState, deepest: int = _DEEPEST) -> None:
        """Fetch the manifest of `image`, its blobs, and the wanted children of an index, `deepest` levels deep."""
        manifest = await self._manifest(image, state)
        await self._load_blobs(image.repository, manifest, state)
        if manifest.is_list:
            self._indexes[manifest.digest] = image.repository, manifest.children
        if self._signatures:
            try:
                await self._load_signatures(image.repository, manifest.digest, state)
            except Unavailable as error:
                if state.manifests or state.blobs:
                    raise
                state.notes.append(f"cannot check for other signatures: {error.message}")
        children, found = chosen(manifest.children, self._wanted)
        state.found |= found
        state.offered |= {child.full_platform for child in manifest.children if child.platform}
        state.unspecified |= any(not one.platform and one.media_type not in LISTS for one in manifest.children)
        failed: list[RegistryError] = []
        for child in children:
            if len(failed) < MOST_REFUSED and deepest and child.media_type in MEDIA_TYPES:
                try:
                    await self._load_manifest(ImageReference(image.repository, child.digest), state, deepest - 1)
                except RegistryError as error:
                    failed.append(error)
        if failed:
            raise failed[0]

    async def _manifest(self, image: ImageReference, state: _LoadState) -> Manifest:
        state.asked += 1
        if state.asked > _MOST_MANIFESTS:
            raise RegistryError(f"it names more than {_MOST_MANIFESTS} manifests")
        found = await self._fetcher.manifest(image)
        state.manifests += not found.cache_status.is_hit
        if found.cache_status.is_hit and not self._store.shown_in(image.repository, found.manifest.digest):
            # A hit by digest, from another repository: the operator names this one.
            await self._store.keep(found.manifest, image, known=True)
        return found.manifest

    async def _load_blobs(self, repository: Repository, manifest: Manifest, state: _LoadState) -> None:
        missing = await self._store.missing_blobs(manifest)
        self._progress.expect(state.name, sum(missing.values()))
        refusals = Refusals()
        fetching = [
            Deferred.fromCoroutine(self._load_blob(repository, digest, size, state, refusals))
            for digest, size in missing.items()
        ]
        # Wait for all of them, also when one fails: a blob that was begun is completed.
        await DeferredList(fetching[::-1], consumeErrors=True).addCallback(_raise_first_failure)
        await self._load_foreign_layers(repository, manifest, state)
        if not manifest.is_list:
            # Only now: a daemon on the same store would fetch the blobs of a wanted image at the same time.
            await self._store.want(manifest.digest)

    async def _load_foreign_layers(self, repository: Repository, manifest: Manifest, state: _LoadState) -> None:
        """Fetch the layers that clients may fetch from other URLs, as far as the registry has them."""
        refusals = Refusals()
        missing = dict(await self._store.missing_foreign_layers(manifest.foreign_layers))
        for digest, size in list(missing.items()):
            try:
                if await self._load_blob(repository, digest, size, state, refusals):
                    del missing[digest]
            except (BlobUnknown, Denied, AirGapped):
                continue
            except Unavailable:
                if state.manifests or state.blobs:
                    raise
        if missing:
            state.notes.append(without_foreign_layers(missing))

    async def _load_blob(
        self, repository: Repository, digest: Digest, size: int, state: _LoadState, refusals: Refusals
    ) -> bool:
        """Fetch a blob, and return True; return False where the image already has enough `refusals`.

        Raises:
            RegistryError: it could not be fetched; this is one more of the `refusals`.
        """
        await self._blobs.acquire()
        try:
            await self._next_turn()
            if refusals.enough:
                return False
            await self._fetcher.blob(
                repository, digest, size, lambda count: self._progress.advance(state.name, count)
            )
        except RegistryError as error:
            refusals.add(digest, error)
            raise
        finally:
            self._blobs.release()
        state.blobs += 1
        state.bytes += size
        return True

    async def _load_signatures(self, repository: Repository, digest: Digest, state: _LoadState) -> None:
        """Fetch the cosign tags of the manifest `digest`, and its referrers."""
        if digest.algorithm == "sha256":
            for ending in _SIGNATURES:
                await self._load_signature(ImageReference(repository, Tag(f"sha256-{digest.hex}.{ending}")), state)
        referrers = await self._fetcher.referrers(repository, digest)
        absent = 0
        for child in referrers.children if referrers else ():
            if child.media_type in MEDIA_TYPES and absent < MOST_REFUSED:
                absent += not await self._load_signature(ImageReference(repository, child.digest), state)

    async def _load_signature(self, image: ImageReference, state: _LoadState) -> bool:
        """Fetch a manifest with its blobs; return whether it is there."""
        try:
            manifest = await self._manifest(image, state)
        except (ManifestUnknown, AirGapped):
            return False
        await self._load_blobs(image.repository, manifest, state)
        return True


def _failed(state: _LoadState, why: str, *, again: bool) -> LoadResult:
    return LoadResult(state.name, LoadStatus.FAILED, why, (), state.blobs, state.bytes, again)


_AGAIN = 30.0
"""Seconds until an image that could not be loaded for now is tried again."""


@dataclass(frozen=True, slots=True)
class PreloadProgress:
    """The progress of preloading, as numbers of images."""

    images: int
    """Images in the file."""
    loaded: int
    failed: int
    """Images that will not be tried again."""


class Preloader(Service):
    """Loads images in the background, and logs all errors."""

    def __init__(self, read: Callable[[], Deferred[ImageList]], loader: Loader, clock: IReactorTime) -> None:
        """Load the images that `read` returns; it may fail with `OSError`."""
        self._read = read
        self._loader = loader
        self._clock = clock
        self._ended: dict[ImageReference, LoadStatus] = {}
        self._images: Sequence[ImageReference] = ()
        self._running: Deferred[None] = succeed(None)

    @property
    def progress(self) -> PreloadProgress:
        """The progress so far."""
        failed = sum(ended is LoadStatus.FAILED for ended in self._ended.values())
        return PreloadProgress(len(self._images), len(self._ended) - failed, failed)

    def startService(self) -> None:
        """Start preloading."""
        super().startService()
        self._running = Deferred.fromCoroutine(self._preload()).addErrback(self._failed)

    def stopService(self) -> None:
        """Stop; the next start loads the rest."""
        super().stopService()
        self._running.cancel()

    def _failed(self, failure: Failure) -> None:
        error = failure.value
        if isinstance(error, OSError):
            named = error.filename and error.strerror
            _log.error("cannot preload: {why}", why=f"{error.filename}: {error.strerror}" if named else error)
        elif not failure.check(CancelledError):
            _log.failure("a defect in preloading", failure)

    async def _preload(self) -> None:
        listed = await self._read()
        for error in listed.errors:
            _log.error("not preloaded: {why}", why=error)
        self._images = listed.images
        # Cancel in reverse order: releasing the semaphore starts the next waiter.
        loading = [Deferred.fromCoroutine(self._preload_one(image)) for image in listed.images]
        await DeferredList(loading[::-1], consumeErrors=True).addCallback(_raise_first_failure)
        done = self.progress
        _log.info("preloaded: {loaded}, failed: {failed}", loaded=done.loaded, failed=done.failed)

    async def _preload_one(self, image: ImageReference) -> None:
        told = False
        while True:
            (outcome,) = await self._loader.load([image])
            if outcome.ended is not LoadStatus.FAILED:
                _log.info("preloading: {outcome}", outcome=outcome, image=image)
            elif not told or not outcome.again:
                _log.error("preloading: {outcome}", outcome=outcome, image=image)
            if not outcome.again:
                self._ended[image] = outcome.ended
                return
            told = True
            await deferLater(self._clock, _AGAIN)


def _raise_first_failure(results: list[tuple[bool, Any]]) -> None:
    for succeeded, result in results:
        if not succeeded:
            result.raiseException()
