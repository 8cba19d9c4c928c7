"""Circuit breakers: hosts that cannot be reached, or are silent, are known as down and asked by probes alone.

`probing` sends the probes. A breaker also learns how long a slow host takes for its first byte.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil

from twisted.internet import defer
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from ociregistry.concurrency import Backoff, Event
from ociregistry.config.proxy import Proxy
from ociregistry.context import Priority
from ociregistry.errors import Unavailable
from ociregistry.upstream.origin import Origin
from ociregistry.upstream.traffic import MOST_NAMES

_log = Logger(namespace="ociregistry.upstream")

_BACKOFF = Backoff(first=1.0, longest=30.0)
"""From the start of a probe to the next; also from the first failure to the first probe."""
_MARGIN = 0.5
"""Seconds that Retry-After adds, in which a probe is answered."""
_PROBE_AWAITED = 1.5
"""Seconds from the start of a probe for which a client waits for its outcome."""
PATIENCE = 10.0
"""Seconds without a byte from a host, while a request waits for it, after which it counts as down."""
LONGEST_PATIENCE = 25.0
"""Seconds of the same for a host that was slow of late, and of the life of a probe."""
_SLOW_FOR = 600.0
"""Seconds for which it is remembered that a host was slow."""
_ROUNDING = 0.001
_MOST_BREAKERS = 1000


class LinkDown(Unavailable):
    """A host was not asked, because its circuit breaker is open; or the breaker opened while a request waited.

    `refused` tells whether the host refused the last connection or did not speak TLS, so that http may work.
    """

    def __init__(
        self, message: str, retry_after: int, *, refused: bool = False, breaker: CircuitBreaker | None = None
    ) -> None:
        super().__init__(message, retry_after)
        self.refused = refused
        self._breaker = breaker

    def renewed(self) -> LinkDown | None:
        """Return this error with the present Retry-After; None where the host can be reached again."""
        if self._breaker is None or not self._breaker.is_open:
            return None
        return LinkDown(self.message, self._breaker.retry_after, refused=self.refused, breaker=self._breaker)

    def with_message(self, message: str) -> LinkDown:
        """Return this error with another message."""
        return LinkDown(message, self.retry_after, refused=self.refused, breaker=self._breaker)

    async def ends_soon(self) -> bool:
        """Wait for a probe that has just begun, for at most 1.5 s; tell whether the host can be reached again."""
        return self._breaker is not None and await self._breaker.closes_soon()


class Attempt:
    """One request through a circuit breaker. Its outcome is reported once: by answered, failed or abandoned."""

    def __init__(self, breaker: CircuitBreaker, upstream: str, began: float, down: LinkDown | None) -> None:
        self._breaker = breaker
        self.upstream = upstream
        self.began = began
        self.down = down
        """Why the breaker was open when the request was sent; None where it was closed."""
        self.link_down: Callable[[LinkDown], object] = lambda error: None
        """Called when the breaker opens because the host is silent; the request may go on."""
        self.give_up: Callable[[], object] = lambda: None
        """Called where the host answers others again, and this request has waited too long for its connection."""

    def answered(self) -> None:
        """Report that a response came, of any status."""
        self._breaker.heard()
        self._breaker.answered(self)
        self._breaker.ended(self)

    def failed(self, why: str, *, refused: bool = False) -> None:
        """Report that the name look-up, the connection or the handshake failed, or that no byte came in time."""
        self._breaker.failed(self.began, why, refused=refused)
        self._breaker.ended(self)

    def abandoned(self) -> None:
        """Report that the request tells nothing about the host: it was cancelled, denied, or failed otherwise."""
        self._breaker.ended(self)


@dataclass(frozen=True, slots=True)
class LinkState:
    """What is known of a host that was asked. Times are in seconds."""

    host: str
    """Its name and port; a proxy is called so."""
    named: bool
    """Whether metrics tell its name: clients may ask for any number of hosts."""
    up: bool
    for_seconds: float
    """How long it has been up or down."""
    why: str
    """Why it counts as down; empty where it is up."""
    next_probe: float | None
    """Until a probe may be sent; None where it is up."""
    wanted: bool = False
    """Whether it is down while something from it is wanted: a request of late, a pending image or a download."""


class CircuitBreaker:
    """The circuit breaker of one origin or proxy: opens when the host cannot be reached, closes when it can again.

    It opens when a request fails, and when no byte comes for 10 s from a host that requests wait for, or longer if
    the host has been slow. Such a request goes on, and its response closes the breaker. Each change is logged as one
    line at level warn.

    While the breaker is open, requests of clients are refused, and of the others one at a time passes as a probe: the
    first after 1 s, then at intervals that double up to 30 s, each shortened at random by up to half. An urgent
    request always passes, and is the probe if there is none.
    """

    def __init__(
        self,
        name: str,
        clock: IReactorTime,
        jitter: Callable[[], float] = random.random,
        *,
        watches: bool = True,
        behind_proxy: bool = False,
    ) -> None:
        """Create a closed breaker; `name` is the host for messages, `jitter` returns random numbers from 0 to 1.

        With watches=False, silence does not open it. `behind_proxy` tells that its connections are those to a proxy.
        """
        self.name = name
        """The host for messages."""
        self._clock = clock
        self._jitter = jitter
        self._watches = watches
        self._behind_proxy = behind_proxy
        self._down_since: float | None = None
        self._down_until = 0.0
        self._failures = 0
        self._probe: Attempt | None = None
        self._why = ""
        self._refused = False
        self._changed_at = clock.seconds()
        self._waiting: dict[Attempt, None] = {}
        """The requests that wait for the headers of a response, the oldest first."""
        self._heard_at = float("-inf")
        self._answered_at = float("-inf")
        """When anything first came from the host itself."""
        self._lookups = 0
        self._timer: IDelayedCall | None = None
        self._slowest = 0.0
        self._slow_until = 0.0
        self._probed = Event()

    @property
    def is_open(self) -> bool:
        """Whether the host is known to be down."""
        return self._down_since is not None

    @property
    def has_answered(self) -> bool:
        """Whether anything has ever come from the host itself; a connection to its proxy tells nothing of it."""
        return self._answered_at > float("-inf")

    @property
    def is_known(self) -> bool:
        """Whether anything is known of the host: it has answered, or could not be reached.

        Nothing is known where all requests were denied or cancelled before that.
        """
        return self.is_open or self.has_answered

    def link(self, *, named: bool, wanted: bool = False) -> LinkState:
        """Return what is known of the host.

        Metrics tell its name if it is `named`; `wanted` tells whether something from it is wanted.
        """
        since = max(self._changed_at, self._answered_at) if self._down_since is None else self._down_since
        return LinkState(
            host=self.name,
            named=named,
            up=not self.is_open,
            for_seconds=self._clock.seconds() - since,
            why=self._why if self.is_open else "",
            next_probe=self.next_probe if self.is_open else None,
            wanted=self.is_open and wanted,
        )

    @property
    def in_use(self) -> bool:
        """Whether requests wait for the headers of a response."""
        return bool(self._waiting)

    @property
    def retry_after(self) -> int:
        """Seconds until the outcome of the next probe should be known."""
        return max(1, ceil(self._down_until + _MARGIN - self._clock.seconds()))

    @property
    def next_probe(self) -> float:
        """Seconds until a probe may be sent; 0 if that is now, or as soon as the present one has ended."""
        return max(0.0, self._down_until - self._clock.seconds())

    @property
    def probe_due(self) -> bool:
        """Whether the breaker is open and a probe would pass."""
        return self.is_open and self._probe is None and not self.next_probe

    @property
    def _patience(self) -> float:
        if self._clock.seconds() >= self._slow_until:
            return PATIENCE
        return min(LONGEST_PATIENCE, 2 * self._slowest)

    def enter(self, upstream: str, priority: Priority = Priority.CLIENT) -> Attempt:
        """Register a request to be sent for `upstream`.

        Raises:
            LinkDown: the breaker is open, and the request is neither urgent nor the next probe.
        """
        now = self._clock.seconds()
        down = self._down(upstream) if self.is_open else None
        if down is not None and priority < Priority.URGENT and not (priority < Priority.CLIENT and self.probe_due):
            raise down
        attempt = Attempt(self, upstream, now, down)
        if down is not None and self._probe is None:
            self._probe = attempt
            # From one start to the next, so that a probe that takes long to fail is followed at once.
            self._down_until = now + _BACKOFF.interval(self._failures + 1, self._jitter())
        self._waiting[attempt] = None
        self._watch()
        return attempt

    def _down(self, upstream: str) -> LinkDown:
        why = f"{upstream}: {self.name} could not be reached a moment ago: {self._why}"
        return LinkDown(why, self.retry_after, refused=self._refused, breaker=self)

    def heard(self) -> None:
        """Note that something came from the host: it accepted a connection, or sent bytes."""
        self._heard_at = self._clock.seconds()
        if not self._behind_proxy:
            self._note_answer()

    def _note_answer(self) -> None:
        if not self.has_answered:
            self._answered_at = self._clock.seconds()

    @contextmanager
    def looking_up(self) -> Iterator[None]:
        """Note, while the block runs, that the name of the host is being looked up."""
        self._lookups += 1
        try:
            yield
        finally:
            self._lookups -= 1

    def _watch(self) -> None:
        """Set the timer for the time when the host has been silent for too long; none where no request waits."""
        if not self._waiting or self.is_open or not self._watches:
            if self._timer is not None and self._timer.active():
                self._timer.cancel()
            self._timer = None
        elif self._timer is None:
            left = self._silent_since + self._patience - self._clock.seconds()
            self._timer = self._clock.callLater(max(0.0, left), self._check)

    @property
    def _silent_since(self) -> float:
        return max(self._heard_at, next(iter(self._waiting)).began)

    def _check(self) -> None:
        """Open the breaker if the host was silent for too long, and tell all requests that wait for it."""
        self._timer = None
        patience = self._patience
        if self._clock.seconds() - self._silent_since < patience - _ROUNDING:
            self._watch()
            return
        if self._lookups:
            why = f"host name cannot be resolved: no answer within {patience:.0f} s"
        else:
            why = f"nothing came from it for {patience:.0f} s"
        self._open(why, refused=False)
        for attempt in list(self._waiting):
            attempt.link_down(self._down(attempt.upstream))

    def ended(self, attempt: Attempt) -> None:
        """Make room for the next probe if `attempt` was the current one."""
        self._waiting.pop(attempt, None)
        self._watch()
        if attempt is self._probe:
            self._probe = None
            self._probed.fire()

    def answered(self, attempt: Attempt | None = None) -> None:
        """Close the breaker: the host can be reached; note how long it took for `attempt`."""
        self._note_answer()
        now = self._clock.seconds()
        if attempt is not None and now - attempt.began > PATIENCE:
            self._slowest, self._slow_until = now - attempt.began, now + _SLOW_FOR
        if self._down_since is None:
            return
        _log.warn(
            "{host} can be reached again, after {seconds:.0f} s", host=self.name, seconds=now - self._down_since
        )
        self._down_since = self._probe = None
        self._changed_at = self._heard_at = now
        self._probed.fire()
        self._watch()
        for other in list(self._waiting):
            if other is not attempt and now - other.began >= LONGEST_PATIENCE:
                # After an outage an old TCP connection can take minutes to recover.
                other.give_up()

    def forget(self) -> None:
        """Close the breaker without having heard of the host, as another one is going to stand for it."""
        self._down_since = None
        self._probed.fire()

    async def closes_soon(self) -> bool:
        """Wait while a probe is in its first 1.5 s, or one is due now; tell whether the breaker has closed."""
        now = self._clock.seconds()
        if self.is_open and (self._probe is not None or self.probe_due):
            left = (self._probe.began if self._probe is not None else now) + _PROBE_AWAITED - now
            if left > 0:
                try:
                    await self._probed.wait().addTimeout(left, self._clock)
                except defer.TimeoutError:
                    return False
        return not self.is_open

    def failed(self, began: float, why: str, *, refused: bool = False) -> None:
        """Open the breaker, or lengthen its interval: a request sent at the time `began` could not reach the host."""
        if began >= self._changed_at:
            # Else sent before the last change of state: all requests in flight at an outage count as one failure.
            self._open(why, refused=refused)

    def stalled(self, since: float, why: str) -> None:
        """Open the breaker: a body was silent since the time `since`; unless other bytes came from the host."""
        if self._heard_at <= since + _ROUNDING:
            self.failed(since, why)

    def _open(self, why: str, *, refused: bool) -> None:
        now = self._clock.seconds()
        if self._down_since is None:
            self._down_since, self._failures = now, 0
            self._down_until = now + _BACKOFF.interval(1, self._jitter())
            _log.warn("{host} cannot be reached: {why}", host=self.name, why=why)
        self._failures += 1
        self._changed_at = now
        self._why, self._refused = why, refused
        self._watch()


Key = tuple[Origin | Proxy, Proxy | None]


class CircuitBreakers:
    """The circuit breakers of all origins and proxies; the 1000 used last are kept, and those in use."""

    def __init__(self, clock: IReactorTime, *, watches: bool = True) -> None:
        """Create none yet; with watches=False, silence does not open them."""
        self._clock = clock
        self._watches = watches
        self._breakers: dict[Key, CircuitBreaker] = {}
        """The one used last is the last one."""
        self._named: set[str] = set()
        """Hosts that are not configured, and whose names metrics tell."""

    def get(self, target: Origin | Proxy, through: Proxy | None = None) -> CircuitBreaker:
        """Return the circuit breaker of `target` where it is asked directly, or of `target` behind a proxy."""
        breaker = self._breakers.pop((target, through), None)
        if breaker is None:
            self._make_room()
            name = f"proxy {target}" if isinstance(target, Proxy) else f"{target.host}:{target.port}"
            # A proxy is silent while it waits for a host; whether it can be connected to has a time-out of its own.
            watches = self._watches and not isinstance(target, Proxy)
            breaker = CircuitBreaker(name, self._clock, watches=watches, behind_proxy=through is not None)
        self._breakers[target, through] = breaker
        return breaker

    def links(
        self,
        configured: Callable[[str, int], bool],
        wanted: Callable[[CircuitBreaker], bool] = lambda breaker: False,
    ) -> tuple[LinkState, ...]:
        """Return what is known of hosts; one that is asked in several ways is up if it is up in one of them.

        Left out are those of which nothing is known: a client may ask for a host that is denied.

        Named are those of which `configured` is true, with their host and port; and of the others the first 50 that
        have answered. `wanted` tells whether something from the host of an open breaker is wanted.
        """
        found: dict[str, LinkState] = {}
        for (target, _), breaker in self._breakers.items():
            if not breaker.is_known:
                continue
            known = isinstance(target, Proxy) or configured(target.host, target.port)
            link = breaker.link(named=known or self._names(breaker), wanted=wanted(breaker))
            other = found.get(link.host)
            if other is None or (link.up, link.wanted) > (other.up, other.wanted):
                found[link.host] = link
        return tuple(found.values())

    def _names(self, breaker: CircuitBreaker) -> bool:
        """Tell whether metrics tell the name of this host, which is not configured."""
        if breaker.has_answered and len(self._named) < MOST_NAMES:
            self._named.add(breaker.name)
        return breaker.name in self._named

    def _make_room(self) -> None:
        if len(self._breakers) >= _MOST_BREAKERS:
            unused = next((key for key, breaker in self._breakers.items() if not breaker.in_use), None)
            if unused is not None:
                self._breakers.pop(unused).forget()
