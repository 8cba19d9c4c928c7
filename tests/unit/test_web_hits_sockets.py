"""Hits by the short way over sockets: what the kernel does not take at once follows, in order and once."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Factory
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.admin.requests import Kind, Outcome
from ociregistry.pullthrough.cache import PullThrough
from ociregistry.store.blobs import StoredBlob
from ociregistry.store.pagecache import SLICE
from ociregistry.store.store import Store
from tests.images import make_image
from tests.unit.support.common import REACTOR, image, manifest, on_reactor, texts, turn, until
from tests.unit.support.hits import BLOB, TAG, Served, request, undated

LARGE = make_image("large", layers=1, layer_size=3_000_000)
LARGE_BLOB = f"/v2/team/app/blobs/{LARGE.layers[0].digest}?ns=reg.example"


class Kernel:
    """The socket of a connection, which takes what the test lets it take."""

    def __init__(self, real: socket.socket) -> None:
        self._real = real
        self.takes: list[int | OSError] = []
        """The bytes that the next calls take, at most; further ones take all."""
        self.full = False
        self.flags: list[int] = []
        """Those of each call."""

    def send(self, data: bytes, flags: int = 0) -> int:
        """Take some bytes."""
        self.flags.append(flags)
        if self.full:
            raise BlockingIOError(errno.EAGAIN, "it is full")
        if self.takes:
            most = self.takes.pop(0)
            if not isinstance(most, int):
                raise most
            data = data[:most]
        return self._real.send(data, flags)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class Client(Factory):
    """A client of the site, connected by TCP."""

    noisy = False

    def __init__(self, served: Served) -> None:
        self._served = served
        self._port = REACTOR.listenTCP(0, self, interface="127.0.0.1")
        self.socket = socket.create_connection(("127.0.0.1", self._port.getHost().port))
        self.socket.setblocking(False)
        self.channel: Any = None
        self.received = b""

    def buildProtocol(self, addr: IAddress | None) -> Any:
        """Make the channel, and keep it."""
        self.channel = self._served.site.buildProtocol(addr)
        return self.channel

    async def connect(self) -> Kernel:
        """Wait for the connection; return the server's socket."""
        await until(lambda: self.channel is not None and self.channel.transport is not None)
        kernel = Kernel(self.channel.transport.socket)
        self.channel.transport.socket = kernel
        return kernel

    def has_received(self, count: int) -> bool:
        """Read what has come; tell whether it is this number of bytes."""
        try:
            self.received += self.socket.recv(1 << 20)
        except BlockingIOError:
            return False
        return len(self.received) >= count

    async def close(self) -> None:
        """Close both sides."""
        self.socket.close()
        await until(lambda: self.channel is None or not self.channel.transport.connected)
        await self._port.stopListening()


@pytest.fixture
def served(root: Path, store: Store, cache: PullThrough, clock: Clock) -> Served:
    """Return a site over the empty store."""
    return Served(root, store, cache, clock)


@pytest_twisted.async_yield_fixture
async def client(served: Served) -> AsyncIterator[Client]:
    """Return a client of the site."""
    client = Client(served)
    yield client
    await client.close()


async def remembered(served: Served, store: Store) -> dict[str, bytes]:
    """Have the answers remembered that come from a manifest, a small blob and a large one; return them."""
    await served.fill()
    await store.keep(manifest(LARGE), image("reg.example/team/app:large"))
    for blob in LARGE.blobs:
        (served.root / "blobs" / blob.digest.removeprefix("sha256:")).write_bytes(blob.data)
    return {target: await served.remember(target) for target in (TAG, BLOB, LARGE_BLOB)}


DATE = b"\r\nDate: Mon, 01 Jan 2024 00:00:00 GMT"


