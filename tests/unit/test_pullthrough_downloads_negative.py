"""The negative cache: unavailable blobs are remembered for a minute."""

from __future__ import annotations

import pytest
from twisted.internet.task import Clock

from ociregistry.errors import BlobUnknown
from ociregistry.names import Digest
from ociregistry.pullthrough.downloads import NegativeCache
from tests.unit.support.common import image

APP, ELSEWHERE = image("reg.example/team/app:1").repository, image("else.example/team/app:1").repository
BLOB, OTHER = Digest.of(b"blob"), Digest.of(b"other")
GONE = BlobUnknown("reg.example: it answered 404")


def test_error_is_remembered_for_a_minute(clock: Clock) -> None:
    clock.advance(1000)
    broken = NegativeCache(clock)
    broken.check(APP, BLOB)
    broken.remember(APP, BLOB, GONE)
    for _ in range(2):
        with pytest.raises(BlobUnknown) as raised:
            broken.check(APP, BLOB)
        # A new error for each caller: the traceback of a shared one would grow with every client.
        assert raised.value is not GONE
        assert raised.value.message == GONE.message
        clock.advance(59.875 / 2)
    with pytest.raises(BlobUnknown):
        broken.check(APP, BLOB)
    clock.advance(0.125)
    for _ in range(2):
        broken.check(APP, BLOB)
    assert len(broken._errors) == 0


def test_other_blobs_and_repositories_are_unaffected(clock: Clock) -> None:
    broken = NegativeCache(clock)
    broken.remember(APP, BLOB, GONE)
    broken.check(APP, OTHER)
    broken.check(ELSEWHERE, BLOB)


def test_new_error_restarts_the_minute(clock: Clock) -> None:
    broken = NegativeCache(clock)
    broken.remember(APP, BLOB, GONE)
    clock.advance(45)
    broken.remember(APP, BLOB, BlobUnknown("another"))
    clock.advance(45)
    with pytest.raises(BlobUnknown, match="another"):
        broken.check(APP, BLOB)


def test_memory_is_bounded(clock: Clock) -> None:
    broken = NegativeCache(clock)
    for number in range(5000):
        broken.remember(APP, Digest.of(str(number).encode()), GONE)
        assert len(broken._errors) <= 1000
    with pytest.raises(BlobUnknown):
        broken.check(APP, Digest.of(b"4999"))


def test_least_recently_used_error_is_dropped_when_full(clock: Clock) -> None:
    negative = NegativeCache(clock)
    blobs = [Digest.of(str(number).encode()) for number in range(1001)]
    for blob in blobs[:1000]:
        negative.remember(APP, blob, GONE)
    with pytest.raises(BlobUnknown):
        negative.check(APP, blobs[0])
    negative.remember(APP, blobs[1000], GONE)
    negative.check(APP, blobs[1])
    for blob in (blobs[0], blobs[2], blobs[1000]):
        with pytest.raises(BlobUnknown):
            negative.check(APP, blob)
