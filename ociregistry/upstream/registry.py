"""One upstream registry, in the terms of the distribution specification: manifests, blobs, tags, referrers."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from urllib.parse import urlencode, urlsplit

from twisted.internet import defer
from twisted.internet.defer import Deferred, DeferredSemaphore
from twisted.internet.interfaces import IReactorTime

from ociregistry.errors import (
    BlobUnknown,
    DigestInvalid,
    ManifestUnknown,
    NameUnknown,
    RegistryError,
    Unavailable,
)
from ociregistry.manifests import LARGEST_MANIFEST, MEDIA_TYPES, OCI_INDEX, Manifest, ManifestInvalid
from ociregistry.names import Digest, ImageReference, Repository, Tag, Upstream
from ociregistry.upstream.body import Body
from ociregistry.upstream.client import Client
from ociregistry.upstream.exchange import Response

_ACCEPT = ", ".join(MEDIA_TYPES)
_UNKNOWN = frozenset({401, 403, 404})
"""What registries say of things that they do not have, or do not show."""
_LONGEST_RETRY_AFTER = 3600
_MOST_PAGES = 100
_LARGEST_LISTING = 8 * 1024 * 1024
_CONTENT_RANGE = re.compile(r"bytes (?P<first>[0-9]{1,19})-[0-9]{1,19}/(?P<size>[0-9]{1,19}|[*])")
_NEXT_PAGE = re.compile(r'<([^>]*)>\s*;\s*rel="?next"?')


@dataclass(frozen=True, slots=True)
class BlobStream:
    """A blob on its way: its whole `size` in bytes, if the upstream tells it, and the `body` from byte `start`."""

    size: int | None
    start: int
    body: Body


class OtherBlob(Unavailable):
    """The upstream has other bytes than those that were expected."""


@dataclass(frozen=True, slots=True)
class TagPage:
    """A page of tags; `more` tells whether the upstream has others after the last."""

    tags: tuple[Tag, ...]
    more: bool


class Registry:
    """What one upstream has. All methods raise `Unavailable` when it cannot be asked."""

    def __init__(self, upstream: Upstream, client: Client, max_connections: int, clock: IReactorTime) -> None:
        self.upstream = upstream
        self._clock = clock
        self._client = client
        self._slots = DeferredSemaphore(max_connections)

    async def manifest(self, image: ImageReference) -> Manifest:
        """The manifest that `image` means there; raises `ManifestUnknown`."""
        headers = {"Accept": _ACCEPT}
        response = await self._client.request("GET", image.repository, f"manifests/{image.reference}", headers)
        await self._expect(response, 200, ManifestUnknown(f"{image}: the upstream answered {response.status}"))
        data = await response.collect(LARGEST_MANIFEST)
        return _manifest(response, data, str(image), _expected_digest(image, response))

    async def blob(
        self, repository: Repository, digest: Digest, start: int = 0, within: float | None = None
    ) -> BlobStream:
        """The blob from the byte `start`, or from its first byte where the upstream knows no ranges.

        Its connection counts as one of the upstream's until the body has ended or was aborted. Raises
        `BlobUnknown`, `OtherBlob` if the upstream's blob ends before `start`, and `Unavailable` also when the
        headers do not come `within` so many seconds.
        """
        await self._slots.acquire()
        try:
            asked = Deferred.fromCoroutine(self._stream(repository, digest, start))
            stream = await (asked.addTimeout(within, self._clock) if within else asked)
        except defer.TimeoutError:
            self._slots.release()
            raise Unavailable(f"{self.upstream}: it gave no answer within {within:g} s") from None
        except BaseException:
            self._slots.release()
            raise
        stream.body.ended.addCallback(lambda _: self._slots.release())
        return stream

    async def _stream(self, repository: Repository, digest: Digest, start: int) -> BlobStream:
        response = await self._blob(repository, digest, start)
        stream = _stream(response, start)
        if stream is None:
            response.body.abort()
            response = await self._blob(repository, digest, 0)
            stream = BlobStream(response.length, 0, response.body)
        return stream

    async def _blob(self, repository: Repository, digest: Digest, start: int) -> Response:
        headers = {"Range": f"bytes={start}-"} if start else {}
        response = await self._client.request("GET", repository, f"blobs/{digest}", headers)
        if response.status == 206 and start:
            return response
        if response.status == 416 and start:
            await response.discard()
            raise OtherBlob(f"{repository}@{digest}: the upstream has no more than {start} bytes of it")
        await self._expect(response, 200, _blob_unknown(repository, digest, response))
        return response

    async def blob_size(self, repository: Repository, digest: Digest) -> int | None:
        """The size of the blob in bytes, asked by HEAD, if the upstream tells it; raises `BlobUnknown`."""
        response = await self._client.request("HEAD", repository, f"blobs/{digest}")
        await self._expect(response, 200, _blob_unknown(repository, digest, response))
        length = response.header("content-length")
        await response.discard()
        return int(length[:19]) if length.isascii() and length.isdigit() else None

    async def tags(self, repository: Repository, count: int | None, last: str) -> TagPage:
        """At most `count` tags after the tag `last`; raises `NameUnknown`."""
        query = {"n": str(count)} if count is not None else {}
        query |= {"last": last} if last else {}
        path = "tags/list" + (f"?{urlencode(query)}" if query else "")
        response = await self._client.request("GET", repository, path)
        await self._expect(
            response, 200, NameUnknown(f"{repository}: the upstream answered {response.status} for its tags")
        )
        more = _next_page(response) is not None
        return TagPage(_tags(repository, await response.collect(_LARGEST_LISTING)), more)

    async def referrers(self, repository: Repository, digest: Digest) -> Manifest:
        """The index of all that refers to the manifest `digest`; its pages are put together.

        Raises `ManifestUnknown` where the upstream offers no referrers.
        """
        unknown = ManifestUnknown(f"{repository}@{digest}: the upstream offers no referrers of it")
        pages: list[Manifest] = []
        path = f"referrers/{digest}"
        while len(pages) < _MOST_PAGES:
            response = await self._client.request("GET", repository, path, {"Accept": OCI_INDEX})
            await self._expect(response, 200, unknown)
            pages.append(_manifest(response, await response.collect(LARGEST_MANIFEST), f"{repository}@{digest}"))
            following = _next_page(response)
            if following is None:
                return pages[0] if len(pages) == 1 else _joined(pages, f"{repository}@{digest}")
            try:
                path = f"referrers/{digest}?{urlsplit(following).query}"
            except ValueError:
                raise Unavailable(f"{repository}@{digest}: the upstream's next page is no URL") from None
        raise Unavailable(f"{repository}@{digest}: the upstream's referrers take more than {_MOST_PAGES} pages")

    async def _expect(self, response: Response, status: int, unknown: RegistryError) -> None:
        if response.status == status:
            return
        await response.discard()
        if response.status in _UNKNOWN:
            raise unknown
        raise Unavailable(f"{self.upstream}: it answered {response.status}", _retry_after(response))


def _manifest(response: Response, data: bytes, what: str, digest: Digest | None = None) -> Manifest:
    media_type = response.header("content-type").partition(";")[0].strip()
    try:
        return Manifest.parse(data, media_type, digest)
    except ManifestInvalid as error:
        raise Unavailable(f"{what}: the upstream sent no valid manifest: {error}") from None


def _next_page(response: Response) -> str | None:
    links = map(_NEXT_PAGE.search, response.headers("link"))
    return next((link[1] for link in links if link), None)


def _joined(pages: list[Manifest], what: str) -> Manifest:
    documents = [json.loads(page.data) for page in pages]
    entries = [entry for document in documents for entry in document["manifests"]]
    try:
        return Manifest.parse(json.dumps({**documents[0], "manifests": entries}).encode(), OCI_INDEX)
    except ManifestInvalid as error:
        raise Unavailable(f"{what}: the upstream's pages make no valid index: {error}") from None


def _stream(response: Response, start: int) -> BlobStream | None:
    """The stream in an answer to a request for the bytes from `start`; None when it is of other bytes."""
    if response.status != 206:
        return BlobStream(response.length, 0, response.body)
    match = _CONTENT_RANGE.fullmatch(response.header("content-range"))
    if match is None or int(match["first"]) != start:
        return None
    return BlobStream(None if match["size"] == "*" else int(match["size"]), start, response.body)


def _blob_unknown(repository: Repository, digest: Digest, response: Response) -> BlobUnknown:
    return BlobUnknown(f"{repository}@{digest}: the upstream answered {response.status}")


def _expected_digest(image: ImageReference, response: Response) -> Digest | None:
    if isinstance(image.reference, Digest):
        return image.reference
    told = response.header("docker-content-digest")
    try:
        return Digest.parse(told) if told else None
    except DigestInvalid:
        raise Unavailable(f"{image}: the upstream sent the digest {told[:100]!r}") from None


def _retry_after(response: Response) -> int:
    told = response.header("retry-after")
    if not told.isascii() or not told.isdigit():
        return 5
    return min(int(told[:9]), _LONGEST_RETRY_AFTER)


def _tags(repository: Repository, data: bytes) -> tuple[Tag, ...]:
    try:
        tags = json.loads(data)["tags"] or []
        return tuple(Tag.parse(tag) for tag in tags)
    except (ValueError, KeyError, TypeError, RecursionError, RegistryError) as error:
        raise Unavailable(f"{repository}: the upstream sent no valid list of tags: {error}") from None
