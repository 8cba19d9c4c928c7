"""`--max-bandwidth`: the total rate from all upstreams, measured on the network, with the kernel's own buffers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.client import fetch
from tests.images import MIB, Blob
from tests.namespaces import NamespacedDaemon, Routed
from tests.real.caches import plain_image
from tests.upstream import ScriptedRegistry

RATE = 1_000_000
"""Bytes a second: 8Mbit."""
WINDOW = 10.0
EVERY = 0.25
AT_ONCE = 6


@pytest.fixture
def routed() -> Iterator[Routed]:
    """A routed network."""
    with Routed() as routed:
        yield routed


class Samples:
    """Samples of the bytes received so far, with their times."""

    def __init__(self, routed: Routed) -> None:
        self._routed = routed
        self._taken: list[tuple[float, int]] = []

    def take(self) -> int:
        """Take a sample; return the bytes so far."""
        self._taken.append((time.monotonic(), self._routed.received()))
        return len(self._taken)

    def rates(self) -> list[float]:
        """Return the rates in bytes per second, over all windows of ten seconds."""
        return [
            (after - before) / (later - first)
            for number, (first, before) in enumerate(self._taken)
            for later, after in self._taken[number:]
            if WINDOW <= later - first <= WINDOW + 2 * EVERY
        ]


@pytest.mark.parametrize(
    "limit",
    [
        {"max_bandwidth": "8Mbit"},
        {"max_bandwidth": "1Gbit", "bandwidth": [{"from": "00:00", "to": "24:00", "max": "8Mbit"}]},
    ],
    ids=["by_option", "by_window"],
)
def test_rate_stays_within_five_percent_over_any_ten_seconds(
    routed: Routed, tmp_path: Path, limit: dict[str, object]
) -> None:
    """Layers come from two upstreams at once, and small objects in between do not wait."""
    large = [plain_image(f"large {number}", 4 * MIB) for number in range(AT_ONCE)]
    small = [plain_image(f"small {number}", 1000) for number in range(8)]
    with ExitStack() as stack:
        upstreams = [routed.far.call(lambda: ScriptedRegistry(address=Routed.FAR)) for _ in range(2)]
        for upstream in upstreams:
            stack.enter_context(upstream)
            for number, image in enumerate([*large, *small]):
                upstream.add("team/app", image, f"v{number}")
        registries = {upstream.host: "http" for upstream in upstreams}
        daemon = NamespacedDaemon(routed.near, tmp_path, registries, "--no-complete-images", settings=limit)
        stack.enter_context(daemon)

        def get(number: int, blob: Blob) -> bool:
            url = f"{daemon.url}/v2/team/app/blobs/{blob.digest}?ns={upstreams[number % 2].host}"
            return routed.near.call(lambda: fetch(url)).body == blob.data

        clients = stack.enter_context(ThreadPoolExecutor(AT_ONCE))
        samples, waits = Samples(routed), []
        pulls = [clients.submit(get, number, image.layers[0]) for number, image in enumerate(large)]
        while not all(one.done() for one in pulls):
            if samples.take() % 8 == 0 and small:
                asked = time.monotonic()
                assert get(0, small.pop().config)
                waits.append(time.monotonic() - asked)
            time.sleep(EVERY)
        assert all(one.result() for one in pulls)
    rates = samples.rates()
    assert rates
    # The network also counts the headers of packets.
    assert max(rates) <= RATE * 1.05
    # The limit is used, as far as a busy machine manages.
    assert min(rates) >= RATE * 0.75
    assert max(waits) < 5
