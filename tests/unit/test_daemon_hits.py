"""Hits by the short way in a daemon: reloads and scheduled maintenance leave no stale answer."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from twisted.internet.task import Clock
from twisted.logger import LogEvent

from tests.images import make_image
from tests.unit.support.common import on_reactor, texts, until
from tests.unit.support.daemon_upstreams import BUILT, LAYER
from tests.unit.support.daemons import Daemons, get
from tests.unit.support.stores import open_blobs
from tests.unit.support.wire import Network
from tests.upstream import ScriptedRegistry

OTHER = make_image("of the other upstream")
MANIFEST = "/v2/team/app/manifests/1"
BLOB = f"/v2/team/app/blobs/{LAYER.digest}"
DAY = 86_400


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of the configuration file."""
    return tmp_path / "ociregistry.yaml"


class Client:
    """A client of the daemon."""

    def __init__(self, network: Network, events: list[LogEvent]) -> None:
        self._network = network
        self._events = events

    async def get(self, target: str) -> tuple[int, bytes]:
        """Send a request; return the status and body of the answer."""
        response = await get(self._network, self._events, target)
        return response.status, await response.collect(1_000_000)

    @property
    def by_the_usual_way(self) -> int:
        """The number of hits that have taken the usual way."""
        return sum(" from cache: " in text for text in texts(self._events))

    async def remembers(self, *targets: str) -> None:
        """Request these until they take the short way."""
        for target in targets:
            for _ in range(2):
                assert (await self.get(target))[0] == 200
            before = self.by_the_usual_way
            assert (await self.get(target))[0] == 200
            assert self.by_the_usual_way == before


@pytest.fixture
def client(network: Network, events: list[LogEvent]) -> Client:
    """Return a client of the only daemon."""
    return Client(network, events)


@on_reactor
async def test_reload_of_default_ns(daemons: Daemons, client: Client, upstream: ScriptedRegistry, path: Path) -> None:
    upstream.add("team/app", BUILT, "1")
    with ScriptedRegistry() as other:
        other.add("team/app", OTHER, "1")
        path.write_text(f"default_ns: {upstream.host}\n")
        daemon = daemons.start("--no-complete-images", "--config-path", str(path))
        await client.remembers(MANIFEST)
        path.write_text(f"default_ns: {other.host}\n")
        await daemon.reload()
        assert await client.get(MANIFEST) == (200, OTHER.manifest.data)


@on_reactor
async def test_reload_of_allow_upstreams(
    daemons: Daemons, client: Client, upstream: ScriptedRegistry, path: Path, root: Path
) -> None:
    upstream.add("team/app", BUILT, "1")
    path.write_text("allow_upstreams: '127.*'\n")
    daemon = daemons.start("--no-complete-images", "--default-ns", upstream.host, "--config-path", str(path))
    await client.get(BLOB)
    await until((root / "blobs" / LAYER.digest.removeprefix("sha256:")).exists)
    await client.remembers(MANIFEST, BLOB)
    path.write_text("allow_upstreams: quay.io\n")
    await daemon.reload()
    assert [(await client.get(target))[0] for target in (MANIFEST, BLOB)] == [403, 403]


@on_reactor
async def test_reload_that_changes_nothing(
    daemons: Daemons, client: Client, upstream: ScriptedRegistry, path: Path
) -> None:
    upstream.add("team/app", BUILT, "1")
    path.write_text("allow_upstreams: '127.*'\n")
    daemon = daemons.start("--no-complete-images", "--default-ns", upstream.host, "--config-path", str(path))
    await client.remembers(MANIFEST)
    await daemon.reload()
    await client.remembers(MANIFEST)


@on_reactor
async def test_scheduled_prune(
    daemons: Daemons, client: Client, upstream: ScriptedRegistry, path: Path, root: Path, clock: Clock
) -> None:
    upstream.add("team/app", BUILT, "1")
    path.write_text("prune: {unused_for: 4d, every: 1m, max_share: 100%}\n")
    daemon = daemons.start("--no-complete-images", "--default-ns", upstream.host, "--config-path", str(path))
    await client.get(MANIFEST)
    await client.get(BLOB)
    blob = root / "blobs" / LAYER.digest.removeprefix("sha256:")
    await until(blob.exists)
    await client.remembers(MANIFEST, BLOB)
    long_ago = time.time() - 5 * DAY
    os.utime(root / "img" / BUILT.manifest.digest.removeprefix("sha256:"), (long_ago, long_ago))

    def is_pruned() -> bool:
        clock.advance(60)
        return not blob.exists() and daemon._store.counts.images == 0

    await until(is_pruned)
    await until(lambda: not open_blobs(root))
    before = len(upstream.requests)
    assert [(await client.get(target))[0] for target in (MANIFEST, BLOB)] == [200, 200]
    assert len(upstream.requests) == before + 2
