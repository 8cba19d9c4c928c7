"""Notifies systemd of the daemon's state: ready, reloading, stopping, and alive (sd_notify(3)).

Sends nothing unless systemd set `$NOTIFY_SOCKET`.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

_log = Logger(namespace="ociregistry")


class Systemd:
    """Sends notifications to `$NOTIFY_SOCKET`."""

    def __init__(self, clock: IReactorTime, environment: Mapping[str, str] = os.environ) -> None:
        self._environment = environment
        # The reactor's clock drives the watchdog: if the reactor hangs, systemd restarts the daemon.
        self._watchdog = LoopingCall(self._tell, "WATCHDOG=1")
        self._watchdog.clock = clock

    def ready(self) -> None:
        """Notify that the daemon serves, and start the watchdog if systemd asks for it."""
        self._tell("READY=1")
        interval = self._interval()
        if interval:
            self._watchdog.start(interval)

    def reloading(self) -> None:
        """Notify that the daemon reads its settings again; `reloaded` must follow."""
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def reloaded(self) -> None:
        """Notify that the reload has ended, with new settings or the old ones."""
        self._tell("READY=1")

    def stopping(self) -> None:
        """Notify that the daemon stops; the watchdog goes on while requests in flight end."""
        self._tell("STOPPING=1")

    def stopped(self) -> None:
        """Stop the watchdog."""
        if self._watchdog.running:
            self._watchdog.stop()

    def _interval(self) -> float:
        """Return the seconds between two watchdog messages, half of systemd's timeout; 0 for no watchdog."""
        ours = str(os.getpid())
        if self._environment.get("WATCHDOG_PID", ours) != ours:
            return 0
        return int(self._environment.get("WATCHDOG_USEC", "0")) / 2_000_000

    def _tell(self, state: str) -> None:
        address = self._environment.get("NOTIFY_SOCKET", "")
        if not address:
            return
        # The name of an abstract socket begins with a NUL byte; environment variables spell it "@".
        address = f"\0{address[1:]}" if address.startswith("@") else address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as datagrams:
            datagrams.setblocking(False)
            try:
                datagrams.sendto(state.encode(), address)
            except OSError as error:
                _log.error("cannot notify systemd of {state}: {why}", state=state.partition("\n")[0], why=error)
