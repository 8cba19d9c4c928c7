"""The daemon's `--max-bandwidth` limits its clients and a concurrent load together."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.client import fetch
from tests.images import MIB
from tests.namespaces import NamespacedDaemon, Routed
from tests.real.caches import plain_image
from tests.real.stores import PATIENCE, command_line, has_all_of, image_list, running_command
from tests.upstream import ScriptedRegistry

RATE = 1_000_000
"""Bytes a second: 8Mbit."""
WINDOW = 10.0
EVERY = 0.25


@pytest.fixture
def routed() -> Iterator[Routed]:
    """A routed network."""
    with Routed() as routed:
        yield routed


def test_max_bandwidth_limits_clients_and_load_together(routed: Routed, tmp_path: Path) -> None:
    """Over any ten seconds, measured by the kernel."""
    loaded = [plain_image(f"loaded {number}", 4 * MIB) for number in range(2)]
    pulled = [plain_image(f"pulled {number}", 4 * MIB) for number in range(2)]
    taken: list[tuple[float, int]] = []
    with routed.far.call(lambda: ScriptedRegistry(address=Routed.FAR)) as upstream:
        for number, image in enumerate([*loaded, *pulled]):
            upstream.add("team/app", image, f"v{number}")
        settings = {"max_bandwidth": "8Mbit"}
        daemon = NamespacedDaemon(
            routed.near, tmp_path, {upstream.host: "http"}, "--no-complete-images", settings=settings
        )
        listed = image_list(tmp_path / "list", [f"{upstream.host}/team/app:v{number}" for number in range(2)])
        load_line = routed.near.argv(command_line(daemon, "load", "--concurrent=2", listed))

        def get(path: str) -> bytes:
            url = f"{daemon.url}/v2/team/app/{path}?ns={upstream.host}"
            return routed.near.call(lambda: fetch(url, timeout=PATIENCE)).body

        with daemon, ThreadPoolExecutor() as clients, running_command(load_line, tmp_path) as load:
            pulls = [clients.submit(get, f"blobs/{image.layers[0].digest}") for image in pulled]
            while load.poll() is None or not all(one.done() for one in pulls):
                taken.append((time.monotonic(), routed.received()))
                time.sleep(EVERY)
            assert load.returncode == 0, (tmp_path / "stderr").read_text()
            assert [one.result() for one in pulls] == [image.layers[0].data for image in pulled]
            assert all(has_all_of(daemon.image_path, image) for image in loaded)
        blobs = [one.path for one in upstream.requests if "/blobs/" in one.path]
        assert len(blobs) == len(set(blobs))
    rates = [
        (after - before) / (later - first)
        for number, (first, before) in enumerate(taken)
        for later, after in taken[number:]
        if WINDOW <= later - first <= WINDOW + 2 * EVERY
    ]
    assert rates
    # The network also counts the headers of packets.
    assert max(rates) <= RATE * 1.05
