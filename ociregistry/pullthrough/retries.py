"""When a broken download tries again."""

from __future__ import annotations

from collections.abc import Callable

_FIRST = 0.5
_WATCHED = 5.0
"""Seconds, at most, from one try to the next while somebody waits."""
_UNWATCHED = 30.0
_GIVE_UP = 300.0
"""Seconds without a byte, and without anybody who waits, after which the download ends; its partial stays."""


class Retries:
    """Counts the tries since the last progress. All times are in seconds; `jitter` gives numbers from 0 to 1."""

    def __init__(self, now: float, jitter: Callable[[], float]) -> None:
        self._jitter = jitter
        self.progress(now)

    def progress(self, now: float) -> None:
        """Bytes came."""
        self._progress = now
        self._tried = now
        self._tries = 0

    def exhausted(self, now: float, *, watched: bool) -> bool:
        """Whether it is time to give up."""
        return not watched and now - self._progress >= _GIVE_UP

    def wait(self, now: float, *, watched: bool) -> float:
        """How long from `now` to the next try, which counts as made then.

        The first comes at once; the distance of the others doubles. It is measured from try to try: one that
        took long to fail is followed at once.
        """
        longest = _WATCHED if watched else _UNWATCHED
        distance = min(longest, _FIRST * 2 ** (self._tries - 1)) if self._tries else 0.0
        wait = max(0.0, self._tried + distance * (0.5 + self._jitter() / 2) - now)
        self._tries += 1
        self._tried = now + wait
        return wait
