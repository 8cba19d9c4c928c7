"""The daemon's own TLS: `tls` in the file, and Twisted's `ssl:` endpoint."""

from __future__ import annotations

import http.client
import json
import os
import signal
import ssl
from contextlib import closing
from pathlib import Path

import pytest

from tests.certificates import Authority
from tests.client import ask, connect, fetch
from tests.images import Image, make_image
from tests.peers import Containerd
from tests.processes import Daemon, free_port, wait_until
from tests.real.caches import SOON
from tests.upstream import ScriptedRegistry


class SecureDaemon(Daemon):
    """A daemon that speaks TLS; `context` is that of an admitted client."""

    def __init__(self, folder: Path, context: ssl.SSLContext, *arguments: object, **keywords: object) -> None:
        super().__init__(folder, *arguments, **keywords)  # type: ignore[arg-type]  # passed on unchanged
        self.url = f"https://{self.host}"
        self.context = context

    def ready(self) -> bool:
        """Whether its health is good."""
        try:
            return fetch(f"{self.url}/health", tls=self.context).status == 200
        except OSError:
            return False


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """An authority that signs for the daemon and for clients."""
    (tmp_path / "authority").mkdir()
    return Authority(tmp_path / "authority")


@pytest.fixture
def image(upstream: ScriptedRegistry) -> Image:
    """An image at the upstream."""
    image = make_image("served over TLS", layer_size=300_000)
    upstream.add("team/app", image, "1")
    return image


def assert_pulls(daemon: SecureDaemon, upstream: ScriptedRegistry, image: Image) -> None:
    """Assert that a client gets the image, twice, and a part of it."""
    base = f"{daemon.url}/v2/team/app"
    for _ in range(2):
        assert fetch(f"{base}/manifests/1?ns={upstream.host}", tls=daemon.context).body == image.manifest.data
        for blob in image.blobs:
            url = f"{base}/blobs/{blob.digest}?ns={upstream.host}"
            assert fetch(url, tls=daemon.context).body == blob.data
            part = fetch(url, tls=daemon.context, headers={"Range": "bytes=10-"})
            assert (part.status, part.body) == (206, blob.data[10:])


def identity(authority: Authority, **more: object) -> dict[str, object]:
    """The daemon's `tls` section."""
    certificate, key = authority.issue("127.0.0.1")
    return {"tls": {"cert": str(certificate), "key": str(key), **more}}


def test_tls_without_client_certificates(
    tmp_path: Path, authority: Authority, upstream: ScriptedRegistry, image: Image
) -> None:
    context = authority.client_context()
    with SecureDaemon(tmp_path, context, {upstream.host: "http"}, settings=identity(authority)) as daemon:
        assert_pulls(daemon, upstream, image)
        with pytest.raises((OSError, http.client.HTTPException)):
            fetch(f"http://{daemon.host}/health")
        assert "Traceback" not in daemon.log


def test_ssl_endpoint(tmp_path: Path, authority: Authority, upstream: ScriptedRegistry, image: Image) -> None:
    certificate, key = authority.issue("127.0.0.1")
    port = free_port()
    endpoint = f"ssl:{port}:certKey={certificate}:privateKey={key}:interface=127.0.0.1"
    registries = {upstream.host: "http"}
    context = authority.client_context()
    with SecureDaemon(tmp_path, context, registries, "--listen", endpoint, port=port) as daemon:
        assert_pulls(daemon, upstream, image)


def test_client_certificate_is_required(
    tmp_path: Path, authority: Authority, upstream: ScriptedRegistry, image: Image
) -> None:
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other", "another authority")
    contexts = {}
    for who, issuer in (("right", authority), ("wrong", other), ("none", None)):
        contexts[who] = authority.client_context()
        if issuer is not None:
            contexts[who].load_cert_chain(*issuer.issue(f"{who}.example"))
    settings = identity(authority, client_ca=str(authority.ca))
    with SecureDaemon(tmp_path, contexts["right"], {upstream.host: "http"}, settings=settings) as daemon:
        assert_pulls(daemon, upstream, image)
        for who in ("wrong", "none"):
            with pytest.raises((OSError, http.client.HTTPException)):
                fetch(f"{daemon.url}/health", tls=contexts[who])
        assert "Traceback" not in daemon.log


def test_renewed_certificate_is_served_after_sighup(tmp_path: Path, authority: Authority) -> None:
    """The daemon keeps running; a damaged certificate changes nothing."""
    settings = identity(authority)
    with SecureDaemon(tmp_path, authority.client_context(), settings=settings) as daemon:
        address = ("127.0.0.1", daemon.port)
        first = ssl.get_server_certificate(address)
        _, key = authority.issue("127.0.0.1")  # replaces the old files
        os.kill(daemon.process.pid, signal.SIGHUP)
        wait_until(lambda: ssl.get_server_certificate(address) != first, SOON, "the new certificate")
        second = ssl.get_server_certificate(address)
        key.write_bytes(b"damaged")
        os.kill(daemon.process.pid, signal.SIGHUP)
        wait_until(lambda: "reload failed, settings unchanged" in daemon.log, SOON, "the refusal")
        assert ssl.get_server_certificate(address) == second
        assert json.loads(fetch(f"{daemon.url}/health", tls=daemon.context).body)["status"] == "ok"


def test_renewed_certificate_is_served_without_a_signal(tmp_path: Path, authority: Authority) -> None:
    """A connection that is open goes on."""
    settings = identity(authority)
    with SecureDaemon(tmp_path, authority.client_context(), settings=settings) as daemon:
        address = ("127.0.0.1", daemon.port)
        first = ssl.get_server_certificate(address)
        with closing(connect(daemon.url, tls=daemon.context)) as opened:
            assert ask(opened, f"{daemon.url}/livez").status == 200
            authority.issue("127.0.0.1")  # replaces the old files
            wait_until(lambda: ssl.get_server_certificate(address) != first, 3 * SOON, "the new certificate")
            assert ask(opened, f"{daemon.url}/livez").status == 200
        assert fetch(f"{daemon.url}/livez", tls=daemon.context).status == 200


def test_containerd_pulls_over_mutual_tls(
    tmp_path: Path, authority: Authority, upstream: ScriptedRegistry, containerd: Containerd
) -> None:
    image = make_image("mutual TLS for containerd")
    upstream.add("team/mutual", image, "v1")
    certificate, key = authority.issue("node.example")
    context = authority.client_context()
    context.load_cert_chain(certificate, key)
    settings = identity(authority, client_ca=str(authority.ca))
    with SecureDaemon(tmp_path, context, {upstream.host: "http"}, settings=settings) as daemon:
        hosts = tmp_path / "hosts" / upstream.host
        hosts.mkdir(parents=True)
        (hosts / "hosts.toml").write_text(
            f'server = "http://127.0.0.1:1"\n[host."{daemon.url}"]\ncapabilities = ["pull", "resolve"]\n'
            f'ca = "{authority.ca}"\nclient = [["{certificate}", "{key}"]]\n'
        )
        done = containerd.pull(f"{upstream.host}/team/mutual:v1", tmp_path / "hosts")
        assert done.returncode == 0, done.stderr
        assert {blob.digest for blob in image.blobs} <= containerd.content
