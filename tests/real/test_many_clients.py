"""Many clients that pull at once from the hot cache: no error, and little memory. A small run of the benchmark."""

from __future__ import annotations

from pathlib import Path

from bench.many_clients import SMALL_LAYERS, runs
from tests.images import MIB

CONNECTIONS = 100
IMAGES = 11
"""Two of them have a layer of 1 MB."""
MOST_MEMORY = 150 * MIB


def test_many_clients_pull_many_images(tmp_path: Path) -> None:
    for run in runs(tmp_path, CONNECTIONS, IMAGES):
        assert run.found.errors == []
        assert {kind: len(times) for kind, times in run.found.seconds.items()} == {
            "manifest by tag": CONNECTIONS * IMAGES,
            "manifest by digest": CONNECTIONS * IMAGES,
            "config": CONNECTIONS * IMAGES,
            "layer of 20 kB": CONNECTIONS * IMAGES * SMALL_LAYERS,
            "layer of 1 MB": CONNECTIONS * 2,
        }
        assert run.memory_peak <= MOST_MEMORY
