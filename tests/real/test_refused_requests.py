"""Refused requests: statuses, codes, headers and log lines. (test_upstream_failures has the other errors.)"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from itertools import product

import pytest

from tests.client import Response, ask, connect, fetch
from tests.images import MIB, Image
from tests.real.caches import Cache, assert_error, cache_in, plain_image

DIGEST = f"sha256:{'0' * 64}"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cache]:
    """One cache for all tests of this file."""
    folder = tmp_path_factory.mktemp("statuses")
    with cache_in(folder, "--allow-upstreams", "127.0.0.1:*, *.Allowed.test") as cache:
        yield cache


@pytest.fixture(scope="module")
def image(cache: Cache) -> Image:
    """An image at the upstream, in `here` as `1`."""
    image = plain_image("statuses", 1000)
    cache.upstream.add("here", image, "1")
    return image


@pytest.fixture(autouse=True)
def no_upstream_request(cache: Cache, request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test whose requests reach the upstream or change the store."""
    before = cache.upstream.connections, cache.files
    yield
    if "image" not in request.fixturenames:
        assert (cache.upstream.connections, cache.files) == before


def assert_refused(cache: Cache, path: str, status: int, code: str, method: str = "GET") -> Response:
    """Assert that this path, with its query, is answered by this error, and logged in one line that says why."""
    since = cache.log_size
    answer = fetch(f"{cache.daemon.url}{path}", method=method)
    assert_error(answer, status, code, method)
    assert cache.one_error(since).partition(f": {status} {code}: ")[2]
    return answer


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "here/manifests/1"),
        ("DELETE", "here/manifests/1"),
        ("DELETE", f"here/manifests/{DIGEST}"),
        ("PATCH", "here/manifests/1"),
        ("POST", "here/manifests/1"),
        ("OPTIONS", "here/manifests/1"),
        ("DELETE", f"here/blobs/{DIGEST}"),
        ("PUT", f"here/blobs/{DIGEST}"),
        ("OPTIONS", f"here/blobs/{DIGEST}"),
        ("POST", "here/blobs/uploads/"),
        ("POST", "deep/er/here/blobs/uploads"),
        ("PATCH", "here/blobs/uploads/7d7a1f2b"),
        ("PUT", "here/blobs/uploads/7d7a1f2b"),
        ("DELETE", "here/blobs/uploads/7d7a1f2b"),
        ("DELETE", "here/tags/1"),
        ("POST", ""),
        ("BREW", "here/manifests/1"),
    ],
)
def test_writing_methods_are_refused(cache: Cache, method: str, path: str) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    with closing(connect(cache.daemon.url)) as connection:
        # A body must not disturb the next request.
        for body in (None, b"a=b", b"a" * (2 * MIB)):
            since = cache.log_size
            answer = ask(connection, cache.url(path), method=method, body=body, headers=headers)
            assert_error(answer, 405, "UNSUPPORTED", method)
            assert answer.headers["Allow"] == "GET, HEAD"
            assert f"{method} /v2/{path}" in cache.one_error(since)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["here/blobs/uploads/", "here/blobs/uploads", "here/blobs/uploads/7d7a1f2b"])
def test_upload_status_is_refused(cache: Cache, path: str, method: str) -> None:
    answer = assert_refused(cache, f"/v2/{path}", 405, "UNSUPPORTED", method)
    assert answer.headers["Allow"] == "GET, HEAD"


def test_chunked_upload_is_refused(cache: Cache) -> None:
    with closing(connect(cache.daemon.url)) as connection:
        pieces = iter([b"x" * 100_000] * 30)
        connection.request("PATCH", "/v2/here/blobs/uploads/7d7a1f2b", pieces, encode_chunked=True)
        with connection.getresponse() as answer:
            assert_error(Response(answer.status, answer.headers, answer.read()), 405, "UNSUPPORTED")
        assert ask(connection, f"{cache.daemon.url}/v2/").status == 200


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/v2/_catalog", "/v2/_catalog?n=100", "/v2/_catalog?ns=docker.io"])
def test_catalog_is_refused(cache: Cache, path: str, method: str) -> None:
    assert_refused(cache, path, 404, "UNSUPPORTED", method)


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/v1/", "/v22/", "/etc/passwd", "/v2/here", "/v2/here/manifests/", "/v2/here/blobs/", "/v2/here/tags"),
        *("/v2//manifests/1", "/v2/he%0d%0are/manifests/1", f"/v2/he%0d%0are/blobs/{DIGEST}"),
    ],
)
def test_unknown_paths_are_not_found(cache: Cache, path: str) -> None:
    assert_refused(cache, path, 404, "NOT_FOUND")


