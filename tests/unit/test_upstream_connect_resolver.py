"""Looking up names: once for all who ask at the same time, and no name that hangs delays another."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from twisted.internet.defer import gatherResults
from twisted.internet.error import DNSLookupError
from twisted.internet.task import deferLater

from ociregistry.upstream.connect import Resolver
from tests.unit.support.doubles import REACTOR, on_reactor, until

THREADS = 64


def found(*addresses: str) -> list[Any]:
    """As the operating system tells of addresses."""
    return [
        (socket.AF_INET6 if ":" in one else socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 0)) for one in addresses
    ]


class Names:
    """In the place of getaddrinfo. Names that hang do so until `release`."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.threads: list[threading.Thread] = []
        self.release = threading.Event()

    def __call__(self, host: str, port: None, *, type: int) -> list[Any]:  # noqa: A002
        """Called in threads."""
        assert type == socket.SOCK_STREAM
        self.threads.append(threading.current_thread())
        self.asked.append(host)
        if host.startswith("hanging"):
            self.release.wait(30)
        return found(f"10.0.0.{len(host)}")


@pytest.fixture
def names() -> Iterator[Names]:
    """Released at the end, whatever comes."""
    names = Names()
    yield names
    names.release.set()


@pytest.fixture
def resolver(names: Names) -> Iterator[Resolver]:
    """It looks names up there."""
    resolver = Resolver(REACTOR, names)
    resolver.start()
    yield resolver
    resolver.stop()


Raised = Callable[[], list[Any]]


def resolver_of(looked_up: Raised) -> Resolver:
    """One for which every look-up gives this."""
    resolver = Resolver(REACTOR, lambda *_, **__: looked_up())
    resolver.start()
    return resolver


def raising(error: Exception) -> Raised:
    """A look-up that fails."""

    def look_up() -> list[Any]:
        raise error

    return look_up


@on_reactor
async def test_the_addresses_of_a_name(resolver: Resolver, names: Names) -> None:
    assert await resolver.addresses("reg.example") == ("10.0.0.11",)
    assert names.asked == ["reg.example"]


@on_reactor
async def test_each_address_once_and_the_best_first() -> None:
    resolver = resolver_of(lambda: found("fd00::2", "10.0.0.9", "fd00::2", "10.0.0.1", "10.0.0.9"))
    assert await resolver.addresses("reg.example") == ("fd00::2", "10.0.0.9", "10.0.0.1")
    resolver.stop()


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "8.8.8.8"])
@on_reactor
async def test_an_address_is_its_own(address: str) -> None:
    resolver = Resolver(REACTOR)
    resolver.start()
    assert await resolver.addresses(address) == (address,)
    resolver.stop()


@on_reactor
async def test_one_look_up_serves_all_who_wait_for_a_name(resolver: Resolver, names: Names) -> None:
    waiting = [resolver.addresses("hanging.example") for _ in range(3)]
    await until(lambda: names.asked)
    waiting.append(resolver.addresses("hanging.example"))
    # Who gives up takes it from nobody else.
    waiting[0].cancel()
    waiting.pop(0).addErrback(lambda _: None)
    names.release.set()
    assert await gatherResults(waiting) == [("10.0.0.15",)] * 3
    assert names.asked == ["hanging.example"]


@on_reactor
async def test_a_name_is_looked_up_anew_for_who_asks_later(resolver: Resolver, names: Names) -> None:
    for _ in range(2):
        await resolver.addresses("reg.example")
    assert names.asked == ["reg.example"] * 2


@on_reactor
async def test_names_that_hang_delay_no_other(resolver: Resolver, names: Names) -> None:
    hanging = [resolver.addresses(f"hanging{number}.example") for number in range(THREADS - 1)]
    assert await resolver.addresses("reg.example") == ("10.0.0.11",)
    assert not any(one.called for one in hanging)
    names.release.set()
    assert len(await gatherResults(hanging)) == THREADS - 1


@on_reactor
async def test_but_there_is_an_end_to_the_threads(resolver: Resolver, names: Names) -> None:
    hanging = [resolver.addresses(f"hanging{number}.example") for number in range(THREADS + 10)]
    await until(lambda: len(names.asked) >= THREADS)
    await deferLater(REACTOR, 0.02)
    assert len(names.asked) == THREADS
    names.release.set()
    await gatherResults(hanging)
    assert len(names.asked) == THREADS + 10


@on_reactor
async def test_a_name_that_hangs_does_not_hold_up_the_end(names: Names) -> None:
    resolver = Resolver(REACTOR, names)
    resolver.start()
    hanging = resolver.addresses("hanging.example")
    await until(lambda: names.asked)
    (thread,) = names.threads
    limit = threading.Timer(5, names.release.set)
    limit.start()
    resolver.stop()
    assert not names.release.is_set()
    limit.cancel()
    names.release.set()
    await hanging
    await until(lambda: not thread.is_alive())


@pytest.mark.parametrize(
    ("looked_up", "message"),
    [
        (raising(socket.gaierror(-2, "Name or service not known")), "Name or service not known"),
        (raising(OSError(24, "Too many open files")), "Too many open files"),
        (raising(UnicodeError("label too long")), "label too long"),
        (list, "it has no address"),
    ],
)
@on_reactor
async def test_a_name_without_an_address(looked_up: Raised, message: str) -> None:
    resolver = resolver_of(looked_up)
    for _ in range(2):
        with pytest.raises(DNSLookupError, match=message):
            await resolver.addresses("reg.example")
    resolver.stop()


@pytest.mark.parametrize("name", ["a" * 64 + ".example", "a..example"])
@on_reactor
async def test_a_name_that_cannot_have_one(name: str) -> None:
    resolver = Resolver(REACTOR)
    resolver.start()
    with pytest.raises(DNSLookupError):
        await resolver.addresses(name)
    resolver.stop()
