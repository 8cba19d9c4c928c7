"""The documentation's pages, and the blocks of code in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))

_FENCE = re.compile(r"```(\S*)$")
_NOT_RUN = re.compile(r"<!-- not run: (\S.*) -->$")


@dataclass(frozen=True)
class Block:
    """A block of code: where its fence begins, under which heading, in which language, and its text."""

    page: Path
    line: int
    heading: str
    language: str
    text: str
    not_run: str | None = None
    """Why no test runs the block, from the comment above it."""

    @property
    def is_of_the_chart(self) -> bool:
        """Whether it shows values of the Helm chart."""
        return self.text.startswith("# values.yaml\n")

    @property
    def is_of_the_cluster(self) -> bool:
        """Whether it shows objects of Kubernetes."""
        return "\napiVersion: " in self.text

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Return all blocks of a page, in order.

    Raises:
        ValueError: a block has no end.
    """
    return list(_blocks(page, page.read_text(encoding="utf-8").splitlines()))


def _blocks(page: Path, lines: list[str]) -> Iterator[Block]:
    heading, above, number = "", "", 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif fence := _FENCE.match(line):
            if "```" not in lines[number:]:
                raise ValueError(f"{page}:{number}: a block that does not end")
            end = lines.index("```", number)
            text = "".join(f"{one}\n" for one in lines[number:end])
            reason = _NOT_RUN.match(above)
            yield Block(page, number, heading, fence[1], text, reason[1] if reason else None)
            number = end + 1
        above = line
