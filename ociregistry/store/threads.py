"""The store's own threads, so that nothing here blocks the reactor and no slow disk delays its DNS look-ups."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorFromThreads
from twisted.internet.threads import deferToThreadPool
from twisted.python.threadpool import ThreadPool

P = ParamSpec("P")
T = TypeVar("T")


class Threads:
    """A pool for reading and one for writing, so that a hanging fsync never keeps a hit waiting; and one thread
    for what waits for the store's lock, so that this never keeps a blob waiting."""

    def __init__(self, reactor: IReactorFromThreads, readers: int = 8, writers: int = 16) -> None:
        self._reactor = reactor
        self._reading = ThreadPool(0, readers, "store-reading")
        self._writing = ThreadPool(0, writers, "store-writing")
        self._in_turn = ThreadPool(0, 1, "store-in-turn")

    def start(self) -> None:
        """Must be called after the process has daemonized: threads do not survive a fork."""
        self._reading.start()
        self._writing.start()
        self._in_turn.start()

    def stop(self) -> None:
        """Blocks until what runs has ended."""
        self._reading.stop()
        self._writing.stop()
        self._in_turn.stop()

    def read(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        """Runs `function`, which reads, in a thread."""
        return deferToThreadPool(self._reactor, self._reading, function, *args, **kwargs)

    def write(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        """Runs `function`, which writes or syncs, in a thread."""
        return deferToThreadPool(self._reactor, self._writing, function, *args, **kwargs)

    def write_in_turn(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        """As `write`, one after the other."""
        return deferToThreadPool(self._reactor, self._in_turn, function, *args, **kwargs)
