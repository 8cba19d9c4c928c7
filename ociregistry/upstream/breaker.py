"""Circuit breakers: while a host cannot be reached, only a few probes are sent to it."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import ceil

from cachetools import LRUCache
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from ociregistry.concurrency import Backoff
from ociregistry.config.proxy import Proxy
from ociregistry.context import Priority
from ociregistry.errors import Unavailable
from ociregistry.upstream.origin import Origin

_BACKOFF = Backoff(first=1.0, longest=30.0)
"""From a failure to the next probe."""
_MOST_BREAKERS = 1000


class LinkDown(Unavailable):
    """A host was not asked, because its circuit breaker is open.

    `refused` tells whether the host refused the last connection or did not speak TLS, so that http may work.
    """

    def __init__(self, message: str, retry_after: int, *, refused: bool = False) -> None:
        super().__init__(message, retry_after)
        self.refused = refused


class Attempt:
    """One request through a circuit breaker. Its outcome is reported once: by answered, failed or abandoned."""

    def __init__(self, breaker: CircuitBreaker, began: float) -> None:
        self._breaker = breaker
        self._began = began

    def answered(self) -> None:
        """Report that a response came, of any status."""
        self._breaker.ended(self)
        self._breaker.answered()

    def failed(self, why: str, *, refused: bool = False) -> None:
        """Report that the name look-up, the connection or the handshake failed, or that no byte came in time."""
        self._breaker.ended(self)
        self._breaker.failed(self._began, why, refused=refused)

    def abandoned(self) -> None:
        """Report that the request tells nothing about the host: it was cancelled, denied, or failed otherwise."""
        self._breaker.ended(self)


class CircuitBreaker:
    """The circuit breaker of one origin or proxy: opens when the host cannot be reached, closes when it can again.

    Each change is logged as one line at level warn. While the breaker is open, one request at a time passes as a
    probe: the first after 1 s, then after intervals that double up to 30 s, each shortened at random by up to half.
    An urgent request always passes, and is the probe if there is none.
    """

    log = Logger(namespace="ociregistry.upstream")

    def __init__(self, name: str, clock: IReactorTime, jitter: Callable[[], float] = random.random) -> None:
        """Create a closed breaker; `name` is the host for messages, `jitter` returns random numbers from 0 to 1."""
        self._name = name
        self._clock = clock
        self._jitter = jitter
        self._down_since: float | None = None
        self._down_until = 0.0
        self._failures = 0
        self._probe: Attempt | None = None
        self._why = ""
        self._refused = False
        self._changed_at = clock.seconds()

    def enter(self, upstream: str, priority: Priority = Priority.CLIENT) -> Attempt:
        """Register a request to be sent for `upstream`.

        Raises:
            LinkDown: the breaker is open, and the request is neither urgent nor the next probe.
        """
        now = self._clock.seconds()
        attempt = Attempt(self, now)
        if self._down_since is None:
            return attempt
        if priority < Priority.URGENT and (self._probe is not None or now < self._down_until):
            wait = max(1, ceil(self._down_until - now))
            why = f"{upstream}: {self._name} could not be reached a moment ago: {self._why}"
            raise LinkDown(why, wait, refused=self._refused)
        self._probe = self._probe or attempt
        return attempt

    def ended(self, attempt: Attempt) -> None:
        """Make room for the next probe if `attempt` was the current one."""
        if attempt is self._probe:
            self._probe = None

    def answered(self) -> None:
        """Close the breaker: the host can be reached."""
        if self._down_since is not None:
            seconds = self._clock.seconds() - self._down_since
            self._down_since = self._probe = None
            self._changed_at = self._clock.seconds()
            self.log.warn("{host} can be reached again, after {seconds:.0f} s", host=self._name, seconds=seconds)

    def failed(self, began: float, why: str, *, refused: bool = False) -> None:
        """Open the breaker, or lengthen its interval: a request sent at the time `began` could not reach the host."""
        now = self._clock.seconds()
        if began < self._changed_at:
            # Sent before the last change of state: all requests in flight at an outage count as one failure.
            return
        if self._down_since is None:
            self._down_since, self._failures = now, 0
            self.log.warn("{host} cannot be reached: {why}", host=self._name, why=why)
        self._failures += 1
        self._changed_at = now
        self._why, self._refused = why, refused
        self._down_until = now + _BACKOFF.interval(self._failures, self._jitter())


class CircuitBreakers:
    """The circuit breakers of all origins and proxies; the 1000 used last are kept."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._breakers: LRUCache[tuple[Origin | Proxy, Proxy | None], CircuitBreaker] = LRUCache(_MOST_BREAKERS)

    def get(self, target: Origin | Proxy, through: Proxy | None = None) -> CircuitBreaker:
        """Return the circuit breaker of `target` where it is asked directly, or of `target` behind a proxy."""
        breaker = self._breakers.get((target, through))
        if breaker is None:
            name = f"proxy {target}" if isinstance(target, Proxy) else f"{target.host}:{target.port}"
            breaker = self._breakers[target, through] = CircuitBreaker(name, self._clock)
        return breaker
