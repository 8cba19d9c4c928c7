"""The documentation matches the program: option tables and log lines."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import metrics, reference

ROOT = Path(__file__).resolve().parents[2]
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
_GENERAL = {"{why}", "preloading: {outcome}"}
"""Log lines that consist of a reason only, which is explained where it arises, or that are quoted in full."""


def logged(level: str) -> Iterator[tuple[str, str]]:
    """Return where each line is logged at `level`, and its text."""
    for path in sorted((ROOT / "ociregistry").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Attribute(attr=called, value=ast.Name(id="_log")),
                    args=[ast.Constant(value=str(text)), *_],
                ) if called == level:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", text


def explained() -> str:
    """Return the log lines that the page explains, with `…` for the variable parts."""
    return "\n".join(re.findall(r"`([^`]*)`", TROUBLESHOOTING.read_text(encoding="utf-8")))


@pytest.mark.parametrize("level", ["error", "warn"])
def test_every_warning_and_error_is_explained(level: str) -> None:
    lines = [(where, text) for where, text in logged(level) if text not in _GENERAL]
    assert len(lines) > 3
    missing = []
    for where, text in lines:
        # The constant part is what a reader would search for.
        pieces = [piece.strip(" ,") for piece in re.split(r"\{[^}]*\}|: ", text)]
        searched = [piece for piece in pieces if len(piece) >= 8]
        if searched and not any(piece in explained() for piece in searched):
            missing.append(f"{where}: {text}")
    assert missing == []


def test_reference_is_generated() -> None:
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), "run: python -m tools.reference"


def test_metrics_are_generated() -> None:
    assert metrics.PAGE.read_text(encoding="utf-8") == metrics.page(), "run: python -m tools.metrics"
