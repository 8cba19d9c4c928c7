"""The daemon over TLS: same content, optional client certificates, reloaded certificates."""

from __future__ import annotations

import json
import ssl
from pathlib import Path

import pytest
from twisted.internet.task import Clock
from twisted.internet.threads import deferToThreadPool
from twisted.logger import LogEvent, LogLevel

from ociregistry import __version__
from ociregistry.config.tls import UpstreamTls
from ociregistry.errors import Unavailable
from ociregistry.openssl import Certificates, KeyPair
from ociregistry.upstream.http import Response
from ociregistry.upstream.tls import ContextCache, UpstreamPolicy
from tests.certificates import Authority
from tests.images import make_image
from tests.unit.support.common import REACTOR, on_reactor, texts, until
from tests.unit.support.daemons import Daemons, addresses, get
from tests.unit.support.wire import Network
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Hold

BUILT = make_image("tls", layer_size=3_000_000)
LAYER = BUILT.layers[0]
HOST = "127.0.0.1"


@pytest.fixture
def path(tmp_path: Path, authority: Authority) -> Path:
    """Return the path of a configuration file with TLS."""
    authority.issue(HOST)
    path = tmp_path / "ociregistry.yaml"
    path.write_text(f"tls: {{cert: {HOST}.crt, key: {HOST}.key}}\n")
    return path


class Client:
    """A TLS client of the daemon, with an optional certificate of its own."""

    def __init__(
        self, network: Network, events: list[LogEvent], trust: Authority, own: tuple[Path, Path] | None = None
    ) -> None:
        ca = Certificates(trust.ca, (trust.ca.read_bytes(),))
        identity = KeyPair(Certificates(own[0], (own[0].read_bytes(),)), own[1].read_bytes()) if own else None
        self._address = addresses(events)[0]
        host, _, port = self._address.rpartition(":")
        policy = UpstreamPolicy(UpstreamTls(ca, identity), (host, int(port)), ContextCache())
        self._http = network.http("daemon", policy=policy)

    async def get(self, path: str) -> Response:
        """Send a GET request."""
        return await self._http.send("GET", f"https://{self._address}{path}", {})


@on_reactor
async def test_pull_over_tls(
    root: Path,
    daemons: Daemons,
    network: Network,
    events: list[LogEvent],
    upstream: ScriptedRegistry,
    path: Path,
    authority: Authority,
) -> None:
    upstream.add("team/app", BUILT, "1")
    daemons.start(
        "--no-complete-images", "--log-level", "info", "--default-ns", upstream.host, "--config-path", str(path)
    )
    client = Client(network, events, authority)
    health = await client.get("/health")
    assert json.loads(await health.collect(1000))["version"] == __version__
    for _ in range(2):
        manifest = await client.get("/v2/team/app/manifests/1")
        assert await manifest.collect(10_000) == BUILT.manifest.data
        blob = await client.get(f"/v2/team/app/blobs/{LAYER.digest}")
        assert await blob.collect(10_000_000) == LAYER.data
        # The last byte is sent before the blob is committed.
        await until((root / "blobs" / LAYER.digest.removeprefix("sha256:")).exists)
    outcomes = [text.rpartition(" ")[2] for text in texts(events, LogLevel.info) if text.startswith("GET /v2/")]
    assert outcomes == ["miss", "miss", "hit", "hit"]


@on_reactor
async def test_every_listener_speaks_tls(
    daemons: Daemons, network: Network, events: list[LogEvent], path: Path, authority: Authority
) -> None:
    daemons.start("--config-path", str(path), "--listen", f"tcp:0:interface={HOST}")
    assert len(addresses(events)) == 2
    for address in addresses(events):
        http = network.http("daemon", trust=authority.ca)
        assert (await http.send("GET", f"https://{address}/health", {})).status == 200


@on_reactor
async def test_plain_http_is_refused(daemons: Daemons, network: Network, events: list[LogEvent], path: Path) -> None:
    daemons.start("--config-path", str(path))
    with pytest.raises(Unavailable):
        await get(network, events, "/health")
    assert texts(events, LogLevel.error) == []


@on_reactor
async def test_client_that_rejects_our_certificate_causes_no_log_line(
    daemons: Daemons, network: Network, events: list[LogEvent], path: Path, tmp_path: Path
) -> None:
    daemons.start("--config-path", str(path))
    with pytest.raises(Unavailable, match="its issuer is not trusted"):
        await Client(network, events, Authority(tmp_path / "other", "other")).get("/health")
    assert texts(events, LogLevel.error) == []


@on_reactor
async def test_client_certificate_is_required_with_client_ca(
    daemons: Daemons, network: Network, events: list[LogEvent], path: Path, authority: Authority, tmp_path: Path
) -> None:
    clients, strangers = (Authority(tmp_path / name, name) for name in ("clients", "strangers"))
    path.write_text(f"tls: {{cert: {HOST}.crt, key: {HOST}.key, client_ca: {clients.ca}}}\n")
    daemons.start("--log-level", "info", "--config-path", str(path))
    right = Client(network, events, authority, clients.issue("client"))
    assert (await right.get("/health")).status == 200
    for own in (None, strangers.issue("client"), authority.issue("client")):
        with pytest.raises(Unavailable):
            await Client(network, events, authority, own).get("/health")
    assert sum(text.startswith("GET /health ") for text in texts(events, LogLevel.info)) == 1
    assert texts(events, LogLevel.error) == []


@on_reactor
async def test_truncated_response_over_tls(
    daemons: Daemons,
    network: Network,
    events: list[LogEvent],
    upstream: ScriptedRegistry,
    path: Path,
    authority: Authority,
    clock: Clock,
) -> None:
    upstream.add("team/app", BUILT, "1")
    upstream.script("/v2/*/blobs/*", Hold(100_000))
    daemons.start("--default-ns", upstream.host, "--config-path", str(path), "--pull-timeout", "1000")
    client = Client(network, events, authority)
    response = await client.get(f"/v2/team/app/blobs/{LAYER.digest}")
    data = await response.body.read()
    while len(data) < 100_000:
        data += await response.body.read()
    clock.advance(1)
    await until(lambda: any("response truncated" in text for text in texts(events, LogLevel.error)))
    with pytest.raises(Unavailable):
        await response.body.read()
    assert LAYER.data.startswith(data)


async def server_certificate(events: list[LogEvent]) -> str:
    """Return the certificate shown to a new client."""
    host, _, port = addresses(events)[0].rpartition(":")
    asked = deferToThreadPool(REACTOR, REACTOR.getThreadPool(), ssl.get_server_certificate, (host, int(port)))
    return str(await asked)


@on_reactor
async def test_renewed_certificate_is_used_after_reload(
    daemons: Daemons, events: list[LogEvent], path: Path, authority: Authority
) -> None:
    old = path.with_name(f"{HOST}.crt").read_text()
    daemon = daemons.start("--config-path", str(path))
    assert await server_certificate(events) == old
    new = authority.issue(HOST)[0].read_text()
    assert await server_certificate(events) == old
    await daemon.reload()
    assert await server_certificate(events) == new
    assert texts(events, LogLevel.warn) == []
    # A change that needs a restart is a warning; TLS stays on.
    path.write_text("")
    await daemon.reload()
    assert await server_certificate(events) == new
    assert texts(events, LogLevel.warn) == ["tls: changes take effect at the next start"]
