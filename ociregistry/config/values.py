"""Parsers and formatters of values: durations, sizes, rates, shares, local times and patterns."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from difflib import get_close_matches
from math import floor

_DURATION = re.compile(r"(?P<number>[0-9]{1,6}) ?(?P<unit>[smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_LONGEST = 36_500 * _SECONDS["d"]
_SIZE = re.compile(r"(?P<number>[0-9]{1,12}(?:\.[0-9]{1,6})?) ?(?P<unit>[kKMGT]?)(?P<binary>i?)B?")
_PERCENT = re.compile(r"(?P<percent>[0-9]{1,3}) ?%")
_POWERS = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}
_SHARE = re.compile(r"(?P<percent>[0-9]{1,2}(?:\.[0-9]{1,3})?) ?%")
_LOCAL_TIME = "%Y-%m-%dT%H:%M:%S"


def printable(text: str) -> str:
    """Escape characters that are not printable, so that the text is one line, and UTF-8 and JSON can hold it.

    In Python, a path that is not UTF-8 has surrogates in it, which neither can.
    """
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown `word`: the nearest of the `known` ones, or the empty string."""
    near = get_close_matches(word, list(known), 1)
    return f": did you mean {near[0]}?" if near else ""


def parse_endpoint(text: str) -> str:
    """Return `text` if it is a Twisted endpoint description, such as `tcp:8080`.

    Whether it can be used, such as whether its port is free, is not looked at.

    Raises:
        ValueError: it is malformed.
    """
    # Imported here, since most commands are given no endpoint.
    from twisted.internet.endpoints import serverFromString

    try:
        serverFromString(None, text)
    except (TypeError, ValueError):
        raise ValueError(
            r"an endpoint such as tcp:8080:interface=127.0.0.1 is expected, with \: for each colon of an IPv6 address"
        ) from None
    except Exception:
        # The certificate or the socket of systemd that it names is not there, or not for this user: listening tells.
        return text
    return text


def parse_duration(text: str) -> timedelta:
    """Parse a duration such as `45s`, `90m`, `12h`, `30d` or `2w`.

    Raises:
        ValueError: it is malformed, zero, or longer than 100 years.
    """
    match = _DURATION.fullmatch(text)
    seconds = int(match["number"]) * _SECONDS[match["unit"]] if match else 0
    if not seconds:
        raise ValueError("a time such as 30d, 12h, 90m or 45s is expected")
    if seconds > _LONGEST:
        raise ValueError("a time of 100 years at most is expected")
    return timedelta(seconds=seconds)


def parse_size(text: str) -> int:
    """Parse a size such as `50GB` (powers of 1000) or `20MiB` (powers of 1024).

    Returns:
        Bytes.

    Raises:
        ValueError: it is malformed or zero.
    """
    match = _SIZE.fullmatch(text)
    size = int(float(match["number"]) * (1024 if match["binary"] else 1000) ** _POWERS[match["unit"]]) if match else 0
    if not size:
        raise ValueError("a size such as 50GB, 500MB or 20MiB is expected")
    return size


@dataclass(frozen=True, slots=True)
class Reserve:
    """Disk space to leave free: a `share` of the disk, from 0 to 1, but at most `most` bytes."""

    share: float
    most: int = sys.maxsize

    def of(self, total: int) -> int:
        """Return the bytes to leave free on a disk of `total` bytes."""
        return min(int(total * self.share), self.most)


USUAL_RESERVE = Reserve(0.05, 2 * 10**9)


def parse_reserve(text: str) -> Reserve:
    """Parse a reserve such as `1GB` or `5%`; the empty string gives `USUAL_RESERVE`.

    Raises:
        ValueError: it is malformed.
    """
    if not text:
        return USUAL_RESERVE
    match = _SHARE.fullmatch(text)
    if match:
        return Reserve(float(match["percent"]) / 100)
    try:
        return Reserve(1.0, parse_size(text))
    except ValueError:
        raise ValueError("a size such as 1GB or a share of the disk such as 5% is expected") from None


