"""Requests to upstreams: headers, tokens, and redirects."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest

from ociregistry import __version__
from tests.images import DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, Image, make_image
from tests.processes import Daemon, wait_until
from tests.real.caches import SOON, Cache, daemon_in, scripted
from tests.upstream import ScriptedRegistry
from tests.upstream_auth import Tokens
from tests.upstream_http import Answer, Handler, Request, Rule, error
from tests.upstream_rules import Hold, Redirect

OURS = {"host", "accept", "accept-encoding", "authorization", "user-agent", "connection", "via"}
"""All headers that may reach an upstream; all are the daemon's own."""


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[ScriptedRegistry]:
    """Another registry, to which the upstream redirects."""
    with ScriptedRegistry() as registry:
        yield registry


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, elsewhere: ScriptedRegistry) -> Iterator[Cache]:
    """One cache for all tests of this file."""
    folder = tmp_path_factory.mktemp("asking")
    with ScriptedRegistry() as upstream, daemon_in(folder, upstream, elsewhere) as daemon:
        yield Cache(daemon, upstream)


@pytest.fixture
def image(cache: Cache, repository: str) -> Image:
    """An image with many layers at the upstream, in the test's repository as `1`, not pulled yet."""
    image = make_image(repository, layers=6)
    cache.upstream.add(repository, image, "1")
    return image


def asked(registry: ScriptedRegistry, repository: str) -> list[Request]:
    """Return the requests that the registry received for this repository."""
    return [request for request in registry.requests if request.path.startswith(f"/v2/{repository}/")]


CLIENT = {
    "Authorization": "Basic Zm9vOmJhcg==",
    "Proxy-Authorization": "Basic Zm9vOmJhcg==",
    "Cookie": "session=secret",
    "Accept": "application/vnd.docker.distribution.manifest.v1+prettyjws, application/json",
    "Accept-Encoding": "zstd;q=1.0, gzip;q=0.8",
    "If-None-Match": '"x"',
    "If-Modified-Since": "Wed, 21 Oct 2026 07:28:00 GMT",
    "Range": "bytes=1-2",
    "User-Agent": "containerd/2.3.0",
    "X-Forwarded-For": "10.0.0.1",
    "X-Registry-Auth": "secret",
    "Referer": "http://internal.test/",
}


@pytest.mark.parametrize("headers", [CLIENT, {}, {"Accept": OCI_MANIFEST}], ids=["many", "none", "one_type"])
def test_client_headers_are_not_forwarded_to_the_upstream(
    cache: Cache, repository: str, image: Image, headers: dict[str, str]
) -> None:
    blob = f"{repository}/blobs/{image.config.digest}"
    for method, path in (
        *(("HEAD", blob), ("GET", blob)),
        *(("GET", f"{repository}/manifests/{reference}") for reference in ("1", image.manifest.digest)),
        *(("GET", f"{repository}/{path}") for path in ("tags/list", f"referrers/{image.manifest.digest}")),
    ):
        assert cache.ask(path, method, headers).status in (200, 206)
    requests = asked(cache.upstream, repository)
    assert len(requests) >= 5
    for request in requests:
        assert {name.lower() for name, _ in request.headers} <= OURS
        assert request.values("Accept-Encoding") == ("identity",)
        assert request.header("Authorization") is None
        assert request.values("User-Agent") == (f"ociregistry/{__version__}",)
        assert not request.query
        if "/manifests/" in request.path:
            accepted = {part.strip() for value in request.values("Accept") for part in value.split(",")}
            assert accepted == {OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST}


def test_concurrent_requests_share_one_upstream_request(cache: Cache, repository: str, image: Image) -> None:
    paths = [f"{repository}/manifests/1", f"{repository}/manifests/{image.manifest.digest}"]
    hold = Hold(None)
    with cache.scripted(f"/v2/{repository}/*", hold), ThreadPoolExecutor(20) as clients:
        answers = [clients.submit(cache.ask, path) for path in paths * 10]
        assert hold.reached.wait(SOON)
        hold.release.set()
        assert {answer.result(SOON).body for answer in answers} == {image.manifest.data}
    assert cache.sent(paths[0]) == 1
    assert cache.sent(paths[1]) <= 1  # None, when it came after the tag's answer.


