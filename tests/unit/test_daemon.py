"""The daemon: startup, banner, serving, and graceful shutdown."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from twisted.application import service
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.internet.threads import deferToThread
from twisted.logger import ILogObserver, LogEvent, Logger, LogLevel
from twisted.scripts._twistd_unix import ServerOptions

from ociregistry import __version__
from ociregistry.errors import Unavailable
from ociregistry.log import ALWAYS
from ociregistry.tap import Options, makeService
from tests.images import make_image
from tests.unit.support.common import REACTOR, on_reactor, texts, turn, until
from tests.unit.support.daemons import Daemons, addresses, get, make
from tests.unit.support.wire import Network
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Hold

BUILT = make_image("daemon", layer_size=500_000)
LAYER = BUILT.layers[0]


@on_reactor
async def test_banner_lists_version_store_counts_and_addresses(
    daemons: Daemons, root: Path, events: list[LogEvent]
) -> None:
    daemons.start("--listen", "tcp:0:interface=127.0.0.1")
    (banner,) = [event for event in events if event.get("log_always")]
    (text,) = texts([banner])
    for word in (f"ociregistry {__version__}", str(root), "0 lists", "0 images", *addresses(events)):
        assert word in text
    assert len(set(addresses(events))) == 2


@on_reactor
async def test_freed_memory_is_kept(daemons: Daemons, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    monkeypatch.setattr("ociregistry.daemon.keep_freed_memory", lambda: kept.append(True))
    daemons.start()
    assert kept == [True]


@on_reactor
async def test_pull_through_the_daemon(
    root: Path, daemons: Daemons, network: Network, events: list[LogEvent], upstream: ScriptedRegistry
) -> None:
    upstream.add("team/app", BUILT, "1")
    daemons.start("--no-complete-images", "--log-level", "info", "--default-ns", upstream.host)
    health = await get(network, events, "/health")
    assert json.loads(await health.collect(1000))["version"] == __version__
    for _ in range(2):
        manifest = await get(network, events, "/v2/team/app/manifests/1")
        assert await manifest.collect(10_000) == BUILT.manifest.data
        blob = await get(network, events, f"/v2/team/app/blobs/{LAYER.digest}")
        assert await blob.collect(1_000_000) == LAYER.data
        # The last byte is sent before the blob is committed.
        await until((root / "blobs" / LAYER.digest.removeprefix("sha256:")).exists)
    assert [request.path for request in upstream.requests] == [
        "/v2/team/app/manifests/1",
        f"/v2/team/app/blobs/{LAYER.digest}",
    ]
    lines = texts(events, LogLevel.info)
    assert [line.rpartition(" ")[2] for line in lines if line.startswith("GET /v2/")] == [
        "miss",
        "miss",
        "hit",
        "hit",
    ]


@on_reactor
async def test_disallowed_upstream_is_denied(daemons: Daemons, network: Network, events: list[LogEvent]) -> None:
    daemons.start("--allow-upstreams", "quay.io")
    assert (await get(network, events, "/v2/team/app/manifests/1")).status == 403


@on_reactor
async def test_configured_scheme_is_used(
    daemons: Daemons, network: Network, events: list[LogEvent], upstream: ScriptedRegistry, tmp_path: Path
) -> None:
    (tmp_path / "it.yaml").write_text(f"- name: {upstream.host}\n  scheme: https\n")
    daemons.start("--default-ns", upstream.host, "--config-path", str(tmp_path / "it.yaml"))
    assert (await get(network, events, "/v2/team/app/manifests/1")).status == 503
    assert upstream.requests == ()


def startup_error(capfd: pytest.CaptureFixture[str], begin: Callable[[], object], events: list[LogEvent]) -> str:
    """Return the single log line of a daemon that fails to start with exit status 1."""
    with pytest.raises(SystemExit) as ended:
        begin()
    assert ended.value.code == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"ociregistry: {texts(events, LogLevel.error)[-1]}"
    return line


# Twisted 22.4 leaves the unbound socket to the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")
def test_port_in_use_ends_startup(root: Path, capfd: pytest.CaptureFixture[str], events: list[LogEvent]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"tcp:{taken.getsockname()[1]}:interface=127.0.0.1"
        daemon = make(root, "--listen", endpoint)
        line = startup_error(capfd, daemon.privilegedStartService, events)
    assert f"cannot listen on {endpoint}: " in line
    assert "in use" in line
    daemon._listeners.stopService()


# Twisted 22.4 leaves the unbound socket to the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("endpoint", "why"),
    [
        ("unix:/nowhere/at/all", "No such file or directory"),
        ("tcp:1:interface=8.8.8.8", "Cannot assign requested address"),
        ("ssl:1:certKey=/nowhere:privateKey=/nowhere", "No such file or directory"),
        ("systemd:domain=INET6:index=0", "systemd has passed no such socket: start the socket unit"),
    ],
)
def test_unusable_endpoint_ends_startup(
    root: Path, capfd: pytest.CaptureFixture[str], events: list[LogEvent], endpoint: str, why: str
) -> None:
    options = Options()
    options.parent = ServerOptions()
    options.parseOptions(["--image-path", str(root), "--listen", endpoint])
    daemon = makeService(options, REACTOR)
    line = startup_error(capfd, daemon.privilegedStartService, events)
    assert line == f"ociregistry: cannot listen on {endpoint}: {why}"


def test_unusable_store_ends_startup(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], events: list[LogEvent]
) -> None:
    (tmp_path / "file").touch()
    daemon = make(tmp_path / "file" / "store")
    assert f"cannot use the store {tmp_path}/file/store: Not a directory" in startup_error(
        capfd, daemon.startService, events
    )


@pytest.mark.parametrize("level", ["error", "info"])
def test_log_level_filters_twistd_log(root: Path, capsys: pytest.CaptureFixture[str], level: str) -> None:
    application = service.Application("ociregistry")
    make(root, "--log-level", level).setServiceParent(application)
    log = Logger(namespace="ociregistry", observer=ILogObserver(application))
    log.info("a request")
    log.info("the banner", **ALWAYS)
    log.error("a failure")
    told = [line.partition("] ")[2] for line in capsys.readouterr().out.splitlines()]
    assert told == (["the banner", "a failure"] if level == "error" else ["a request", "the banner", "a failure"])


def test_json_goes_to_the_log_of_twistd(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    application = service.Application("ociregistry")
    make(root, "--log-format", "json").setServiceParent(application)
    Logger(namespace="ociregistry.web", observer=ILogObserver(application)).error("{why}", why="a failure")
    told = json.loads(capsys.readouterr().out)
    assert (told["namespace"], told["message"], told["why"]) == ("ociregistry.web", "a failure", "a failure")


@pytest.mark.parametrize("elsewhere", ["syslog", "logger"])
def test_json_is_refused_where_it_cannot_be_written(
    root: Path, capfd: pytest.CaptureFixture[str], elsewhere: str
) -> None:
    options = Options()
    options.parent = ServerOptions()
    options.parent[elsewhere] = "x"
    options.parseOptions(["--image-path", str(root), "--log-format", "json"])
    with pytest.raises(SystemExit) as ended:
        makeService(options, REACTOR)
    assert ended.value.code == 2
    assert capfd.readouterr().err == (
        f"ociregistry: --log-format json: not with twistd's --{elsewhere}, only in a file or on the standard output\n"
    )


@on_reactor
async def test_request_in_flight_is_answered_before_shutdown(
    daemons: Daemons, network: Network, events: list[LogEvent], upstream: ScriptedRegistry
) -> None:
    upstream.add("team/app", BUILT, "1")
    hold = Hold()
    upstream.script("*", hold)
    daemons.start("--default-ns", upstream.host)
    asked = Deferred.fromCoroutine(get(network, events, "/v2/team/app/manifests/1"))
    await until(hold.reached.is_set)
    stopped = daemons.stop()
    await turn()
    with pytest.raises(Unavailable, match="refused"):
        await get(network, events, "/health")
    assert not stopped.called
    hold.release.set()
    assert await (await asked).collect(10_000) == BUILT.manifest.data
    await until(daemons.stopped)


@on_reactor
async def test_a_daemon_that_stops_is_alive_but_not_ready(
    daemons: Daemons, network: Network, events: list[LogEvent], upstream: ScriptedRegistry
) -> None:
    hold = Hold()
    upstream.script("*", hold)
    daemons.start("--default-ns", upstream.host)
    host, _, port = addresses(events)[0].partition(":")

    def probe(path: str) -> bytes:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
        return client.recv(10_000)

    with socket.create_connection((host, int(port))) as client:

        async def probes() -> list[bytes]:
            return [(await deferToThread(probe, path))[:12] for path in ("/livez", "/readyz")]

        assert await probes() == [b"HTTP/1.1 200", b"HTTP/1.1 200"]
        asked = Deferred.fromCoroutine(get(network, events, "/v2/team/app/manifests/1"))
        await until(hold.reached.is_set)
        daemons.stop()
        assert await probes() == [b"HTTP/1.1 200", b"HTTP/1.1 503"]
        hold.release.set()
        assert (await asked).status == 404
        await until(daemons.stopped)


@on_reactor
async def test_shutdown_waits_at_most_30_seconds(
    daemons: Daemons, network: Network, events: list[LogEvent], upstream: ScriptedRegistry, clock: Clock
) -> None:
    upstream.add("team/app", BUILT, "1")
    upstream.script("/v2/*/blobs/*", Hold(100_000))
    daemons.start("--default-ns", upstream.host)
    response = await get(network, events, f"/v2/team/app/blobs/{LAYER.digest}")
    assert await response.body.read()
    stopped = daemons.stop()
    # The 30 s begin once commands on the same store find the control socket closed.
    await turn()
    for _ in range(29):
        clock.advance(1)
        await turn()
    assert not stopped.called
    clock.advance(1)
    await until(daemons.stopped)
    assert "stopping with requests in flight after 30 s" in texts(events, LogLevel.warn)
    with pytest.raises(Unavailable):
        await response.collect(1_000_000)


@on_reactor
async def test_connections_are_flushed_and_closed_before_shutdown_ends(
    daemons: Daemons, events: list[LogEvent]
) -> None:
    """What a transport has not sent when the reactor stops is lost."""
    daemon = daemons.start()
    host, _, port = addresses(events)[0].partition(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"GET /v2/ HTTP/1.1\r\nHost: cache\r\n\r\n")
        connections = daemon._site.in_flight._connections
        await until(lambda: connections)
        daemons.stop()
        await until(daemons.stopped)
        assert not connections
        client.settimeout(10)
        received = b"".join(iter(lambda: client.recv(65536), b""))
    assert received.startswith(b"HTTP/1.1 200 ")
    assert received.endswith(b"{}")
