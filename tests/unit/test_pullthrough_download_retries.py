"""Retry schedule of interrupted downloads."""

from __future__ import annotations

import itertools

from ociregistry.context import Priority
from ociregistry.pullthrough.transfer import Retries


def delays(retries: Retries, count: int, priority: Priority, failing_after: float = 0.0) -> list[float]:
    """Return the delays in seconds before `count` attempts that each take `failing_after` seconds to fail."""
    now, found = 0.0, []
    for _ in range(count):
        found.append(retries.wait(now, priority))
        now += found[-1] + failing_after
    return found


def test_first_retry_is_immediate_then_at_most_5_s_apart() -> None:
    """While a client waits; with the longest delays, not shortened by jitter."""
    assert delays(Retries(0.0, lambda: 1.0), 7, Priority.CLIENT) == [0, 0.5, 1, 2, 4, 5, 5]


def test_unwatched_retries_are_at_most_30_s_apart() -> None:
    assert delays(Retries(0.0, lambda: 1.0), 10, Priority.BACKGROUND)[-3:] == [30, 30, 30]


def test_jitter_shortens_delays_by_up_to_half() -> None:
    """It keeps many downloads from retrying at the same time."""
    numbers = itertools.cycle([0.0, 0.5, 1.0])
    assert delays(Retries(0.0, lambda: next(numbers)), 7, Priority.CLIENT)[-3:] == [3.0, 5.0, 2.5]


def test_no_delay_after_a_slow_attempt() -> None:
    """The interval is from attempt to attempt: a connection attempt of 10 s has waited long enough."""
    assert delays(Retries(0.0, lambda: 1.0), 7, Priority.CLIENT, failing_after=10.0) == [0] * 7


def test_retries_continue_after_hours_of_failures() -> None:
    """After 85 minutes, two to the power of the number of failures exceeds a float."""
    assert delays(Retries(0.0, lambda: 1.0), 1100, Priority.CLIENT)[-1] == 5


def test_progress_resets_the_schedule() -> None:
    """After bytes arrived, the next interruption is retried immediately."""
    retries = Retries(0.0, lambda: 1.0)
    delays(retries, 6, Priority.CLIENT)
    retries.progress(100.0)
    assert retries.wait(100.0, Priority.CLIENT) == 0


def test_watched_download_is_never_given_up() -> None:
    """An unwatched one is given up after five minutes without a byte."""
    retries = Retries(0.0, lambda: 1.0)
    assert not retries.exhausted(1e9, Priority.CLIENT)
    assert not retries.exhausted(299.0, Priority.BACKGROUND)
    assert retries.exhausted(300.0, Priority.BACKGROUND)