def test_anonymous_token_is_fetched_once(cache: Cache, repository: str, image: Image) -> None:
    tokens = Tokens(f"{cache.upstream.url}/token")
    before = cache.upstream.count("GET", "/token")
    with cache.scripted("*", tokens), ThreadPoolExecutor(10) as clients:
        assert cache.ask(f"{repository}/manifests/1").status == 200
        paths = [f"{repository}/blobs/{blob.digest}" for blob in image.blobs]
        assert [answer.body for answer in clients.map(cache.ask, paths)] == [blob.data for blob in image.blobs]
    fetched = [request for request in cache.upstream.requests if request.path == "/token"][before:]
    assert len(fetched) == 1
    assert fetched[0].parameters("scope") == (f"repository:{repository}:pull",)
    assert fetched[0].parameters("service") == ("scripted-registry",)
    assert fetched[0].header("Authorization") is None
    # One request was refused; the others carried the token from the start.
    requests = asked(cache.upstream, repository)
    assert [request.status for request in requests] == [401, *[200] * (1 + len(image.blobs))]
    assert len({request.header("Authorization") for request in requests[1:]}) == 1


@pytest.mark.parametrize("key", ["token", "access_token"])
@pytest.mark.parametrize("expires_in", [None, 300])
def test_token_response_formats(
    cache: Cache, repository: str, image: Image, key: Literal["token", "access_token"], expires_in: int | None
) -> None:
    before = cache.upstream.count("GET", "/token")
    with cache.scripted("*", Tokens(f"{cache.upstream.url}/token?a=b", key=key, expires_in=expires_in)):
        for blob in image.blobs:
            assert cache.ask(f"{repository}/blobs/{blob.digest}").body == blob.data
    (fetched,) = [request for request in cache.upstream.requests if request.path == "/token"][before:]
    assert fetched.parameters("a") == ("b",)


def test_each_repository_has_a_separate_token(cache: Cache, repository: str, image: Image) -> None:
    cache.upstream.add(f"{repository}/below", image, "1")
    with cache.scripted("*", Tokens(f"{cache.upstream.url}/token")):
        for name in (repository, f"{repository}/below"):
            assert cache.ask(f"{name}/tags/list").status == 200
    below = asked(cache.upstream, f"{repository}/below")
    assert [request.status for request in below] == [401, 200]


LOGINS: dict[str, dict[str, str]] = {
    "anonymous": {},
    "password": {"user": "puller", "password": "s3cret"},
    "identity_token": {"identity_token": "s3cret"},
}


@pytest.mark.parametrize("login", LOGINS)
@pytest.mark.parametrize("scope", ["missing", "empty"])
def test_challenge_without_a_scope(
    tmp_path: Path, repository: str, login: str, scope: Literal["missing", "empty"]
) -> None:
    """The token service gives tokens for the requested scope, and an empty token without a scope."""
    image, other = make_image(repository, layers=2), make_image(f"{repository} too", layers=2)
    with ScriptedRegistry() as upstream:
        upstream.add(repository, image, "1")
        upstream.add(f"{repository}/below", other, "1")
        users = {"puller": "s3cret"} if LOGINS[login] else {}
        upstream.script("*", Tokens(f"{upstream.url}/token", scope=scope, users=users))
        entry: dict[str, object] = {"scheme": "http"} | ({"auth": LOGINS[login]} if LOGINS[login] else {})
        with Daemon(tmp_path, {upstream.host: entry}, "--no-complete-images") as daemon:
            cache = Cache(daemon, upstream)
            for name, what in ((repository, image), (f"{repository}/below", other)):
                assert cache.ask(f"{name}/manifests/{what.manifest.digest}").body == what.manifest.data
                assert cache.ask(f"{name}/manifests/1").body == what.manifest.data
                assert cache.ask(f"{name}/blobs/{what.config.digest}", "HEAD").status == 200
                for blob in what.blobs:
                    assert cache.ask(f"{name}/blobs/{blob.digest}").body == blob.data
        # Each repository was refused once, and has one token.
        assert [request.status for request in upstream.requests].count(401) == 2
        assert upstream.count(path="/token") == 2


