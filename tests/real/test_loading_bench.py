"""A short run of the benchmark of loading: every program brings all images, and the table compares them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.processes import ROOT

ENDS_WITHIN = 300
"""Seconds."""


@pytest.mark.long
def test_loading_benchmark_runs() -> None:
    """The benchmark itself checks the results; skopeo's rate is the reference."""
    options = ["--images", "3", "--concurrent", "1,2", "--rounds", "2"]
    command = [sys.executable, "-m", "bench.loading", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=ENDS_WITHIN, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["|", "| load --concurrent 1", "| load --concurrent 2", "| skopeo sync"]
    assert rows[-1][-1] == "1.00 (1.00 to 1.00) |"
