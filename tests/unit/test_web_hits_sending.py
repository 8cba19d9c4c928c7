"""Hits by the short way keep all promises of the usual one: log, last pull, completion, limits and drain."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.names import Digest, ImageReference, Repository
from ociregistry.pullthrough.cache import PullThrough
from ociregistry.store.blobs import StoredBlob
from ociregistry.store.store import Store
from tests.images import make_image
from tests.unit.support.common import image, manifest, on_reactor, record, texts, turn, until
from tests.unit.support.demands import AMD64, ARM64, INDEX, Demands, NoDemand
from tests.unit.support.hits import BLOB, BUILT, IMAGE, MANIFEST, TAG, Connection, Served, request, undated
from tests.unit.support.loads import settle
from tests.unit.support.stores import by_name, open_blobs

LAYER = Digest(BUILT.layers[0].digest)
LARGE = make_image("large", layers=1, layer_size=3_000_000)
LARGE_BLOB = f"/v2/team/app/blobs/{LARGE.layers[0].digest}?ns=reg.example"
WIDE = make_image("wide", layers=300, layer_size=1)
WIDE_MANIFEST = f"/v2/team/app/manifests/{WIDE.manifest.digest}?ns=reg.example"
SIZE = len(LARGE.layers[0].data)


@pytest.fixture
def served(root: Path, store: Store, cache: PullThrough, clock: Clock) -> Served:
    """Return a site over the empty store."""
    return Served(root, store, cache, clock)


async def large(served: Served, store: Store) -> bytes:
    """Store a large blob, have the answer remembered, and return that."""
    await store.keep(manifest(LARGE), image("reg.example/team/app:large"))
    for blob in LARGE.blobs:
        (served.root / "blobs" / blob.digest.removeprefix("sha256:")).write_bytes(blob.data)
    return await served.remember(LARGE_BLOB)


# The log


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("target", [TAG, MANIFEST, BLOB])
@on_reactor
async def test_same_line_in_the_access_log(served: Served, target: str, method: str, events: list[LogEvent]) -> None:
    await served.fill()
    await served.remember(target, method)
    assert await served.is_short(request(target, method))
    first, second = (text for text in texts(events, LogLevel.info) if text.startswith(f"{method} /v2/"))
    assert re.sub(r" \d+ ms ", " 0 ms ", first) == second
    assert second.endswith(" ms 192.0.2.1:40000 hit")


@on_reactor
async def test_one_line_for_what_was_not_sent_at_once(served: Served, store: Store, events: list[LogEvent]) -> None:
    await large(served, store)
    assert await served.is_short(request(LARGE_BLOB))
    lines = [text for text in texts(events, LogLevel.info) if text.startswith("GET /v2/")]
    assert len(lines) == 2
    assert f" 200 {SIZE} bytes " in lines[1]


# The last pull


@on_reactor
async def test_pull_is_noted_once_a_minute(served: Served, clock: Clock) -> None:
    await served.fill()
    path = record(served.root, IMAGE.digest)
    for target, method in ((TAG, "GET"), (TAG, "HEAD"), (MANIFEST, "GET")):
        await served.remember(target, method)
    os.utime(path, (1000, 1000))
    clock.advance(59)
    for target, method in ((TAG, "GET"), (TAG, "HEAD"), (MANIFEST, "GET")):
        assert await served.is_short(request(target, method))
    for _ in range(20):
        await turn()
    assert path.stat().st_mtime == 1000
    clock.advance(1)
    assert await served.is_short(request(TAG))
    await until(lambda: path.stat().st_mtime > 1000)
    noted = path.stat().st_mtime
    # The same image by its digest: a minute has not passed since.
    assert await served.is_short(request(MANIFEST))
    for _ in range(20):
        await turn()
    assert path.stat().st_mtime == noted


# Completion


@pytest.fixture
def demands(root: Path, store: Store, clock: Clock) -> Iterator[Demands]:
    """Return the demand."""
    demands = Demands(root, store, clock)
    yield demands
    demands.stop()


@on_reactor
async def test_image_that_lost_a_blob_is_completed(
    root: Path, store: Store, cache: PullThrough, clock: Clock, demands: Demands
) -> None:
    served = Served(root, store, cache, clock, demands.demand)
    await served.fill()
    await served.remember(TAG)
    await settle(store)
    assert await served.is_short(request(TAG))
    assert demands.completing == []
    (root / "blobs" / LAYER.hex).unlink()
    # Found complete by the request before; that holds for 30 s, and the folder of blobs is looked at every 10 s.
    for _ in range(31):
        clock.advance(1)
        await settle(store)
    assert await served.is_short(request(TAG))
    await settle(store)
    assert demands.completing == [IMAGE.digest]


@on_reactor
async def test_requests_for_an_index_put_off_the_decision(
    root: Path, store: Store, cache: PullThrough, clock: Clock, demands: Demands
) -> None:
    served = Served(root, store, cache, clock, demands.demand)
    await demands.get(INDEX, tag="1")
    await demands.get(AMD64, ARM64)
    index = f"/v2/team/app/manifests/{INDEX.digest}?ns=reg.example"
    child = f"/v2/team/app/manifests/{ARM64.digest}?ns=reg.example"
    await store.keep(INDEX, image(f"reg.example/team/app@{INDEX.digest}"))
    for target in (index, child):
        await served.remember(target)
    for target in (index, child, index):
        await demands.wait(20)
        assert await served.is_short(request(target))
        assert demands.pending == ["linux/amd64", "linux/arm64"]
    await demands.wait(29)
    assert demands.pending == ["linux/amd64", "linux/arm64"]
    await demands.wait(1)
    assert (demands.pending, demands.completing) == ([], ["linux/amd64"])


class Requested(NoDemand):
    """A demand that records what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def manifest_requested(self, image: ImageReference, digest: Digest, *, is_list: bool, hit: bool) -> None:
        """Record the request."""
        self.told.append((image, digest, is_list, hit))

    def blob_requested(self, repository: Repository, digest: Digest) -> None:
        """Record the request."""
        self.told.append((repository, digest))


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("target", [TAG, MANIFEST, BLOB])
@on_reactor
async def test_demand_is_told_the_same(
    root: Path, store: Store, cache: PullThrough, clock: Clock, target: str, method: str
) -> None:
    demand = Requested()
    served = Served(root, store, cache, clock, demand)
    await served.fill()
    await served.remember(target, method)
    usual, demand.told = demand.told, []
    assert len(usual) == (method == "GET")
    assert await served.is_short(request(target, method))
    assert demand.told == usual


