"""The daemon preloads, prunes and verifies according to its settings."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.names import Digest
from ociregistry.store.store import Store
from tests.unit.support.common import REACTOR, image, manifest, on_reactor, texts, turn, until
from tests.unit.support.daemon_upstreams import BUILT, LAYER, app, counts, here, start
from tests.unit.support.daemons import Daemons, get
from tests.unit.support.wire import Network
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Hold

DAY = 86_400


async def preloaded(network: Network, events: list[LogEvent]) -> Any:
    """Return the preload status in /health."""
    response = await get(network, events, "/health")
    return json.loads(await response.collect(10_000)).get("preload")


@on_reactor
async def test_image_list_is_preloaded(
    daemons: Daemons, root: Path, network: Network, upstream: ScriptedRegistry, events: list[LogEvent], tmp_path: Path
) -> None:
    upstream.add("team/app", BUILT, "1")
    images = tmp_path / "images.txt"
    images.write_text(f"# ours\n{app(upstream)}\nNo Reference\n{app(upstream, 'none')}\n")
    for _ in range(2):
        start(daemons, upstream, "--preload-images", str(images), "--concurrent", "2")
        await until(lambda: any(text.startswith("preloaded: ") for text in texts(events)))
        assert await preloaded(network, events) == {"images": 2, "loaded": 1, "failed": 1}
        first, second = sorted(texts(events, LogLevel.error))
        assert first.startswith(f"not preloaded: {images}:3: 'No Reference' is not an image reference")
        assert second.startswith(f"preloading: failed: {app(upstream, 'none')}: ")
        daemons.stop()
        await until(daemons.stopped)
        events.clear()

    assert all(here(root, blob.digest).read_bytes() == blob.data for blob in BUILT.blobs)
    # Present images cause no requests the second time.
    assert counts(upstream).pop("/v2/team/app/manifests/none") == 2
    assert [count for path, count in counts(upstream).items() if not path.endswith("/none")] == [1] * 4


@on_reactor
async def test_missing_image_list_is_an_error_line(
    daemons: Daemons, network: Network, upstream: ScriptedRegistry, events: list[LogEvent], tmp_path: Path
) -> None:
    start(daemons, upstream, "--preload-images", str(tmp_path / "none.txt"))
    await until(lambda: texts(events, LogLevel.error))
    (line,) = texts(events, LogLevel.error)
    assert line.startswith("cannot preload: ")
    assert str(tmp_path / "none.txt") in line
    assert await preloaded(network, events) == {"images": 0, "loaded": 0, "failed": 0}


@on_reactor
async def test_without_image_list_health_has_no_preload_status(
    daemons: Daemons, network: Network, upstream: ScriptedRegistry, events: list[LogEvent]
) -> None:
    start(daemons, upstream)
    assert await preloaded(network, events) is None


async def stopped_in_the_middle(daemons: Daemons, upstream: ScriptedRegistry, folder: Path) -> None:
    """Stop a daemon while the first of three images is being preloaded."""
    upstream.add("team/app", BUILT, "1", "2", "3")
    hold = Hold(1000)
    upstream.script("/v2/*/blobs/*", hold)
    (folder / "images.txt").write_text("".join(f"{app(upstream, tag)}\n" for tag in "123"))
    start(daemons, upstream, "--preload-images", str(folder / "images.txt"))
    await until(hold.reached.is_set)
    daemons.stop()
    await until(daemons.stopped)


@on_reactor
async def test_shutdown_during_preloading(
    daemons: Daemons, upstream: ScriptedRegistry, events: list[LogEvent], tmp_path: Path
) -> None:
    await stopped_in_the_middle(daemons, upstream, tmp_path)
    assert not any("preloading" in text for text in texts(events, LogLevel.error))
    assert texts(events, LogLevel.critical) == []


@on_reactor
async def test_air_gapped_daemon_preloads_nothing_with_warning(
    daemons: Daemons, upstream: ScriptedRegistry, events: list[LogEvent], tmp_path: Path
) -> None:
    (tmp_path / "images.txt").write_text(f"{app(upstream)}\n")
    start(daemons, upstream, "--air-gapped", "--preload-images", str(tmp_path / "images.txt"))
    await until(lambda: texts(events, LogLevel.error))
    assert texts(events, LogLevel.error)[0].startswith(f"preloading: failed: {app(upstream)}: ")
    assert upstream.requests == ()


async def fill(root: Path, url: str, ago: float) -> Path:
    """Put an image last pulled `ago` seconds ago into the store; return the path of its record."""
    store = Store(root, Clock(), REACTOR)
    store.startService()
    await store.keep(manifest(BUILT), image(url))
    store.stopService()
    for blob in BUILT.blobs:
        here(root, blob.digest).write_bytes(blob.data)
    record = root / "img" / Digest(BUILT.manifest.digest).hex
    os.utime(record, (time.time() - ago, time.time() - ago))
    return record


@on_reactor
async def test_prune_settings_apply_at_start_and_after_reload(
    daemons: Daemons, root: Path, upstream: ScriptedRegistry, tmp_path: Path, clock: Clock
) -> None:
    record = await fill(root, str(app(upstream)), 3 * DAY)
    path = tmp_path / "ociregistry.yaml"
    path.write_text("prune: {unused_for: 4d, every: 1m}\n")
    daemon = start(daemons, upstream, "--config-path", str(path))

    async def a_minute() -> None:
        before = len(pruned)
        clock.advance(60)
        await until(lambda: len(pruned) > before)

    pruned: list[object] = []
    real = daemon._store.prune

    async def prune(choose: Any) -> Any:
        plan = await real(choose)
        pruned.append(plan)
        return plan

    daemon._store.prune = prune  # type: ignore[method-assign]  # records the plans
    await a_minute()
    assert record.exists()
    path.write_text("prune: {unused_for: none}\n")
    await daemon.reload()
    await a_minute()
    path.write_text(f"prune: {{unused_for: 2d, every: 1m, keep: ['{upstream.host}']}}\n")
    await daemon.reload()
    await a_minute()
    assert record.exists()
    path.write_text("{}\n")
    await daemon.reload()
    clock.advance(3600)
    await turn()
    assert len(pruned) == 3
    path.write_text("prune: {unused_for: 2d, every: 1m, max_share: 100%}\n")
    await daemon.reload()
    # The system clock did not move during this hour, so the first run does not trust it.
    await a_minute()
    assert record.exists()
    await a_minute()
    assert not record.exists()
    assert list((root / "blobs").iterdir()) == []


@on_reactor
async def test_due_verification_repairs_damaged_blob(
    daemons: Daemons,
    root: Path,
    upstream: ScriptedRegistry,
    tmp_path: Path,
    events: list[LogEvent],
    clock: Clock,
) -> None:
    upstream.add("team/app", BUILT, "1")
    await fill(root, str(app(upstream)), 0)
    damaged = here(root, LAYER.digest)
    damaged.write_bytes(b"x" * len(LAYER.data))
    (root / "pulls" / "verified").touch()
    os.utime(root / "pulls" / "verified", (time.time() - 8 * DAY, time.time() - 8 * DAY))
    path = tmp_path / "ociregistry.yaml"
    path.write_text("verify: {every: 9d}\n")
    daemon = start(daemons, upstream, "--config-path", str(path))
    assert damaged.read_bytes() != LAYER.data
    path.write_text("verify: {every: 7d}\n")
    await daemon.reload()

    def repaired() -> bool:
        clock.advance(0)
        return damaged.exists() and damaged.read_bytes() == LAYER.data

    await until(repaired)
    (line,) = texts(events, LogLevel.error)
    assert line.startswith(f"quarantined: {damaged}: ")
    assert counts(upstream) == {f"/v2/team/app/blobs/{LAYER.digest}": 1}
