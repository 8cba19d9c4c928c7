"""Daemons in the process of the tests, on free ports."""

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
from tests.unit.support.common import REACTOR, turn, until
from tests.unit.support.wire import Network


class ReactorOnClock:
    """The real reactor with delayed calls on a clock; calls without delay run on the real reactor."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.seconds = clock.seconds
        directlyProvides(self, providedBy(REACTOR))

    def callLater(self, delay: float, *what: Any, **more: Any) -> Any:
        """Schedule on the clock, or without delay on the reactor."""
        return (self._clock if delay else REACTOR).callLater(delay, *what, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(REACTOR, name)


def make(root: Path, *argv: str, reactor: Any = REACTOR) -> Daemon:
    """Return a daemon that listens on a free port, and unless told otherwise not for the operator."""
    options = Options()
    options.parent = ServerOptions()
    options.parent["nodaemon"] = 1
    options.parseOptions(
        ["--image-path", str(root), "--listen", "tcp:0:interface=127.0.0.1", "--admin-listen", "", *argv]
    )
    daemon = makeService(options, reactor)
    assert isinstance(daemon, Daemon)
    return daemon


class Daemons:
    """Start daemons on a clock of the test and stop them all at the end.

    Afterwards, SIGHUP has its former handler.
    """

    def __init__(self, root: Path, clock: Clock) -> None:
        self._root = root
        self._clock = clock
        self._started: list[Daemon] = []
        self._stopped: list[Deferred[None]] = []
        self._hung_up = signal.getsignal(signal.SIGHUP)

    def start(self, *argv: str) -> Daemon:
        """Start a daemon."""
        daemon = make(self._root, *argv, reactor=ReactorOnClock(self._clock))
        daemon.privilegedStartService()
        daemon.startService()
        self._started.append(daemon)
        return daemon

    def stop(self) -> Deferred[None]:
        """Stop the latest daemon."""
        self._stopped.append(self._started.pop().stopService())
        return self._stopped[-1]

    def stopped(self) -> bool:
        """Return whether all have stopped, without advancing the clock."""
        self._clock.advance(0)
        return not self._started and all(stopped.called for stopped in self._stopped)

    async def stop_all(self) -> None:
        """Stop all daemons in any state; running threads of a store would keep the process alive."""
        while self._started:
            self.stop()
        for _ in range(100):
            if not self.stopped():
                self._clock.advance(1)
                await turn()
        await until(self.stopped)
        signal.signal(signal.SIGHUP, self._hung_up)


def addresses(events: list[LogEvent]) -> list[str]:
    """Return the addresses in the daemon's banner."""
    banner = [event for event in events if "addresses" in event][-1]
    return str(banner["addresses"]).split(", ")


async def get(network: Network, events: list[LogEvent], path: str) -> Response:
    """Send a GET request to the daemon."""
    return await network.http("daemon").send("GET", f"http://{addresses(events)[0]}{path}", {})
