"""What becomes of images that are loaded, and what is told of it on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol


class Ended(Enum):
    """How the loading of an image ended."""

    LOADED = "loaded"
    THERE = "already there"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the loading of the image `name` ended, and what was brought for it."""

    name: str
    ended: Ended
    why: str = ""
    """The reason of a failure."""
    notes: tuple[str, ...] = ()
    """What the operator should know of it."""
    blobs: int = 0
    bytes: int = 0
    again: bool = False
    """Whether what failed may succeed later."""

    def __str__(self) -> str:
        """One line."""
        said = [f"{self.blobs} blobs, {self.bytes} bytes"] if self.blobs else []
        said += [*self.notes, *([self.why.removeprefix(f"{self.name}: ")] if self.why else [])]
        return f"{self.ended.value}: {self.name}" + (f": {'; '.join(said)}" if said else "")


class Progress(Protocol):
    """Is told how the loading goes on."""

    def expect(self, name: str, size: int) -> None:
        """So many bytes more are to come for the image `name`."""

    def came(self, name: str, count: int) -> None:
        """So many of them came."""

    def ended(self, outcome: Outcome) -> None:
        """The image has ended."""


class Untold:
    """Progress that nobody looks at."""

    def expect(self, name: str, size: int) -> None:
        """Not told."""

    def came(self, name: str, count: int) -> None:
        """Not told."""

    def ended(self, outcome: Outcome) -> None:
        """Not told."""


def summary(outcomes: Sequence[Outcome]) -> str:
    """How many ended how, in one line."""
    return ", ".join(f"{sum(outcome.ended is how for outcome in outcomes)} {how.value}" for how in Ended)
