"""Parses the target and the Range header of a request into frozen values; only this module reads URLs of clients.

The paths are those of the OCI Distribution specification v1.1.1. With the query parameter `ns`, containerd names the
registry that it wants from a mirror. Ranges follow RFC 9110, section 14; a single range is supported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from ociregistry.admin.images import Selection
from ociregistry.errors import MethodUnsupported, NameInvalid, NotFound, PageInvalid, RangeUnsatisfiable, Unsupported
from ociregistry.names import Digest, ImageReference, Repository, Upstream, parse_reference
from ociregistry.upstream.paging import PageRequest, parse_page_query

_SCHEME_AND_AUTHORITY = re.compile(rb"https?://[^/?#]*", re.IGNORECASE)


def origin_form(target: bytes) -> bytes:
    """Return a request target in origin form; one in absolute form loses its scheme and authority.

    A server must accept both, and the target's host stands for the one in `Host` (RFC 9112, section 3.2.2); neither
    matters here.
    """
    match = _SCHEME_AND_AUTHORITY.match(target)
    if match is None:
        return target
    path = target[match.end() :]
    return path if path.startswith(b"/") else b"/" + path


_SINGLE = re.compile(r"bytes\s*=\s*(?P<first>[0-9]{0,19})-(?P<last>[0-9]{0,19})\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Range:
    """The bytes from `start` up to, not including, `stop`."""

    start: int
    stop: int


def parse_range(header: str, size: int) -> Range | None:
    """Parse a Range header for content of `size` bytes.

    Returns:
        The range, or None to send all of the content: for a header that cannot be parsed; for several ranges,
        because clients handle a 200 but not a 206 that has only the first range; and for content without a byte, as
        servers in Go do, because some clients send `bytes=0-` for every blob.

    Raises:
        RangeUnsatisfiable: the range lies outside the content, or ends before it begins (the conformance suite
            expects that).
    """
    match = _SINGLE.fullmatch(header.strip())
    if size == 0 or match is None or not (match["first"] or match["last"]):
        return None
    if match["first"]:
        start = int(match["first"])
        stop = min(int(match["last"]) + 1, size) if match["last"] else size
    else:
        start = max(0, size - int(match["last"]))
        stop = size
    if start >= stop:
        raise RangeUnsatisfiable(f"the range {header[:80]!r} is outside the {size} bytes there are", size)
    return Range(start, stop)


_MOST_TAGS = 10_000
_ENDPOINT = re.compile(
    r"(?P<name>.+?)/(?:"
    r"manifests/(?P<reference>[^/]+)|blobs/(?P<blob>[^/]+)|referrers/(?P<subject>[^/]+)|tags/(?P<tags>list))"
)

Query = Mapping[bytes, Sequence[bytes]]


@dataclass(frozen=True, slots=True)
class VersionCheck:
    """Asks whether this server is a registry ("end-1" of the specification)."""


@dataclass(frozen=True, slots=True)
class ManifestRequest:
    """Asks for a manifest by tag or digest."""

    image: ImageReference


@dataclass(frozen=True, slots=True)
class BlobRequest:
    """Asks for a blob of a repository."""

    repository: Repository
    digest: Digest


@dataclass(frozen=True, slots=True)
class TagsRequest:
    """Asks for a page of the tags of a repository."""

    repository: Repository
    page: PageRequest


@dataclass(frozen=True, slots=True)
class ReferrersRequest:
    """Asks for the referrers of a manifest, all or those of a non-empty `artifact_type`."""

    repository: Repository
    digest: Digest
    artifact_type: str


Request = VersionCheck | ManifestRequest | BlobRequest | TagsRequest | ReferrersRequest


def parse_request(path: bytes, query: Query, default: Upstream) -> Request:
    """Parse a request from its percent-encoded `path` and its query; `default` is the upstream if it names none.

    Raises:
        RegistryError: the request is malformed or asks for something that this server does not offer.
    """
    text = _decode(path)
    upstream = _upstream(query)
    if text in ("/v2", "/v2/"):
        return VersionCheck()
    rest = text.removeprefix("/v2/")
    if rest == "_catalog":
        raise Unsupported("listing repositories is not supported")
    if "/blobs/uploads" in rest:
        raise MethodUnsupported("this server is pull-only")
    match = _ENDPOINT.fullmatch(rest)
    if match is None:
        raise NotFound(f"no such path: {text[:300]!r}")
    name = match["name"]
    repository = Repository.at(upstream, name) if upstream else Repository.parse(name, default)
    if match["reference"]:
        return ManifestRequest(ImageReference(repository, parse_reference(match["reference"])))
    if match["blob"]:
        return BlobRequest(repository, Digest.parse(match["blob"]))
    if match["subject"]:
        return ReferrersRequest(repository, Digest.parse(match["subject"]), _one(query, b"artifactType"))
    return TagsRequest(repository, _page(query))


def namespace(query: Query) -> str:
    """Return the query parameter `ns` as sent, or the empty string."""
    return _one(query, b"ns")


def parse_selection(query: Query) -> Selection:
    """Parse which images the page for the operator shows; anything that is wrong counts as not given."""
    return Selection.parse(_one(query, b"search"), _one(query, b"sort"), _one(query, b"page"))


def _decode(path: bytes) -> str:
    # Decoded once, and before the path is split: an encoded slash would change where it is split.
    if b"%2f" in path.lower():
        raise NameInvalid("a path must not contain an encoded slash")
    try:
        return unquote_to_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise NameInvalid("a path must be UTF-8") from None


def _upstream(query: Query) -> Upstream | None:
    ns = namespace(query)
    return Upstream.parse(ns) if ns else None


def _one(query: Query, key: bytes) -> str:
    values = query.get(key, ())
    return values[0].decode("utf-8", "replace") if values else ""


def _page(query: Query) -> PageRequest:
    try:
        named = parse_page_query(_one(query, b"next"))
    except ValueError as error:
        raise PageInvalid(f"next: {error}") from None
    return PageRequest(_count(_one(query, b"n")), _one(query, b"last")[:128], named)


def _count(text: str) -> int | None:
    if not text:
        return None
    if not re.fullmatch("[0-9]{1,9}", text):
        raise PageInvalid(f"n={text[:40]!r} is not a number of tags")
    return min(int(text), _MOST_TAGS)
