"""The API under /v2/ as clients see it: headers, names, lists."""

from __future__ import annotations

import hashlib
import json
from contextlib import closing
from dataclasses import replace
from email.message import Message
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.client import connect, fetch
from tests.images import OCI_LAYER, Blob, Image, Manifest, make_index
from tests.processes import wait_until
from tests.real.caches import (
    SEEN,
    Cache,
    blob_file,
    counts,
    daemon_in,
    plain_image,
    pull,
    record,
)
from tests.upstream_http import Rule
from tests.upstream_rules import Header, NoLength, Reply

GONE = Reply(503)


def assert_headers(headers: Message, what: Blob | Manifest, media_type: str, namespace: str | None) -> None:
    """Assert that the headers are those of a 200 for this content, requested with this `ns`."""
    assert headers["Docker-Content-Digest"] == what.digest
    assert headers["Content-Length"] == str(len(what.data))
    assert headers["Content-Type"] == media_type
    assert headers["Docker-Distribution-API-Version"] == "registry/2.0"
    assert headers["ETag"] == f'"{what.digest}"'
    assert headers["Accept-Ranges"] == "bytes"
    assert headers["OCI-Namespace"] == namespace
    for name in ("Content-Encoding", "Transfer-Encoding", "Content-Range", "WWW-Authenticate"):
        assert headers[name] is None
    for name in set(headers.keys()):
        assert len(headers.get_all(name, [])) == 1


def assert_served(cache: Cache, path: str, what: Blob | Manifest, media_type: str) -> None:
    """Check HEAD and GET, first on a miss, then on a hit, with both ways to name the upstream."""
    client = {"Accept": f"{media_type}, */*", "Accept-Encoding": "zstd;q=1.0, gzip;q=0.8, deflate;q=0.5"}
    in_path = f"{cache.daemon.url}/v2/{cache.upstream.host}/{path}"
    for url, namespace in ((cache.url(path), cache.upstream.host), (in_path, None)):
        for method in ("HEAD", "GET", "HEAD", "GET"):
            answer = fetch(url, method=method, headers=client)
            assert answer.status == 200
            assert_headers(answer.headers, what, media_type, namespace)
            assert answer.body == (what.data if method == "GET" else b"")


@pytest.mark.parametrize("docker", [False, True], ids=["oci", "docker"])
def test_headers_of_manifests(cache: Cache, repository: str, docker: bool) -> None:
    index = make_index(repository, docker=docker)
    cache.upstream.add(repository, index, "1")
    for manifest in (index.manifest, *(image.manifest for image in index.images)):
        assert_served(cache, f"{repository}/manifests/{manifest.digest}", manifest, manifest.media_type)
        assert cache.sent(f"{repository}/manifests/{manifest.digest}") == 1
    assert_served(cache, f"{repository}/manifests/1", index.manifest, index.manifest.media_type)
    assert cache.sent(f"{repository}/manifests/1") == 1


@pytest.mark.parametrize("by_head", [False, True], ids=["asked_by_get", "asked_by_head"])
def test_headers_of_a_tag_on_a_miss(cache: Cache, repository: str, image: Image, by_head: bool) -> None:
    path = f"{repository}/manifests/1"
    for method in ("HEAD", "GET") if by_head else ("GET", "HEAD"):
        answer = cache.ask(path, method)
        assert answer.status == 200
        assert_headers(answer.headers, image.manifest, image.manifest.media_type, cache.upstream.host)
    assert cache.sent(path) == 1


@pytest.mark.parametrize("known", [True, False], ids=["manifest", "no_manifest"])
def test_headers_of_blobs(cache: Cache, repository: str, image: Image, known: bool) -> None:
    if known:
        assert cache.ask(f"{repository}/manifests/1").status == 200
    for blob in image.blobs:
        path = f"{repository}/blobs/{blob.digest}"
        assert_served(cache, path, blob, "application/octet-stream")
        assert cache.sent(path, "GET") == 1
        assert cache.sent(path, "HEAD") == 1


