"""The daemon's control socket: commands on the same store pull through it."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.internet.error import CannotListenError
from twisted.logger import LogEvent, LogLevel

from ociregistry.errors import Denied, ManifestUnknown
from ociregistry.names import Digest
from ociregistry.pullthrough.fetchers import DaemonFetcher
from ociregistry.pullthrough.loader import LoadStatus
from ociregistry.store.store import Store
from ociregistry.store.workdir import ControlSocket, find_daemon
from ociregistry.upstream.daemon_client import DaemonClient
from tests.unit.support.common import REACTOR, image, manifest, on_reactor, texts, turn, until
from tests.unit.support.daemon_upstreams import BUILT, LAYER, app, counts, here, start
from tests.unit.support.daemons import Daemons, get
from tests.unit.support.http_agents import INSTANCE
from tests.unit.support.loads import Loads
from tests.unit.support.wire import Network
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Hold


class ControlSocketClients:
    """Opens clients of daemons' control sockets."""

    def __init__(self) -> None:
        self._open: list[tuple[DaemonClient, ControlSocket]] = []

    def find(self, root: Path) -> DaemonClient:
        """Return a client of the daemon on the store."""
        control_socket = find_daemon(root)
        assert control_socket is not None
        self._open.append((DaemonClient(control_socket.path, INSTANCE, REACTOR), control_socket))
        return self._open[-1][0]

    async def close(self) -> None:
        """Close all connections."""
        while self._open:
            daemon_client, control_socket = self._open.pop()
            await daemon_client.stop()
            control_socket.close()


@pytest_twisted.async_yield_fixture
async def socket_clients() -> AsyncIterator[ControlSocketClients]:
    """Return a factory of control socket clients."""
    socket_clients = ControlSocketClients()
    yield socket_clients
    await socket_clients.close()


@on_reactor
async def test_commands_pull_through_control_socket(
    daemons: Daemons,
    root: Path,
    upstream: ScriptedRegistry,
    socket_clients: ControlSocketClients,
    events: list[LogEvent],
) -> None:
    upstream.add("team/app", BUILT, "1")
    start(daemons, upstream, "--no-complete-images", "--log-level", "info")
    found = root / "pulls" / "0" / "socket"
    assert stat.S_ISSOCK(found.stat().st_mode)
    # Only those with access to the store's credentials and files may use it.
    assert stat.S_IMODE(found.stat().st_mode) == 0o600
    daemon_client = socket_clients.find(root)
    assert await daemon_client.manifest(app(upstream)) == manifest(BUILT)
    for start_at in (0, 1000):
        body = await daemon_client.blob(app(upstream).repository, Digest(LAYER.digest), start_at)
        data = b""
        while piece := await body.read():
            data += piece
        assert data == LAYER.data[start_at:]
        await until(here(root, LAYER.digest).exists)
    assert counts(upstream) == {"/v2/team/app/manifests/1": 1, f"/v2/team/app/blobs/{LAYER.digest}": 1}
    # Their requests are logged like those of other clients.
    assert len([line for line in texts(events, LogLevel.info) if "/v2/team/app/" in line]) == 3


@on_reactor
async def test_failures_are_passed_on_to_commands(
    daemons: Daemons, root: Path, upstream: ScriptedRegistry, socket_clients: ControlSocketClients
) -> None:
    start(daemons, upstream, "--allow-upstreams", upstream.host)
    daemon_client = socket_clients.find(root)
    with pytest.raises(ManifestUnknown, match="404"):
        await daemon_client.manifest(app(upstream))
    with pytest.raises(Denied, match=r"^quay.io: the operator does not allow this upstream"):
        await daemon_client.manifest(image("quay.io/team/app:1"))


@on_reactor
async def test_image_is_loaded_with_one_request_per_object(
    daemons: Daemons, root: Path, upstream: ScriptedRegistry, socket_clients: ControlSocketClients
) -> None:
    upstream.add("team/app", BUILT, "1")
    start(daemons, upstream)
    # Like a command: a separate process with its own view of the store.
    store = Store(root, REACTOR, REACTOR)
    store.startService()
    try:
        loads = Loads(store, DaemonFetcher(store, socket_clients.find(root), 60.0, REACTOR, lambda upstream: None))
        (outcome,) = await loads.load(str(app(upstream)))
    finally:
        store.stopService()
    assert outcome.ended is LoadStatus.LOADED, outcome
    assert all(here(root, blob.digest).read_bytes() == blob.data for blob in BUILT.blobs)
    assert set(counts(upstream).values()) == {1}
    assert len(counts(upstream)) == 4


@on_reactor
async def test_control_socket_is_removed_at_shutdown(
    daemons: Daemons, root: Path, upstream: ScriptedRegistry
) -> None:
    start(daemons, upstream)
    daemons.stop()
    await until(daemons.stopped)
    assert find_daemon(root) is None
    assert not (root / "pulls" / "0" / "socket").exists()


@on_reactor
async def test_socket_of_a_killed_daemon_is_replaced(
    daemons: Daemons, root: Path, upstream: ScriptedRegistry, socket_clients: ControlSocketClients
) -> None:
    upstream.add("team/app", BUILT, "1")
    (root / "pulls" / "0").mkdir(parents=True)
    (root / "pulls" / "0" / "socket").touch()
    start(daemons, upstream)
    assert await socket_clients.find(root).manifest(app(upstream)) == manifest(BUILT)


@on_reactor
async def test_daemon_serves_without_control_socket(
    daemons: Daemons,
    root: Path,
    network: Network,
    upstream: ScriptedRegistry,
    events: list[LogEvent],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def listen(*args: Any, **kwargs: Any) -> Any:
        raise CannotListenError("", "socket", OSError(95, "Operation not supported"))

    monkeypatch.setattr(REACTOR, "listenUNIX", listen)
    start(daemons, upstream)
    monkeypatch.undo()
    assert texts(events, LogLevel.error) == [
        "control socket unavailable, commands cannot download through this daemon: [Errno 95] Operation not supported"
    ]
    assert (await get(network, events, "/health")).status == 200
    assert find_daemon(root) is None


@on_reactor
async def test_request_over_control_socket_is_answered_before_shutdown(
    daemons: Daemons, root: Path, upstream: ScriptedRegistry, socket_clients: ControlSocketClients
) -> None:
    upstream.add("team/app", BUILT, "1")
    hold = Hold()
    upstream.script("*", hold)
    start(daemons, upstream)
    asked = Deferred.fromCoroutine(socket_clients.find(root).manifest(app(upstream)))
    await until(hold.reached.is_set)
    stopped = daemons.stop()
    await turn()
    assert not stopped.called
    assert find_daemon(root) is None
    hold.release.set()
    assert await asked == manifest(BUILT)
    await until(daemons.stopped)
