"""Storage behind a registry: another origin, URLs signed for a short time, no second authorization."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.images import Image, make_image
from tests.processes import Daemon
from tests.real.caches import Cache
from tests.upstream import ScriptedRegistry
from tests.upstream_auth import Basic, Tokens
from tests.upstream_http import Answer, Handler, Request, Rule, error
from tests.upstream_rules import Cut, Drip, IgnoreRange

USER, PASSWORD = "puller", "p4ssw0rd"
LIFE = 2.0
SIZE = 400_000
RATE = 100_000
CUT = 300_000
"""Bytes; they take longer than a URL is valid."""


@dataclass(frozen=True)
class Sign(Rule):
    """The registry: it redirects to the storage by a URL that expires."""

    storage: str

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Return the redirect without calling the handler."""
        expires = time.monotonic() + LIFE
        return Answer(307, (("Location", f"{self.storage}{request.path}?expires={expires}&signature=s3cr3t"),))


@dataclass(frozen=True)
class Signed(Rule):
    """The storage: 400 for two authorizations, 403 for an expired URL, and for any method but `methods`."""

    methods: tuple[str, ...] = ("GET",)
    refused: list[str] = field(default_factory=list)

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Return errors as S3 does."""
        if request.header("Authorization"):
            self.refused.append("two authorisations")
            return error(400, "InvalidArgument")
        if float(request.parameters("expires")[0]) < time.monotonic():
            self.refused.append("expired")
            return error(403, "AccessDenied")
        if request.method not in self.methods:
            return error(403, "SignatureDoesNotMatch")
        return handler(request)


@pytest.fixture
def storage() -> Iterator[ScriptedRegistry]:
    """A registry as the storage of blobs."""
    with ScriptedRegistry() as storage:
        yield storage


@pytest.fixture(params=["basic", "tokens"])
def credentials(request: pytest.FixtureRequest) -> str:
    """How the daemon authenticates to the upstream."""
    return str(request.param)


@pytest.fixture
def image(upstream: ScriptedRegistry, storage: ScriptedRegistry, credentials: str) -> Image:
    """An image at the upstream, which requires authentication, with its blobs in the storage."""
    image = make_image("signed", layers=1, layer_size=SIZE)
    upstream.add("team/app", image, "1")
    storage.add("team/app", image)
    upstream.script("*/blobs/*", Sign(storage.url))
    users = {USER: PASSWORD}
    upstream.script("*", Basic(users) if credentials == "basic" else Tokens(f"{upstream.url}/token", users=users))
    return image


@pytest.fixture
def cache(tmp_path: Path, upstream: ScriptedRegistry, storage: ScriptedRegistry) -> Iterator[Cache]:
    """A daemon for both."""
    auth = {"user": USER, "password": PASSWORD}
    entry: dict[str, object] = {"scheme": "http", "auth": auth}
    registries: dict[str, str | dict[str, object]] = {upstream.host: entry, storage.host: "http"}
    with Daemon(tmp_path, registries, "--log-level", "trace") as daemon:
        yield Cache(daemon, upstream)


def test_broken_download_resumes_with_a_new_signed_url(cache: Cache, storage: ScriptedRegistry, image: Image) -> None:
    layer = image.layers[0]
    signed = Signed()
    storage.script(f"*{layer.digest}", Drip(RATE))
    storage.script(f"*{layer.digest}", Cut(CUT), times=1)
    storage.script("*", signed)
    began = time.monotonic()
    assert cache.ask(f"team/app/blobs/{layer.digest}").body == layer.data
    # The first URL had expired when the connection broke.
    assert time.monotonic() - began > LIFE
    assert signed.refused == []
    first, second = [request for request in storage.requests if request.path.endswith(layer.digest)]
    assert (first.header("Range"), second.header("Range")) == (None, f"bytes={CUT}-")
    assert first.query != second.query
    assert storage.bytes_sent(layer.digest) == len(layer.data)
    assert all(request.header("Authorization") is None for request in storage.requests)
    assert "s3cr3t" not in cache.daemon.log


def test_skopeo_pulls_through_a_broken_connection(
    storage: ScriptedRegistry, start_daemon: Callable[..., Daemon], skopeo: Callable[..., None], tmp_path: Path
) -> None:
    address = "127.0.88.2"
    with ScriptedRegistry(address=address, port=80) as upstream:
        image = make_image("signed for skopeo", layers=1, layer_size=SIZE)
        upstream.add("team/app", image, "1")
        storage.add("team/app", image)
        upstream.script("*/blobs/*", Sign(storage.url))
        upstream.script("*", Tokens(f"{upstream.url}/token"))
        storage.script(f"*{image.layers[0].digest}", Drip(RATE))
        storage.script(f"*{image.layers[0].digest}", Cut(CUT), times=1)
        storage.script("*", Signed())
        daemon = start_daemon({address: "http", storage.host: "http"})
        skopeo(f"{daemon.host}/{address}/team/app:1", f"dir:{tmp_path}/copy")
        for blob in image.blobs:
            assert (tmp_path / "copy" / blob.digest.removeprefix("sha256:")).read_bytes() == blob.data
        assert storage.bytes_sent(image.layers[0].digest) == len(image.layers[0].data)


@pytest.mark.parametrize("ranges", [True, False])
def test_head_reports_the_size_of_a_url_signed_for_get(
    cache: Cache, storage: ScriptedRegistry, image: Image, ranges: bool
) -> None:
    """Request one byte in place of the HEAD; where the storage supports no ranges, its headers state the size."""
    layer = image.layers[0]
    storage.script("*", Signed())
    if not ranges:
        storage.script("*", IgnoreRange())
    answer = cache.ask(f"team/app/blobs/{layer.digest}", "HEAD")
    assert (answer.status, answer.headers["Content-Length"]) == (200, str(len(layer.data)))
    assert [(request.method, request.header("Range")) for request in storage.requests] == [
        ("HEAD", None),
        ("GET", "bytes=0-0"),
    ]