def test_headers_when_the_upstream_omits_or_decorates_them(cache: Cache, repository: str, image: Image) -> None:
    rules = [
        Header("Docker-Content-Digest", None),
        Header("ETag", '"something else"'),
        Header("Content-Type", f"{image.manifest.media_type}; charset=utf-8"),
        Header("OCI-Namespace", "elsewhere.test"),
        Header("Set-Cookie", "a=b"),
    ]
    with cache.scripted(f"/v2/{repository}/manifests/*", *rules):
        answer = cache.ask(f"{repository}/manifests/1")
    assert_headers(answer.headers, image.manifest, image.manifest.media_type, cache.upstream.host)
    assert answer.headers["Set-Cookie"] is None


def test_sha512(cache: Cache, repository: str, image: Image) -> None:
    """The answer has the requested digest, and the content is verified against it."""
    manifest, layer = image.manifest, image.blobs[1]
    manifest = replace(manifest, digest=f"sha512:{hashlib.sha512(manifest.data).hexdigest()}")
    layer = replace(layer, digest=f"sha512:{hashlib.sha512(layer.data).hexdigest()}")
    cache.upstream.add(repository, Image(manifest, (layer,), ""))
    assert_served(cache, f"{repository}/manifests/{manifest.digest}", manifest, manifest.media_type)
    assert_served(cache, f"{repository}/blobs/{layer.digest}", layer, "application/octet-stream")
    cache.wait_stored(layer.digest)
    assert blob_file(cache.daemon, layer.digest).read_bytes() == layer.data


@pytest.mark.parametrize("known", [True, False], ids=["manifest", "no_manifest"])
def test_head_of_a_blob_fetches_nothing(cache: Cache, repository: str, image: Image, known: bool) -> None:
    if known:
        assert cache.ask(f"{repository}/manifests/1").status == 200
    layer, before = image.blobs[1], cache.files
    path = f"{repository}/blobs/{layer.digest}"
    answer = cache.ask(path, "HEAD")
    assert_headers(answer.headers, layer, "application/octet-stream", cache.upstream.host)
    assert (cache.sent(path, "HEAD"), cache.sent(path, "GET")) == (1, 0)
    assert cache.files == before


def test_head_of_a_blob_whose_size_is_only_in_the_manifest(cache: Cache, repository: str, image: Image) -> None:
    assert cache.ask(f"{repository}/manifests/1").status == 200
    layer = image.blobs[1]
    path = f"{repository}/blobs/{layer.digest}"
    with cache.scripted(f"*{layer.digest}", NoLength()):
        answer = cache.ask(path, "HEAD")
    assert_headers(answer.headers, layer, "application/octet-stream", cache.upstream.host)


@pytest.mark.parametrize(
    "framing", [None, NoLength("chunked"), NoLength("close")], ids=["length", "chunked", "close_delimited"]
)
def test_the_empty_blob(cache: Cache, repository: str, image: Image, framing: Rule | None, tmp_path: Path) -> None:
    empty = Blob(f"sha256:{hashlib.sha256().hexdigest()}", b"", OCI_LAYER)
    cache.upstream.add(repository, replace(image, blobs=(empty,)))
    path = f"{repository}/blobs/{empty.digest}"
    # It has one digest in all tests, so each starts a fresh daemon.
    with (
        daemon_in(tmp_path, cache.upstream) as daemon,
        cache.scripted(f"*{empty.digest}", *([framing] if framing else [])),
    ):
        fresh = Cache(daemon, cache.upstream)
        for method in ("GET", "HEAD", "GET"):
            answer = fresh.ask(path, method)
            assert (answer.status, answer.headers["Content-Length"], answer.body) == (200, "0", b"")
        ranged = fresh.ask(path, headers={"Range": "bytes=0-"})
        assert (ranged.status, ranged.headers["Content-Range"], ranged.body) == (200, None, b"")
        fresh.wait_stored(empty.digest)
        assert blob_file(daemon, empty.digest).read_bytes() == b""
    assert cache.sent(path) == 1


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/v2/", "/v2", "/v2/?ns=docker.io"])
def test_v2_endpoint_answers_200(cache: Cache, path: str, method: str) -> None:
    """Docker, podman and crane send this first; any status but 200 makes them give up, or log in."""
    answer = fetch(f"{cache.daemon.url}{path}", method=method)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    assert answer.headers["Docker-Distribution-API-Version"] == "registry/2.0"
    assert answer.body == (b"{}" if method == "GET" else b"")


