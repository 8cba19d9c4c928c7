"""The API: answers the requests below /v2/ (OCI Distribution specification), and GET /health, /livez and /readyz.

`daemon.py` passes in where the fields of /health come from, and what readiness is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import assert_never
from urllib.parse import urlencode

from twisted.logger import Logger

from ociregistry import __version__
from ociregistry.context import FROM_CLIENT, NO_VIA, Context
from ociregistry.errors import LoopDetected
from ociregistry.manifests import OCI_INDEX, Manifest
from ociregistry.names import Digest, ImageReference, Upstream
from ociregistry.pullthrough.cache import Content, PullThrough
from ociregistry.pullthrough.completion import Incomplete
from ociregistry.pullthrough.demand import Demand
from ociregistry.pullthrough.listings import Listings
from ociregistry.pullthrough.loader import PreloadProgress
from ociregistry.pullthrough.waiting import CacheStatus
from ociregistry.store.lookups import Counts
from ociregistry.store.space import Room
from ociregistry.web.exchange import InMemory, SizeOnly
from ociregistry.web.hits import Repeat
from ociregistry.web.requests import (
    BlobRequest,
    ManifestRequest,
    Query,
    ReferrersRequest,
    TagsRequest,
    VersionCheck,
    namespace,
    parse_request,
)
from ociregistry.web.resource import Answer, Handler, json_answer

_log = Logger(namespace="ociregistry.web")


def health(
    counts: Callable[[], Counts],
    incomplete: Callable[[], Incomplete],
    preloaded: Callable[[], PreloadProgress | None],
    room: Callable[[], Room],
    faults: Callable[[], Sequence[str]],
    started: datetime,
) -> Handler:
    """Make the handler of GET /health.

    `started` is the start time of the daemon; the other arguments are called for each request.
    """

    async def answer(method: str, path: bytes, query: Query, context: Context) -> Answer:
        held, lacking, preloader = counts(), incomplete(), preloaded()
        reasons = faults()
        return json_answer(
            200,
            {
                # Still with status 200: what is cached is served, so clients should go on asking.
                "status": "degraded" if reasons else "ok",
                "reasons": reasons,
                "version": __version__,
                "started": started.isoformat(timespec="seconds"),
                "lists": held.lists,
                "images": held.images,
                "incomplete_images": lacking.images,
                "missing_bytes": lacking.bytes,
                "pending_images": lacking.pending,
                "incomplete_indexes": lacking.indexes,
                "disk": asdict(room()),
                **({"preload": asdict(preloader)} if preloader else {}),
            },
        )

    return answer


def probe(fails: Callable[[], str] = lambda: "") -> Handler:
    """Make the handler of a probe, as Kubernetes uses them: 200 and `ok`, or 503 and what `fails` says.

    `fails` is called for each request; it returns the empty string where all is well.
    """

    async def answer(method: str, path: bytes, query: Query, context: Context) -> Answer:
        why = fails()
        content = InMemory(f"{why or 'ok'}\n".encode())
        headers = {"Content-Type": "text/plain; charset=utf-8", "Cache-Control": "no-store"}
        return Answer(503 if why else 200, content, headers, is_probe=True)

    return answer


class V2:
    """Answers GET and HEAD requests below /v2/; `default` is the upstream of requests that name none."""

    def __init__(
        self,
        cache: PullThrough,
        listings: Listings,
        demand: Demand,
        default: Upstream,
        instance: str,
    ) -> None:
        """Wire the API to what answers it.

        `demand` is told which manifests and blobs clients request; `instance` is the name of this process in the
        `Via` header.
        """
        self._demand = demand
        self._cache = cache
        self._listings = listings
        self._default = default
        self._instance = instance

    def reconfigure(self, default: Upstream) -> None:
        """Replace the upstream of requests that name none."""
        self._default = default

    async def answer(self, method: str, path: bytes, query: Query, context: Context = FROM_CLIENT) -> Answer:
        """Answer a request; the caller must close the content of the answer.

        `path` is still percent-encoded.

        Raises:
            RegistryError: the request is malformed, came here in a loop, or cannot be answered.
        """
        request = parse_request(path, query, self._default)
        if context.via.loops_through(self._instance):
            which = namespace(query) or self._default
            raise LoopDetected(f"{which}: this server is its own upstream", context.via.through(self._instance))
        scope = {"OCI-Namespace": namespace(query)} if namespace(query) else {}
        match request:
            case VersionCheck():
                return json_answer(200, {}, scope)
            case ManifestRequest():
                return await self._manifest(method, request, scope, context)
            case BlobRequest():
                return await self._blob(method, request, scope, context)
            case TagsRequest():
                return await self._tags(request, scope, context)
            case ReferrersRequest():
                return await self._referrers(request, scope, context)
        assert_never(request)

    async def _manifest(
        self, method: str, request: ManifestRequest, scope: dict[str, str], context: Context
    ) -> Answer:
        # A downstream cache completes its images itself. Where the two are each other's mirrors, completing them here
        # too would request blobs from the process that waits for them.
        pulls = method == "GET" and context.via == NO_VIA
        found = await self._cache.manifest(request.image, context, wanted=pulls)
        manifest, status = found.manifest, found.cache_status
        headers = _headers(manifest.digest, manifest.media_type) | scope
        if status is CacheStatus.STALE:
            headers["Warning"] = '110 - "Response is Stale"'
        if pulls:
            self._demand.manifest_requested(
                request.image, manifest.digest, is_list=manifest.is_list, hit=status.is_hit
            )
        repeat = self._manifest_repeat(method, request.image, manifest) if status is CacheStatus.HIT else None
        return Answer(200, InMemory(manifest.data), headers, ranged=True, cache_status=status, repeat=repeat)

    def _manifest_repeat(self, method: str, image: ImageReference, manifest: Manifest) -> Repeat | None:
        digest, is_list = manifest.digest, manifest.is_list
        is_same = self._cache.repeats(image, digest)
        if is_same is None:
            return None
        content = InMemory(manifest.data) if method == "GET" else SizeOnly(manifest.size)

        def repeat() -> Content | None:
            if not is_same():
                return None
            if method == "GET":
                self._demand.manifest_requested(image, digest, is_list=is_list, hit=True)
            return content

        return repeat

    async def _blob(self, method: str, request: BlobRequest, scope: dict[str, str], context: Context) -> Answer:
        headers = _headers(request.digest, "application/octet-stream") | scope
        if method == "HEAD":
            size = await self._cache.blob_size(request.repository, request.digest, context)
            repeat = self._size_repeat(request.digest) if size.cache_status.is_hit else None
            return Answer(
                200, SizeOnly(size.size), headers, ranged=True, cache_status=size.cache_status, repeat=repeat
            )
        if context.via == NO_VIA:
            self._demand.blob_requested(request.repository, request.digest)
        found = await self._cache.blob(request.repository, request.digest, context)
        repeat = self._blob_repeat(request) if found.cache_status.is_hit else None
        return Answer(200, found.content, headers, ranged=True, cache_status=found.cache_status, repeat=repeat)

    def _size_repeat(self, digest: Digest) -> Repeat:
        def repeat() -> Content | None:
            content = self._cache.opened(digest)
            if content is None:
                return None
            content.close()
            return SizeOnly(content.size)

        return repeat

    def _blob_repeat(self, request: BlobRequest) -> Repeat:
        def repeat() -> Content | None:
            content = self._cache.opened(request.digest)
            if content is not None:
                self._demand.blob_requested(request.repository, request.digest)
            return content

        return repeat

    async def _tags(self, request: TagsRequest, scope: dict[str, str], context: Context) -> Answer:
        found = await self._listings.tags(request.repository, request.page, context)
        # The name as the client spelled it: with `ns` the path alone.
        name = request.repository.path if scope else str(request.repository)
        headers = dict(scope)
        if found.page.following is not None:
            ns = f"&{urlencode({'ns': scope['OCI-Namespace']})}" if scope else ""
            headers["Link"] = f'</v2/{name}/tags/list?{found.page.following.client_query}{ns}>; rel="next"'
        return json_answer(
            200, {"name": name, "tags": list(found.page.tags)}, headers, cache_status=found.cache_status
        )

    async def _referrers(self, request: ReferrersRequest, scope: dict[str, str], context: Context) -> Answer:
        found = await self._listings.referrers(request.repository, request.digest, request.artifact_type, context)
        headers = {"Content-Type": OCI_INDEX, **scope}
        if request.artifact_type:
            headers["OCI-Filters-Applied"] = "artifactType"
        return Answer(200, InMemory(found.data), headers, cache_status=found.cache_status)


def _headers(digest: Digest, media_type: str) -> dict[str, str]:
    return {"Docker-Content-Digest": digest, "Content-Type": media_type, "ETag": f'"{digest}"'}
