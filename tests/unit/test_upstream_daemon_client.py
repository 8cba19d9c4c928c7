"""The client of a running daemon: requests over its control socket, and errors."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.web.http import Request
from twisted.web.server import NOT_DONE_YET, Site

from ociregistry import __version__
from ociregistry.errors import BlobUnknown, Denied, ManifestUnknown, RegistryError, Unavailable
from ociregistry.manifests import LARGEST_MANIFEST, OCI_INDEX
from ociregistry.names import Digest
from ociregistry.store.workdir import ControlSocket
from ociregistry.upstream.daemon_client import DaemonClient
from tests.images import make_image
from tests.unit.support.common import REACTOR, image, manifest, on_reactor, until
from tests.unit.support.http_agents import INSTANCE
from tests.unit.support.loads import image_of, index_of

BUILT = make_image("over the socket")
IMAGE = manifest(BUILT)
APP = image("reg.example:5000/team/app:1")
BLOB = Digest.of(b"0123456789")


class _Answering:
    """Resource with the scripted answers in order."""

    isLeaf = True

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def render(self, request: Any) -> bytes | int:
        daemon = self._daemon
        line = f"{request.method.decode()} {request.uri.decode()}"
        daemon.asked.append((line, request.getHeader("range"), request.getHeader("host")))
        daemon.open.append(request)
        if daemon.give is None:
            return NOT_DONE_YET
        status, body, headers = daemon.give
        request.setResponseCode(status)
        for name, value in headers.items():
            request.setHeader(name, value)
        request.setHeader("Content-Length", str(len(body)))
        return body


class _Site(Site):
    def __init__(self, answering: _Answering) -> None:
        super().__init__(answering)
        self.connections = 0
        self.lost = 0

    def getResourceFor(self, request: Request) -> Any:
        return self.resource

    def buildProtocol(self, addr: Any) -> Any:
        self.connections += 1
        protocol: Any = super().buildProtocol(addr)
        lost = protocol.connectionLost

        def count(reason: Any) -> None:
            self.lost += 1
            lost(reason)

        protocol.connectionLost = count
        return protocol


class Daemon:
    """Listens on a socket and gives the answers of the test."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.asked: list[tuple[str, str | None, str | None]] = []
        self.open: list[Any] = []
        self.give: tuple[int, bytes, dict[str, str]] | None = (200, b"", {})
        self.control_socket = ControlSocket(folder)
        self.site = _Site(_Answering(self))
        self._port = REACTOR.listenUNIX(self.control_socket.path, self.site, mode=0o600)
        self.daemon_client = DaemonClient(self.control_socket.path, INSTANCE, REACTOR)

    async def stop(self) -> None:
        """Stop listening and close all connections."""
        await self.daemon_client.stop()
        await self._port.stopListening()
        self.control_socket.close()


@pytest_twisted.async_yield_fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    """Return a daemon at a path longer than a socket address."""
    daemon = Daemon(tmp_path / ("long" * 30) / "pulls" / "0")
    yield daemon
    await daemon.stop()


def error(message: object) -> bytes:
    """Return the body of an error response."""
    return json.dumps({"errors": [{"code": "ANY", "message": message, "detail": {}}]}).encode()


@on_reactor
async def test_manifest(daemon: Daemon) -> None:
    for url, reference in ((str(APP), "1"), (f"{APP.repository}@{IMAGE.digest}", IMAGE.digest)):
        daemon.give = (200, IMAGE.data, {"Content-Type": IMAGE.media_type})
        assert await daemon.daemon_client.manifest(image(url)) == IMAGE
        line = f"GET /v2/team/app/manifests/{reference}?ns=reg.example%3A5000"
        assert daemon.asked.pop() == (line, None, "localhost")


@pytest.mark.parametrize("name", ["docker.io/library/nginx:1", "[::1]:5000/app:1", "singleword:80/app:1"])
@on_reactor
async def test_manifest_of_any_upstream(daemon: Daemon, name: str) -> None:
    daemon.give = (200, IMAGE.data, {"Content-Type": IMAGE.media_type})
    assert await daemon.daemon_client.manifest(image(name)) == IMAGE
    upstream = image(name).repository.upstream.name
    quoted = upstream.replace("[", "%5B").replace("]", "%5D").replace(":", "%3A")
    assert daemon.asked[0][0].endswith(f"?ns={quoted}")


@pytest.mark.parametrize("kind", ["manifest", "referrers", "blob"])
@on_reactor
async def test_user_agent(daemon: Daemon, kind: str) -> None:
    daemon.give = (503, b"", {})
    with pytest.raises(Unavailable):
        await ask(daemon, kind)
    assert daemon.open[0].requestHeaders.getRawHeaders("User-Agent") == [f"ociregistry/{__version__}"]


@on_reactor
async def test_referrers(daemon: Daemon) -> None:
    index = index_of((image_of(b"{}"), ""))
    daemon.give = (200, index.data, {"Content-Type": OCI_INDEX})
    assert await daemon.daemon_client.referrers(APP.repository, IMAGE.digest) == index
    assert daemon.asked[0][0] == f"GET /v2/team/app/referrers/{IMAGE.digest}?ns=reg.example%3A5000"


