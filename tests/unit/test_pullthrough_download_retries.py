"""When a broken download tries again."""

from __future__ import annotations

import itertools

from ociregistry.context import Priority
from ociregistry.pullthrough.transfer import Retries


def waits(retries: Retries, count: int, priority: Priority, failing_after: float = 0.0) -> list[float]:
    """How long it waits before each of `count` tries, each of which takes so long to fail."""
    now, found = 0.0, []
    for _ in range(count):
        found.append(retries.wait(now, priority))
        now += found[-1] + failing_after
    return found


def test_the_first_try_comes_at_once_and_the_others_at_most_5_s_apart() -> None:
    """While somebody waits; the longest waits, without jitter to shorten them."""
    assert waits(Retries(0.0, lambda: 1.0), 7, Priority.CLIENT) == [0, 0.5, 1, 2, 4, 5, 5]


def test_at_most_30_s_apart_when_nobody_waits() -> None:
    """The link is left in peace."""
    assert waits(Retries(0.0, lambda: 1.0), 10, Priority.BACKGROUND)[-3:] == [30, 30, 30]


def test_jitter_takes_away_up_to_half() -> None:
    """So that many downloads do not try in step."""
    numbers = itertools.cycle([0.0, 0.5, 1.0])
    assert waits(Retries(0.0, lambda: next(numbers)), 7, Priority.CLIENT)[-3:] == [3.0, 5.0, 2.5]


def test_a_try_that_took_long_is_followed_at_once() -> None:
    """The distance is from try to try: a dial that hangs for 10 s has waited enough."""
    assert waits(Retries(0.0, lambda: 1.0), 7, Priority.CLIENT, failing_after=10.0) == [0] * 7


def test_after_hours_of_failures_tries_go_on() -> None:
    """Two to the power of their number is more than a float can hold after 85 minutes."""
    assert waits(Retries(0.0, lambda: 1.0), 1100, Priority.CLIENT)[-1] == 5


def test_progress_begins_anew() -> None:
    """After bytes came the next break is taken up at once."""
    retries = Retries(0.0, lambda: 1.0)
    waits(retries, 6, Priority.CLIENT)
    retries.progress(100.0)
    assert retries.wait(100.0, Priority.CLIENT) == 0


def test_it_never_gives_up_while_somebody_waits() -> None:
    """And after five minutes without a byte when nobody does."""
    retries = Retries(0.0, lambda: 1.0)
    assert not retries.exhausted(1e9, Priority.CLIENT)
    assert not retries.exhausted(299.0, Priority.BACKGROUND)
    assert retries.exhausted(300.0, Priority.BACKGROUND)