@on_reactor
async def test_demand_is_told_once_of_a_blob_that_is_not_open_any_more(
    root: Path, store: Store, cache: PullThrough, clock: Clock
) -> None:
    demand = Requested()
    served = Served(root, store, cache, clock, demand)
    await served.fill()
    await served.remember(BLOB)
    (root / "blobs" / LAYER.hex).chmod(0o640)
    clock.advance(1)
    await until(lambda: not open_blobs(root))
    demand.told.clear()
    await served.remember(BLOB)
    assert len(demand.told) == 1


# What the client takes


class Part:
    """A client that takes the beginning of a large answer, and then nothing while `full`."""

    def __init__(self, served: Served, target: str = LARGE_BLOB) -> None:
        asked = served.v2.asked
        self.connection = Connection(served.site)
        self.transport: Any = self.connection.transport
        self.transport.full = True
        self.connection.send(request(target))
        assert served.v2.asked == asked

    def resume(self) -> None:
        """Take all that comes."""
        self.transport.full = False
        self.transport.producer.resumeProducing()


def has_more_than(part: Part, received: int) -> bool:
    """Tell whether the client has got more than this number of bytes."""
    return len(part.connection.received) > received


@on_reactor
async def test_slow_client_is_dropped_after_a_minute(
    served: Served, store: Store, clock: Clock, events: list[LogEvent]
) -> None:
    await large(served, store)
    part = Part(served)
    await until(lambda: len(part.connection.received) > 1000)
    clock.pump([1] * 59)
    assert not part.transport.aborted
    clock.pump([1] * 2)
    assert part.transport.aborted
    part.connection.channel.connectionLost()
    await until(lambda: served.site.in_flight.idle().called)
    (line,) = texts(events, LogLevel.warn)
    assert line.endswith(": the client read nothing for 60 s")