def test_revoked_token_is_replaced(cache: Cache, repository: str, image: Image) -> None:
    tokens = Tokens(f"{cache.upstream.url}/token")
    with cache.scripted("*", tokens):
        for blob in image.blobs[:3]:
            assert cache.ask(f"{repository}/blobs/{blob.digest}").body == blob.data
            tokens.revoke()
    assert [request.status for request in asked(cache.upstream, repository)] == [401, 200] * 3


def test_token_is_renewed_before_it_expires(cache: Cache, repository: str, image: Image) -> None:
    """The upstream never receives an expired one, so it refuses only the first request."""
    path = f"{repository}/blobs/{image.config.digest}"
    before = cache.upstream.count("GET", "/token")

    def renewed() -> bool:
        assert cache.ask(path, "HEAD").status == 200
        return cache.upstream.count("GET", "/token") == before + 2

    with cache.scripted("*", Tokens(f"{cache.upstream.url}/token", expires_in=1)):
        wait_until(renewed, SOON, "a second token")
    assert [request.status for request in asked(cache.upstream, repository)].count(401) == 1


def test_token_service_on_another_host(
    cache: Cache, elsewhere: ScriptedRegistry, repository: str, image: Image
) -> None:
    tokens = Tokens(f"{elsewhere.url}/token")
    with cache.scripted(f"/v2/{repository}/*", tokens), scripted(elsewhere, "/token", tokens):
        assert cache.ask(f"{repository}/manifests/1").body == image.manifest.data
    assert all(request.header("Authorization") is None for request in elsewhere.requests)


class NoAuthorization(Rule):
    """A storage service that accepts the signature in a URL or in a header, never both."""

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Return 400 for both, as S3 does."""
        return error(400, "DENIED") if request.header("Authorization") else handler(request)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_blobs_redirected_to_storage(
    cache: Cache, elsewhere: ScriptedRegistry, repository: str, image: Image, status: int
) -> None:
    elsewhere.add(repository, image)
    layer = image.layers[0]
    path = f"{repository}/blobs/{layer.digest}"
    with (
        cache.scripted(f"*{layer.digest}", Redirect(elsewhere.url, status)),
        cache.scripted("*", Tokens(f"{cache.upstream.url}/token")),
        scripted(elsewhere, "*", NoAuthorization()),
    ):
        assert cache.ask(path, "HEAD").headers["Content-Length"] == str(len(layer.data))
        assert cache.ask(path).body == layer.data
    # The token went to the upstream only.
    assert [request.status for request in asked(cache.upstream, repository)] == [401, status, status]
    there = asked(elsewhere, repository)
    assert [(request.method, request.status) for request in there] == [("HEAD", 200), ("GET", 200)]
    assert all({name.lower() for name, _ in request.headers} <= OURS - {"authorization"} for request in there)
    assert all(request.header("Accept-Encoding") == "identity" for request in there)


def test_registry_redirected_to_another_with_its_own_tokens(
    cache: Cache, elsewhere: ScriptedRegistry, repository: str, image: Image
) -> None:
    elsewhere.add(repository, image, "1")
    with (
        cache.scripted(f"/v2/{repository}/*", Redirect(elsewhere.url, 302)),
        scripted(elsewhere, "*", Tokens(f"{elsewhere.url}/token")),
    ):
        assert cache.ask(f"{repository}/manifests/1").body == image.manifest.data
        assert cache.ask(f"{repository}/blobs/{image.config.digest}").body == image.config.data
    assert all(request.header("Authorization") is None for request in asked(cache.upstream, repository))
    assert [request.status for request in asked(elsewhere, repository)] == [401, 200, 200]