@pytest.mark.parametrize("behind_head", [None, -20, 0, 7], ids=["nothing", "part of the head", "the head", "more"])
@pytest.mark.parametrize("target", [TAG, BLOB, LARGE_BLOB])
@on_reactor
async def test_rest_of_an_answer_follows(
    served: Served, store: Store, client: Client, events: list[LogEvent], target: str, behind_head: int | None
) -> None:
    answer = (await remembered(served, store))[target]
    head, _, content = answer.partition(b"\r\n\r\n")
    kernel = await client.connect()
    before = served.v2.asked
    tally = served.site.requests.tally(Kind.MANIFEST if target == TAG else Kind.BLOB, Outcome.HIT)
    counted = (tally.answers, tally.bytes)
    first = 0 if behind_head is None else len(head) + len(DATE) + len(b"\r\n\r\n") + behind_head
    kernel.takes = [first] if first else [BlockingIOError(errno.EAGAIN, "it is full")]
    client.channel.dataReceived(request(target))
    await until(lambda: client.has_received(len(answer) + len(DATE)))
    await until(lambda: served.site.in_flight.idle().called)
    assert (tally.answers, tally.bytes) == (counted[0] + 1, counted[1] + len(content))
    assert f" 200 {len(content)} bytes " in texts(events, LogLevel.info)[-1]
    # The connection is as good as new.
    client.channel.dataReceived(request(target))
    await until(lambda: client.has_received(2 * (len(answer) + len(DATE))))
    assert undated(client.received) == 2 * answer
    assert served.v2.asked == before


@pytest.mark.parametrize(("target", "flag"), [(TAG, 0), (BLOB, 0), (LARGE_BLOB, socket.MSG_MORE)])
@on_reactor
async def test_only_a_head_waits_for_what_follows(
    served: Served, store: Store, client: Client, target: str, flag: int
) -> None:
    """The kernel would hold the end of a whole answer back for a fifth of a second."""
    answer = (await remembered(served, store))[target]
    kernel = await client.connect()
    client.channel.dataReceived(request(target))
    assert kernel.flags == [flag]
    await until(lambda: client.has_received(len(answer) + len(DATE)))


@pytest.mark.parametrize("turns", [0, 5], ids=["written", "tried"])
@on_reactor
async def test_answer_does_not_overtake_what_is_unsent(
    served: Served, store: Store, client: Client, turns: int
) -> None:
    """Twisted keeps unsent bytes in two places: those that it has tried to send, and newer ones."""
    answers = await remembered(served, store)
    kernel = await client.connect()
    kernel.full = True
    client.channel.dataReceived(request(TAG))
    for _ in range(turns):
        await turn()
    kernel.full = False
    client.channel.dataReceived(request(BLOB))
    await until(lambda: client.has_received(len(answers[TAG]) + len(answers[BLOB]) + 2 * len(DATE)))
    assert undated(client.received) == answers[TAG] + answers[BLOB]


@pytest.mark.parametrize("target", [TAG, BLOB, LARGE_BLOB])
@on_reactor
async def test_connection_that_turns_out_to_be_lost(
    served: Served, store: Store, client: Client, events: list[LogEvent], target: str
) -> None:
    """That is no defect, and nothing is left of the request."""
    await remembered(served, store)
    kernel = await client.connect()
    kernel.takes = [ConnectionResetError(errno.ECONNRESET, "it is lost")] * 3
    client.channel.dataReceived(request(target))
    client.socket.close()
    await until(lambda: not client.channel.transport.connected)
    await until(lambda: served.site.in_flight.idle().called)
    assert texts(events, LogLevel.critical) + texts(events, LogLevel.error) == []


@on_reactor
async def test_large_file_is_sent_in_turn_with_other_connections(
    served: Served, store: Store, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is sent at once keeps the reactor busy, and a client may take gigabytes."""
    answers = await remembered(served, store)
    await client.connect()
    counts: list[int] = []
    original = StoredBlob.send_at_once

    def noting(blob: StoredBlob, to: int, offset: int, count: int) -> int:
        counts.append(count)
        return original(blob, to, offset, count)

    monkeypatch.setattr(StoredBlob, "send_at_once", noting)
    client.channel.dataReceived(request(LARGE_BLOB))
    await until(lambda: client.has_received(len(answers[LARGE_BLOB]) + len(DATE)))
    assert counts == [SLICE]
