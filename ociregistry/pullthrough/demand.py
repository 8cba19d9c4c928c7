"""Demand: decide from the requests of clients which images of an index are wanted with all their layers.

Some clients read the manifests of all platforms and pull one of them. So an image of an index is wanted when a client
requests a layer that no other image of the index has. Without such a request, the decision is made 30 s after the
last request for the index or its children: if manifests of one platform were requested, it is wanted; if of several,
the one of this machine. An image that no index names is wanted as soon as it is requested.
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from ociregistry.manifests import Descriptor
from ociregistry.names import Digest, ImageReference, Repository
from ociregistry.platforms import NO_PLATFORM, Platform
from ociregistry.pullthrough.completion import Completion
from ociregistry.store.store import Store

_log = Logger(namespace="ociregistry.pullthrough")

_DECIDED_AFTER = 30.0
"""Seconds without a request for an index or its children after which its images are decided."""


@dataclass(slots=True)
class _Requests:
    """The recent requests for the children of one index."""

    timer: IDelayedCall
    images: set[Digest] = field(default_factory=set)
    """The images whose manifests were requested."""
    by_layer: bool = False
    """Whether a layer of one of them was requested; the others are then wanted only by a layer of their own."""


class Demand(Service):
    """Receives the requests of clients, and tells `completion` which images are wanted."""

    def __init__(self, store: Store, completion: Completion, machine: Platform, clock: IReactorTime) -> None:
        """Prefer `machine`, the platform of this machine, where clients requested several."""
        self._store = store
        self._completion = completion
        self._machine = machine
        self._clock = clock
        self._indexes: dict[Digest, _Requests] = {}
        self._stopped = False

    def startService(self) -> None:
        """Continue with the images that were undecided when the last process ended."""
        super().startService()
        for image, repository in list(self._store.undecided.items()):
            self._begin(self._resume(image, repository))

    def stopService(self) -> None:
        """Stop; undecided images stay recorded for the next start."""
        super().stopService()
        self._stopped = True
        for requests in self._indexes.values():
            requests.timer.cancel()
        self._indexes.clear()

    def manifest_requested(self, image: ImageReference, digest: Digest, *, is_list: bool, hit: bool) -> None:
        """Note that a client requested `image` and got the manifest `digest`; `hit`: the store had it."""
        if self._stopped:
            return
        if is_list:
            if digest in self._indexes:
                self._indexes[digest].timer.reset(_DECIDED_AFTER)
            return
        indexes = self._store.indexes(digest) if isinstance(image.reference, Digest) else ()
        if indexes:
            if self._completion.policy.platforms:
                return
            self._note_child(digest, indexes)
        if hit and self._completion.lacks_nothing(digest):
            return
        if indexes:
            self._begin(self._child_requested(digest, image.repository, indexes, hit=hit))
        else:
            self._begin(self._completion.complete(digest, image.repository, hit=hit))

    def blob_requested(self, repository: Repository, digest: Digest) -> None:
        """Note that a client requested a blob.

        Where several images have the blob, such as a layer of a base image, the request counts for those whose
        manifests were requested recently.
        """
        naming = self._store.naming(digest)
        # This runs for every hit, and a layer may be in thousands of images: consider only recently requested ones.
        images = naming if len(naming) == 1 else self._recently_requested & naming.keys()
        for image in images:
            entry = self._store.entry(image)
            if entry is None or (entry.wanted and not self._indexes) or digest not in entry.layers:
                continue
            indexes = self._store.indexes(image)
            if not self._is_shared(digest, image, indexes):
                self._begin(self._layer_requested(image, repository, indexes))

    @property
    def _recently_requested(self) -> set[Digest]:
        return {image for requests in self._indexes.values() for image in requests.images}

    def _is_shared(self, layer: Digest, image: Digest, indexes: Iterable[Digest]) -> bool:
        """Tell whether another image of the same indexes has the layer too, so that it decides nothing."""
        siblings = {child.digest for child in self._children(indexes)} - {image}
        entries = [self._store.entry(sibling) for sibling in siblings & self._store.naming(layer).keys()]
        return any(entry is not None and layer in entry.layers for entry in entries)

    def _note_child(self, image: Digest, indexes: Iterable[Digest]) -> None:
        for index in indexes:
            requests = self._requests(index)
            requests.images.add(image)
            requests.timer.reset(_DECIDED_AFTER)

    async def _child_requested(
        self, image: Digest, repository: Repository, indexes: Iterable[Digest], *, hit: bool
    ) -> None:
        entry = self._store.entry(image)
        if entry is not None and entry.wanted:
            await self._completion.complete(image, repository, hit=hit)
        elif not any(self._requests(index).by_layer for index in indexes):
            await self._note_undecided(image, repository)

    async def _note_undecided(self, image: Digest, repository: Repository) -> None:
        try:
            await self._store.add_pending(image, repository, undecided=True)
        except OSError as error:
            _log.error("cannot record that {image} is pending: {why}", image=image, why=error.strerror)

    async def _layer_requested(self, image: Digest, repository: Repository, indexes: Iterable[Digest]) -> None:
        others: set[Digest] = set()
        if self._platform(image) != NO_PLATFORM:
            for index in indexes:
                requests = self._indexes.get(index)
                if requests is not None:
                    requests.by_layer = True
                    others |= requests.images
        entry = self._store.entry(image)
        if entry is not None and not entry.wanted:
            await self._completion.complete(image, repository)
        for other in others - {image}:
            # A layer of the other image may have been requested meanwhile.
            if other in self._store.undecided:
                await self._completion.drop(other)

    async def _resume(self, image: Digest, repository: Repository) -> None:
        """Continue with an image that was undecided when the last process ended."""
        indexes = self._store.indexes(image)
        if self._store.entry(image) is None or (indexes and self._completion.policy.platforms):
            await self._completion.drop(image)
        elif not indexes:
            await self._completion.complete(image, repository)
        else:
            for index in indexes:
                # The requests of the last run are lost; the wanted images of the index were requested at some time.
                self._requests(index).images.update(self._wanted_children(index))
            self._note_child(image, indexes)
            await self._child_requested(image, repository, indexes, hit=True)

    def _wanted_children(self, index: Digest) -> list[Digest]:
        entries = {child.digest: self._store.entry(child.digest) for child in self._children([index])}
        return [digest for digest, entry in entries.items() if entry is not None and entry.wanted]

    def _requests(self, index: Digest) -> _Requests:
        if index not in self._indexes:
            self._indexes[index] = _Requests(self._clock.callLater(_DECIDED_AFTER, self._decide, index))
        return self._indexes[index]

    def _decide(self, index: Digest) -> None:
        requests = self._indexes.pop(index)
        self._begin(self._decided(requests))

    async def _decided(self, requests: _Requests) -> None:
        """Complete the requested images of the chosen platform, and drop the other undecided ones."""
        wanted = set[Digest]() if requests.by_layer else self._wanted(requests.images)
        for image in requests.images:
            # A request for a layer may have decided the image meanwhile.
            repository = self._store.undecided.get(image)
            if repository is None:
                continue
            if image in wanted:
                await self._completion.complete(image, repository)
            elif not any(image in others.images for others in self._indexes.values()):
                await self._completion.drop(image)

    def _wanted(self, images: Iterable[Digest]) -> set[Digest]:
        """Return the images of the only requested platform, or of the best one for this machine."""
        platforms = {image: self._platform(image) for image in images}
        told = set(platforms.values()) - {NO_PLATFORM}
        if len(told) > 1:
            best = self._machine.best([one for one in self._children_of(images) if one.digest in platforms])
            told = {best.platform} if best is not None else set()
        return {image for image, platform in platforms.items() if platform in told}

    def _children_of(self, images: Iterable[Digest]) -> list[Descriptor]:
        return self._children(dict.fromkeys(index for image in images for index in self._store.indexes(image)))

    def _children(self, indexes: Iterable[Digest]) -> list[Descriptor]:
        entries = map(self._store.entry, indexes)
        return [child for entry in entries if entry is not None for child in entry.children]

    def _platform(self, image: Digest) -> str:
        """Return the platform that an index gives the image, else its digest: a platform of its own."""
        told = (child.platform for child in self._children_of([image]) if child.digest == image)
        return next(filter(None, told), image)

    def _begin(self, work: Coroutine[Deferred[Any], Any, None]) -> None:
        if self._stopped:
            work.close()
            return
        started = Deferred.fromCoroutine(work)
        started.addErrback(lambda failure: _log.failure("a defect in completing an image", failure))