@on_reactor
async def test_long_transfer_is_not_idle(served: Served, store: Store, clock: Clock) -> None:
    whole = await large(served, store)
    part = Part(served)
    for _ in range(10):
        clock.pump([1] * 50)
        received = len(part.connection.received)
        part.transport.producer.resumeProducing()
        await until(partial(has_more_than, part, received))
        assert not part.transport.disconnecting
    part.resume()
    await until(lambda: part.connection.whole)
    assert undated(part.connection.received) == whole
    clock.pump([1] * 149)
    assert not part.transport.disconnecting
    clock.pump([1] * 2)
    assert part.transport.disconnecting


@on_reactor
async def test_idle_connection_is_closed_after_its_last_request(served: Served, clock: Clock) -> None:
    await served.fill()
    await served.remember(TAG)
    connection = Connection(served.site)
    for _ in range(3):
        connection.send(request(TAG))
        clock.pump([1] * 140)
        assert not connection.transport.disconnecting
    clock.pump([1] * 11)
    assert connection.transport.disconnecting
    assert connection.received.count(b"HTTP/1.1 200 OK") == 3


@on_reactor
async def test_half_closed_client_gets_the_rest(served: Served, store: Store) -> None:
    whole = await large(served, store)
    part = Part(served)
    part.connection.channel.readConnectionLost()
    assert not part.transport.disconnecting
    part.resume()
    await until(lambda: part.transport.disconnecting)
    assert undated(part.connection.received) == whole


@on_reactor
async def test_client_that_closes_after_an_answer(served: Served) -> None:
    await served.fill()
    whole = await served.remember(TAG)
    connection = Connection(served.site).send(request(TAG))
    connection.channel.readConnectionLost()
    assert connection.transport.disconnecting
    assert undated(connection.received) == whole


@on_reactor
async def test_stop_waits_for_the_rest(served: Served, store: Store, clock: Clock) -> None:
    await large(served, store)
    await until(lambda: served.site.in_flight.idle().called)
    part = Part(served)
    idle = served.site.in_flight.idle()
    clock.pump([1] * 10)
    assert not idle.called
    part.resume()
    await until(lambda: idle.called)
    assert part.connection.whole


@on_reactor
async def test_answered_connection_does_not_delay_a_stop(served: Served) -> None:
    await served.fill()
    await served.remember(TAG)
    Connection(served.site).send(request(TAG))
    # Neither does it count as new any more, nor as being answered.
    assert served.site.in_flight.idle().called


@on_reactor
async def test_client_that_leaves_releases_the_blob(
    served: Served, store: Store, clock: Clock, events: list[LogEvent]
) -> None:
    await large(served, store)
    part = Part(served)
    part.connection.channel.connectionLost()
    await until(lambda: served.site.in_flight.idle().called)
    assert texts(events, LogLevel.error) == []
    await store.prune(by_name("team/app"))
    await until(lambda: not open_blobs(served.root))


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@on_reactor
async def test_answer_at_once_releases_the_blob(served: Served, store: Store, method: str) -> None:
    await served.fill()
    await served.remember(BLOB, method)
    # The first HEAD opens no file.
    await served.ask(request(BLOB))
    assert await served.is_short(request(BLOB, method))
    assert open_blobs(served.root)
    await store.prune(by_name("team/app"))
    await until(lambda: not open_blobs(served.root))


@on_reactor
async def test_requests_that_come_meanwhile_wait(served: Served, store: Store) -> None:
    await served.fill()
    small = await served.remember(TAG)
    whole = await large(served, store)
    part = Part(served)
    rest = request(BLOB)
    part.connection.send(request(TAG), request(MANIFEST), rest[:20])
    received = len(part.connection.received)
    part.resume()
    await until(lambda: part.connection.received.count(b"HTTP/1.1 200 OK") == 3)
    part.connection.send(rest[20:])
    await until(lambda: part.connection.received.endswith(BUILT.layers[0].data))
    assert received < SIZE
    answers = undated(part.connection.received)
    assert answers.startswith(whole + small + small)
    assert answers.endswith(await served.ask(request(BLOB)))


