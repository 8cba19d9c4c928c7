"""One upstream registry as the distribution specification sees it: manifests, blobs, tags, referrers.

Mirrors are asked before the registry itself, and a connection limit bounds the concurrent requests.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from twisted.internet.defer import DeferredSemaphore

from ociregistry.context import FROM_CLIENT, Context, Priority, Via, Wanted
from ociregistry.errors import (
    AirGapped,
    BlobUnknown,
    DigestInvalid,
    LoopDetected,
    ManifestUnknown,
    NameUnknown,
    RegistryError,
    Unavailable,
)
from ociregistry.manifests import (
    IMAGES,
    LARGEST_MANIFEST,
    MEDIA_TYPES,
    OCI_INDEX,
    Manifest,
    ManifestInvalid,
    canonical_media_type,
)
from ociregistry.names import Digest, ImageReference, Repository, Tag, Upstream, referrers_tag
from ociregistry.strictjson import parse_json
from ociregistry.upstream.auth import AccessRefused
from ociregistry.upstream.body import Body
from ociregistry.upstream.http import DEFAULT_OPTIONS, RequestOptions, Response
from ociregistry.upstream.mirrors import Source, Sources
from ociregistry.upstream.paging import FIRST_PAGE, PageRequest, TagPage, next_page_query
from ociregistry.upstream.referrers import NO_API, is_index, joined, no_referrers, parse_index, says_absent

T = TypeVar("T")

RESERVED_CONNECTIONS = 2
"""Connections that are kept for manifests, tokens and small blobs."""
_SMALL = 64 * 1024
"""Bytes up to which a blob, such as a config, may use the reserved connections."""


def uses_reserved(priority: Priority, size: int | None) -> bool:
    """Tell whether a blob of `size` bytes (None: unknown) may use the reserved connections."""
    return priority.uses_reserved or (size is not None and size <= _SMALL)


class ConnectionLimit:
    """Limits the concurrent requests to one upstream: `most` for blobs, and two reserved ones.

    The reserved connections keep manifests and small blobs from waiting behind layers.
    """

    def __init__(self, most: int) -> None:
        self._blobs = DeferredSemaphore(most)
        self._all = DeferredSemaphore(most + RESERVED_CONNECTIONS)

    async def acquire(self, *, reserved: bool) -> None:
        """Wait for a connection for a blob; with `reserved`, also for one of the reserved connections."""
        if not reserved:
            await self._blobs.acquire()
        try:
            await self._all.acquire()
        except BaseException:
            if not reserved:
                self._blobs.release()
            raise

    def release(self, *, reserved: bool) -> None:
        """Release a connection that `acquire` returned for the same `reserved`."""
        self._all.release()
        if not reserved:
            self._blobs.release()

    @asynccontextmanager
    async def for_small(self, context: Context) -> AsyncIterator[Context]:
        """Hold a connection for a small response, and for its token request, while the block runs.

        Yields the context for the request. The connection no longer counts once its host is down, as those that wait
        for a connection must learn that at once.
        """
        await self._all.acquire()
        release = _once(self._all.release)
        try:
            yield _released_when_down(context, release)
        finally:
            release()


def _once(release: Callable[[], object]) -> Callable[[], None]:
    """Return a function of which only the first call calls `release`."""
    left = [release]

    def released() -> None:
        while left:
            left.pop()()

    return released


def _released_when_down(context: Context, release: Callable[[], object]) -> Context:
    wanted = context.wanted

    def link_down(error: Unavailable) -> None:
        release()
        if wanted is not None:
            wanted.link_down(error)

    return replace(context, wanted=Wanted(link_down, wanted.again if wanted is not None else None))


_ACCEPT = ", ".join(MEDIA_TYPES)
_INDEX_ALONE = {"Accept": OCI_INDEX}
_UNKNOWN = frozenset({401, 403, 404})
"""Statuses with which registries answer for content that they do not have, or do not show to this client."""
_OK = frozenset({200})
_OF_RANGE = frozenset({200, 206, 416})
"""The statuses for a blob of which a range was requested; 416 where it has no such bytes, as an empty blob."""
_MOST_PAGES = 100
_LARGEST_LISTING = 8 * 1024 * 1024
"""Bytes of a page of tags."""
_CONTENT_RANGE = re.compile(r"bytes (?P<first>[0-9]{1,19})-[0-9]{1,19}/(?P<size>[0-9]{1,19}|[*])")
_NO_RANGE = re.compile(r"bytes [*]/(?P<size>[0-9]{1,19})")


@dataclass(frozen=True, slots=True)
class BlobStream:
    """A blob being downloaded: the size of the whole blob in bytes, and its `body` from byte `start` on.

    `size` is None where the upstream does not tell it. `source` is to be told if the bytes are wrong, or none come.
    """

    size: int | None
    start: int
    body: Body
    source: Source


class BlobMismatch(Unavailable):
    """The upstream's blob does not have the expected bytes."""


