"""A TCP proxy that imitates a bad link: slow, distant, cutting, silent, refusing or intermittent.

`python -m tests.badlink [options] HOST:PORT` runs the proxy in front of a server until stdin ends or SIGTERM arrives.
Its first line says where it listens. Each line of stdin is a command, such as {"down": true} or {"rate": "2Mbit"},
and is answered by a line of counts. The last line has the final counts.

A proxy stands between two TCP connections and cannot lose bytes in the middle of one. While the link is down, nothing
passes, neither data nor the end of a connection, and new connections get no answer. When the link returns, either the
bytes held back are delivered (hold: as if TCP had retransmitted them), or each connection is cut (cut: as if a router
in between had forgotten it). The kernel accepts a client's connection at once, so the first bytes of each connection
wait for one more round trip, as they would behind a real handshake. Each direction of a connection buffers at most 64
KiB beside what the wire itself holds, which is rate times delay; without a rate that is 64 KiB for each connection.
Bytes are counted when they are delivered.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

from twisted.internet.defer import Deferred, succeed
from twisted.internet.protocol import Factory, connectionDone
from twisted.internet.stdio import StandardIO
from twisted.protocols.basic import LineOnlyReceiver
from twisted.python.failure import Failure

from tests.badlink_connection import Connection
from tests.badlink_wire import Wire

_BITS = {"bit": 1, "kbit": 10**3, "Mbit": 10**6, "Gbit": 10**9}
_BYTES = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Badness:
    """The faults of a link.

    Attributes:
        rate: bytes per second in each direction, for all connections together.
        rtt: seconds.
        cut_bytes, cut_seconds: cut each connection after that many bytes downstream, or that long after it began.
        cut_by: by FIN, by RST, or by passing nothing from then on.
        hole: accept new connections and never answer.
        refuse: do not listen.
        schedule: seconds up, then seconds down, repeated.
        outage: what happens to connections when the link returns.
    """

    rate: float | None = None
    rtt: float = 0.0
    cut_bytes: int | None = None
    cut_seconds: float | None = None
    cut_by: Literal["fin", "rst", "silence"] = "fin"
    hole: bool = False
    refuse: bool = False
    schedule: tuple[float, float] | None = None
    outage: Literal["hold", "cut"] = "hold"


@dataclass
class Counts:
    """Counters since the start.

    `up` and `down` are bytes delivered to the server and to its clients, `lost` is bytes that were discarded;
    `accepted` and `dialled` are connections with clients and with the server.
    """

    up: int = 0
    down: int = 0
    lost: int = 0
    accepted: int = 0
    dialled: int = 0
    cut: int = 0
    open: int = 0


class BadLink:
    """A link to the server at `host` and `port`. `clock` times its delays and schedules; default: the reactor."""

    def __init__(
        self, reactor: Any, host: str, port: int, badness: Badness | None = None, *, clock: Any = None
    ) -> None:
        self.reactor = reactor
        self.clock = clock or reactor
        self.target = (host, port)
        self.badness = badness or Badness()
        self.counts = Counts()
        self.is_down = False
        self.up, self.down = Wire(self.clock), Wire(self.clock)
        self.port = 0
        self._address = ""
        self._listening: Any = None
        self._connections: set[Connection] = set()
        self._schedule: Any = None
        self._idle: Deferred[None] | None = None

    def start(self, address: str = "127.0.0.1", port: int = 0) -> Self:
        """Listen, unless `refuse` is set, with the configured faults; afterwards `port` is set."""
        self._address = address
        self._listen(port)
        self.change(schedule=self.badness.schedule)
        return self

    def _listen(self, port: int) -> None:
        factory = Factory.forProtocol(lambda: Connection(self).near)
        factory.noisy = False
        self._listening = self.reactor.listenTCP(port, factory, backlog=1024, interface=self._address)
        self.port = self._listening.getHost().port

    def change(self, **changes: Any) -> Deferred[None]:
        """Change the faults; fires when they are in effect. A given schedule starts now."""
        self.badness = replace(self.badness, **changes)
        for wire in (self.up, self.down):
            wire.reconfigure(self.badness.rate, self.badness.rtt / 2)
        if "schedule" in changes:
            self._turn(down=False)
        if not self.badness.refuse and self._listening is None:
            self._listen(self.port)
        if self.badness.refuse and self._listening is not None:
            listening, self._listening = self._listening, None
            stopped: Deferred[None] = listening.stopListening()
            return stopped
        return succeed(None)

    def _turn(self, *, down: bool) -> None:
        if self._schedule is not None and self._schedule.active():
            self._schedule.cancel()
        self.set_down(down)
        if self.badness.schedule is not None:
            seconds = self.badness.schedule[1 if down else 0]
            self._schedule = self.clock.callLater(seconds, lambda: self._turn(down=not down))

    def set_down(self, down: bool) -> None:
        """Stop passing anything, or pass data again."""
        returns, self.is_down = self.is_down and not down, down
        if returns:
            for connection in tuple(self._connections):
                connection.link_returned()
        for wire in (self.up, self.down):
            wire.freeze(down)

    def silence(self) -> None:
        """Pass nothing more on the existing connections, and never end them."""
        for connection in tuple(self._connections):
            connection.silence()

    def cut(self) -> None:
        """Cut the existing connections; while the link is down, that shows when it returns."""
        for connection in tuple(self._connections):
            connection.cut()

    def add(self, connection: Connection) -> None:
        """Register an accepted connection. Called by connections."""
        self._connections.add(connection)
        self.counts.accepted += 1
        self.counts.open += 1

    def remove(self, connection: Connection) -> None:
        """Forget a connection that has ended. Called by connections."""
        self._connections.discard(connection)
        self.counts.open = len(self._connections)
        if self._idle is not None and not self._connections:
            idle, self._idle = self._idle, None
            idle.callback(None)

    def stop(self) -> Deferred[None]:
        """Refuse, and end all connections; fires when they have ended."""
        stopped = self.change(refuse=True, schedule=None)
        if self._connections:
            idle = self._idle = Deferred()
            stopped.addCallback(lambda _: idle)
        for connection in tuple(self._connections):
            connection.abort()
        return stopped


def amount(text: str) -> float:
    """Parse an amount such as `10Mbit`, `5MB` or `64KiB` into bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if found is None or found[2] not in _BITS | _BYTES:
        raise ValueError(f"{text!r} is not an amount such as 10Mbit, 5MB or 64KiB")
    return float(found[1]) * (_BITS[found[2]] / 8 if found[2] in _BITS else _BYTES[found[2]])


