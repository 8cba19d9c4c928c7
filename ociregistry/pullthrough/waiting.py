"""Waiting for upstreams: how long a client waits is one thing, how long a request lives is another.

Clients share the requests in flight. A client is answered when its host counts as down, or at its deadline; the
request goes on, and its result is kept for the next try.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Hashable
from dataclasses import replace
from enum import Enum
from typing import Any, Generic, TypeVar

from twisted.internet import defer
from twisted.internet.defer import Deferred, fail
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater

from ociregistry.concurrency import SingleFlight
from ociregistry.context import FROM_CLIENT, Again, Context, Priority, Wanted
from ociregistry.errors import LoopDetected, Unavailable
from ociregistry.upstream.breaker import LinkDown

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

ANSWER_DEADLINE = 25.0
"""Seconds until an answer must be given; containerd gives up on a server that sends no headers for 30 s."""
_IN_A_CHAIN = 10.0
"""Seconds of patience of a cache with another one; each cache in a chain answers 2 s before the one that asks it."""
_HOP = 2.0
_SHORTEST = 2.0

LOOK_AGAIN = 1.0
"""Seconds from the first look for caches that wait for each other to the second."""

Look = Callable[[], Coroutine[Deferred[Any], Any, LoopDetected | None]]
Loops = Callable[[Context], Coroutine[Deferred[Any], Any, LoopDetected | None]]
"""Asks the caches that a request in flight may wait for whether they wait for the one that asks; `Registry.loops`."""


class CacheStatus(Enum):
    """Where an answer is from, as the access log tells it."""

    HIT = "hit"
    """From the store."""
    STALE = "stale"
    """From the store, although the upstream should have been asked, but could not be, or gave no answer."""
    MISS = "miss"
    """From the upstream."""
    SHARED = "shared"
    """From the upstream, by a request or download in flight that another client had begun."""

    @property
    def is_hit(self) -> bool:
        """Whether the answer is from the store."""
        return self in (CacheStatus.HIT, CacheStatus.STALE)

    @classmethod
    def fetched(cls, *, joined: bool) -> CacheStatus:
        """Return the status of an answer from the upstream to a request that this client began, or `joined`."""
        return cls.SHARED if joined else cls.MISS


class DeadlineExceeded(Unavailable):
    """There was no answer in time; a repeated request waits for the same answer."""


def deadline(context: Context) -> float:
    """Return the seconds until a request must be answered: by 25 s, and by 8 s or less if it came through caches."""
    hops = len(context.via.instances)
    if not context.from_cache:
        return ANSWER_DEADLINE
    return max(_SHORTEST, _IN_A_CHAIN - _HOP * hops)


async def within_deadline(
    waiting: Deferred[T],
    clock: IReactorTime,
    what: object,
    context: Context = FROM_CLIENT,
    *,
    slack: float = 0.0,
    of: Callable[[], str] = lambda: "the upstream",
) -> T:
    """Return the result of `waiting`; cancel it `slack` seconds after the deadline of a request with this context.

    Raises:
        DeadlineExceeded: there was no result in time; the message names `what`, and `of` what no answer came.
    """
    seconds = deadline(context)
    waiting.addTimeout(seconds + slack, clock)
    try:
        return await waiting
    except defer.TimeoutError:
        raise DeadlineExceeded(f"{what}: {of()} gave no answer within {seconds:.0f} s") from None


async def unless_down(ask: Callable[[], Coroutine[Deferred[Any], Any, T]], context: Context) -> T:
    """Return the result of `ask`; call it again where a probe that has just begun finds that the link is back.

    Raises:
        LinkDown: the link is down.
    """
    while True:
        try:
            return await ask()
        except LinkDown as down:
            if context.priority < Priority.CLIENT or not await down.ends_soon():
                raise


async def unless_loop(waiting: Deferred[T], look: Look, clock: IReactorTime) -> T:
    """Return the result of `waiting`; look meanwhile, twice, for caches that wait for each other.

    Raises:
        LoopDetected: `look` found, before there was a result, that it would wait for the one that waits for it.
    """
    result: Deferred[T] = Deferred(lambda _: waiting.cancel())

    async def look_twice() -> LoopDetected | None:
        found = await look()
        if found is None:
            # The last cache of a ring may have begun to wait only after it was asked.
            await deferLater(clock, LOOK_AGAIN)
            found = await look()
        return found

    looking = Deferred.fromCoroutine(look_twice())

    def looked(found: LoopDetected | None) -> None:
        if found is not None and not result.called:
            result.errback(found)
            waiting.cancel()

    def ended(outcome: object) -> None:
        if not result.called:
            result.callback(outcome)  # type: ignore[arg-type]  # a Failure, too
        looking.cancel()

    waiting.addBoth(ended)
    looking.addCallback(looked).addErrback(lambda failure: failure.trap(defer.CancelledError))
    return await result


class SharedRequests(Generic[K, T]):
    """The requests in flight for one kind of content, one for each key, and the clients that wait for them."""

    def __init__(self, clock: IReactorTime, of: Callable[[], str] = lambda: "the upstream") -> None:
        """Set up the requests; `of` says what a client waits for in vain, as for `within_deadline`."""
        self._clock = clock
        self._of = of
        self._requests: SingleFlight[K, T] = SingleFlight()
        self._down: dict[K, LinkDown] = {}
        """The requests in flight whose host counts as down."""

    def __contains__(self, key: K) -> bool:
        """Tell whether a request for `key` is in flight."""
        return key in self._requests

    async def wait(
        self,
        key: K,
        start: Callable[[Context], Coroutine[Deferred[Any], Any, T]],
        context: Context,
        again: Again | None = None,
        loops: Loops | None = None,
    ) -> T:
        """Wait for the request for `key`; `start` begins it with the context that it is given.

        `again` repeats it as a probe.

        Raises:
            DeadlineExceeded: there was no result in time.
            LinkDown: the host counts as down; the request may still go on.
            LoopDetected: the request in flight waits for a cache that asks for the same here.
        """

        async def result() -> T:
            if loops is not None and context.from_cache and key in self._requests:
                joined = self._join(key, start, context, again)
                return await unless_loop(joined, lambda: loops(context), self._clock)
            return await self._join(key, start, context, again)

        async def patiently() -> T:
            while True:
                try:
                    return await result()
                except LinkDown:
                    # A command waits for as long as the request goes on.
                    if not (context.patient and key in self._requests):
                        raise

        waiting = Deferred.fromCoroutine(unless_down(patiently, context))
        return await within_deadline(waiting, self._clock, key, context, of=self._of)

    def _join(
        self,
        key: K,
        start: Callable[[Context], Coroutine[Deferred[Any], Any, T]],
        context: Context,
        again: Again | None,
    ) -> Deferred[T]:
        down = self._down.get(key)
        still = down.renewed() if down is not None and not context.patient else None
        if still is not None:
            return fail(still)
        return self._requests.join(key, lambda: self._run(key, start, context, again))

    async def _run(
        self,
        key: K,
        start: Callable[[Context], Coroutine[Deferred[Any], Any, T]],
        context: Context,
        again: Again | None,
    ) -> T:
        def link_down(error: Unavailable) -> None:
            if isinstance(error, LinkDown):
                self._down[key] = error
            self._requests.dismiss(key, error)

        try:
            return await start(replace(context, wanted=Wanted(link_down, again)))
        finally:
            self._down.pop(key, None)
