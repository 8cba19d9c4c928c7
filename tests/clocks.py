"""A clock that is set while a process runs: libfaketime tells the process what time it is."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import pytest


class FakeClock:
    """The wall clock of processes that run with its `environment`; they have the real monotonic clock, and files."""

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
        """From now on it is so far ahead."""
        new = self._told.with_suffix(".new")
        new.write_text(f"{ahead.total_seconds():+.0f}s\n")
        new.replace(self._told)
