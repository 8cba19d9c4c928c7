"""The soak of bench/, in short: it must end well, and find what is wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.processes import ROOT

SECONDS = 20
ENDS_WITHIN = 300
"""Seconds: what is left over is waited for."""


@pytest.mark.long
def test_twenty_seconds_of_trouble() -> None:
    """Every answer is right, and nothing is left over."""
    command = [sys.executable, "-m", "bench.soak", "--seconds", str(SECONDS), "--seed", "20261124"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=ENDS_WITHIN, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("0 violations\n")