NAMES = [
    "Here",
    "here/",
    "/here",
    "he//re",
    "-here",
    "here_",
    "he..re",
    "..",
    "../here",
    "here/..",
    "here/./there",
    "%2e%2e/here",
    "here%2f..%2fthere",
    "here%2Fthere",
    "he%00re",
    "he%20re",
    "he%25re",
    "he%5cre",
    "h%c3%a9re",
    "he%ffre",
    "h" * 300,
]


@pytest.mark.parametrize("name", NAMES)
def test_malformed_names_are_refused(cache: Cache, name: str) -> None:
    for last in ("manifests/1", f"blobs/{DIGEST}", "tags/list", f"referrers/{DIGEST}"):
        assert_refused(cache, f"/v2/{name}/{last}?ns={cache.upstream.host}", 400, "NAME_INVALID")


@pytest.mark.parametrize(
    "tag", [".INVALID_MANIFEST_NAME", "-1", "%2e%2e", "1%002", "1%0d%0aX", "1%202", "%c3%a9", "1" * 129]
)
def test_malformed_tags_are_refused(cache: Cache, tag: str) -> None:
    """404, as the specification's conformance suite expects."""
    for method in ("GET", "HEAD"):
        path = f"/v2/here/manifests/{tag}?ns={cache.upstream.host}"
        assert_refused(cache, path, 404, "MANIFEST_UNKNOWN", method)


@pytest.mark.parametrize(
    "digest",
    [
        "sha256:totallywrong",
        "sha256%3Atotallywrong",
        "sha256:",
        f"sha256:{'0' * 63}",
        f"sha256:{'0' * 65}",
        f"sha256:{'A' * 64}",
        f"sha256:{'0' * 63}%0a",
        f"sha256:{'0' * 61}%2e%2e",
        f"sha512:{'0' * 64}",
        f"md5:{'0' * 32}",
        f":{'0' * 64}",
    ],
)
def test_malformed_digests_are_refused(cache: Cache, digest: str) -> None:
    for kind, method in product(("manifests", "blobs", "referrers"), ("GET", "HEAD")):
        assert_refused(cache, f"/v2/here/{kind}/{digest}?ns={cache.upstream.host}", 400, "DIGEST_INVALID", method)


def test_malformed_digest_with_a_body_is_refused(cache: Cache) -> None:
    """The specification's conformance suite sends this."""
    answer = fetch(cache.url("here/manifests/sha256:totallywrong"), body=b"x" * 1000)
    assert_error(answer, 400, "DIGEST_INVALID")


@pytest.mark.parametrize(
    "ns",
    [
        "user@{}",
        "user:password@{}",
        "{}/path",
        "{}/",
        "{}?query",
        "{}%23fragment",
        "http://{}",
        "{}%0d%0aX-Injected:%20yes",
        "{}%0a",
        "{}%00",
        "{}%20",
        "%20{}",
        "127.0.0.1:0",
        "127.0.0.1:65536",
        "127.0.0.1:",
        "127.0.0.1:80:80",
        "127.0.0.1:%2080",
        "127.0.0.1:-80",
        "127.0.0.1:http",
        ":80",
        "..",
        "../../etc",
        "[::1",
        "*",
        "h%c3%b6st.test",
        "h%f6st.test",
        "a" * 300,
    ],
)
def test_malformed_ns_is_refused(cache: Cache, ns: str) -> None:
    written, since = ns.format(cache.upstream.host), cache.log_size
    for path in ("here/manifests/1", f"here/blobs/{DIGEST}"):
        answer = assert_refused(cache, f"/v2/{path}?ns={written}", 400, "NAME_INVALID")
        assert "X-Injected" not in answer.headers
        assert answer.headers["OCI-Namespace"] is None
    # It cannot inject lines into the log either, or escape sequences for a terminal.
    for line in cache.daemon.log[since:].removesuffix("\n").split("\n"):
        assert line.isprintable()
        assert re.match(r"\d{4}-\d\d-\d\dT", line)


@pytest.mark.parametrize(
    "upstream", ["docker.io", "localhost:5000", "allowed.test", "127.0.0.1", "x.allowed.test.net"]
)
@pytest.mark.parametrize("path", ["manifests/1", f"manifests/{DIGEST}", f"blobs/{DIGEST}", "tags/list"])
def test_disallowed_upstreams_are_refused(cache: Cache, path: str, upstream: str) -> None:
    spelled = (f"/v2/team/app/{path}?ns={upstream}", f"/v2/{upstream}/team/app/{path}")
    for asked, method in product(spelled, ("GET", "HEAD")):
        since = cache.log_size
        answer = fetch(f"{cache.daemon.url}{asked}", method=method)
        assert_error(answer, 403, "DENIED", method)
        assert upstream in cache.one_error(since).partition(": 403 DENIED: ")[2]


def test_allowed_upstream_is_served(cache: Cache, image: Image) -> None:
    assert cache.ask("here/manifests/1").body == image.manifest.data
