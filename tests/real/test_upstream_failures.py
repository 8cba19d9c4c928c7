"""Failures of an upstream before its answer has begun: refusals, errors, silence, and malformed answers."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from tests.client import Response, fetch
from tests.images import DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, Image
from tests.real.caches import Cache, assert_error, cache_in, plain_image
from tests.upstream import ScriptedRegistry
from tests.upstream_auth import Tokens
from tests.upstream_http import Rule
from tests.upstream_rules import Header, Hold, NoLength, Redirect, Reply

SIZE = 5000
BY_US = 25.0
BY_CONTAINERD = 30.0
SLACK = 3.0


@pytest.fixture(scope="module")
def gone() -> ScriptedRegistry:
    """An upstream that refuses connections."""
    registry = ScriptedRegistry()
    registry.close()
    return registry


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, gone: ScriptedRegistry) -> Iterator[Cache]:
    """One cache for all tests of this file."""
    with cache_in(tmp_path_factory.mktemp("failures"), gone, named=[NO_SERVER]) as cache:
        yield cache


@pytest.fixture
def blob(repository: str, image: Image) -> str:
    """The path of the image's layer."""
    return f"{repository}/blobs/{image.blobs[1].digest}"


@pytest.fixture
def manifests(repository: str, image: Image) -> tuple[str, str]:
    """The paths of the image's manifest: by tag and by digest."""
    return f"{repository}/manifests/1", f"{repository}/manifests/{image.manifest.digest}"


NO_SERVER = "127.0.0.1:1"
"""Named in the configuration, because otherwise the answer would be 403."""
BASIC = ("WWW-Authenticate", 'Basic realm="not for clients"')
BEARER = ("WWW-Authenticate", 'Bearer realm="http://127.0.0.1:1/token",service="s",scope="repository:x:pull"')


@pytest.mark.parametrize(
    "reply",
    [
        Reply(404),
        Reply(404, b"<html>not here</html>", (("Content-Type", "text/html"),)),
        Reply(403, b"{}", (BASIC, BEARER)),
        Reply(401),
        Reply(401, b"{}", (BASIC,)),
        Reply(401, b"{}", (("WWW-Authenticate", "Negotiate"),)),
    ],
    ids=["404", "404_html", "403", "401", "401_basic", "401_negotiate"],
)
def test_missing_or_hidden_content_is_404(
    cache: Cache, repository: str, blob: str, manifests: tuple[str, str], reply: Rule
) -> None:
    with cache.scripted(f"/v2/{repository}/*", reply):
        for method in ("GET", "HEAD"):
            for manifest in manifests:
                cache.refused(manifest, 404, "MANIFEST_UNKNOWN", method)
            cache.refused(blob, 404, "BLOB_UNKNOWN", method)
        cache.refused(f"{repository}/tags/list", 404, "NAME_UNKNOWN")
    # These do not open the upstream's circuit breaker.
    assert cache.ask(manifests[0]).status == 200
    assert cache.ask(blob).status == 200


def test_token_without_the_scope_is_404(cache: Cache, repository: str, blob: str, manifests: tuple[str, str]) -> None:
    tokens = Tokens(f"{cache.upstream.url}/token", denied=[f"repository:{repository}:pull"])
    with cache.scripted("*", tokens):
        for method in ("GET", "HEAD"):
            cache.refused(manifests[0], 404, "MANIFEST_UNKNOWN", method)
            cache.refused(blob, 404, "BLOB_UNKNOWN", method)


def test_unreachable_token_realm_is_503(cache: Cache, repository: str, blob: str, manifests: tuple[str, str]) -> None:
    with cache.scripted(f"/v2/{repository}/*", Reply(401, b"", (BEARER,))):
        cache.refused(manifests[0], 503, "UNAVAILABLE")
        cache.refused(blob, 503, "UNAVAILABLE")


def assert_unavailable(cache: Cache, repository: str, blob: str, manifests: tuple[str, str]) -> None:
    """Assert that every request for this repository gets 503."""
    for method in ("GET", "HEAD"):
        for path in (*manifests, blob, f"{repository}/tags/list"):
            cache.refused(path, 503, "UNAVAILABLE", method)
    cache.refused(manifests[1].replace("manifests", "referrers"), 503, "UNAVAILABLE")


