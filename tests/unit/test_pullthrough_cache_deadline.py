"""The deadline for the start of a response."""

from __future__ import annotations

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ociregistry.errors import Unavailable
from ociregistry.pullthrough.waiting import ANSWER_DEADLINE, within_deadline
from tests.unit.support.common import failed, fired


def waiting(clock: Clock) -> tuple[Deferred[str], Deferred[str]]:
    """Return the awaited work and the Deferred that waits for it."""
    work: Deferred[str] = Deferred()
    return work, Deferred.fromCoroutine(within_deadline(work, clock, "docker.io/library/nginx:1"))


def test_deadline_is_before_containerd_times_out() -> None:
    assert 20 <= ANSWER_DEADLINE < 30


def test_result_in_time_is_returned(clock: Clock) -> None:
    work, waits = waiting(clock)
    clock.advance(ANSWER_DEADLINE - 0.1)
    work.callback("here")
    assert fired(waits) == "here"
    assert clock.getDelayedCalls() == []


@pytest.mark.parametrize("error", [Unavailable("down"), ZeroDivisionError("a defect")])
def test_failure_is_passed_on(clock: Clock, error: Exception) -> None:
    work, waits = waiting(clock)
    work.errback(error)
    assert failed(waits, type(error)) is error
    assert clock.getDelayedCalls() == []


def test_timeout_is_unavailable(clock: Clock) -> None:
    work, waits = waiting(clock)
    clock.advance(ANSWER_DEADLINE)
    message = failed(waits, Unavailable).message
    assert message == "docker.io/library/nginx:1: the upstream gave no answer within 25 s"
    assert work.called
