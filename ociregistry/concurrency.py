"""Events and single flight: several waiters for one result. Back-off: the intervals between tries. A pool of threads.

A Deferred can be awaited only once, and cancelling it cancels the work. Here every waiter gets a Deferred of its own,
which can be cancelled or time out without an effect on the work and on the other waiters.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from threading import Thread
from typing import Any, Generic, ParamSpec, TypeVar

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool

from ociregistry.errors import RegistryError

_log = Logger(namespace="ociregistry")

K = TypeVar("K", bound=Hashable)
P = ParamSpec("P")
T = TypeVar("T")

_MOST_DOUBLINGS = 60
"""More than any back-off needs; 2.0 to the power of 1024 would overflow."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential back-off: intervals in seconds that double from `first` up to `longest`."""

    first: float
    longest: float

    def interval(self, failures: int, jitter: float = 1.0) -> float:
        """Return the seconds from one try to the next after `failures` failures in a row; 0 after none.

        `jitter` is a random number: 1 leaves the interval as it is, and 0 halves it.
        """
        if not failures:
            return 0.0
        interval = min(self.longest, self.first * 2.0 ** min(failures - 1, _MOST_DOUBLINGS))
        return interval * (0.5 + jitter / 2)


class Event:
    """Wakes waiters when some state changes; a waiter checks the state and may wait again."""

    def __init__(self) -> None:
        self._waiting: list[Deferred[None]] = []

    def wait(self) -> Deferred[None]:
        """Return a Deferred that fires at the next `fire`."""
        waiter: Deferred[None] = Deferred(self._waiting.remove)
        self._waiting.append(waiter)
        return waiter

    def fire(self) -> None:
        """Wake all current waiters."""
        waiting, self._waiting = self._waiting, []
        while waiting:
            waiting.pop().callback(None)


class SingleFlight(Generic[K, T]):
    """Runs at most one piece of work per key at a time, and gives its result to all waiters."""

    def __init__(self) -> None:
        self._waiting: dict[K, list[Deferred[T]]] = {}

    def __contains__(self, key: K) -> bool:
        """Tell whether work for `key` is in flight."""
        return key in self._waiting

    def join(self, key: K, start: Callable[[], Coroutine[Deferred[Any], Any, T]]) -> Deferred[T]:
        """Wait for the work for `key`; `start` begins it if none is in flight.

        Returns:
            A Deferred with the result or the failure of the work.
        """
        waiting = self._waiting.get(key)
        begin = waiting is None
        if waiting is None:
            waiting = self._waiting[key] = []
        waiter: Deferred[T] = Deferred(waiting.remove)
        waiting.append(waiter)
        if begin:
            Deferred.fromCoroutine(start()).addBoth(self._finish, key)
        return waiter

    def dismiss(self, key: K, error: RegistryError) -> None:
        """Fail all who wait for the work for `key`; the work goes on, and others may join it."""
        waiting = self._waiting.get(key, [])
        # Emptied in place: a waiter that is cancelled removes itself from this list.
        dismissed = waiting[:]
        waiting.clear()
        for waiter in dismissed:
            waiter.errback(error)

    def _finish(self, result: T | Failure, key: K) -> None:
        waiting = self._waiting.pop(key)
        if isinstance(result, Failure) and not waiting:
            if result.check(RegistryError):
                _log.error("{why}", why=result.value)
            else:
                _log.failure("a shared call without waiters failed", result)
        while waiting:
            waiting.pop(0).callback(result)


_LIMITED = "the limit of processes is reached (pids.max of a container, or ulimit -u)"


class _DaemonThread(Thread):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(daemon=True, **arguments)


class DaemonThreadPool(ThreadPool):
    """Up to `most` threads that do not keep the process alive, as their work may never return.

    One runs from the start. Where the system starts no further one, as a container may have few, work waits for those
    that run: Twisted's own pool raises an error then.
    """

    threadFactory = _DaemonThread  # type: ignore[assignment]  # Twisted declares the class, and calls it

    def __init__(self, most: int, name: str) -> None:
        super().__init__(1, most, name)
        self._most = most
        self._told = most
        """The number of threads for which it was logged last that there cannot be more."""

    def start(self) -> None:
        """Start the first thread, and those for which there is work.

        Raises:
            OSError: no thread can be started.
        """
        try:
            super().start()
        except RuntimeError as error:
            self._take_what_runs(error)

    def callInThreadWithCallback(
        self, onResult: Callable[[bool, T], object] | None, func: Callable[P, T], *args: P.args, **kw: P.kwargs
    ) -> None:
        """Call `func` in a thread, and there `onResult` with whether it succeeded, and with its result or failure."""
        self.max = self._most
        try:
            super().callInThreadWithCallback(onResult, func, *args, **kw)
        except RuntimeError as error:
            self._take_what_runs(error)
            super().callInThreadWithCallback(onResult, func, *args, **kw)

    def _take_what_runs(self, error: RuntimeError) -> None:
        # Twisted keeps also those that it could not start, and would wait for their end.
        self.threads = [thread for thread in self.threads if thread.ident is not None]
        self.max = self.workers
        if not self.max:
            raise OSError(errno.EAGAIN, f"{error}: {_LIMITED}") from None
        if self.max != self._told:
            self._told = self.max
            _log.warn(
                "no further thread can be started, {threads} of up to {most} do the work of {part}: {why}",
                why=f"{error}: {_LIMITED}",
                threads=self.max,
                most=self._most,
                part=self.name,
            )

    def end(self) -> list[Thread]:
        """Have each thread end after its work; return those that have not been waited for."""
        threads, self.threads = self.threads, []
        self.stop()
        return threads
