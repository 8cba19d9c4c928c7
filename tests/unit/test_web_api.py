"""The API: requests to responses through the cache, with their headers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ociregistry.context import NO_VIA, Context, Via
from ociregistry.errors import LoopDetected, NameInvalid, NotFound, Unavailable
from ociregistry.manifests import OCI_INDEX, Manifest
from ociregistry.names import Tag, Upstream
from ociregistry.pullthrough.cache import PullThrough
from ociregistry.pullthrough.listings import Listings
from ociregistry.pullthrough.waiting import CacheStatus
from ociregistry.store.store import Store
from ociregistry.upstream.paging import PageRequest, TagPage
from ociregistry.web.api import V2
from ociregistry.web.requests import Query
from ociregistry.web.resource import Answer
from tests.images import make_image
from tests.unit.support.common import failed, fired, image, manifest, on_reactor, until
from tests.unit.support.demands import NoDemand
from tests.unit.support.http_agents import INSTANCE
from tests.unit.support.raw_clients import RawClient, site
from tests.unit.support.registries import MemoryRegistries

BUILT = make_image("v2")
IMAGE = manifest(BUILT)
LAYER = BUILT.layers[0]
MANIFEST = f"/v2/team/app/manifests/{IMAGE.digest}"
BLOB = f"/v2/team/app/blobs/{LAYER.digest}"
NS: Query = {b"ns": [b"reg.example"]}
EVERYTHING = [
    ("GET", MANIFEST),
    ("HEAD", MANIFEST),
    ("GET", BLOB),
    ("HEAD", BLOB),
    ("GET", "/v2/team/app/tags/list"),
    ("GET", MANIFEST.replace("manifests", "referrers")),
]
OTHER = f"ociregistry-{'f' * 16}"


@pytest.fixture
def v2(cache: PullThrough, store: Store, upstreams: MemoryRegistries, clock: Clock) -> V2:
    """Return the API over the empty store."""
    return V2(cache, Listings(store, upstreams, clock), NoDemand(), Upstream("docker.io"), INSTANCE)


def ask(v2: V2, path: str, query: Query = NS, method: str = "GET", via: Via = NO_VIA) -> Deferred[Answer]:
    """Send a request."""
    return Deferred.fromCoroutine(v2.answer(method, path.encode(), query, Context(via)))


async def body(answer: Answer) -> bytes:
    """Return the whole body."""
    data = await answer.content.read(0, answer.content.size)
    answer.content.close()
    return data


async def cached(store: Store, root: Path) -> None:
    """Store the image."""
    await store.keep(IMAGE, image("reg.example/team/app:1"))
    for blob in BUILT.blobs:
        (root / "blobs" / blob.digest.removeprefix("sha256:")).write_bytes(blob.data)


@pytest.mark.parametrize("path", ["/v2", "/v2/"])
def test_version_check(v2: V2, path: str) -> None:
    answer = fired(ask(v2, path, {}))
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    assert fired(answer.content.read(0, 10)) == b"{}"
    assert "OCI-Namespace" not in answer.headers


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("reference", ["1", IMAGE.digest])
@on_reactor
async def test_manifest(v2: V2, store: Store, root: Path, method: str, reference: str) -> None:
    await cached(store, root)
    answer = await ask(v2, f"/v2/team/app/manifests/{reference}", NS, method)
    assert (answer.status, answer.cache_status, answer.ranged, answer.content.size) == (
        200,
        CacheStatus.HIT,
        True,
        IMAGE.size,
    )
    assert answer.headers == {
        "Docker-Content-Digest": IMAGE.digest,
        "Content-Type": IMAGE.media_type,
        "ETag": f'"{IMAGE.digest}"',
        "OCI-Namespace": "reg.example",
    }
    assert await body(answer) == IMAGE.data


@on_reactor
async def test_blob(v2: V2, store: Store, root: Path, upstreams: MemoryRegistries) -> None:
    await cached(store, root)
    answer = await ask(v2, BLOB)
    assert (answer.status, answer.cache_status, answer.ranged) == (200, CacheStatus.HIT, True)
    assert answer.headers == {
        "Docker-Content-Digest": LAYER.digest,
        "Content-Type": "application/octet-stream",
        "ETag": f'"{LAYER.digest}"',
        "OCI-Namespace": "reg.example",
    }
    head = await ask(v2, BLOB, NS, "HEAD")
    assert (head.headers, head.cache_status, head.content.size) == (
        answer.headers,
        CacheStatus.HIT,
        answer.content.size,
    )
    assert await body(answer) == LAYER.data
    assert len(upstreams) == 0


@on_reactor
async def test_head_of_blob_requests_the_size_only(v2: V2, upstreams: MemoryRegistries) -> None:
    asked = ask(v2, BLOB, NS, "HEAD")
    await until(lambda: upstreams.calls)
    upstreams[0].answer(4711)
    answer = await asked
    assert (answer.content.size, answer.cache_status) == (4711, CacheStatus.MISS)
    assert upstreams.asked == [f"blob_size reg.example/team/app {LAYER.digest}"]


@on_reactor
async def test_upstream_in_the_repository_name(v2: V2, store: Store, root: Path) -> None:
    await cached(store, root)
    answer = await ask(v2, "/v2/reg.example/team/app/manifests/1", {})
    assert await body(answer) == IMAGE.data
    assert "OCI-Namespace" not in answer.headers


@pytest.mark.parametrize("path", ["/v2/", MANIFEST, BLOB, "/v2/team/app/tags/list"])
@pytest.mark.parametrize("ns", [b"a\r\nX-Injected: 1", b"http://reg.example", b"\xff", b"../..", b"a b"])
def test_invalid_ns_is_not_echoed(v2: V2, path: str, ns: bytes) -> None:
    failed(ask(v2, path, {b"ns": [ns]}), NameInvalid)


def page(*names: str, following: PageRequest | None = None) -> TagPage:
    """Return a page of tags."""
    return TagPage(tuple(map(Tag, names)), following)


@pytest.mark.parametrize(
    ("path", "query", "following", "name", "link"),
    [
        ("/v2/team/app/tags/list", NS, PageRequest(None, "b"), "team/app", "last=b&ns=reg.example"),
        (
            "/v2/team/app/tags/list",
            {b"ns": [b"[::1]:5000"]},
            PageRequest(None, "b"),
            "team/app",
            "last=b&ns=%5B%3A%3A1%5D%3A5000",
        ),
        ("/v2/team/app/tags/list", NS, PageRequest(2, "b"), "team/app", "last=b&n=2&ns=reg.example"),
        (
            "/v2/team/app/tags/list",
            NS,
            PageRequest(2, "b", "next_page=gA%3D&n=5"),
            "team/app",
            "last=b&n=2&next=next_page%3DgA%253D%26n%3D5&ns=reg.example",
        ),
        ("/v2/reg.example/team/app/tags/list", {}, PageRequest(2, "b"), "reg.example/team/app", "last=b&n=2"),
    ],
)
def test_tag_page_links_to_the_next_one(
    v2: V2, upstreams: MemoryRegistries, path: str, query: Query, following: PageRequest, name: str, link: str
) -> None:
    asked = ask(v2, path, query)
    upstreams[0].answer(page("a", "b", following=following))
    answer = fired(asked)
    assert json.loads(fired(answer.content.read(0, 1000))) == {"name": name, "tags": ["a", "b"]}
    assert answer.headers["Link"] == f'</v2/{name}/tags/list?{link}>; rel="next"'


def test_last_tag_page_has_no_link(v2: V2, upstreams: MemoryRegistries) -> None:
    asked = ask(v2, "/v2/team/app/tags/list")
    upstreams[0].answer(page("a"))
    answer = fired(asked)
    assert "Link" not in answer.headers
    assert answer.headers["OCI-Namespace"] == "reg.example"


def test_empty_tag_page_before_others(v2: V2, upstreams: MemoryRegistries) -> None:
    """Registries that filter their tags send such pages."""
    asked = ask(v2, "/v2/a.example/b/tags/list", {})
    upstreams[0].answer(page(following=PageRequest(named="page=2")))
    answer = fired(asked)
    assert (answer.status, answer.headers["Link"]) == (200, '</v2/a.example/b/tags/list?next=page%3D2>; rel="next"')


def index(*kinds: str) -> Manifest:
    """Return an index of artifacts."""
    entries = [
        {"mediaType": IMAGE.media_type, "digest": IMAGE.digest, "size": number, "artifactType": kind}
        for number, kind in enumerate(kinds)
    ]
    return Manifest.parse(json.dumps({"schemaVersion": 2, "manifests": entries}).encode(), OCI_INDEX)


@on_reactor
async def test_referrers(v2: V2, upstreams: MemoryRegistries) -> None:
    path = MANIFEST.replace("manifests", "referrers")
    asked = ask(v2, path)
    upstreams[0].answer(index("a/b", "c/d"))
    answer = await asked
    assert answer.headers == {"Content-Type": OCI_INDEX, "OCI-Namespace": "reg.example"}
    assert len(json.loads(await body(answer))["manifests"]) == 2
    asked = ask(v2, path, {**NS, b"artifactType": [b"a/b"]})
    upstreams[1].answer(index("a/b", "c/d"))
    answer = await asked
    assert answer.headers["OCI-Filters-Applied"] == "artifactType"
    assert len(json.loads(await body(answer))["manifests"]) == 1


def test_unknown_path_or_unavailable_content_is_an_error(v2: V2, upstreams: MemoryRegistries) -> None:
    failed(ask(v2, "/v2/team/app"), NotFound)
    asked = ask(v2, "/v2/team/app/tags/list")
    upstreams[0].refuse(Unavailable("down"))
    failed(asked, Unavailable)


class Asked:
    """A cache and listings without content that record the Via of requests."""

    def __init__(self) -> None:
        self.contexts: list[Context] = []

    async def _nothing(self, *arguments: object, **options: object) -> NoReturn:
        context = arguments[-1]
        assert isinstance(context, Context)
        self.contexts.append(context)
        raise Unavailable("there is nothing")

    manifest = blob = blob_size = tags = referrers = _nothing


@pytest.mark.parametrize(("method", "path"), EVERYTHING)
def test_via_is_passed_on(method: str, path: str) -> None:
    asked: Any = Asked()
    v2 = V2(asked, asked, NoDemand(), Upstream("docker.io"), INSTANCE)
    for via in (NO_VIA, Via((OTHER,))):
        failed(ask(v2, path, NS, method, via), Unavailable)
        assert asked.contexts.pop() == Context(via)
    assert asked.contexts == []


@pytest.mark.parametrize(("method", "path"), [*EVERYTHING, ("GET", "/v2/")])
@on_reactor
async def test_loop_is_an_error(
    v2: V2, store: Store, root: Path, upstreams: MemoryRegistries, method: str, path: str
) -> None:
    """Also for cached content, because any such request means a misconfiguration."""
    await cached(store, root)
    loop = failed(ask(v2, path, NS, method, Via((INSTANCE, OTHER))), LoopDetected)
    assert loop.message == "reg.example: this server is its own upstream"
    assert loop.via == f"1.1 {INSTANCE}, 1.1 {OTHER}, 1.1 {INSTANCE}"
    assert "docker.io: " in failed(ask(v2, path, {}, method, Via((INSTANCE,))), LoopDetected).message
    failed(ask(v2, path, NS, method, Via((OTHER,) * 17)), LoopDetected)
    assert len(upstreams) == 0


def test_loop_response(v2: V2, clock: Clock) -> None:
    got = RawClient(site(v2, clock)).ask(f"{MANIFEST}?ns=reg.example", Via=f"1.1 varnish, 1.1 {INSTANCE}").got()
    assert (got.status, got.error["code"]) == (403, "DENIED")
    assert got.headers["via"] == f"1.1 {INSTANCE}, 1.1 {INSTANCE}"
    failed(ask(v2, "/v2/team/app", via=Via((INSTANCE,))), NotFound)
