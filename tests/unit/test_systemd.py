"""systemd notifications, on a real socket with a clock of the test."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.systemd import Systemd
from tests.unit.support.common import on_reactor, texts, until
from tests.unit.support.daemons import Daemons


class Manager:
    """systemd's end of the socket; `address` is its value in NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(address.replace("@", "\0", 1))

    def messages(self) -> list[str]:
        """Return the messages since the last call, each reduced to its first line."""
        found = []
        try:
            while True:
                found.append(self._socket.recv(1000).decode().partition("\n")[0])
        except BlockingIOError:
            return found

    def raw(self) -> str:
        """Return the next datagram."""
        return self._socket.recv(1000).decode()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    """Return a manager at a path or at an abstract name."""
    manager = Manager(str(tmp_path / "notify") if request.param == "path" else f"@{secrets.token_hex(8)}")
    yield manager
    manager.close()


def test_ready_reloading_and_stopping_are_sent(manager: Manager, clock: Clock) -> None:
    systemd = Systemd(clock, {"NOTIFY_SOCKET": manager.address})
    for tell in (systemd.ready, systemd.reloading, systemd.reloaded, systemd.stopping, systemd.stopped):
        tell()
        clock.advance(100)
    assert manager.messages() == ["READY=1", "RELOADING=1", "READY=1", "STOPPING=1"]


def test_reloading_has_a_timestamp(manager: Manager, clock: Clock) -> None:
    """Type=notify-reload needs it to tell it from an older one."""
    Systemd(clock, {"NOTIFY_SOCKET": manager.address}).reloading()
    first, second = manager.raw().splitlines()
    key, _, since = second.partition("=")
    assert (first, key) == ("RELOADING=1", "MONOTONIC_USEC")
    assert int(since) > 0


def test_watchdog_is_sent_at_half_the_interval(manager: Manager, clock: Clock) -> None:
    systemd = Systemd(clock, {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "30000000"})
    assert manager.messages() == []
    systemd.ready()
    assert manager.messages() == ["READY=1", "WATCHDOG=1"]
    clock.advance(14.9)
    assert manager.messages() == []
    clock.pump([0.1, 15])
    systemd.stopping()
    clock.advance(15)
    assert manager.messages() == ["WATCHDOG=1"] * 2 + ["STOPPING=1", "WATCHDOG=1"]
    systemd.stopped()
    clock.advance(15)
    assert manager.messages() == []
    assert clock.getDelayedCalls() == []


@pytest.mark.parametrize(
    ("pid", "signs"), [(os.getpid(), ["WATCHDOG=1"]), (os.getpid() + 1, [])], ids=["ours", "of another"]
)
def test_no_watchdog_for_another_pid(manager: Manager, clock: Clock, pid: int, signs: list[str]) -> None:
    """The variables may be inherited from a watched parent."""
    environment = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": str(pid)}
    Systemd(clock, environment).ready()
    assert manager.messages() == ["READY=1", *signs]


def test_without_systemd_nothing_happens(clock: Clock, events: list[LogEvent]) -> None:
    systemd = Systemd(clock, {})
    for tell in (systemd.ready, systemd.reloading, systemd.reloaded, systemd.stopping, systemd.stopped):
        tell()
    assert texts(events) == []
    assert clock.getDelayedCalls() == []


def test_missing_socket_is_one_log_line(tmp_path: Path, clock: Clock, events: list[LogEvent]) -> None:
    Systemd(clock, {"NOTIFY_SOCKET": str(tmp_path / "gone")}).reloading()
    (line,) = texts(events, LogLevel.error)
    assert line.startswith("cannot notify systemd of RELOADING=1: ")
    assert "No such file" in line


@on_reactor
async def test_daemon_sends_notifications(
    manager: Manager, clock: Clock, daemons: Daemons, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    daemon = daemons.start()
    assert manager.messages() == ["READY=1", "WATCHDOG=1"]
    await daemon.reload()
    assert manager.messages() == ["RELOADING=1", "READY=1"]
    clock.advance(1)
    assert manager.messages() == ["WATCHDOG=1"]
    daemons.stop()
    assert manager.messages()[0] == "STOPPING=1"
    await until(daemons.stopped)
    clock.advance(100)
    assert set(manager.messages()) <= {"WATCHDOG=1"}
    await daemon.reload()
    clock.advance(100)
    assert manager.messages() == ["RELOADING=1", "READY=1"]
