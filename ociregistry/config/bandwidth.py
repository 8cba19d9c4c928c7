"""Rates, and the times of the day at which they hold."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import time

from ociregistry.config.nodes import Node

_RATE = re.compile(r"(?P<number>[0-9]{1,9}(?:\.[0-9]{1,6})?) ?(?P<unit>[kMG]?)bit")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
_TIME = re.compile(r"(?P<hour>[01]?[0-9]|2[0-4]):(?P<minute>[0-5][0-9])")
_LEAST = 8000
"""Bits a second: below it nothing would come in a client's time."""


@dataclass(frozen=True, slots=True)
class Window:
    """A time of every day, local, in which at most `rate` bytes a second may come; its end is not part of it."""

    begin: time
    end: time
    rate: float

    def holds(self, now: time) -> bool:
        """Whether it is that time; one that ends before it begins goes over midnight."""
        if self.begin < self.end:
            return self.begin <= now < self.end
        return now >= self.begin or now < self.end


def parse_rate(text: str) -> float | None:
    """Bytes a second, from `500kbit` or `2Mbit`; None for the empty string. Raises `ValueError`."""
    if not text:
        return None
    match = _RATE.fullmatch(text)
    bits = float(match["number"]) * _UNITS[match["unit"]] if match else 0.0
    if bits < _LEAST:
        raise ValueError("a rate such as 500kbit or 2Mbit is expected, 8kbit at least")
    return bits / 8


def read_windows(node: Node) -> tuple[Window, ...]:
    """The windows of a list of mappings; raises `ConfigInvalid`."""
    return tuple(map(_window, node.items()))


def _window(node: Node) -> Window:
    nodes = node.mapping("from", "to", "max", below="bandwidth.")
    for key in ("from", "to", "max"):
        if key not in nodes:
            raise node.missing(f"bandwidth.{key}", "a window has from, to and max")
    try:
        rate = parse_rate(nodes["max"].word())
    except ValueError as error:
        raise nodes["max"].error(f"{nodes['max'].word()!r}: {error}") from None
    assert rate is not None
    return Window(_time(nodes["from"]), _time(nodes["to"]), rate)


def _time(node: Node) -> time:
    match = _TIME.fullmatch(node.word())
    hour, minute = (int(match["hour"]), int(match["minute"])) if match else (99, 0)
    if hour > 24 or (hour == 24 and minute):
        raise node.error(f"{node.word()!r}: a time of the day such as 08:00 is expected")
    return time(hour % 24, minute)