def parsed(changes: dict[str, Any]) -> dict[str, Any]:
    """Convert fields of `Badness` from commands and options: amounts as text, the round trip in milliseconds."""
    values = dict(changes)
    for name in ("rate", "cut_bytes"):
        if isinstance(values.get(name), str):
            values[name] = amount(values[name])
    if values.get("cut_bytes") is not None:
        values["cut_bytes"] = int(values["cut_bytes"])
    if "rtt" in values:
        values["rtt"] = values["rtt"] / 1000
    if values.get("schedule") is not None:
        values["schedule"] = tuple(values["schedule"])
    return values


class _Commands(LineOnlyReceiver):
    """Executes the commands on stdin."""

    delimiter = b"\n"

    def __init__(self, link: BadLink) -> None:
        self._link = link
        self.ended: Deferred[None] = Deferred()

    def lineReceived(self, line: bytes) -> None:
        """Execute one command, or several in one object."""
        try:
            done = self._obey(json.loads(line))
        except (ValueError, TypeError, AttributeError) as problem:
            self.say({"error": f"{type(problem).__name__}: {problem}"})
        else:
            done.addCallback(lambda _: self.say(asdict(self._link.counts)))

    def _obey(self, command: dict[str, Any]) -> Deferred[None]:
        actions = {
            "count": lambda: None,
            "down": lambda: self._link.set_down(True),
            "up": lambda: self._link.set_down(False),
            "silence": self._link.silence,
            "cut": self._link.cut,
        }
        changes = {key: value for key, value in command.items() if key not in actions}
        done = self._link.change(**parsed(changes)) if changes else succeed(None)
        for name, action in actions.items():
            if command.get(name):
                action()
        return done

    def say(self, what: dict[str, Any]) -> None:
        """Write one line of output."""
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Stop at the end of stdin."""
        self.ended.callback(None)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    head, _, more = (__doc__ or "").partition("\n\n")
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tests.badlink", description=head, epilog=more, formatter_class=plain)
    parser.add_argument("target", metavar="HOST:PORT", help="the server behind the link")
    parser.add_argument("--listen", default="127.0.0.1:0", metavar="ADDRESS:PORT", help="[%(default)s]")
    parser.add_argument("--rate", metavar="10Mbit", help="of the whole link, in each direction")
    parser.add_argument("--rtt", type=float, default=0.0, metavar="MS", help="round trip in milliseconds")
    parser.add_argument("--cut-bytes", metavar="5MB", help="cut each connection after this many bytes downstream")
    parser.add_argument("--cut-seconds", type=float, metavar="S", help="cut each connection after this many seconds")
    parser.add_argument("--cut-by", choices=("fin", "rst", "silence"), default="fin", help="[%(default)s]")
    parser.add_argument("--hole", action="store_true", help="accept connections and never answer")
    parser.add_argument("--refuse", action="store_true", help="do not listen")
    parser.add_argument("--up", type=float, metavar="S", help="seconds up before each outage")
    parser.add_argument("--down", type=float, metavar="S", help="seconds of each outage")
    parser.add_argument("--outage", choices=("hold", "cut"), default="hold", help="what happens to connections")
    options = parser.parse_args(arguments)
    if (options.up is None) != (options.down is None):
        parser.error("--up and --down go together")
    try:
        names = ("rate", "rtt", "cut_bytes", "cut_seconds", "cut_by", "hole", "refuse", "outage")
        schedule = None if options.up is None else (options.up, options.down)
        changes = parsed({**{name: getattr(options, name) for name in names}, "schedule": schedule})
        options.badness = Badness(**changes)
        options.host, options.port = _address(options.target)
        options.address, options.own_port = _address(options.listen)
    except ValueError as problem:
        parser.error(str(problem))
    return options


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]") or "127.0.0.1", int(port)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the proxy."""
    options = _options(arguments)
    from twisted.internet import reactor

    link = BadLink(reactor, options.host, options.port, options.badness)
    link.start(options.address, options.own_port)
    commands = _Commands(link)
    StandardIO(commands)
    running: Any = reactor
    commands.ended.addCallback(lambda _: running.running and running.stop())
    # From here on SIGTERM is handled.
    running.callWhenRunning(commands.say, {"host": f"{options.address}:{link.port}", "port": link.port})
    running.run()
    commands.say(asdict(link.counts))


if __name__ == "__main__":
    main()