FAILURES = {
    "500": Reply(500),
    "502_html": Reply(502, b"<html>bad gateway</html>", (("Content-Type", "text/html"),)),
    "503": Reply(503, b"", (("Retry-After", "17"),)),
    "503_date": Reply(503, b"", (("Retry-After", "Wed, 21 Oct 2026 07:28:00 GMT"),)),
    "captive_portal": Reply(302, b"", (("Location", "http://127.0.0.1:1/login"),)),
    "file_url": Reply(302, b"", (("Location", "file:///etc/passwd"),)),
    "204": Reply(204),
    "206": Reply(206, b"abc", (("Content-Range", "bytes 0-2/100"),)),
    "304": Reply(304),
}


@pytest.mark.parametrize("rule", FAILURES.values(), ids=FAILURES.keys())
def test_upstream_errors_are_503(
    cache: Cache, repository: str, blob: str, manifests: tuple[str, str], rule: Rule
) -> None:
    before = cache.settled()
    with cache.scripted(f"/v2/{repository}/*", rule):
        assert_unavailable(cache, repository, blob, manifests)
    assert cache.files == before
    assert cache.ask(manifests[0]).status == 200
    with cache.scripted(f"/v2/{repository}/*", rule):
        assert cache.ask(manifests[0]).status == 200  # the cached tag


def test_redirect_loop_is_503(cache: Cache, repository: str, blob: str, manifests: tuple[str, str]) -> None:
    with cache.scripted(f"/v2/{repository}/*", Redirect(cache.upstream.url)):
        assert_unavailable(cache, repository, blob, manifests)


def test_unreachable_upstream_is_503(
    cache: Cache, gone: ScriptedRegistry, repository: str, blob: str, manifests: tuple[str, str]
) -> None:
    assert_unavailable(replace(cache, upstream=gone), repository, blob, manifests)


PORTAL = Reply(200, b"<html>Please log in.</html>", (("Content-Type", "text/html"),))
BOTH = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": {}, "layers": [], "manifests": []}
SCHEMA_1 = {"schemaVersion": 1, "name": "x", "tag": "1", "architecture": "amd64", "fsLayers": [], "history": []}
SIGNED = "application/vnd.docker.distribution.manifest.v1+prettyjws"


def json_reply(body: object, media_type: str) -> Reply:
    """Return an answer with this JSON."""
    return Reply(200, json.dumps(body).encode(), (("Content-Type", media_type),))


GARBAGE = {
    "captive_portal": PORTAL,
    "captive_portal_in_disguise": Reply(200, PORTAL.body, (("Content-Type", OCI_MANIFEST),)),
    "nothing": Reply(200, b"", (("Content-Type", OCI_MANIFEST),)),
    "no_type": Header("Content-Type", None),
    "another_type": Header("Content-Type", DOCKER_MANIFEST),
    "index_type": Header("Content-Type", OCI_INDEX),
    "octets": Header("Content-Type", "application/octet-stream"),
    "another_digest": Header("Docker-Content-Digest", f"sha256:{'0' * 64}"),
    "no_digest": Header("Docker-Content-Digest", "latest"),
    "schema_1": json_reply(SCHEMA_1, SIGNED),
    "schema_1_in_disguise": json_reply(SCHEMA_1, OCI_MANIFEST),
    "list": json_reply([], OCI_MANIFEST),
    "number": json_reply(2, OCI_MANIFEST),
    "two_things_at_once": json_reply(BOTH, OCI_MANIFEST),
    "nested": Reply(200, b"[" * 100_000, (("Content-Type", OCI_MANIFEST),)),
    "latin_1": Reply(200, b'{"schemaVersion": 2, "x": "\xff"}', (("Content-Type", OCI_MANIFEST),)),
    "too_large": json_reply({"schemaVersion": 2, "x": "x" * (9 << 20)}, OCI_MANIFEST),
}
REFUSED_FOR_TAGS_ONLY = {"another_digest", "no_digest"}
"""Wrong only for tags: a request by digest needs no header."""


@pytest.mark.parametrize("name", GARBAGE)
def test_malformed_manifest_is_refused(
    cache: Cache, repository: str, image: Image, manifests: tuple[str, str], name: str
) -> None:
    before = cache.settled()
    with cache.scripted(f"/v2/{repository}/manifests/*", GARBAGE[name]):
        for manifest in manifests[: 1 if name in REFUSED_FOR_TAGS_ONLY else 2]:
            for method in ("GET", "HEAD"):
                cache.refused(manifest, 503, "UNAVAILABLE", method)
    assert cache.files == before
    for manifest in manifests:
        assert cache.ask(manifest).body == image.manifest.data


