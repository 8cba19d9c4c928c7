"""The connection limit of an upstream: slots for blobs, and two reserved ones."""

from __future__ import annotations

import pytest
from twisted.internet.defer import CancelledError, Deferred

from ociregistry.context import FROM_CLIENT
from ociregistry.upstream.registry import ConnectionLimit
from tests.unit.support.common import failed, fired


class LimitHarness:
    """A connection limit and its users."""

    def __init__(self, most: int) -> None:
        self.limit = ConnectionLimit(most)

    def blob(self) -> Deferred[None]:
        """Request a slot for a blob."""
        return Deferred.fromCoroutine(self.limit.acquire(reserved=False))

    def small(self) -> tuple[Deferred[None], Deferred[None]]:
        """Request a slot for a small request; return Deferreds that fire with the slot and that end the request."""
        begun: Deferred[None] = Deferred()
        over: Deferred[None] = Deferred()

        async def occupy() -> None:
            async with self.limit.for_small(FROM_CLIENT):
                begun.callback(None)
                await over

        self.last = Deferred.fromCoroutine(occupy())
        return begun, over

    def free(self) -> int:
        """Return how many blobs could start now; their slots are freed again."""
        waiting: list[Deferred[None]] = []
        while not waiting or waiting[-1].called:
            waiting.append(self.blob())
        last = waiting.pop()
        last.cancel()
        last.addErrback(lambda _: None)
        for _ in waiting:
            self.limit.release(reserved=False)
        return len(waiting)


def have_slots(waiting: list[Deferred[None]]) -> list[bool]:
    """Return for each waiter whether it has a slot."""
    return [one.called for one in waiting]


@pytest.mark.parametrize("most", [1, 2, 16])
def test_blob_slots_are_limited(most: int) -> None:
    harness = LimitHarness(most)
    blobs = [harness.blob() for _ in range(most + 2)]
    assert have_slots(blobs) == [True] * most + [False] * 2
    harness.limit.release(reserved=False)
    assert have_slots(blobs) == [True] * (most + 1) + [False]


@pytest.mark.parametrize("most", [1, 16])
def test_two_slots_are_reserved_for_small_requests(most: int) -> None:
    harness = LimitHarness(most)
    for _ in range(most + 5):
        harness.blob()
    small = [harness.small() for _ in range(3)]
    assert have_slots([begun for begun, _ in small]) == [True, True, False]
    small[0][1].callback(None)
    assert small[2][0].called


def test_small_requests_may_use_all_slots() -> None:
    harness = LimitHarness(2)
    small = [harness.small() for _ in range(5)]
    assert have_slots([begun for begun, _ in small]) == [True] * 4 + [False]
    blob = harness.blob()
    assert not blob.called
    for _, over in small[:2]:
        over.callback(None)
    # In order of arrival.
    assert (small[4][0].called, blob.called) == (True, True)


def test_small_request_frees_its_slot_on_any_end() -> None:
    harness = LimitHarness(1)
    for _ in range(5):
        _, over = harness.small()
        over.errback(ZeroDivisionError())
        failed(harness.last, ZeroDivisionError)
        harness.small()
        harness.last.cancel()
        harness.last.addErrback(lambda _: None)
    begun = [harness.small()[0] for _ in range(3)]
    assert have_slots(begun) == [True] * 3


def test_cancelled_blob_waiter_frees_its_slot() -> None:
    harness = LimitHarness(2)
    fired(harness.blob())
    fired(harness.blob())
    waiting = [harness.blob() for _ in range(10)]
    for one in waiting[:9]:
        one.cancel()
        one.addErrback(lambda _: None)
    harness.limit.release(reserved=False)
    assert waiting[9].called
    harness.limit.release(reserved=False)
    harness.limit.release(reserved=False)
    assert harness.free() == 2


def test_blob_waiter_behind_small_requests_frees_its_slot() -> None:
    """It has a blob slot by then and waits for one of all slots."""
    harness = LimitHarness(1)
    small = [harness.small() for _ in range(3)]
    waiting = harness.blob()
    assert not waiting.called
    waiting.cancel()
    failed(waiting, CancelledError)
    for _, over in small:
        over.callback(None)
    assert harness.free() == 1


def test_cancelled_small_waiter_frees_its_slot() -> None:
    harness = LimitHarness(1)
    small = [harness.small() for _ in range(3)]
    waiting = [harness.small() for _ in range(3)]
    harness.last.cancel()
    harness.last.addErrback(lambda _: None)
    for _, over in [*small, *waiting[:2]]:
        over.callback(None)
    assert not waiting[2][0].called
    assert have_slots([harness.small()[0] for _ in range(3)]) == [True] * 3


def test_small_blob_uses_slots_like_a_manifest() -> None:
    limit = ConnectionLimit(1)
    fired(Deferred.fromCoroutine(limit.acquire(reserved=False)))
    waiting = Deferred.fromCoroutine(limit.acquire(reserved=False))
    for _ in range(2):
        fired(Deferred.fromCoroutine(limit.acquire(reserved=True)))
    third = Deferred.fromCoroutine(limit.acquire(reserved=True))
    assert not waiting.called
    assert not third.called
    limit.release(reserved=True)
    assert third.called
    limit.release(reserved=False)
    assert waiting.called
