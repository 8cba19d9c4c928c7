"""Counts the answered requests, by what they were for and how they ended.

Each answer takes a few additions to plain numbers, since a hit takes not much more than that.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from enum import Enum
from operator import add

BUCKETS = (0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 30.0, 120.0, 600.0)
"""Upper bounds in seconds, each included, of the buckets of the histograms; one more bucket has no bound."""


class Kind(Enum):
    """What a request is for."""

    MANIFEST = "manifest"
    BLOB = "blob"
    OTHER = "other"


class Outcome(Enum):
    """How a request was answered; `NONE` is an answer that does not depend on the cache."""

    HIT = "hit"
    MISS = "miss"
    NONE = "none"
    CLIENT_ERROR = "4xx"
    SERVER_ERROR = "5xx"


class CutBy(Enum):
    """Which side ended an answer before its last byte."""

    CLIENT = "client"
    SERVER = "server"


class Histogram:
    """How many durations fell into each bucket, and the sum of all."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.sum += seconds

    def __add__(self, other: Histogram) -> Histogram:
        both = Histogram()
        both.counts = list(map(add, self.counts, other.counts))
        both.sum = self.sum + other.sum
        return both


class Tally:
    """The answers of one kind and outcome."""

    __slots__ = ("_at_once", "_duration", "_first_byte", "bytes")

    def __init__(self) -> None:
        self.bytes = 0
        """Bytes of content that were sent."""
        self._first_byte = Histogram()
        self._duration = Histogram()
        self._at_once = Histogram()
        """The answers whose first and last byte were sent together."""

    @property
    def first_byte(self) -> Histogram:
        """Until the first byte of the content was sent; where there is none, until the end of the answer."""
        return self._first_byte + self._at_once

    @property
    def duration(self) -> Histogram:
        """Until the last byte was sent, or the answer was cut."""
        return self._duration + self._at_once

    @property
    def answers(self) -> int:
        """The number of answers."""
        return sum(self._duration.counts) + sum(self._at_once.counts)

    def count(self, sent: int, first_byte: float, duration: float) -> None:
        """Count one answer: the bytes of content that were sent, and two times in seconds since its request."""
        self.bytes += sent
        self._first_byte.observe(first_byte)
        self._duration.observe(duration)

    def count_at_once(self, sent: int, duration: float) -> None:
        """Count one answer whose first and last byte were sent together."""
        self.bytes += sent
        self._at_once.observe(duration)


class Requests:
    """The answers of a server, by kind and outcome."""

    def __init__(self) -> None:
        self._tallies = {(kind, outcome): Tally() for kind in Kind for outcome in Outcome}
        self.cut = {(kind, by): 0 for kind in Kind for by in CutBy}
        """Answers that ended before their last byte."""

    def tally(self, kind: Kind, outcome: Outcome) -> Tally:
        """Return the answers of one kind and outcome."""
        return self._tallies[kind, outcome]

    def tallies(self) -> Iterator[tuple[Kind, Outcome, Tally]]:
        """Yield all answers by kind and outcome."""
        return ((kind, outcome, tally) for (kind, outcome), tally in self._tallies.items())


def kind_of(path: str) -> Kind:
    """Return what a request for this path is for; a repository may have the name `blobs`."""
    match path.split("/"):
        case ["", "v2", _, *_, "manifests", _]:
            return Kind.MANIFEST
        case ["", "v2", _, *_, "blobs", _]:
            return Kind.BLOB
    return Kind.OTHER


def outcome_of(status: int, hit: bool | None) -> Outcome:
    """Return the outcome of an answer; `hit` is None where the cache was not involved."""
    if status >= 400:
        return Outcome.SERVER_ERROR if status >= 500 else Outcome.CLIENT_ERROR
    return {True: Outcome.HIT, False: Outcome.MISS, None: Outcome.NONE}[hit]
