"""Chains of a bad mirror near the daemon and a registry behind a bad link: each byte crosses that link once."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.badlink import image_of, measure
from bench.badlink_chains import CHAINS
from bench.badlink_rows import ROWS

MOST = 1.05
"""Bytes over the link, headers included, divided by the size of the image."""


def check(row: str, size: int, folder: Path) -> None:
    """Play one row of the benchmark on all chains; its clients have a limit of their own, in seconds."""
    image = image_of(size)
    for (_, chain), outcomes in measure([row], list(CHAINS), 1, image, folder).items():
        assert [outcome.right for outcome in outcomes] == [True], chain
        assert outcomes[0].crossed <= MOST * size, chain
        (log,) = (folder / f"{row}-0-{chain}").glob("ociregistry-*.log")
        assert "is not asked for 10 s" in log.read_text()


def test_slow_and_distant_registry(tmp_path: Path) -> None:
    check("a", 2_000_000, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("row", ROWS)
def test_every_row(tmp_path: Path, row: str) -> None:
    """The image is large enough for outages and kills in the middle of its pull."""
    check(row, 25_000_000, tmp_path)
