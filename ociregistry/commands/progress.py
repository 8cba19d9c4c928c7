"""Progress of a command: bars on a terminal, and a line for each finished image."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from ociregistry.commands.options import print_lines
from ociregistry.pullthrough.loader import LoadResult


class Lines:
    """Implements `Progress`: prints a line for each image when it has ended."""

    def expect(self, name: str, size: int) -> None:
        """Do nothing: only ends are printed."""

    def advance(self, name: str, count: int) -> None:
        """Do nothing: only ends are printed."""

    def ended(self, outcome: LoadResult) -> None:
        """Print how the image ended."""
        print_lines([str(outcome)])


class Bars(Lines):
    """Implements `Progress` with bars: bytes, rate and remaining time, for each image and in total."""

    def __init__(self) -> None:
        self._total = bar("in total")
        self._images: dict[str, Any] = {}

    def expect(self, name: str, size: int) -> None:
        """Add `size` bytes to the total of the image's bar, which is created if missing."""
        if not size:
            return
        if name not in self._images:
            self._images[name] = bar(name)
        for one in (self._images[name], self._total):
            one.total += size
            one.refresh()

    def advance(self, name: str, count: int) -> None:
        """Move the bars forward by `count` bytes."""
        for one in (self._images.get(name), self._total):
            if one is not None:
                one.update(count)

    def ended(self, outcome: LoadResult) -> None:
        """Remove the image's bar, and print how the image ended."""
        finished = self._images.pop(outcome.name, None)
        if finished is not None:
            finished.close()
        with tqdm.external_write_mode(file=sys.stdout):
            super().ended(outcome)

    def close(self) -> None:
        """Remove all bars from the screen."""
        for one in (*self._images.values(), self._total):
            one.close()


def bar(name: str, total: int = 0) -> Any:
    """Make a bar on stderr that counts bytes."""
    # No monitor thread: the bars are updated often enough without it, and a fork does not copy threads.
    tqdm.monitor_interval = 0
    return tqdm(
        total=total, desc=name, unit="B", unit_scale=True, leave=False, dynamic_ncols=True, file=sys.__stderr__
    )


@contextmanager
def shown() -> Iterator[Lines]:
    """Show progress while the block runs: bars and lines on a terminal, else lines only."""
    if not on_terminal():
        yield Lines()
        return
    bars = Bars()
    try:
        yield bars
    finally:
        bars.close()


def on_terminal() -> bool:
    """Tell whether stderr is a terminal."""
    return sys.__stderr__ is not None and sys.__stderr__.isatty()
