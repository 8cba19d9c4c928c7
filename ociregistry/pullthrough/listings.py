"""Lists of tags and referrers: from the upstream while it can be reached, else from the store."""

from __future__ import annotations

import json
from dataclasses import dataclass

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from ociregistry.context import FROM_CLIENT, Context
from ociregistry.errors import AirGapped, Unavailable
from ociregistry.manifests import Manifest, canonical_media_type
from ociregistry.names import Digest, ImageReference, Repository, referrers_tag
from ociregistry.pullthrough.cache import within_deadline
from ociregistry.store.store import Store
from ociregistry.upstream.network import Registries
from ociregistry.upstream.paging import FIRST_PAGE, PageRequest, TagPage


@dataclass(frozen=True, slots=True)
class FoundTags:
    """A page of tags; `hit` tells whether it is from the store, as the upstream could not be asked."""

    page: TagPage
    hit: bool


@dataclass(frozen=True, slots=True)
class FoundReferrers:
    """An index of referrers as JSON; `hit` tells whether it is from the store, as the upstream could not be asked."""

    data: bytes
    hit: bool


class Listings:
    """Lists tags and referrers of an upstream.

    Without an answer of the upstream, an empty list is never returned; the methods raise like those of `PullThrough`.
    """

    log = Logger(namespace="ociregistry.pullthrough")

    def __init__(self, store: Store, registries: Registries, clock: IReactorTime) -> None:
        self._store = store
        self._registries = registries
        self._clock = clock

    async def tags(
        self, repository: Repository, page: PageRequest = FIRST_PAGE, context: Context = FROM_CLIENT
    ) -> FoundTags:
        """Return the page of the tags of `repository` that `page` asks for.

        Raises:
            RegistryError: the upstream refused, or cannot be asked and the store knows no tags.
        """
        registry = self._registries.get(repository.upstream)
        if page.count == 0:
            return FoundTags(TagPage(()), hit=False)
        asked = Deferred.fromCoroutine(registry.tags(repository, page, context))
        try:
            return FoundTags(await within_deadline(asked, self._clock, repository), hit=False)
        except (Unavailable, AirGapped) as error:
            known = self._store.tags(repository)
            if not known:
                raise
            self.log.warn("listing the tags in the cache: {why}", why=error)
            rest = [tag for tag in known if tag > page.last]
            tags = tuple(rest[: page.count])
            following = PageRequest(page.count, tags[-1]) if len(tags) < len(rest) else None
            return FoundTags(TagPage(tags, following), hit=True)

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
        asked = Deferred.fromCoroutine(registry.referrers(repository, digest, context))
        try:
            manifest = await within_deadline(asked, self._clock, repository)
        except (Unavailable, AirGapped) as error:
            kept = await self._store.manifest(tagged)
            if kept is None or not kept.is_list:
                raise
            self.log.warn("listing the referrers in the cache: {why}", why=error)
            return FoundReferrers(_filtered(kept, artifact_type), hit=True)
        if manifest.children:
            await self._keep(manifest, tagged)
        return FoundReferrers(_filtered(manifest, artifact_type), hit=False)

    async def _keep(self, manifest: Manifest, tagged: ImageReference) -> None:
        try:
            await self._store.keep(manifest, tagged)
        except OSError as error:
            self.log.error("{image}: cannot be stored: {why}", image=tagged, why=error.strerror)


def _filtered(manifest: Manifest, artifact_type: str) -> bytes:
    if not artifact_type:
        return manifest.data
    document = json.loads(manifest.data)
    wanted = canonical_media_type(artifact_type)
    document["manifests"] = [
        entry for entry in document["manifests"] or () if canonical_media_type(entry.get("artifactType")) == wanted
    ]
    return json.dumps(document).encode()
