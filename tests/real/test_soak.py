"""A short run of bench/soak.py: it must end well, and find errors."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.processes import ROOT

SECONDS = 20
ENDS_WITHIN = 300
"""Seconds, with the time until leftovers are gone."""


@pytest.mark.long
def test_soak_of_twenty_seconds() -> None:
    """Every answer is correct, and nothing is left over."""
    command = [sys.executable, "-m", "bench.soak", "--seconds", str(SECONDS), "--seed", "20261124"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=ENDS_WITHIN, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("0 violations\n")
