"""How a command tells how far it is: bars on a terminal, and a line for each image that has ended."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from ociregistry.commands.options import print_lines
from ociregistry.pullthrough.loader import Outcome


class Lines:
    """A line for each image, at its end."""

    def expect(self, name: str, size: int) -> None:
        """As `Progress.expect`: not told."""

    def advance(self, name: str, count: int) -> None:
        """As `Progress.came`: not told."""

    def ended(self, outcome: Outcome) -> None:
        """As `Progress.ended`."""
        print_lines([str(outcome)])


class Bars(Lines):
    """Bytes, rate and time left, of each image and of all."""

    def __init__(self) -> None:
        self._total = bar("in total")
        self._images: dict[str, Any] = {}

    def expect(self, name: str, size: int) -> None:
        """As `Progress.expect`."""
        if not size:
            return
        if name not in self._images:
            self._images[name] = bar(name)
        for one in (self._images[name], self._total):
            one.total += size
            one.refresh()

    def advance(self, name: str, count: int) -> None:
        """As `Progress.came`."""
        for one in (self._images.get(name), self._total):
            if one is not None:
                one.update(count)

    def ended(self, outcome: Outcome) -> None:
        """As `Progress.ended`."""
        finished = self._images.pop(outcome.name, None)
        if finished is not None:
            finished.close()
        with tqdm.external_write_mode(file=sys.stdout):
            super().ended(outcome)

    def close(self) -> None:
        """Takes the bars off the screen."""
        for one in (*self._images.values(), self._total):
            one.close()


def bar(name: str, total: int = 0) -> Any:
    """A bar that counts bytes, on stderr."""
    # Without a thread of its own: it would outlive a daemon's fork, and nothing here is slow to refresh.
    tqdm.monitor_interval = 0
    return tqdm(
        total=total, desc=name, unit="B", unit_scale=True, leave=False, dynamic_ncols=True, file=sys.__stderr__
    )


@contextmanager
def shown() -> Iterator[Lines]:
    """Bars on a terminal, else lines alone, while the block runs."""
    if not on_terminal():
        yield Lines()
        return
    bars = Bars()
    try:
        yield bars
    finally:
        bars.close()


def on_terminal() -> bool:
    """Whether somebody looks at stderr."""
    return sys.__stderr__ is not None and sys.__stderr__.isatty()
