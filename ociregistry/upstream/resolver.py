"""Host names to addresses, in threads of their own: a look-up that hangs delays nothing else."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import DNSLookupError
from twisted.internet.interfaces import IReactorFromThreads
from twisted.internet.threads import deferToThreadPool
from twisted.python.threadpool import ThreadPool

from ociregistry.flights import Flights

_THREADS = 64
"""So many dead names can be waited for at once before they delay a live one."""

GetAddrInfo = Callable[..., list[Any]]


class Resolver:
    """Asks the operating system, once for all who want the same name at the same time."""

    def __init__(self, reactor: IReactorFromThreads, getaddrinfo: GetAddrInfo = socket.getaddrinfo) -> None:
        self._reactor = reactor
        self._getaddrinfo = getaddrinfo
        self._threads = ThreadPool(0, _THREADS, "resolver")
        self._flights: Flights[str, tuple[str, ...] | DNSLookupError] = Flights()

    def start(self) -> None:
        """Must be called after the process has daemonized: threads do not survive a fork."""
        self._threads.start()

    def stop(self) -> None:
        """Ends the threads, those in which a look-up hangs when it is done: nobody waits for that."""
        self._threads.adjustPoolsize(0, 0)

    def addresses(self, host: str) -> Deferred[tuple[str, ...]]:
        """Fires with the IP addresses of `host`, at least one, best first; fails with `DNSLookupError`."""
        return self._flights.join(host, lambda: self._look_up(host)).addCallback(_found)

    async def _look_up(self, host: str) -> tuple[str, ...] | DNSLookupError:
        # A failure is a value: it may come when nobody waits any more, and is none of the log's then.
        try:
            found = await deferToThreadPool(
                self._reactor, self._threads, self._getaddrinfo, host, None, type=socket.SOCK_STREAM
            )
        except (OSError, UnicodeError) as error:
            return DNSLookupError(str(error))
        addresses = tuple(dict.fromkeys(str(entry[4][0]) for entry in found))
        return addresses or DNSLookupError("it has no address")


def _found(result: tuple[str, ...] | DNSLookupError) -> tuple[str, ...]:
    if isinstance(result, DNSLookupError):
        raise result
    return result
