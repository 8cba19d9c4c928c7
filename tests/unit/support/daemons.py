"""Daemons in the process of the tests, on ports that are free."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent
from twisted.scripts._twistd_unix import ServerOptions
from zope.interface import directlyProvides, providedBy

from ociregistry.daemon import Daemon
from ociregistry.tap import Options, makeService
from ociregistry.upstream.http import Response
from tests.unit.support.doubles import REACTOR, turn, until
from tests.unit.support.wire import Network


class Timed:
    """The real reactor, but for the time; what is to be done at once is."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.seconds = clock.seconds
        directlyProvides(self, providedBy(REACTOR))

    def callLater(self, delay: float, *what: Any, **more: Any) -> Any:
        """As the clock does."""
        return (self._clock if delay else REACTOR).callLater(delay, *what, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(REACTOR, name)


def make(root: Path, *argv: str, reactor: Any = REACTOR) -> Daemon:
    """A daemon with a port that is free."""
    options = Options()
    options.parent = ServerOptions()
    options.parent["nodaemon"] = 1
    options.parseOptions(["--image-path", str(root), "--listen", "tcp:0:interface=127.0.0.1", *argv])
    daemon = makeService(options, reactor)
    assert isinstance(daemon, Daemon)
    return daemon


class Daemons:
    """Starts daemons for which time passes as the test says, and stops them all in the end.

    Then a SIGHUP to the process means again what it did before.
    """

    def __init__(self, root: Path, clock: Clock) -> None:
        self._root = root
        self._clock = clock
        self._started: list[Daemon] = []
        self._stopped: list[Deferred[None]] = []
        self._hung_up = signal.getsignal(signal.SIGHUP)

    def start(self, *argv: str) -> Daemon:
        """Starts one."""
        daemon = make(self._root, *argv, reactor=Timed(self._clock))
        daemon.privilegedStartService()
        daemon.startService()
        self._started.append(daemon)
        return daemon

    def stop(self) -> Deferred[None]:
        """Stops the one that runs."""
        self._stopped.append(self._started.pop().stopService())
        return self._stopped[-1]

    def stopped(self) -> bool:
        """Whether all have stopped, without any time passing."""
        self._clock.advance(0)
        return not self._started and all(stopped.called for stopped in self._stopped)

    async def stop_all(self) -> None:
        """Stops them, whatever the test has left them in: a store's threads would keep the process from ending."""
        while self._started:
            self.stop()
        for _ in range(100):
            if not self.stopped():
                self._clock.advance(1)
                await turn()
        await until(self.stopped)
        signal.signal(signal.SIGHUP, self._hung_up)


def addresses(events: list[LogEvent]) -> list[str]:
    """Where the daemon says that it listens."""
    banner = [event for event in events if "addresses" in event][-1]
    return str(banner["addresses"]).split(", ")


async def get(network: Network, events: list[LogEvent], path: str) -> Response:
    """Asks the daemon."""
    return await network.http("daemon").send("GET", f"http://{addresses(events)[0]}{path}", {})
