"""Hosts that are lost in each way, behind a router, and a daemon on the near side whose clients miss them.

They are silent, drop or refuse connections, or have a name that cannot be resolved.
"""

from __future__ import annotations

import shutil
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from tests.client import Response, fetch
from tests.namespaces import NamespacedDaemon, Routed

DROPPED = "10.77.2.3"
"""An address behind the router, which drops what is sent there."""
_SILENT_PORTS = range(6100, 6110)
_REFUSED_PORTS = range(6200, 6210)
_DNS_PORT = 53
_NXDOMAIN = 0x8183
"""The flags of a response: recursion was desired and is available, and there is no such name (RFC 1035)."""
_SPACING = 5.0

HOSTS: Mapping[str, Callable[[int], str]] = {
    "silent host": lambda number: f"{Routed.FAR}:{_SILENT_PORTS[number]}",
    "dropped SYNs": lambda number: f"{DROPPED}:{_REFUSED_PORTS[number]}",
    "refused": lambda number: f"{Routed.FAR}:{_REFUSED_PORTS[number]}",
    "DNS silent": lambda number: f"host{number}.silent.example",
    "DNS NXDOMAIN": lambda number: f"host{number}.absent.example",
}
"""For each kind, the host of a number: no outage of one number is known from another."""
PAUSES: Mapping[str, Callable[[Response], float]] = {
    "back to back": lambda answer: 0.0,
    "5 s apart": lambda answer: _SPACING,
    "after Retry-After": lambda answer: float(answer.headers["Retry-After"]),
}
"""The seconds from an answer to the next request."""


@dataclass(frozen=True)
class Misses:
    """The requests of one client, for one kind of lost host."""

    kind: str
    pause: str
    seconds: Sequence[float]
    """How long each took."""
    statuses: Sequence[int]


class LostHosts:
    """A daemon, and a network in which the hosts are lost."""

    def __init__(self, network: Routed, daemon: NamespacedDaemon) -> None:
        self.network = network
        self.daemon = daemon

    def ask(self, host: str, tag: str) -> Response:
        """Request a manifest that is not in the store."""
        url = f"{self.daemon.url}/v2/team/app/manifests/{tag}?ns={quote(host, safe='')}"
        return self.network.near.call(lambda: fetch(url))

    def misses(self, kind: str, pause: str, count: int) -> Misses:
        """Ask several times in a row, each time for another tag, and measure."""
        host = HOSTS[kind](list(PAUSES).index(pause))
        seconds, statuses = [], []
        for number in range(count):
            began = time.monotonic()
            answer = self.ask(host, str(number))
            seconds.append(time.monotonic() - began)
            statuses.append(answer.status)
            time.sleep(PAUSES[pause](answer))
        return Misses(kind, pause, seconds, statuses)

    def all_misses(self, count: int, pauses: Sequence[str] = tuple(PAUSES)) -> list[Misses]:
        """Ask for all kinds of hosts, with all of the `pauses`, at the same time."""
        cases = [(kind, pause) for kind in HOSTS for pause in pauses]
        with ThreadPoolExecutor(len(cases)) as clients:
            return list(clients.map(lambda case: self.misses(case[0], case[1], count), cases))


@contextmanager
def lost_hosts(folder: Path, *options: str) -> Iterator[LostHosts]:
    """Run the network, the hosts and the daemon until the block ends."""
    with ExitStack() as stack:
        network = stack.enter_context(Routed())
        network.drop(DROPPED)
        for port in _SILENT_PORTS:
            listener = network.far.call(lambda port=port: socket.create_server((Routed.FAR, port)))  # type: ignore[misc]  # mypy infers no type for a default
            stack.callback(listener.close)
        stack.enter_context(_name_server(network))
        # `ip netns exec` puts this file in the place of /etc/resolv.conf.
        files = Path("/etc/netns", network.near.name)
        files.mkdir(parents=True)
        stack.callback(shutil.rmtree, files)
        (files / "resolv.conf").write_text(f"nameserver {Routed.FAR}\n")
        registries = {host(number): "http" for host in HOSTS.values() for number in range(len(PAUSES))}
        yield LostHosts(network, stack.enter_context(NamespacedDaemon(network.near, folder, registries, *options)))


@contextmanager
def _name_server(network: Routed) -> Iterator[None]:
    """Run a name server that knows no name, and answers only for those that end in `absent.example`."""

    def bound() -> socket.socket:
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        server.bind((Routed.FAR, _DNS_PORT))
        server.settimeout(0.2)
        return server

    ended = threading.Event()

    def serve(server: socket.socket) -> None:
        while not ended.is_set():
            with suppress(TimeoutError):
                query, client = server.recvfrom(512)
                if b"\x06absent\x07example\x00" in query:
                    server.sendto(query[:2] + struct.pack(">H", _NXDOMAIN) + query[4:], client)

    with network.far.call(bound) as server:
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