class Registry:
    """The content of one upstream.

    Every method that sends a request also raises:
        Unavailable: the upstream cannot be asked, or its response is not valid.
        Denied: the upstream's name, or a redirect, leads to an address that is not allowed.
        LoopDetected: the upstream is this server itself, perhaps through other caches.
        AirGapped: no upstream may be asked.
    """

    def __init__(
        self,
        upstream: Upstream,
        sources: Sources | None,
        limit: ConnectionLimit,
        instance: str,
        delivered: Callable[[], object] = lambda: None,
    ) -> None:
        """Ask `sources`, None on an air-gapped server; `instance` names this process in Via headers.

        `delivered` is called for each manifest that came.
        """
        self.upstream = upstream
        self._sources = sources
        self._limit = limit
        self._instance = instance
        self._delivered = delivered

    async def manifest(self, image: ImageReference, context: Context = FROM_CLIENT) -> Manifest:
        """Return the manifest of `image`, verified against its digest where one is known.

        Raises:
            ManifestUnknown: the upstream does not have it, or does not show it.
        """

        def parse(response: Response, data: bytes) -> Manifest:
            return _manifest(response, data, str(image), _expected_digest(image, response))

        manifest = await self._ask_for_manifest("GET", image, context, parse)
        self._delivered()
        return manifest

    async def manifest_digest(self, image: ImageReference, context: Context = FROM_CLIENT) -> Digest | None:
        """Ask for the digest of the manifest of `image`, by HEAD where the upstream supports that.

        Returns:
            The digest, or None where the upstream does not tell it.

        Raises:
            ManifestUnknown: the upstream does not have the manifest, or does not show it.
        """

        def parse(response: Response, data: bytes) -> Digest | None:
            digest = _expected_digest(image, response)
            return digest if response.method == "HEAD" else _manifest(response, data, str(image), digest).digest

        return await self._ask_for_manifest("HEAD", image, context, parse)

    async def _ask_for_manifest(
        self, method: str, image: ImageReference, context: Context, parse: Callable[[Response, bytes], T]
    ) -> T:
        """Ask for the manifest of `image`, and return what `parse` makes of it, as `_collect` does."""

        def unknown(why: str) -> RegistryError:
            return ManifestUnknown(f"{image}: {why}")

        headers = {"Accept": _ACCEPT}
        path = f"manifests/{image.reference}"
        async with self._limit.for_small(context) as context:
            return await self._collect(
                method, image.repository, path, headers, unknown, context, LARGEST_MANIFEST, parse
            )

    async def blob(
        self,
        repository: Repository,
        digest: Digest,
        context: Context = FROM_CLIENT,
        *,
        start: int = 0,
        size: int | None = None,
        timeout: float = DEFAULT_OPTIONS.timeout,
    ) -> BlobStream:
        """Start to download a blob from the byte `start`, or from byte 0 where the upstream supports no ranges.

        The download counts against the connection limit until its body ends or is aborted. `size` is the number of
        bytes of the whole blob, None where it is unknown; `timeout` is the number of seconds for the headers.

        Raises:
            BlobUnknown: the upstream does not have the blob, or does not show it.
            BlobMismatch: the upstream's blob has no more than `start` bytes.
        """
        reserved = uses_reserved(context.priority, size)
        await self._limit.acquire(reserved=reserved)
        release = _once(lambda: self._limit.release(reserved=reserved))
        try:
            context = _released_when_down(context, release)
            stream = await self._stream(repository, digest, context, start, timeout)
        except BaseException:
            release()
            raise
        stream.body.ended.addCallback(lambda _: release())
        return stream

    async def _stream(
        self, repository: Repository, digest: Digest, context: Context, start: int, timeout: float
    ) -> BlobStream:
        response, source = await self._blob(repository, digest, context, start, timeout)
        stream = _stream(response, start, source)
        if stream is None:
            response.body.abort()
            response, source = await self._blob(repository, digest, context, 0, timeout)
            stream = BlobStream(response.length, 0, response.body, source)
        return stream

    async def _blob(
        self, repository: Repository, digest: Digest, context: Context, start: int, timeout: float
    ) -> tuple[Response, Source]:
        headers = {"Range": f"bytes={start}-"} if start else {}
        what = f"{repository}@{digest}"
        accepted = _OF_RANGE if start else _OK
        response, source = await self._ask(
            "GET", repository, f"blobs/{digest}", headers, _unknown_blob(what), context, accepted, timeout
        )
        if response.status == 416:
            await response.discard()
            raise BlobMismatch(f"{what}: the upstream has no more than {start} bytes of it")
        return response, source

    async def blob_size(self, repository: Repository, digest: Digest, context: Context = FROM_CLIENT) -> int | None:
        """Ask for the size of a blob, by HEAD where the upstream supports that.

        Returns:
            The size in bytes, or None where the upstream does not tell it.

        Raises:
            BlobUnknown: the upstream does not have the blob, or does not show it.
        """
        unknown = _unknown_blob(f"{repository}@{digest}")
        async with self._limit.for_small(context) as context:
            response, _ = await self._ask("HEAD", repository, f"blobs/{digest}", {}, unknown, context, _OF_RANGE)
            await response.discard()
        if response.status != 200:
            return _size_of_whole(response)
        return _length(response.header("content-length")) if response.method == "HEAD" else response.length

    async def tags(
        self, repository: Repository, page: PageRequest = FIRST_PAGE, context: Context = FROM_CLIENT
    ) -> TagPage:
        """Return the page of tags that `page` asks for.

        Raises:
            NameUnknown: the upstream does not have the repository, or does not show it.
        """

        def unknown(why: str) -> RegistryError:
            return NameUnknown(f"{repository}: {why} for its tags")

        def parse(response: Response, data: bytes) -> TagPage:
            tags = _tags(repository, data)
            return TagPage(tags, page.following(tags, _next_page(response, str(repository))))

        async with self._limit.for_small(context) as context:
            return await self._collect("GET", repository, page.path, {}, unknown, context, _LARGEST_LISTING, parse)

    async def referrers(self, repository: Repository, digest: Digest, context: Context = FROM_CLIENT) -> Manifest:
        """Return the index of the referrers of the manifest `digest`, its pages joined into one.

        From an upstream without the referrers API, it is the index with the tag for referrers; an empty index if
        there is none (OCI Distribution specification, "Unavailable Referrers API").

        Raises:
            ManifestUnknown: the upstream does not show the referrers.
        """
        what = f"{repository}@{digest}"
        pages: list[Manifest] = []
        path = f"referrers/{digest}"

        def unknown(why: str) -> RegistryError:
            return ManifestUnknown(f"{what}: the upstream offers no referrers of it: {why}")

        def parse(response: Response, data: bytes) -> tuple[Response, bytes, Manifest | None]:
            return response, data, parse_index(data, what) if pages or is_index(response, data) else None

        async with self._limit.for_small(context) as context:
            while len(pages) < _MOST_PAGES:
                accepted = _OK if pages else _OK | NO_API
                response, data, page = await self._collect(
                    "GET", repository, path, _INDEX_ALONE, unknown, context, LARGEST_MANIFEST, parse, accepted
                )
                if page is None:
                    tagged = await self._tagged_referrers(repository, digest, unknown, context)
                    return tagged or no_referrers(response, data, unknown)
                pages.append(page)
                following = _next_page(response, what)
                if not following:
                    return pages[0] if len(pages) == 1 else joined(pages, what)
                path = f"referrers/{digest}?{following}"
        raise Unavailable(f"{what}: the upstream's referrers take more than {_MOST_PAGES} pages")

    async def _tagged_referrers(
        self, repository: Repository, digest: Digest, unknown: Callable[[str], RegistryError], context: Context
    ) -> Manifest | None:
        """Return the index with the tag for the referrers of `digest`; None if the upstream says that there is none.

        Raises:
            The error that `unknown` makes of the reason: the upstream does not show it, or does not say that.
        """
        tag = referrers_tag(digest)

        def parse(response: Response, data: bytes) -> Manifest | None:
            if response.status == 200 and canonical_media_type(response.header("content-type")) in IMAGES:
                raise unknown(f"it has no referrers API, and its tag {tag} is an image")
            if response.status == 200:
                return parse_index(data, f"{repository}:{tag}")
            if says_absent(data):
                return None
            raise unknown(f"it has no referrers API, and does not say whether it has the tag {tag}")

        path, accepted = f"manifests/{tag}", _OK | {404}
        return await self._collect(
            "GET", repository, path, _INDEX_ALONE, unknown, context, LARGEST_MANIFEST, parse, accepted
        )

    async def loops(self, repository: Repository, path: str, context: Context) -> LoopDetected | None:
        """Ask the mirrors whether one leads back to a cache that the request with this context came through.

        Where caches wait for each other in a ring, the one with the lowest name of them need not ask: the others'
        wait is no loop once its own request to the next has failed.

        Returns:
            The error for the cache that asks here; None where there is no loop, or where another one looks for it.
        """
        if self._sources is None or min(context.via.instances) > self._instance:
            return None
        via = context.via.through(self._instance)
        way = await self._sources.way_back(repository, path, {"Via": via}, context.via)
        if way is None:
            return None
        return LoopDetected(f"{self.upstream}: this server waits for the one that asks", way.through(self._instance))

    async def _collect(
        self,
        method: str,
        repository: Repository,
        path: str,
        headers: Mapping[str, str],
        unknown: Callable[[str], RegistryError],
        context: Context,
        most: int,
        parse: Callable[[Response, bytes], T],
        accepted: frozenset[int] = _OK,
    ) -> T:
        """Send a request, and return what `parse` makes of a body of at most `most` bytes.

        Where the body of a mirror is cut off, or `parse` raises Unavailable for it, the next source is asked.

        Raises:
            The errors of `_ask` and `parse`.
        """
        while True:
            response, source = await self._ask(method, repository, path, headers, unknown, context, accepted)
            try:
                return parse(response, await response.collect(most))
            except Unavailable as error:
                if not source.failed(error.message):
                    raise

    async def _ask(
        self,
        method: str,
        repository: Repository,
        path: str,
        headers: Mapping[str, str],
        unknown: Callable[[str], RegistryError],
        context: Context,
        accepted: frozenset[int] = _OK,
        timeout: float = DEFAULT_OPTIONS.timeout,
    ) -> tuple[Response, Source]:
        """Send a request; return a response with an `accepted` status, which must be 200 for HEAD, and its source.

        Raises:
            The error that `unknown` makes of the reason: the upstream does not have the content, or does not show it.
            LoopDetected: the upstream is this server itself, perhaps through other caches.
            AirGapped: no upstream may be asked.
            Unavailable: the upstream cannot be asked, or answered with another status.
        """
        if self._sources is None:
            absent = unknown("it is not in the cache, and this server is air-gapped")
            raise AirGapped(absent.message, absent.code)
        headers = {**headers, "Via": context.via.through(self._instance)}
        options = RequestOptions(timeout, context.priority, context.wanted)
        try:
            answer = await self._sources.request(method, repository, path, headers, options)
        except AccessRefused as refused:
            raise unknown(refused.message) from None
        response = answer.response
        if response.status in (_OK if response.method == "HEAD" else accepted):
            return response, answer.source
        await response.discard()
        via = Via.parse(response.header("via"))
        if response.status == 403 and via.loops_through(self._instance):
            raise LoopDetected(f"{self.upstream}: it leads back to this server", via.through(self._instance))
        if response.status in _UNKNOWN:
            raise unknown(answer.told("the upstream"))
        raise Unavailable(f"{self.upstream}: {answer.told('it')}", response.retry_after)


