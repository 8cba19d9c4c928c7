"""Byte ranges (RFC 9110, section 14), as registry clients use them: one range at a time."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ociregistry.errors import RangeUnsatisfiable

_SINGLE = re.compile(r"bytes\s*=\s*(?P<first>[0-9]{0,19})-(?P<last>[0-9]{0,19})\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Range:
    """The bytes from `start` up to, not including, `stop`."""

    start: int
    stop: int


def parse_range(header: str, size: int) -> Range | None:
    """What `header` asks of content of `size` bytes; None means all of it, as if there were no header.

    That holds for several ranges too: a client copes with a 200, not with a 206 that has only the first. Raises
    `RangeUnsatisfiable`, also for a range that ends before it begins, as the conformance suite wants.
    """
    match = _SINGLE.fullmatch(header.strip())
    if match is None or not (match["first"] or match["last"]):
        return None
    if match["first"]:
        start = int(match["first"])
        stop = min(int(match["last"]) + 1, size) if match["last"] else size
    else:
        start = max(0, size - int(match["last"]))
        stop = size
    if start >= stop:
        raise RangeUnsatisfiable(f"the range {header[:80]!r} is outside the {size} bytes there are", size)
    return Range(start, stop)