@pytest.mark.parametrize(("start", "asked"), [(0, None), (4, "bytes=4-")])
@on_reactor
async def test_blob_from_offset(daemon: Daemon, start: int, asked: str | None) -> None:
    daemon.give = (206 if start else 200, b"0123456789"[start:], {})
    body = await daemon.daemon_client.blob(APP.repository, BLOB, start)
    data = b""
    while piece := await body.read():
        data += piece
    assert data == b"0123456789"[start:]
    assert daemon.asked == [(f"GET /v2/team/app/blobs/{BLOB}?ns=reg.example%3A5000", asked, "localhost")]


@on_reactor
async def test_empty_blob(daemon: Daemon) -> None:
    body = await daemon.daemon_client.blob(APP.repository, Digest.of(b""), 0)
    assert await body.read() == b""


def ask(daemon: Daemon, kind: str) -> Deferred[Any]:
    """Send a request of this kind."""
    daemon_client = daemon.daemon_client
    asks: dict[str, Any] = {
        "manifest": lambda: daemon_client.manifest(APP),
        "referrers": lambda: daemon_client.referrers(APP.repository, IMAGE.digest),
        "blob": lambda: daemon_client.blob(APP.repository, BLOB, 0),
    }
    return Deferred.fromCoroutine(asks[kind]())


KINDS = ("manifest", "referrers", "blob")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("status", [404, 403, 503, 500, 405, 416, 302])
@on_reactor
async def test_daemon_error_is_passed_on(daemon: Daemon, kind: str, status: int) -> None:
    unknown = BlobUnknown if kind == "blob" else ManifestUnknown
    kinds: dict[int, type[RegistryError]] = {404: unknown, 403: Denied}
    daemon.give = (status, error("reg.example:5000: the reason, in its own w\u00f6rds"), {"Location": "/elsewhere"})
    with pytest.raises(RegistryError) as failed:
        await ask(daemon, kind)
    assert type(failed.value) is kinds.get(status, Unavailable)
    assert failed.value.message == "reg.example:5000: the reason, in its own w\u00f6rds"
    assert len(daemon.asked) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not JSON",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"null",
        b'{"errors": null}',
        b'{"errors": []}',
        b'{"errors": {"0": 1}}',
        b'{"errors": ["text"]}',
        b'{"errors": [{}]}',
        b"[" * 60_000,
        error(""),
    ],
)
@on_reactor
async def test_error_without_message_names_the_status(daemon: Daemon, body: bytes) -> None:
    daemon.give = (502, body, {})
    with pytest.raises(Unavailable) as failed:
        await ask(daemon, "manifest")
    assert failed.value.message == "the daemon answered 502"


@on_reactor
async def test_endless_error_body(daemon: Daemon) -> None:
    daemon.give = (502, error("x" * 100_000), {})
    with pytest.raises(Unavailable, match=r"^the daemon: a response is longer than 65536 bytes$"):
        await ask(daemon, "manifest")


@pytest.mark.parametrize("kind", ["manifest", "referrers"])
@pytest.mark.parametrize(
    ("data", "media_type", "why"),
    [
        (b"", OCI_INDEX, "not JSON"),
        (b"{}", OCI_INDEX, "schemaVersion"),
        (IMAGE.data, "text/plain", "Content-Type"),
        (IMAGE.data[:-10], IMAGE.media_type, "not JSON"),
        (b"x" * (LARGEST_MANIFEST + 1), OCI_INDEX, "longer than"),
    ],
)
@on_reactor
async def test_malformed_manifest(daemon: Daemon, kind: str, data: bytes, media_type: str, why: str) -> None:
    daemon.give = (200, data, {"Content-Type": media_type})
    with pytest.raises(Unavailable, match=why):
        await ask(daemon, kind)


@on_reactor
async def test_truncated_response(daemon: Daemon) -> None:
    daemon.give = None
    asked = ask(daemon, "blob")
    await until(lambda: daemon.open)
    request = daemon.open[0]
    request.setHeader("Content-Length", "10")
    request.write(b"01234")
    body = await asked
    assert await body.read() == b"01234"
    request.channel.loseConnection()
    with pytest.raises(Unavailable, match=r"^the daemon: "):
        await body.read()


@on_reactor
async def test_stopped_daemon(tmp_path: Path) -> None:
    (tmp_path / "pulls").mkdir()
    control_socket = ControlSocket(tmp_path / "pulls")
    daemon_client = DaemonClient(control_socket.path, INSTANCE, REACTOR)
    for _ in range(2):
        with pytest.raises(Unavailable, match=r"^the daemon: "):
            await daemon_client.manifest(APP)
    await daemon_client.stop()
    control_socket.close()


@on_reactor
async def test_connection_is_reused_until_stop(daemon: Daemon) -> None:
    daemon.give = (200, IMAGE.data, {"Content-Type": IMAGE.media_type})
    for _ in range(3):
        await daemon.daemon_client.manifest(APP)
    assert (daemon.site.connections, daemon.site.lost) == (1, 0)
    await daemon.daemon_client.stop()
    await until(lambda: daemon.site.lost == 1)


@on_reactor
async def test_concurrent_requests_use_separate_connections(daemon: Daemon) -> None:
    daemon.give = None
    asked = [ask(daemon, "manifest") for _ in range(20)]
    await until(lambda: len(daemon.open) == 20)
    for request in daemon.open:
        request.setHeader("Content-Type", IMAGE.media_type)
        request.write(IMAGE.data)
        request.finish()
    assert [await one for one in asked] == [IMAGE] * 20
    assert daemon.site.connections == 20
