"""Patterns for image URLs: regular expressions of Python, in which none that Go reads differently is let through.

The server of the same name that is written in Go takes the same options; an expression that came from there must not
quietly select other images.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

_SEPARATOR = re.compile(r",(?![0-9]*\})")
"""A comma, but not the one in `x{1,2}`."""

_PIECE = re.compile(
    r"\\.|\[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\]\\])*\]|\(\?[^)]?|\{,[0-9]+\}|.",
    re.DOTALL,
)
"""An escape, a character class, the beginning of a group with a question mark, `{,3}`, or one character."""
_IN_CLASS = re.compile(r"\\.|\[:\^?\w+:\]|.", re.DOTALL)

_FOREIGN = {
    r"\z": r"\Z is the end of the text here",
    r"\Q": "put a backslash before each special character",
    r"\E": "put a backslash before each special character",
    r"\p": "name the characters in [ ]",
    r"\P": "name the characters in [^ ]",
    r"\C": "a dot is one character",
    "(?U": "write *? or +? for a repetition that takes as little as it can",
}
"""What Go knows, and Python does not, or reads as something else."""


@dataclass(frozen=True, slots=True)
class Patterns:
    """Regular expressions, as they were written; an image URL is matched when one of them is found in it."""

    expressions: tuple[re.Pattern[str], ...]

    def match(self, url: str) -> bool:
        """Whether one of them is found in `url`."""
        return any(expression.search(url) for expression in self.expressions)

    @classmethod
    def parse(cls, text: str) -> Patterns:
        """The patterns in `text`, separated by commas; raises `ValueError` with what is wrong with which of them."""
        return cls.of(piece.strip() for piece in _SEPARATOR.split(text))

    @classmethod
    def of(cls, expressions: Iterable[str]) -> Patterns:
        """The patterns, one expression each; raises `ValueError` as `parse` does."""
        return cls(tuple(map(_compiled, expressions)))


def _compiled(expression: str) -> re.Pattern[str]:
    if not expression:
        raise ValueError("an empty pattern would be found in every image URL")
    for piece in _PIECE.findall(expression):
        _refuse_foreign(expression, piece)
    try:
        with warnings.catch_warnings():
            # Python warns of what it may read differently one day.
            warnings.simplefilter("error", FutureWarning)
            return re.compile(expression, re.ASCII)
    except (re.error, FutureWarning, OverflowError, RecursionError) as error:
        raise ValueError(f"the pattern {expression!r} is not a regular expression: {error}") from None


def _refuse_foreign(expression: str, piece: str) -> None:
    if piece.startswith("(?"):
        hint = _FOREIGN.get(piece[:3])
    elif piece.startswith("{,"):
        hint = "write {0,3} for it"
    elif piece.startswith("[") and len(piece) > 1:
        inside = [one for one in _IN_CLASS.findall(piece) if one.startswith("[:") or one in _FOREIGN]
        piece, hint = (inside[0], "name the characters, such as [a-z0-9]") if inside else (piece, None)
    else:
        hint = _FOREIGN.get(piece)
    if hint is not None:
        raise ValueError(
            f"the pattern {expression!r} has {piece!r}, which is Go's: expressions are Python's here: {hint}"
        )