def _unknown_blob(what: str) -> Callable[[str], RegistryError]:
    return lambda why: BlobUnknown(f"{what}: {why}")


def _size_of_whole(response: Response) -> int | None:
    """Return the size of the whole blob in bytes, as a 206 tells it, or a 416 for an empty blob."""
    expected = _CONTENT_RANGE if response.status == 206 else _NO_RANGE
    match = expected.fullmatch(response.header("content-range"))
    return _length(match["size"]) if match else None


def _length(told: str) -> int | None:
    return int(told[:19]) if told.isascii() and told.isdigit() else None


def _manifest(response: Response, data: bytes, what: str, digest: Digest | None = None) -> Manifest:
    try:
        return Manifest.parse(data, response.header("content-type"), digest)
    except ManifestInvalid as error:
        raise Unavailable(f"{what}: the upstream sent no valid manifest: {error}") from None


def _next_page(response: Response, what: str) -> str:
    try:
        return next_page_query(response.headers("link"))
    except ValueError as error:
        raise Unavailable(f"{what}: the upstream's link to the next page cannot be followed: {error}") from None


def _stream(response: Response, start: int, source: Source) -> BlobStream | None:
    """Return the stream in a response to a request from byte `start`, or None where a 206 has another range."""
    if response.status != 206:
        return BlobStream(response.length, 0, response.body, source)
    match = _CONTENT_RANGE.fullmatch(response.header("content-range"))
    if match is None or int(match["first"]) != start:
        return None
    return BlobStream(None if match["size"] == "*" else int(match["size"]), start, response.body, source)


def _expected_digest(image: ImageReference, response: Response) -> Digest | None:
    if isinstance(image.reference, Digest):
        return image.reference
    told = response.header("docker-content-digest")
    try:
        return Digest.parse(told) if told else None
    except DigestInvalid:
        raise Unavailable(f"{image}: the upstream sent the digest {told[:100]!r}") from None


def _tags(repository: Repository, data: bytes) -> tuple[Tag, ...]:
    try:
        return tuple(map(Tag.parse, _names_of_tags(parse_json(data))))
    except (ValueError, RegistryError) as error:
        raise Unavailable(f"{repository}: the upstream sent no valid list of tags: {error}") from None


def _names_of_tags(document: object) -> list[str]:
    tags = (document["tags"] or []) if isinstance(document, dict) and "tags" in document else None
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError('it has no "tags" that are a list of names')
    return tags