@pytest.mark.parametrize("known", [True, False], ids=["manifest", "no_manifest"])
def test_content_encoding_is_refused(
    cache: Cache, repository: str, image: Image, blob: str, manifests: tuple[str, str], known: bool
) -> None:
    """A digest covers the bytes as sent; and clients would decode, or resume in the middle."""
    layer = image.blobs[1]
    encoded = (("Content-Encoding", "gzip"),)
    if known:
        assert cache.ask(manifests[0]).status == 200
    before = cache.settled()
    zipped = Reply(200, gzip.compress(layer.data), encoded)
    with cache.scripted(f"*{layer.digest}", zipped):
        cache.refused(blob, 503, "UNAVAILABLE")
        cache.refused(blob, 503, "UNAVAILABLE", "HEAD")
    if not known:
        zipped = Reply(200, gzip.compress(image.manifest.data), (*encoded, ("Content-Type", OCI_MANIFEST)))
        with cache.scripted(f"/v2/{repository}/manifests/*", zipped):
            for manifest in manifests:
                cache.refused(manifest, 503, "UNAVAILABLE")
    assert cache.files == before
    assert cache.ask(blob).body == layer.data


def test_captive_portal_in_place_of_a_blob(
    cache: Cache, blob: str, manifests: tuple[str, str], repository: str
) -> None:
    assert cache.ask(manifests[0]).status == 200
    before = cache.settled()
    with cache.scripted(f"/v2/{repository}/*", PORTAL):
        cache.refused(blob, 503, "UNAVAILABLE")
        # Clients take the length for the blob's.
        cache.refused(blob, 503, "UNAVAILABLE", "HEAD")
    assert cache.files == before
    assert cache.ask(blob).status == 200


@pytest.mark.parametrize("reply", [PORTAL, Reply(200, b"{}"), Reply(200, b'{"tags": 1}')], ids=["html", "no", "one"])
def test_malformed_list_is_refused(cache: Cache, repository: str, manifests: tuple[str, str], reply: Rule) -> None:
    with cache.scripted(f"/v2/{repository}/*", reply):
        cache.refused(f"{repository}/tags/list", 503, "UNAVAILABLE")
        cache.refused(manifests[1].replace("manifests", "referrers"), 503, "UNAVAILABLE")


def test_silent_upstream_is_503_and_served_on_retry(cache: Cache, repository: str) -> None:
    """Clients are answered in time, each object is requested once, and the clients' retries get it.

    The one slow test: as slow as clients are patient.
    """
    silent, stalling = f"{repository}/silent", f"{repository}/stalling"
    one, two = plain_image(f"{repository}/1", SIZE), plain_image(f"{repository}/2", SIZE)
    for name in (silent, stalling):
        cache.upstream.add(name, one, "1")
        cache.upstream.add(name, two, "2")
    kept = {
        f"{silent}/manifests/1": one.manifest.data,
        f"{silent}/manifests/{two.manifest.digest}": two.manifest.data,
        f"{silent}/blobs/{one.blobs[1].digest}": one.blobs[1].data,
        f"{stalling}/manifests/1": one.manifest.data,
        f"{stalling}/blobs/{two.blobs[1].digest}": two.blobs[1].data,  # a blob of unknown size
    }
    lists = [f"{silent}/tags/list", f"{silent}/referrers/{one.manifest.digest}", f"{stalling}/tags/list"]

    def ask(path: str) -> tuple[Response, float]:
        began = time.monotonic()
        return fetch(cache.url(path), timeout=BY_CONTAINERD), time.monotonic() - began

    since = cache.log_size
    with (
        cache.scripted(f"/v2/{silent}/*", Hold(None)),
        cache.scripted(f"/v2/{stalling}/*", NoLength(), Hold(10)),
        ThreadPoolExecutor(10) as clients,
    ):
        for answer, seconds in clients.map(ask, [*kept, *lists]):
            assert_error(answer, 503, "UNAVAILABLE")
            assert seconds < BY_US + SLACK
        errors = cache.errors(since)
    assert len(errors) == len(kept) + len(lists)
    assert all(cache.upstream.host in line.partition(" UNAVAILABLE: ")[2] for line in errors)
    for path, content in kept.items():
        assert cache.ask(path).body == content
        # A connection that has stalled is dropped, one without an answer yet is awaited.
        assert cache.sent(path) == 1 or path.startswith(stalling)
