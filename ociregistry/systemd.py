"""What systemd is told of the daemon, by its own protocol (sd_notify(3)): that it serves, reloads, stops, and lives.

Where systemd did not ask for it, nothing is sent.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger


class Systemd:
    """The other end of `$NOTIFY_SOCKET`."""

    log = Logger(namespace="ociregistry")

    def __init__(self, clock: IReactorTime, environment: Mapping[str, str] = os.environ) -> None:
        self._environment = environment
        # By the reactor's clock: one that hangs misses it, and systemd starts the daemon anew.
        self._watchdog = LoopingCall(self._tell, "WATCHDOG=1")
        self._watchdog.clock = clock

    def ready(self) -> None:
        """It serves; from now on it also says that it lives, if systemd wants to know."""
        self._tell("READY=1")
        interval = self._interval()
        if interval:
            self._watchdog.start(interval)

    def reloading(self) -> None:
        """It reads its settings again; `reloaded` follows."""
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def reloaded(self) -> None:
        """It has its new settings, or keeps the old ones."""
        self._tell("READY=1")

    def stopping(self) -> None:
        """It takes no new connection. While requests in flight end it still says that it lives."""
        self._tell("STOPPING=1")

    def stopped(self) -> None:
        """It has nothing more to say."""
        if self._watchdog.running:
            self._watchdog.stop()

    def _interval(self) -> float:
        """Seconds between two signs of life, half of what systemd waits; 0 for none."""
        ours = str(os.getpid())
        if self._environment.get("WATCHDOG_PID", ours) != ours:
            return 0
        return int(self._environment.get("WATCHDOG_USEC", "0")) / 2_000_000

    def _tell(self, state: str) -> None:
        address = self._environment.get("NOTIFY_SOCKET", "")
        if not address:
            return
        # An abstract socket's name begins with a NUL, which no variable of the environment can hold.
        address = f"\0{address[1:]}" if address.startswith("@") else address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as datagrams:
            datagrams.setblocking(False)
            try:
                datagrams.sendto(state.encode(), address)
            except OSError as error:
                self.log.error("systemd cannot be told {state}: {why}", state=state.partition("\n")[0], why=error)
