"""The content of the scripted registry, and the correct answers before any rule changes them."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass, field
from urllib.parse import urlencode

from tests.images import OCI_INDEX, Blob, Image, Index, Manifest
from tests.upstream_http import Answer, Headers, Request, error

_ROUTE = re.compile(r"/v2/(?P<name>.+)/(?P<verb>manifests|blobs|tags|referrers)/(?P<last>[^/]+)")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_VERSION = ("Docker-Distribution-Api-Version", "registry/2.0")


@dataclass
class _Repository:
    """The content of one repository, invisible in others."""

    blobs: dict[str, Blob] = field(default_factory=dict)
    manifests: dict[str, Manifest] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


class Content:
    """Repositories with their tags, manifests and blobs, readable by HTTP."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._repositories: dict[str, _Repository] = {}

    def add(self, repository: str, what: Image | Index, *tags: str) -> None:
        """Publish an image or an index with its blobs and manifests."""
        with self._lock:
            kept = self._repositories.setdefault(repository, _Repository())
            kept.blobs.update((blob.digest, blob) for blob in what.blobs)
            kept.manifests.update((manifest.digest, manifest) for manifest in what.manifests)
            kept.tags.update((tag, what.manifest.digest) for tag in tags)

    def move(self, repository: str, tag: str, manifest: Manifest) -> None:
        """Move a tag to this manifest."""
        with self._lock:
            self._repositories[repository].manifests[manifest.digest] = manifest
            self._repositories[repository].tags[tag] = manifest.digest

    def answer(self, request: Request) -> Answer:
        """Return the answer of a correct registry."""
        if request.method not in ("GET", "HEAD"):
            return error(405, "UNSUPPORTED")
        if request.path == "/v2/":
            return Answer(200, (_VERSION, ("Content-Type", "application/json")), b"{}")
        route = _ROUTE.fullmatch(request.path)
        if route is None:
            return error(404, "UNSUPPORTED", request.path)
        with self._lock:
            repository = self._repositories.get(route["name"])
            if repository is None:
                return error(404, "NAME_UNKNOWN", route["name"])
            if route["verb"] == "manifests":
                return _manifest(repository, route["last"])
            if route["verb"] == "blobs":
                return _blob(repository, route["last"], request)
            if route["verb"] == "tags" and route["last"] == "list":
                return _tags(route["name"], repository, request)
            if route["verb"] == "referrers":
                return _referrers(repository, route["last"], request)
            return error(404, "UNSUPPORTED", request.path)


def _manifest(repository: _Repository, reference: str) -> Answer:
    manifest = repository.manifests.get(repository.tags.get(reference, reference))
    if manifest is None:
        return error(404, "MANIFEST_UNKNOWN", reference)
    return Answer(200, _headers(manifest.media_type, manifest.digest), manifest.data)


def _blob(repository: _Repository, digest: str, request: Request) -> Answer:
    blob = repository.blobs.get(digest)
    if blob is None:
        return error(404, "BLOB_UNKNOWN", digest)
    headers = (*_headers("application/octet-stream", digest), ("Accept-Ranges", "bytes"))
    asked = _RANGE.fullmatch(request.header("Range") or "")
    if asked is None or asked.group() == "bytes=-":
        return Answer(200, headers, blob.data)
    size = len(blob.data)
    first, last = asked[1], asked[2]
    start = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    if start >= end:
        return Answer(416, (*headers, ("Content-Range", f"bytes */{size}")))
    where = ("Content-Range", f"bytes {start}-{end - 1}/{size}")
    return Answer(206, (*headers, where), blob.data[start:end], start=start)


def _tags(name: str, repository: _Repository, request: Request) -> Answer:
    last = "".join(request.parameters("last")[:1])
    tags = [tag for tag in sorted(repository.tags) if tag > last]
    limit = int(next(iter(request.parameters("n")), len(tags)))
    headers: Headers = (_VERSION, ("Content-Type", "application/json"))
    if 0 < limit < len(tags):
        following = urlencode({"n": limit, "last": tags[limit - 1]})
        headers += (("Link", f'</v2/{name}/tags/list?{following}>; rel="next"'),)
    return Answer(200, headers, json.dumps({"name": name, "tags": tags[:limit]}).encode())


def _referrers(repository: _Repository, digest: str, request: Request) -> Answer:
    headers: Headers = (_VERSION, ("Content-Type", OCI_INDEX))
    found = []
    for manifest in repository.manifests.values():
        body = json.loads(manifest.data)
        if body.get("subject", {}).get("digest") == digest:
            kept = {key: body[key] for key in ("artifactType", "annotations") if key in body}
            size = len(manifest.data)
            found.append({"mediaType": manifest.media_type, "digest": manifest.digest, "size": size, **kept})
    wanted = request.parameters("artifactType")
    if wanted:
        headers += (("OCI-Filters-Applied", "artifactType"),)
        found = [entry for entry in found if entry.get("artifactType") in wanted]
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": found}
    return Answer(200, headers, json.dumps(index).encode())


def _headers(media_type: str, digest: str) -> Headers:
    return (
        _VERSION,
        ("Content-Type", media_type),
        ("Docker-Content-Digest", digest),
        ("ETag", f'"{digest}"'),
    )
