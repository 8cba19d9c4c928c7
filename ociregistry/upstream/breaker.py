"""Circuit breakers: a host that cannot be reached is not asked again and again, but probed."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable
from math import ceil

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from ociregistry.errors import Unavailable
from ociregistry.upstream.origin import Origin

_FIRST = 1.0
_LONGEST = 30.0
"""Seconds from one probe of a link that is down to the next, at most."""
_MOST_KEPT = 1000


class LinkDown(Unavailable):
    """A host was not asked, because it could not be reached a moment ago.

    `refused` tells whether it then refused the connection, or did not speak TLS: http may do.
    """

    def __init__(self, message: str, retry_after: int, *, refused: bool = False) -> None:
        super().__init__(message, retry_after)
        self.refused = refused


class Attempt:
    """One request on a link; it tells how it went, once."""

    def __init__(self, breaker: CircuitBreaker, began: float) -> None:
        self._breaker = breaker
        self._began = began

    def answered(self) -> None:
        """An answer came, whatever it says."""
        self._breaker.ended(self)
        self._breaker.answered()

    def failed(self, why: str, *, refused: bool = False) -> None:
        """The look-up, the connection or the handshake failed, or no byte came in time."""
        self._breaker.ended(self)
        self._breaker.failed(self._began, why, refused=refused)

    def abandoned(self) -> None:
        """Nothing is known."""
        self._breaker.ended(self)


class CircuitBreaker:
    """The way to one origin. What is tried on it tells how it went; each change is one warn line.

    While it is down, one request at a time passes, as a probe: the first after 1 s, then at distances that double
    up to 30 s. Whoever insists passes always, and is a probe if there is none.
    """

    log = Logger(namespace="ociregistry.upstream")

    def __init__(self, name: str, clock: IReactorTime, jitter: Callable[[], float] = random.random) -> None:
        """`jitter` gives numbers from 0 to 1."""
        self._name = name
        self._clock = clock
        self._jitter = jitter
        self._down_since: float | None = None
        self._down_until = 0.0
        self._distance = 0.0
        self._probe: Attempt | None = None
        self._why = ""
        self._refused = False
        self._changed = clock.seconds()

    def enter(self, who: str, *, insist: bool = False) -> Attempt:
        """To be called before a request for the upstream `who`; raises `LinkDown`."""
        now = self._clock.seconds()
        attempt = Attempt(self, now)
        if self._down_since is None:
            return attempt
        if not insist and (self._probe is not None or now < self._down_until):
            wait = max(1, ceil(self._down_until - now))
            why = f"{who}: {self._name} could not be reached a moment ago: {self._why}"
            raise LinkDown(why, wait, refused=self._refused)
        self._probe = self._probe or attempt
        return attempt

    def ended(self, attempt: Attempt) -> None:
        """It is no probe any more, if it was one."""
        if attempt is self._probe:
            self._probe = None

    def answered(self) -> None:
        """It can be reached."""
        if self._down_since is not None:
            seconds = self._clock.seconds() - self._down_since
            self._down_since = self._probe = None
            self._changed = self._clock.seconds()
            self.log.warn("{host} can be reached again, after {seconds:.0f} s", host=self._name, seconds=seconds)

    def failed(self, began: float, why: str, *, refused: bool = False) -> None:
        """What `began` then found that it cannot be reached."""
        now = self._clock.seconds()
        if began < self._changed:
            # It speaks of the time before, and so do all that were under way when the link broke.
            return
        if self._down_since is None:
            self._down_since, self._distance = now, _FIRST
            self.log.warn("{host} cannot be reached: {why}", host=self._name, why=why)
        else:
            self._distance = min(_LONGEST, self._distance * 2)
        self._changed = now
        self._why, self._refused = why, refused
        self._down_until = now + self._distance * (0.5 + self._jitter() / 2)


class CircuitBreakers:
    """The links to all origins."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._kept: OrderedDict[Origin, CircuitBreaker] = OrderedDict()

    def to(self, origin: Origin) -> CircuitBreaker:
        """The link to `origin`; those used last are kept."""
        breaker = self._kept.pop(origin, None) or CircuitBreaker(f"{origin.host}:{origin.port}", self._clock)
        self._kept[origin] = breaker
        if len(self._kept) > _MOST_KEPT:
            self._kept.popitem(last=False)
        return breaker
