"""How many requests an upstream gets at once: so many for blobs, and two that blobs do not get."""

from __future__ import annotations

import pytest
from twisted.internet.defer import CancelledError, Deferred

from ociregistry.upstream.registry import ConnectionLimit
from tests.unit.support.doubles import failed, fired


class Busy:
    """The slots of an upstream, and who has them."""

    def __init__(self, most: int) -> None:
        self.limit = ConnectionLimit(most)

    def blob(self) -> Deferred[None]:
        """Waits for a slot for a blob."""
        return Deferred.fromCoroutine(self.limit.acquire(reserved=False))

    def small(self) -> tuple[Deferred[None], Deferred[None]]:
        """Waits for a slot for something small; the first Deferred fires when it has it, the second ends it."""
        begun: Deferred[None] = Deferred()
        over: Deferred[None] = Deferred()

        async def occupy() -> None:
            async with self.limit.for_small():
                begun.callback(None)
                await over

        self.last = Deferred.fromCoroutine(occupy())
        return begun, over

    def free(self) -> int:
        """How many blobs could begin now, and as many are given back."""
        waiting: list[Deferred[None]] = []
        while not waiting or waiting[-1].called:
            waiting.append(self.blob())
        last = waiting.pop()
        last.cancel()
        last.addErrback(lambda _: None)
        for _ in waiting:
            self.limit.release(reserved=False)
        return len(waiting)


def had(waiting: list[Deferred[None]]) -> list[bool]:
    """Who of them has a slot."""
    return [one.called for one in waiting]


@pytest.mark.parametrize("most", [1, 2, 16])
def test_so_many_blobs_at_once_and_no_more(most: int) -> None:
    busy = Busy(most)
    blobs = [busy.blob() for _ in range(most + 2)]
    assert had(blobs) == [True] * most + [False] * 2
    busy.limit.release(reserved=False)
    assert had(blobs) == [True] * (most + 1) + [False]


@pytest.mark.parametrize("most", [1, 16])
def test_two_more_for_what_is_small(most: int) -> None:
    busy = Busy(most)
    for _ in range(most + 5):
        busy.blob()
    small = [busy.small() for _ in range(3)]
    assert had([begun for begun, _ in small]) == [True, True, False]
    small[0][1].callback(None)
    assert small[2][0].called


def test_all_may_be_small() -> None:
    busy = Busy(2)
    small = [busy.small() for _ in range(5)]
    assert had([begun for begun, _ in small]) == [True] * 4 + [False]
    blob = busy.blob()
    assert not blob.called
    for _, over in small[:2]:
        over.callback(None)
    # In the order in which they came.
    assert (small[4][0].called, blob.called) == (True, True)


def test_what_is_small_gives_its_slot_back_however_it_ends() -> None:
    busy = Busy(1)
    for _ in range(5):
        _, over = busy.small()
        over.errback(ZeroDivisionError())
        failed(busy.last, ZeroDivisionError)
        busy.small()
        busy.last.cancel()
        busy.last.addErrback(lambda _: None)
    begun = [busy.small()[0] for _ in range(3)]
    assert had(begun) == [True] * 3


def test_who_waits_in_vain_leaves_no_slot_behind() -> None:
    busy = Busy(2)
    fired(busy.blob())
    fired(busy.blob())
    waiting = [busy.blob() for _ in range(10)]
    for one in waiting[:9]:
        one.cancel()
        one.addErrback(lambda _: None)
    busy.limit.release(reserved=False)
    assert waiting[9].called
    busy.limit.release(reserved=False)
    busy.limit.release(reserved=False)
    assert busy.free() == 2


def test_nor_does_who_waits_behind_what_is_small() -> None:
    """A blob has one of the blobs' slots by then, and waits for one of all."""
    busy = Busy(1)
    small = [busy.small() for _ in range(3)]
    waiting = busy.blob()
    assert not waiting.called
    waiting.cancel()
    failed(waiting, CancelledError)
    for _, over in small:
        over.callback(None)
    assert busy.free() == 1


def test_a_small_thing_that_waits_in_vain_leaves_none_behind() -> None:
    busy = Busy(1)
    small = [busy.small() for _ in range(3)]
    waiting = [busy.small() for _ in range(3)]
    busy.last.cancel()
    busy.last.addErrback(lambda _: None)
    for _, over in [*small, *waiting[:2]]:
        over.callback(None)
    assert not waiting[2][0].called
    assert had([busy.small()[0] for _ in range(3)]) == [True] * 3


def test_a_small_blob_is_as_small_as_a_manifest() -> None:
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
