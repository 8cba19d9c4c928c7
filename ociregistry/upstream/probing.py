"""Probes hosts that are down, so that their return is found without a client that waits for it.

The best probe is a request that a client missed, since its response is kept; otherwise it is `GET /v2/` without
credentials. A host is probed while something from it is wanted: for ten minutes after each request for a client, a
pending image or a download. Addresses are checked as for any other request. As clients can name any number of hosts,
only those that were missed last are probed.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from ociregistry.context import Again
from ociregistry.errors import RegistryError
from ociregistry.upstream.breaker import CircuitBreaker

_log = Logger(namespace="ociregistry.upstream")

_WANTED_FOR = 600.0
"""Seconds for which a host is probed after the last request that missed it."""
_SOONEST = 0.25
"""Seconds from the end of one probe to the start of the next, at least."""
_MOST_HOSTS = 100
"""Hosts that are probed at the same time."""

Ping = Callable[[], Coroutine[Deferred[Any], Any, None]]
"""Sends `GET /v2/` to a host; raises `RegistryError`."""


class Prober(Service):
    """Sends the probes of all circuit breakers, one at a time for each, when they are due."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._probing: dict[CircuitBreaker, _Probing] = {}

    def want(self, breaker: CircuitBreaker, ping: Ping, again: Again | None = None) -> None:
        """Note that a request missed the host of an open breaker; `again` repeats it."""
        if not self.running:
            return
        probing = self._probing.pop(breaker, None)
        if probing is None:
            if len(self._probing) >= _MOST_HOSTS:
                self._probing.pop(next(iter(self._probing))).stop()
            probing = _Probing(breaker, self._clock, lambda: self._probing.pop(breaker))
        # The host that was missed last is the last one.
        self._probing[breaker] = probing
        probing.want(ping, again)

    def probes(self, breaker: CircuitBreaker) -> bool:
        """Tell whether the host of a breaker is probed, because something from it is wanted."""
        return breaker in self._probing

    def stopService(self) -> None:
        """Stop probing; `want` does nothing from now on."""
        super().stopService()
        for probing in self._probing.values():
            probing.stop()
        self._probing.clear()


class _Probing:
    """Probes the host of one circuit breaker until it closes, or until nothing is wanted any more."""

    def __init__(self, breaker: CircuitBreaker, clock: IReactorTime, ended: Callable[[], object]) -> None:
        self._breaker = breaker
        self._clock = clock
        self._ended = ended
        self._until = 0.0
        self._ping: Ping | None = None
        self._again: Again | None = None
        self._timer: IDelayedCall | None = None
        self._running: Deferred[None] | None = None

    def want(self, ping: Ping, again: Again | None) -> None:
        """Probe for ten more minutes, by `again` if it is given."""
        self._until = self._clock.seconds() + _WANTED_FOR
        self._ping = ping
        self._again = again or self._again
        if self._timer is None and self._running is None:
            # Not at once: the request that missed the host has not ended yet.
            self._set_timer(0.0)

    def stop(self) -> None:
        """Stop, and cancel a probe in flight."""
        self._until = 0.0
        if self._timer is not None:
            self._timer.cancel()
        elif self._running is not None:
            self._running.cancel()

    def _set_timer(self, soonest: float) -> None:
        self._timer = self._clock.callLater(max(soonest, self._breaker.next_probe), self._due)

    def _due(self) -> None:
        self._timer = None
        if not self._breaker.is_open or self._clock.seconds() >= self._until:
            self._ended()
        elif self._breaker.probe_due:
            running = self._running = Deferred.fromCoroutine(self._probe())
            running.addBoth(self._probed)
        else:
            # Another request is the probe.
            self._set_timer(_SOONEST)

    async def _probe(self) -> None:
        asked = self._again() if self._again is not None else None
        if asked is not None:
            try:
                await asked
                self._again = None
            except RegistryError as error:
                _log.debug("probe: {why}", why=error.message)
        # It may have been answered, or refused, without this host: by a mirror, or by a token service.
        if self._ping is not None and self._breaker.probe_due:
            try:
                await self._ping()
            except RegistryError as error:
                _log.debug("probe: {why}", why=error.message)

    def _probed(self, result: Failure | None) -> None:
        self._running = None
        if isinstance(result, Failure) and not result.check(CancelledError):
            _log.failure("a defect in probing a host", result)
        if self._until:
            self._set_timer(_SOONEST)
