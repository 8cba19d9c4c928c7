"""A wall clock that tests can set while a process runs, by libfaketime."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import pytest


class FakeClock:
    """The wall clock of processes that run with its `environment`; monotonic clock and file times stay real."""

    def __init__(self, folder: Path) -> None:
        self._told = folder / "clock"
        found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
        if not found:
            pytest.fail("a library is missing: apt-get install faketime", pytrace=False)
        self.set(timedelta(0))
        self.environment: Mapping[str, str] = {
            "LD_PRELOAD": str(found[0]),
            "FAKETIME_TIMESTAMP_FILE": str(self._told),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }

    def set(self, ahead: timedelta) -> None:
        """Set the clock to this much ahead of the real time."""
        new = self._told.with_suffix(".new")
        new.write_text(f"{ahead.total_seconds():+.0f}s\n")
        new.replace(self._told)
