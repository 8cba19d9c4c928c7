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


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


_DECODER = json.JSONDecoder(parse_constant=_no_number, parse_float=_finite)
