"""Lists of tags and referrers: from the upstream while it can be reached, else from the store."""

from __future__ import annotations

import json
from dataclasses import dataclass

from twisted.internet import defer
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from ociregistry.context import FROM_CLIENT, Context
from ociregistry.errors import AirGapped, Unavailable
from ociregistry.manifests import Manifest, canonical_media_type
from ociregistry.names import Digest, ImageReference, Repository, referrers_tag
from ociregistry.pullthrough.waiting import CacheStatus, SharedRequests
from ociregistry.store.store import Store
from ociregistry.strictjson import parse_json
from ociregistry.upstream.network import Registries
from ociregistry.upstream.paging import FIRST_PAGE, PageRequest, TagPage

_log = Logger(namespace="ociregistry.pullthrough")

_DISK_WITHIN = 4.0
"""Seconds to wait for the disk after the upstream was waited for; containerd waits for 30 s in all."""


@dataclass(frozen=True, slots=True)
class FoundTags:
    """A page of tags, and where it is from."""

    page: TagPage
    cache_status: CacheStatus


@dataclass(frozen=True, slots=True)
class FoundReferrers:
    """An index of referrers as JSON, and where it is from."""

    data: bytes
    cache_status: CacheStatus


class Listings:
    """Lists tags and referrers of an upstream.

    Without an answer of the upstream, an empty list is never returned; the methods raise like those of `PullThrough`.
    """

    def __init__(self, store: Store, registries: Registries, clock: IReactorTime) -> None:
        self._store = store
        self._clock = clock
        self._registries = registries
        self._tags: SharedRequests[str, TagPage] = SharedRequests(clock)
        self._referrers: SharedRequests[str, Manifest] = SharedRequests(clock)

    async def tags(
        self, repository: Repository, page: PageRequest = FIRST_PAGE, context: Context = FROM_CLIENT
    ) -> FoundTags:
        """Return the page of the tags of `repository` that `page` asks for.

        Raises:
            RegistryError: the upstream refused, or cannot be asked and the store knows no tags.
        """
        registry = self._registries.get(repository.upstream)
        if page.count == 0:
            return FoundTags(TagPage(()), CacheStatus.MISS)
        what = f"{repository}/tags/list?{page.query}"
        joined = what in self._tags
        asked = self._tags.wait(
            what,
            lambda context: registry.tags(repository, page, context),
            context,
            loops=lambda context: registry.loops(repository, page.path, context),
        )
        try:
            return FoundTags(await asked, CacheStatus.fetched(joined=joined))
        except (Unavailable, AirGapped) as error:
            known = self._store.tags(repository)
            if not known:
                raise
            _log.warn("listing the tags in the cache: {why}", why=error)
            rest = [tag for tag in known if tag > page.last]
            tags = tuple(rest[: page.count])
            following = PageRequest(page.count, tags[-1]) if len(tags) < len(rest) else None
            return FoundTags(TagPage(tags, following), _instead_of(error))

    async def referrers(
        self, repository: Repository, digest: Digest, artifact_type: str, context: Context = FROM_CLIENT
    ) -> FoundReferrers:
        """Return the index of the referrers of the manifest `digest`; if given, only those of `artifact_type`.

        The answer of the upstream is stored under the tag for registries without this API.

        Raises:
            RegistryError: the upstream refused, or cannot be asked and the store has no index.
        """
        registry = self._registries.get(repository.upstream)
        tagged = ImageReference(repository, referrers_tag(digest))
        what = f"{repository}@{digest}"

        async def ask(context: Context) -> Manifest:
            manifest = await registry.referrers(repository, digest, context)
            if manifest.children:
                await self._keep(manifest, tagged)
            return manifest

        joined = what in self._referrers
        try:
            manifest = await self._referrers.wait(
                what, ask, context, loops=lambda context: registry.loops(repository, f"referrers/{digest}", context)
            )
        except (Unavailable, AirGapped) as error:
            looking = Deferred.fromCoroutine(self._store.manifest(tagged))
            try:
                kept = await looking.addTimeout(_DISK_WITHIN, self._clock)
            except defer.TimeoutError:
                raise error from None
            if kept is None or not kept.is_list:
                raise
            _log.warn("listing the referrers in the cache: {why}", why=error)
            return FoundReferrers(_filtered(kept, artifact_type), _instead_of(error))
        return FoundReferrers(_filtered(manifest, artifact_type), CacheStatus.fetched(joined=joined))

    async def _keep(self, manifest: Manifest, tagged: ImageReference) -> None:
        try:
            await self._store.keep(manifest, tagged)
        except OSError as error:
            _log.error("{image}: cannot be stored: {why}", image=tagged, why=error.strerror)


def _instead_of(error: Unavailable | AirGapped) -> CacheStatus:
    """Return the status of an answer from the store to what the upstream should have been asked for."""
    return CacheStatus.HIT if isinstance(error, AirGapped) else CacheStatus.STALE


def _filtered(manifest: Manifest, artifact_type: str) -> bytes:
    if not artifact_type:
        return manifest.data
    document = parse_json(manifest.data)
    wanted = canonical_media_type(artifact_type)
    document["manifests"] = [
        entry for entry in document["manifests"] or () if canonical_media_type(entry.get("artifactType")) == wanted
    ]
    return json.dumps(document).encode()
