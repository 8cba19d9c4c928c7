"""Clients without `ns`: skopeo, with the upstream in the path or left out, and a Docker engine."""

from __future__ import annotations

import hashlib
import http.client
import socket
import ssl
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest

from tests.client import Response, connect
from tests.images import DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, Blob, Index, make_index
from tests.peers import DockerRegistry
from tests.processes import Daemon
from tests.real.completions import wait_complete

# The media types that a Docker engine accepts, each on a separate line.
_ACCEPT = (
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
    "application/json",
    DOCKER_MANIFEST,
    DOCKER_LIST,
    OCI_INDEX,
    OCI_MANIFEST,
)
_RESUME_AT = 700

Skopeo = Callable[..., None]
StartDaemon = Callable[..., Daemon]


@pytest.fixture(params=[False, True], ids=["oci", "docker"])
def index(request: pytest.FixtureRequest) -> Index:
    """An OCI index or a Docker list."""
    return make_index("clients", docker=request.param)


def test_skopeo_with_the_upstream_in_the_path(
    portless_registry: DockerRegistry, start_daemon: StartDaemon, skopeo: Skopeo, index: Index, tmp_path: Path
) -> None:
    """skopeo copies the whole index, and again without the registry; the copies have the same digests."""
    registry = portless_registry  # skopeo's grammar does not allow `:` in a path.
    registry.push("team/app", index, "v1")
    daemon = start_daemon({registry.host: "http"})
    ref = f"{daemon.host}/{registry.host}/team/app:v1"
    skopeo(ref, f"dir:{tmp_path}/first", "--all")
    _assert_copied(tmp_path / "first", index)
    assert f"pulling manifest from upstream: {registry.host}/team/app:v1" in daemon.log
    _assert_fetched_once(registry, "team/app", *index.blobs)
    registry.kill()
    skopeo(ref, f"dir:{tmp_path}/again", "--all")
    _assert_copied(tmp_path / "again", index)


def test_skopeo_with_default_ns(
    registry: DockerRegistry, start_daemon: StartDaemon, skopeo: Skopeo, index: Index, tmp_path: Path
) -> None:
    """The same for a name without an upstream."""
    registry.push("team/app", index, "v1")
    daemon = start_daemon({registry.host: "http"}, "--default-ns", registry.host)
    skopeo(f"{daemon.host}/team/app:v1", f"dir:{tmp_path}/first", "--all")
    _assert_copied(tmp_path / "first", index)
    _assert_fetched_once(registry, "team/app", *index.blobs)
    registry.kill()
    skopeo(f"{daemon.host}/team/app:v1", f"dir:{tmp_path}/again", "--all")
    _assert_copied(tmp_path / "again", index)


def _assert_copied(folder: Path, index: Index) -> None:
    """Assert that the folder's manifest is the index, and that all its content is there."""
    copied = {file.name: f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}" for file in folder.iterdir()}
    assert copied.pop("manifest.json") == index.manifest.digest
    del copied["version"]
    assert set(copied.values()) == {
        *(image.manifest.digest for image in index.images),
        *(blob.digest for blob in index.blobs),
    }


def _assert_fetched_once(registry: DockerRegistry, repository: str, *blobs: Blob) -> None:
    """Assert that the registry sent each of these blobs once, and no other."""
    paths = f"/v2/{repository}/blobs/"
    sent = [line.path for line in registry.requests if line.method == "GET" and line.path.startswith(paths)]
    assert sorted(sent) == sorted(f"{paths}{blob.digest}" for blob in blobs)


def test_tls_hello_is_refused_at_once(start_daemon: StartDaemon) -> None:
    """skopeo tries TLS first, and a silent server would cost its handshake time-out of 10 s at each copy."""
    daemon = start_daemon()
    with socket.create_connection(("127.0.0.1", daemon.port), timeout=5) as connection:
        connection.sendall(_hello())
        with connection.makefile("rb") as answer:
            assert answer.read().startswith(b"HTTP/1.1 400 ")


def _hello() -> bytes:
    """Return the first bytes of a TLS client."""
    hello = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), hello, server_hostname="localhost")
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return hello.read()


def test_docker_engine_with_registry_mirrors(
    registry: DockerRegistry, start_daemon: StartDaemon, index: Index
) -> None:
    """The engine's pull succeeds, also when the registry is gone.

    Of the other platform the manifest and the config are stored.
    """
    registry.push("library/app", index, "v1")
    daemon = start_daemon({registry.host: "http"}, "--default-ns", registry.host)
    _pull_as_docker_does(daemon, index)
    image, other = index.images
    wait_complete(daemon, [*image.blobs, other.config])
    _assert_fetched_once(registry, "library/app", *image.blobs, other.config)
    registry.kill()
    _pull_as_docker_does(daemon, index)


def _pull_as_docker_does(daemon: Daemon, index: Index) -> None:
    """Send the requests of the classic image store, over one connection."""
    image = index.images[0]
    app = "/v2/library/app"
    with closing(connect(daemon.url)) as connection:
        ping = _ask(connection, "GET", "/v2/")
        assert ping.status == 200
        assert ping.headers["Docker-Distribution-API-Version"] == "registry/2.0"
        assert ping.headers["WWW-Authenticate"] is None

        resolved = _ask(connection, "HEAD", f"{app}/manifests/v1", accept=_ACCEPT)
        _assert_is(resolved, index.manifest.data, index.manifest.digest, index.manifest.media_type, head=True)
        for manifest in (index.manifest, image.manifest):
            answer = _ask(connection, "GET", f"{app}/manifests/{manifest.digest}", accept=_ACCEPT)
            _assert_is(answer, manifest.data, manifest.digest, manifest.media_type)
        for blob in image.blobs:
            answer = _ask(connection, "GET", f"{app}/blobs/{blob.digest}")
            _assert_is(answer, blob.data, blob.digest, "application/octet-stream")

        layer = image.layers[0]
        size = len(layer.data)
        resumed = _ask(connection, "GET", f"{app}/blobs/{layer.digest}", range_=f"bytes={_RESUME_AT}-")
        _assert_is(resumed, layer.data[_RESUME_AT:], layer.digest, "application/octet-stream", status=206)
        assert resumed.headers["Content-Range"] == f"bytes {_RESUME_AT}-{size - 1}/{size}"


def _ask(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    *,
    accept: tuple[str, ...] = (),
    range_: str | None = None,
) -> Response:
    """Send one request as Docker spells it: no ns, and a line for each accepted media type."""
    connection.putrequest(method, path, skip_accept_encoding=True)
    connection.putheader("User-Agent", "docker/28.0 go/go1.24 UpstreamClient(docker-pull)")
    connection.putheader("Accept-Encoding", "identity")
    for media_type in accept:
        connection.putheader("Accept", media_type)
    if range_ is not None:
        connection.putheader("Range", range_)
    connection.endheaders()
    with connection.getresponse() as answer:
        return Response(answer.status, answer.headers, answer.read())


def _assert_is(
    answer: Response, data: bytes, digest: str, media_type: str, *, head: bool = False, status: int = 200
) -> None:
    """Assert that the answer has this content, and correct headers, each once."""
    assert answer.status == status
    assert answer.body == (b"" if head else data)
    assert answer.headers.get_all("Content-Type") == [media_type]
    assert answer.headers.get_all("Content-Length") == [str(len(data))]
    assert answer.headers.get_all("Docker-Content-Digest") == [digest]
    assert answer.headers["Content-Encoding"] is None