def parse_share(text: str) -> int:
    """Parse a share such as `50%`.

    Returns:
        A percentage, from 1 to 100.

    Raises:
        ValueError: it is malformed or out of bounds.
    """
    match = _PERCENT.fullmatch(text)
    percent = int(match["percent"]) if match else 0
    if not 1 <= percent <= 100:
        raise ValueError("a share from 1% to 100% is expected")
    return percent


def parse_local_time(text: str) -> datetime:
    """Parse a time in this machine's time zone, such as `2024-03-01T22:17:30`.

    Raises:
        ValueError: it is malformed, or does not exist.
    """
    try:
        if not re.fullmatch(r"[0-9]{4}(-[0-9]{2}){2}T([0-9]{2}:){2}[0-9]{2}", text):
            raise ValueError
        return datetime.strptime(text, _LOCAL_TIME).astimezone()
    except (ValueError, OverflowError, OSError):
        raise ValueError("a local date and time such as 2024-03-01T22:17:30 is expected") from None


def local_time(moment: datetime) -> str:
    """Format `moment` in this machine's time zone, such as `2024-03-01T22:17:30`."""
    return moment.astimezone().strftime(_LOCAL_TIME)


def count_text(number: int, noun: str, plural: str = "") -> str:
    """Format a number of things for people, such as `1 image` or `2 images`; `plural` is for nouns without an s."""
    return f"{number} {noun}" if number == 1 else f"{number} {plural or f'{noun}s'}"


def size_text(size: int) -> str:
    """Format `size` bytes for people, such as `12.3 MB`."""
    amount, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while amount >= 999.95 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{size} B" if units[0] == "B" else f"{amount:.1f} {units[0]}"


def rate_text(rate: float) -> str:
    """Format `rate`, in bytes per second, for people, such as `12.3 MB/s`."""
    return f"{size_text(round(rate))}/s"


def span_text(seconds: float) -> str:
    """Format a time span for people, such as `45 s`, `12 min` or `3 h 5 min`."""
    whole = max(0, floor(seconds))
    if whole < 120:
        return f"{whole} s"
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if minutes < 120:
        return f"{minutes} min"
    if hours < 48:
        return f"{hours} h {minutes % 60} min"
    return f"{days} d {hours % 24} h"


_SEPARATOR = re.compile(r",(?![0-9]*\})")
"""A comma that separates patterns, unlike the one in `x{1,2}`."""

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
"""Syntax of Go's expressions that Python lacks or reads differently, and what to write instead."""


@dataclass(frozen=True, slots=True)
class Patterns:
    """Regular expressions; an image URL matches if one of them is found anywhere in it."""

    expressions: tuple[re.Pattern[str], ...]

    def match(self, url: str) -> bool:
        """Tell whether one of the expressions is found in `url`."""
        return any(expression.search(url) for expression in self.expressions)

    @classmethod
    def parse(cls, text: str) -> Patterns:
        """Parse expressions separated by commas.

        Raises:
            ValueError: an expression is invalid; the message names it and says why.
        """
        return cls.of(piece.strip() for piece in _SEPARATOR.split(text))

    @classmethod
    def of(cls, expressions: Iterable[str]) -> Patterns:
        """Compile `expressions`.

        Raises:
            ValueError: an expression is invalid; the message names it and says why.
        """
        return cls(tuple(map(_compiled, expressions)))


def _compiled(expression: str) -> re.Pattern[str]:
    if not expression:
        raise ValueError("an empty pattern matches every image URL")
    for piece in _PIECE.findall(expression):
        _refuse_foreign(expression, piece)
    try:
        with warnings.catch_warnings():
            # Python warns about syntax whose meaning may change in a later version; refuse it.
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
        raise ValueError(f"the pattern {expression!r} has {piece!r}, which is Go syntax, not Python's: {hint}")
