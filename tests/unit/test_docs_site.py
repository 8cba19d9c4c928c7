"""The documentation says what the program does: its tables are the program's, and its log lines are explained."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import reference

ROOT = Path(__file__).resolve().parents[2]
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
_GENERAL = {"{why}", "{warning}", "preloading: {outcome}"}
"""Lines that are nothing but a reason, which is explained where it comes from, or one that stands there in full."""


def logged(level: str) -> Iterator[tuple[str, str]]:
    """Where a line is logged at `level`, and how it is spelled."""
    for path in sorted((ROOT / "ociregistry").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Attribute(attr=called, value=ast.Attribute(attr="log")),
                    args=[ast.Constant(value=str(text)), *_],
                ) if called == level:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", text


def explained() -> str:
    """The lines that the page explains, each with `…` for what varies."""
    return "\n".join(re.findall(r"`([^`]*)`", TROUBLESHOOTING.read_text(encoding="utf-8")))


@pytest.mark.parametrize("level", ["error", "warn"])
def test_every_line_of_the_log_is_explained(level: str) -> None:
    lines = [(where, text) for where, text in logged(level) if text not in _GENERAL]
    assert len(lines) > 3
    missing = []
    for where, text in lines:
        # What does not vary is what somebody would search for.
        pieces = [piece.strip(" ,") for piece in re.split(r"\{[^}]*\}|: ", text)]
        searched = [piece for piece in pieces if len(piece) >= 8]
        if searched and not any(piece in explained() for piece in searched):
            missing.append(f"{where}: {text}")
    assert missing == []


def test_the_reference_is_made_from_the_tables() -> None:
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), "run: python -m tools.reference"
