"""Loading: images brought into the store before anybody pulls them, so many at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from twisted.internet.defer import Deferred, DeferredList, DeferredSemaphore, FirstError, gatherResults
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.python.failure import Failure

from ociregistry.errors import ManifestUnknown, RegistryError, Unavailable
from ociregistry.manifests import LISTS, MEDIA_TYPES, Descriptor, Manifest
from ociregistry.names import Digest, ImageReference, Repository, Tag
from ociregistry.platforms import NO_PLATFORM, Platform, chosen
from ociregistry.pullthrough.metadata import Metadata
from ociregistry.pullthrough.outcomes import Ended, Outcome, Progress
from ociregistry.pullthrough.suppliers import Supplier, SupplierMetadata
from ociregistry.store.store import Store

_DEEPEST = 4
"""Lists in lists."""
_SIGNATURES = ("sig", "att", "sbom")
"""Endings of the tags under which cosign keeps what it says of an image."""
_TAG_UNKNOWN = "known by its digest alone: a client that asks for its tag needs the upstream"


@dataclass(slots=True)
class _Brought:
    """What was brought for one image."""

    image: ImageReference
    manifests: int = 0
    blobs: int = 0
    bytes: int = 0
    notes: list[str] = field(default_factory=list)
    offered: set[str] = field(default_factory=set)
    """Platforms that lists have."""
    found: set[Platform] = field(default_factory=set)
    """Those of them that are wanted."""
    untold: bool = False
    """Whether there are images that tell no platform."""

    @property
    def name(self) -> str:
        return str(self.image)

    def outcome(self, wanted: Sequence[Platform]) -> Outcome:
        """How it ended, where nothing failed."""
        tag_unknown = [_TAG_UNKNOWN] if isinstance(self.image.reference, Digest) else []
        notes = (*tag_unknown, *dict.fromkeys(self.notes))
        missing = [str(platform) for platform in wanted if platform not in self.found]
        if missing and self.offered and not self.untold:
            others = ", ".join(sorted(self.offered - {NO_PLATFORM})) or "no platform at all"
            why = f"there is none for {', '.join(missing)}, but for {others}"
            return Outcome(self.name, Ended.FAILED, why, notes, self.blobs, self.bytes)
        ended = Ended.LOADED if self.manifests or self.blobs else Ended.THERE
        return Outcome(self.name, ended, "", notes, self.blobs, self.bytes)


class Loader:
    """Loads images: of a manifest list what is `wanted` of it, and everything that they consist of."""

    def __init__(
        self,
        store: Store,
        supplier: Supplier,
        wanted: Sequence[Platform],
        *,
        signatures: bool,
        concurrent: int,
        connections: int,
        progress: Progress,
        clock: IReactorTime,
    ) -> None:
        """So many images are loaded at once, and so many blobs; `signatures` asks for what refers to them, too."""
        self._store = store
        self._supplier = supplier
        self._wanted = wanted
        self._signatures = signatures
        self._images = DeferredSemaphore(concurrent)
        self._blobs = DeferredSemaphore(connections)
        self._progress = progress
        self._clock = clock
        self._indexes: dict[Digest, tuple[Repository, Sequence[Descriptor]]] = {}
        """The indexes that were loaded, with what they name."""

    async def load_metadata(self) -> list[str]:
        """Fetch the manifests and configs of the other platforms of all indexes that were loaded, as far as they are.

        Returns a line for each upstream that did not give all of them for now. One that it does not have is none.
        Raises `OSError`.
        """
        metadata = Metadata(self._store, SupplierMetadata(self._store, self._supplier), self._clock)
        for index, (repository, children) in self._indexes.items():
            await metadata.look_at(index, repository, children)
        failed = []
        for upstream in metadata.upstreams:
            while (wait := await metadata.fetch_next(upstream)) == 0:
                pass
            if wait is not None:
                failed.append(f"{upstream}: {metadata.error(upstream)}")
        return failed

    async def load(self, images: Sequence[ImageReference]) -> list[Outcome]:
        """How each of the images ended, in their order."""
        running = [Deferred.fromCoroutine(self._load_in_turn(image)) for image in images]
        # The last ones first: who is cancelled gives its turn to the next, which has to be cancelled by then.
        running.reverse()
        try:
            return list(await gatherResults(running, consumeErrors=True))[::-1]
        except FirstError as error:
            for one in running:
                one.cancel()
            error.subFailure.raiseException()
            raise

    async def _load_in_turn(self, image: ImageReference) -> Outcome:
        await self._images.acquire()
        try:
            await self._unwound()
            outcome = await self._load(image)
        finally:
            self._images.release()
        self._progress.ended(outcome)
        return outcome

    async def _unwound(self) -> None:
        """Who gives its turn back calls the next one: a thousand that fail at once would fill the stack."""
        await deferLater(self._clock, 0)

    async def _load(self, image: ImageReference) -> Outcome:
        brought = _Brought(image)
        try:
            await self._bring(image, brought)
        except RegistryError as error:
            return _failed(brought, error.message, again=isinstance(error, Unavailable))
        except OSError as error:
            return _failed(brought, f"cannot be stored: {error.strerror or error}", again=True)
        return brought.outcome(self._wanted)

    async def _bring(self, image: ImageReference, brought: _Brought, deepest: int = _DEEPEST) -> None:
        """The manifest of `image` with its blobs, and what it lists as far as that is wanted."""
        manifest = await self._manifest(image, brought)
        await self._bring_blobs(image.repository, manifest, brought)
        if manifest.is_list:
            self._indexes[manifest.digest] = image.repository, manifest.children
        if self._signatures:
            try:
                await self._bring_signatures(image.repository, manifest.digest, brought)
            except Unavailable as error:
                if brought.manifests or brought.blobs:
                    raise
                brought.notes.append(f"whether there are other signatures could not be asked: {error.message}")
        children, found = chosen(manifest.children, self._wanted)
        brought.found |= found
        brought.offered |= {child.platform for child in manifest.children if child.platform}
        brought.untold |= any(not one.platform and one.media_type not in LISTS for one in manifest.children)
        failed: list[RegistryError] = []
        for child in children:
            if deepest and child.media_type in MEDIA_TYPES:
                try:
                    await self._bring(ImageReference(image.repository, child.digest), brought, deepest - 1)
                except RegistryError as error:
                    failed.append(error)
        if failed:
            raise failed[0]

    async def _manifest(self, image: ImageReference, brought: _Brought) -> Manifest:
        found = await self._supplier.manifest(image)
        brought.manifests += not found.hit
        return found.manifest

    async def _bring_blobs(self, repository: Repository, manifest: Manifest, brought: _Brought) -> None:
        lacking = await self._store.lacking(manifest)
        self._progress.expect(brought.name, sum(lacking.values()))
        fetching = [
            Deferred.fromCoroutine(self._bring_blob(repository, digest, size, brought))
            for digest, size in lacking.items()
        ]
        # All of them, also when one fails: what was begun is brought to its end.
        for succeeded, result in await DeferredList(fetching[::-1], consumeErrors=True):
            if not succeeded:
                cast(Failure, result).raiseException()
        if not manifest.is_list:
            # Not before: a daemon on the same store completes what is wanted, beside what is loaded here.
            await self._store.want(manifest.digest)

    async def _bring_blob(self, repository: Repository, digest: Digest, size: int, brought: _Brought) -> None:
        await self._blobs.acquire()
        try:
            await self._unwound()
            await self._supplier.blob(
                repository, digest, size, lambda count: self._progress.came(brought.name, count)
            )
        finally:
            self._blobs.release()
        brought.blobs += 1
        brought.bytes += size

    async def _bring_signatures(self, repository: Repository, digest: Digest, brought: _Brought) -> None:
        """What cosign says of the manifest `digest` under tags, and what refers to it."""
        if digest.algorithm == "sha256":
            for ending in _SIGNATURES:
                await self._bring_signature(ImageReference(repository, Tag(f"sha256-{digest.hex}.{ending}")), brought)
        referrers = await self._supplier.referrers(repository, digest)
        for child in referrers.children if referrers else ():
            if child.media_type in MEDIA_TYPES:
                await self._bring_signature(ImageReference(repository, child.digest), brought)

    async def _bring_signature(self, image: ImageReference, brought: _Brought) -> None:
        try:
            manifest = await self._manifest(image, brought)
        except ManifestUnknown:
            return
        await self._bring_blobs(image.repository, manifest, brought)


def _failed(brought: _Brought, why: str, *, again: bool) -> Outcome:
    return Outcome(brought.name, Ended.FAILED, why, (), brought.blobs, brought.bytes, again)