def test_names_of_any_depth(cache: Cache, repository: str, image: Image) -> None:
    deep = f"{repository}/manifests/blobs/a.b/c__d/e-f/tags/list"
    cache.upstream.add(deep, image, "manifests")
    assert cache.ask(f"{deep}/manifests/manifests").body == image.manifest.data
    assert json.loads(cache.ask(f"{deep}/tags/list").body) == {"name": deep, "tags": ["manifests"]}


def test_upstream_in_ns_or_in_the_path(cache: Cache, repository: str, image: Image) -> None:
    host = cache.upstream.host
    for ns in (host, quote(host, safe=""), quote(host).replace("1", "%31")):
        answer = fetch(f"{cache.daemon.url}/v2/{repository}/manifests/1?ns={ns}")
        assert (answer.body, answer.headers["OCI-Namespace"]) == (image.manifest.data, host)
    assert fetch(f"{cache.daemon.url}/v2/{host}/{repository}/manifests/1").body == image.manifest.data
    # Other parameters do not matter, and an empty ns counts as none.
    assert fetch(f"{cache.daemon.url}/v2/{repository}/manifests/1?x=1&ns={host}&y").body == image.manifest.data
    assert fetch(f"{cache.daemon.url}/v2/{host}/{repository}/manifests/1?ns=").body == image.manifest.data
    assert cache.sent(f"{repository}/manifests/1") == 1


def test_docker_hub_names(cache: Cache, repository: str, image: Image) -> None:
    """The record of a Docker Hub image is put into the store, so that no upstream is needed."""
    pull(cache, repository, image)
    before, name = counts(cache.daemon), f"nginx{repository.rpartition('/')[2]}"
    hub = plain_image("hub", 10)
    document = json.loads(record(cache, image.manifest).read_text())
    dates = next(iter(document["images"].values()))
    document |= {"digest": hub.manifest.digest, "manifest": hub.manifest.data.decode()}
    document["images"] = {f"docker.io/library/{name}:1": dates}
    record(cache, hub.manifest).write_text(json.dumps(document))
    wait_until(lambda: counts(cache.daemon) != before, SEEN, "the record is counted")
    for path in (
        *(
            f"{name}/manifests/1?ns={ns}"
            for ns in ("docker.io", "index.docker.io", "registry-1.docker.io", "Docker.IO")
        ),
        *(f"library/{name}/manifests/1{ns}" for ns in ("", "?ns=docker.io")),
        *(f"{prefix}{name}/manifests/1" for prefix in ("", "docker.io/", "docker.io/library/", "index.docker.io/")),
    ):
        assert fetch(f"{cache.daemon.url}/v2/{path}").body == hub.manifest.data


def test_request_targets_in_absolute_form(cache: Cache, repository: str, image: Image) -> None:
    """As a client sends them that takes the cache for a forward proxy; the host of the target does not matter."""
    for host in (f"127.0.0.1:{cache.daemon.port}", "else.example"):
        target = cache.url(f"{repository}/manifests/1").replace(f"127.0.0.1:{cache.daemon.port}", host)
        with closing(connect(cache.daemon.url)) as connection:
            connection.request("GET", target, headers={"Host": "ignored"})
            answer = connection.getresponse()
            assert (answer.status, answer.read()) == (200, image.manifest.data)