@on_reactor
async def test_flood_that_comes_meanwhile_is_not_read(
    served: Served, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    await served.fill()
    await large(served, store)
    disk: Deferred[bytes] = Deferred()
    monkeypatch.setattr(StoredBlob, "read", lambda *_: disk)
    connection = Connection(served.site).send(request(LARGE_BLOB))
    connection.send(request(TAG) * 10)
    assert connection.transport.producerState == "producing"
    connection.send(request(TAG) * 400)
    assert connection.transport.producerState == "paused"
    monkeypatch.undo()
    disk.callback(LARGE.layers[0].data[:100])
    await until(lambda: connection.received.count(b"HTTP/1.1 200 OK") == 411)
    assert connection.transport.producerState == "producing"


@on_reactor
async def test_flood_is_not_read_whenever_the_client_takes_a_piece(served: Served, store: Store) -> None:
    await served.fill()
    await served.remember(TAG)
    await large(served, store)
    part = Part(served)
    part.connection.send(request(TAG) * 400)
    for _ in range(3):
        received = len(part.connection.received)
        part.transport.producer.resumeProducing()
        assert part.transport.producerState == "paused"
        await until(partial(has_more_than, part, received))
    part.resume()
    await until(lambda: part.connection.received.count(b"HTTP/1.1 200 OK") == 401)
    assert part.transport.producerState == "producing"


@on_reactor
async def test_long_body_that_begins_meanwhile_is_read_to_its_end(
    served: Served, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its request is refused then, and its client does not wait for ever to send the rest."""
    await large(served, store)
    disk: Deferred[bytes] = Deferred()
    monkeypatch.setattr(StoredBlob, "read", lambda *_: disk)
    connection = Connection(served.site).send(request(LARGE_BLOB))
    head = request("/v2/team/app/blobs/uploads/", "PUT", "Content-Length: 40000\r\n")
    connection.send(head, bytes(20_000))
    assert connection.transport.producerState == "paused"
    monkeypatch.undo()
    disk.callback(LARGE.layers[0].data[:100])
    await until(lambda: served.site.in_flight.idle().called)
    assert connection.transport.producerState == "producing"
    connection.send(bytes(20_000))
    await until(lambda: b"HTTP/1.1 405 " in connection.received)


# Failures


@on_reactor
async def test_failing_disk_ends_the_answer_short(
    served: Served, store: Store, events: list[LogEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    await served.fill()
    await served.remember(TAG)
    await large(served, store)
    part = Part(served)
    part.connection.send(request(TAG))

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    part.resume()
    await until(lambda: part.transport.disconnecting)
    monkeypatch.undo()
    await until(lambda: served.site.in_flight.idle().called)
    # Nor is the next request answered: its client would take that for the rest of the blob.
    assert part.connection.received.count(b"HTTP/1.1 200 OK") == 1
    assert not part.connection.received.endswith(LARGE.layers[0].data[-100:])
    (line,) = texts(events, LogLevel.error)
    assert "response truncated: " in line
    # The file is opened again, and read where it failed.
    assert not await served.is_short(request(LARGE_BLOB))


@pytest.mark.expect_logged_failures
@on_reactor
async def test_defect_closes_the_connection(served: Served, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client must not wait for more bytes."""
    await large(served, store)
    part = Part(served)
    monkeypatch.setattr(StoredBlob, "close", lambda _: 1 / 0)
    part.resume()
    await until(lambda: part.transport.disconnecting)
    assert served.site.in_flight.idle().called


@on_reactor
async def test_bytes_in_memory_are_bounded(served: Served, store: Store, clock: Clock) -> None:
    """Of clients that take nothing, those are dropped that took their last byte the longest time ago."""
    await store.keep(manifest(WIDE), image(f"reg.example/team/app@{WIDE.manifest.digest}"))
    await served.remember(WIDE_MANIFEST)
    count = 64 * 1024 * 1024 // len(WIDE.manifest.data) + 10
    parts = [Part(served, WIDE_MANIFEST) for _ in range(count)]
    assert not any(part.transport.aborted for part in parts)
    clock.advance(6)
    Part(served, WIDE_MANIFEST)
    assert [part.transport.aborted for part in parts[:10]] == [True] * 10
    assert not parts[-1].transport.aborted
