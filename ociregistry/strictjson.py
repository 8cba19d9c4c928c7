"""Parses JSON as RFC 8259 defines it; no other module parses JSON.

Python's parser also takes NaN and Infinity, of which this program would make documents that no other program reads,
and encodings other than UTF-8.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn


def parse_json(data: bytes) -> Any:
    """Parse a JSON text in UTF-8.

    Raises:
        ValueError: it is none, it is nested too deeply, or it has a number that is too large.
    """
    try:
        return _DECODER.decode(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class JsonInvalid(ValueError):
    """A part of a text is no JSON, or its numbers or its depth are none that this program takes."""

    def __init__(self, why: str, position: int) -> None:
        super().__init__(why)
        self.position = position
        """The index, in the text, of the character where it is wrong, or where the value begins."""


def parse_json_value(text: str, start: int) -> tuple[Any, int]:
    """Parse the JSON value that begins at the index `start` of `text`; return it, and the index behind its end.

    Raises:
        JsonInvalid: there is none.
    """
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise JsonInvalid(error.msg[:1].lower() + error.msg[1:], error.pos) from None
    except RecursionError:
        raise JsonInvalid("it is nested too deeply", start) from None
    except ValueError as error:
        raise JsonInvalid(str(error), start) from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


_DECODER = json.JSONDecoder(parse_constant=_no_number, parse_float=_finite)
