"""Network namespaces: a separate network for a test, with faults. Requires root."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import pytest

from tests.processes import Daemon, answers, run

T = TypeVar("T")

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET of <sched.h>
_ALL, _IPV4 = 3, 0x0800  # ETH_P_ALL and ETH_P_IP of <linux/if_ether.h>
_OUTGOING = 4  # PACKET_OUTGOING of <linux/if_packet.h>
_NUMBERS = itertools.count(1)


class Namespace:
    """A network namespace with only a loopback interface, until the block ends."""

    def __init__(self, purpose: str) -> None:
        if shutil.which("ip") is None:
            pytest.fail("ip is missing: apt-get install iproute2", pytrace=False)
        if os.geteuid() != 0:
            pytest.fail("network namespaces need root", pytrace=False)
        self.name = f"oci-{os.getpid()}-{next(_NUMBERS)}-{purpose}"

    def __enter__(self) -> Self:
        """Create the namespace."""
        run(["ip", "netns", "add", self.name])
        self.ip("link", "set", "lo", "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the namespace with its interfaces."""
        run(["ip", "netns", "delete", self.name])

    def ip(self, *arguments: str) -> None:
        """Run `ip` for this namespace."""
        run(["ip", "-n", self.name, *arguments])

    def argv(self, argv: Sequence[str]) -> list[str]:
        """Return the command line that runs `argv` inside; the process becomes that of `argv`."""
        return ["ip", "netns", "exec", self.name, *argv]

    def call(self, function: Callable[[], T]) -> T:
        """Call `function` inside; a socket opened there stays in the namespace, whichever thread uses it."""
        return call_in_network(Path("/run/netns", self.name), function)


def call_in_network(network: Path, function: Callable[[], T]) -> T:
    """Call `function` in the network of this file; a socket opened there stays in it, whichever thread uses it."""
    results: list[T] = []
    problems: list[BaseException] = []

    def inside() -> None:
        try:
            _enter(network)
            results.append(function())
        except BaseException as problem:
            problems.append(problem)

    # One thread per call: a thread enters the namespace alone, and need not return.
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    for problem in problems:
        raise problem
    return results[0]


def _enter(network: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(network, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(descriptor, _NEW_NETWORK):
            raise OSError(ctypes.get_errno(), f"cannot enter {network}")
    finally:
        os.close(descriptor)


class NamespacedDaemon(Daemon):
    """Our daemon in a namespace; its URL is valid there."""

    def __init__(self, namespace: Namespace, folder: Path, *arguments: Any, **keywords: Any) -> None:
        super().__init__(folder, *arguments, **keywords)
        self.argv = namespace.argv(self.argv)
        self._namespace = namespace

    def ready(self) -> bool:
        """Whether its health is good."""
        return self._namespace.call(lambda: answers(f"{self.url}/health"))


class Routed:
    """Two namespaces, `near` and `far`, and a router between them that can drop all packets."""

    NEAR, FAR = "10.77.1.2", "10.77.2.2"
    GATEWAY = "10.77.1.1"
    """The router, as both reach it."""
    _GATEWAYS = (GATEWAY, "10.77.2.1")

    def __init__(self) -> None:
        self.near = Namespace("near")
        self.far = Namespace("far")
        self.router = Namespace("router")
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Create and connect the namespaces."""
        with ExitStack() as stack:
            stack.enter_context(self.router)
            ends = zip((self.near, self.far), (self.NEAR, self.FAR), self._GATEWAYS, strict=True)
            for number, (end, address, gateway) in enumerate(ends):
                stack.enter_context(end)
                peer = ["peer", "name", "eth0", "netns", end.name]
                self.router.ip("link", "add", f"eth{number}", "type", "veth", *peer)
                self.router.ip("address", "add", f"{gateway}/24", "dev", f"eth{number}")
                self.router.ip("link", "set", f"eth{number}", "up")
                end.ip("address", "add", f"{address}/24", "dev", "eth0")
                end.ip("link", "set", "eth0", "up")
                end.ip("route", "add", "default", "via", gateway)
            self.router.call(lambda: Path("/proc/sys/net/ipv4/ip_forward").write_text("1"))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the namespaces."""
        self._stack.close()

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Drop every packet silently until the block ends."""
        for address in (self.NEAR, self.FAR):
            self.router.ip("route", "add", "blackhole", address)
        yield
        for address in (self.NEAR, self.FAR):
            self.router.ip("route", "delete", "blackhole", address)

    @contextmanager
    def split(self) -> Iterator[None]:
        """Drop every packet between `near` and `far` silently until the block ends; both still reach the router."""
        ways = [("iif", f"eth{number}", "to", to, "blackhole") for number, to in enumerate((self.FAR, self.NEAR))]
        for way in ways:
            self.router.ip("rule", "add", *way)
        try:
            yield
        finally:
            for way in ways:
                self.router.ip("rule", "delete", *way)

    def drop(self, address: str) -> None:
        """Drop every packet to an address, silently and for ever."""
        self.router.ip("route", "add", "blackhole", address)

    def received(self) -> int:
        """Return how many bytes have arrived in `near` so far, headers included."""
        table = self.near.call(lambda: Path("/proc/thread-self/net/dev").read_text())
        return next(int(line.split()[1]) for line in table.splitlines() if line.split()[0] == "eth0:")

    @contextmanager
    def sent(self) -> Iterator[Callable[[], int]]:
        """Yield a function that counts the IP packets from `near` to `far` since the block began."""
        count = 0

        def sniff() -> socket.socket:
            sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ALL))
            sniffer.bind(("eth0", _ALL))
            sniffer.setblocking(False)
            return sniffer

        with closing(self.near.call(sniff)) as sniffer:

            def counted() -> int:
                nonlocal count
                with suppress(BlockingIOError):
                    while True:
                        packet, (_, protocol, kind, *_) = sniffer.recvfrom(65536)
                        to_far = packet[16:20] == socket.inet_aton(self.FAR)
                        count += (protocol, kind, to_far) == (_IPV4, _OUTGOING, True)
                return count

            yield counted
