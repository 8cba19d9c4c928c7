"""Work that several wait for: each observes it, none of them awaits it.

A Deferred can be awaited once, and cancelling it ends the work; so every waiter gets a Deferred of its own, which it
may cancel or let time out while the work and the other waiters go on.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from ociregistry.errors import RegistryError

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class Event:
    """Rung when something has changed; who waits looks at what it is, and waits again if it is not enough."""

    def __init__(self) -> None:
        self._waiting: list[Deferred[None]] = []

    def wait(self) -> Deferred[None]:
        """Fires at the next ring."""
        waiter: Deferred[None] = Deferred(self._waiting.remove)
        self._waiting.append(waiter)
        return waiter

    def fire(self) -> None:
        """Wakes all who wait now."""
        waiting, self._waiting = self._waiting, []
        while waiting:
            waiting.pop().callback(None)


class SingleFlight(Generic[K, T]):
    """One piece of work in flight for each key, whoever asks for it."""

    log = Logger(namespace="ociregistry")

    def __init__(self) -> None:
        self._waiting: dict[K, list[Deferred[T]]] = {}

    def __contains__(self, key: K) -> bool:
        """Whether work for `key` is in flight."""
        return key in self._waiting

    def join(self, key: K, start: Callable[[], Coroutine[Deferred[Any], Any, T]]) -> Deferred[T]:
        """Fires with what the work for `key` gives, or fails as it does; `start` begins it if none is in flight."""
        waiting = self._waiting.get(key)
        begin = waiting is None
        if waiting is None:
            waiting = self._waiting[key] = []
        waiter: Deferred[T] = Deferred(waiting.remove)
        waiting.append(waiter)
        if begin:
            Deferred.fromCoroutine(start()).addBoth(self._finish, key)
        return waiter

    def _finish(self, result: T | Failure, key: K) -> None:
        waiting = self._waiting.pop(key)
        if isinstance(result, Failure) and not waiting:
            if result.check(RegistryError):
                self.log.error("{why}", why=result.value)
            else:
                self.log.failure("work that nobody waits for any more failed", result)
        while waiting:
            waiting.pop(0).callback(result)
