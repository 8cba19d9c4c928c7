"""How long a client is let wait for the first word of an answer."""

from __future__ import annotations

from typing import TypeVar

from twisted.internet import defer
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime

from ociregistry.errors import Unavailable

T = TypeVar("T")

ANSWER_WITHIN = 25.0
"""Seconds, below the 30 after which containerd gives up on a server that sends no headers."""


class NotYet(Unavailable):
    """The upstream has not answered yet; whoever asks again waits for the same answer."""


async def in_time(waiting: Deferred[T], clock: IReactorTime, what: object) -> T:
    """What `waiting` gives, which may be cancelled; raises `NotYet` when that takes too long."""
    waiting.addTimeout(ANSWER_WITHIN, clock)
    try:
        return await waiting
    except defer.TimeoutError:
        raise NotYet(f"{what}: the upstream gave no answer within {ANSWER_WITHIN:.0f} s") from None
