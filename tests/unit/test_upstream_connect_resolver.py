"""Name resolution: shared lookups, and hanging names that delay no others."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from twisted.internet.defer import gatherResults
from twisted.internet.error import DNSLookupError
from twisted.internet.task import deferLater

from ociregistry.upstream.connect import GetAddrInfo, Resolver
from ociregistry.upstream.failures import lacks_descriptors
from tests.processes import without_free_descriptors
from tests.unit.support.common import REACTOR, on_reactor, until

THREADS = 64


def found(*addresses: str) -> list[Any]:
    """Return addresses in the form of getaddrinfo."""
    return [
        (socket.AF_INET6 if ":" in one else socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 0)) for one in addresses
    ]


class Names:
    """Replaces getaddrinfo; lookups of hanging names wait for `release`."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.threads: list[threading.Thread] = []
        self.release = threading.Event()

    def __call__(self, host: str, port: None, *, type: int) -> list[Any]:  # noqa: A002  # getaddrinfo calls this parameter `type`
        """Record and answer a lookup; called in threads."""
        assert type == socket.SOCK_STREAM
        self.threads.append(threading.current_thread())
        self.asked.append(host)
        if host.startswith("hanging"):
            self.release.wait(30)
        return found(f"10.0.0.{len(host)}")


@pytest.fixture
def names() -> Iterator[Names]:
    """Return names whose lookups are released at the end of the test."""
    names = Names()
    yield names
    names.release.set()


MakeResolver = Callable[[GetAddrInfo], Resolver]


@pytest.fixture
def resolver_of() -> Iterator[MakeResolver]:
    """Return a function that makes a resolver over this replacement of getaddrinfo, and stop all that it made."""
    made: list[Resolver] = []

    def make(getaddrinfo: GetAddrInfo) -> Resolver:
        made.append(Resolver(REACTOR, getaddrinfo))
        made[-1].start()
        return made[-1]

    yield make
    for resolver in made:
        resolver.stop()


@pytest.fixture
def resolver(names: Names, resolver_of: MakeResolver) -> Resolver:
    """Return a resolver over the names."""
    return resolver_of(names)


def giving(*addresses: str) -> GetAddrInfo:
    """Return a replacement of getaddrinfo that finds these for all names."""
    return lambda *_, **__: found(*addresses)


def raising(error: Exception) -> GetAddrInfo:
    """Return a replacement of getaddrinfo that fails."""

    def look_up(*_: object, **__: object) -> list[Any]:
        raise error

    return look_up


@on_reactor
async def test_addresses_of_a_name(resolver: Resolver, names: Names) -> None:
    assert await resolver.addresses("reg.example") == ("10.0.0.11",)
    assert names.asked == ["reg.example"]


@on_reactor
async def test_duplicates_are_dropped_and_order_is_kept(resolver_of: MakeResolver) -> None:
    resolver = resolver_of(giving("fd00::2", "10.0.0.9", "fd00::2", "10.0.0.1", "10.0.0.9"))
    assert await resolver.addresses("reg.example") == ("fd00::2", "10.0.0.9", "10.0.0.1")


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "8.8.8.8"])
@on_reactor
async def test_literal_address(resolver_of: MakeResolver, address: str) -> None:
    resolver = resolver_of(socket.getaddrinfo)
    assert await resolver.addresses(address) == (address,)


@on_reactor
async def test_concurrent_requests_share_one_lookup(resolver: Resolver, names: Names) -> None:
    waiting = [resolver.addresses("hanging.example") for _ in range(3)]
    await until(lambda: names.asked)
    waiting.append(resolver.addresses("hanging.example"))
    # A cancelled waiter does not affect the others.
    waiting[0].cancel()
    waiting.pop(0).addErrback(lambda _: None)
    names.release.set()
    assert await gatherResults(waiting) == [("10.0.0.15",)] * 3
    assert names.asked == ["hanging.example"]


@on_reactor
async def test_later_request_is_looked_up_again(resolver: Resolver, names: Names) -> None:
    for _ in range(2):
        await resolver.addresses("reg.example")
    assert names.asked == ["reg.example"] * 2


@on_reactor
async def test_hanging_name_does_not_delay_others(resolver: Resolver, names: Names) -> None:
    hanging = [resolver.addresses(f"hanging{number}.example") for number in range(THREADS - 1)]
    assert await resolver.addresses("reg.example") == ("10.0.0.11",)
    assert not any(one.called for one in hanging)
    names.release.set()
    assert len(await gatherResults(hanging)) == THREADS - 1


@on_reactor
async def test_number_of_threads_is_limited(resolver: Resolver, names: Names) -> None:
    hanging = [resolver.addresses(f"hanging{number}.example") for number in range(THREADS + 10)]
    await until(lambda: len(names.asked) >= THREADS)
    await deferLater(REACTOR, 0.02)
    assert len(names.asked) == THREADS
    names.release.set()
    await gatherResults(hanging)
    assert len(names.asked) == THREADS + 10


@on_reactor
async def test_hanging_name_does_not_block_shutdown(names: Names) -> None:
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
    ("look_up", "message"),
    [
        (raising(socket.gaierror(-2, "Name or service not known")), "Name or service not known"),
        (raising(OSError(errno.EIO, "Input/output error")), "Input/output error"),
        (raising(UnicodeError("label too long")), "label too long"),
        (giving(), "it has no address"),
    ],
)
@on_reactor
async def test_name_without_address(resolver_of: MakeResolver, look_up: GetAddrInfo, message: str) -> None:
    resolver = resolver_of(look_up)
    for _ in range(2):
        with pytest.raises(DNSLookupError, match=message):
            await resolver.addresses("reg.example")


@pytest.mark.parametrize("name", ["a" * 64 + ".example", "a..example"])
@on_reactor
async def test_invalid_host_name(resolver_of: MakeResolver, name: str) -> None:
    resolver = resolver_of(socket.getaddrinfo)
    with pytest.raises(DNSLookupError):
        await resolver.addresses(name)


@pytest.mark.parametrize(
    "told", [OSError(errno.EMFILE, "Too many open files"), socket.gaierror(socket.EAI_NONAME, "no such name")]
)
@on_reactor
async def test_lack_of_descriptors_is_told_from_an_unknown_name(resolver_of: MakeResolver, told: OSError) -> None:
    """The C library says either, depending on what it has open."""
    resolver = resolver_of(raising(told))
    with without_free_descriptors(os.getpid()), pytest.raises(OSError, match="Too many open files") as caught:
        await resolver.addresses("reg.example")
    assert lacks_descriptors(caught.value)


@on_reactor
async def test_name_is_asked_for_without_a_descriptor(resolver_of: MakeResolver) -> None:
    resolver = resolver_of(socket.getaddrinfo)
    with without_free_descriptors(os.getpid()), pytest.raises(OSError, match="Too many open files"):
        await resolver.addresses("localhost")
    assert await resolver.addresses("localhost")
