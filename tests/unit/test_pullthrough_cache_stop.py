"""Stopping the cache: downloads end, their clients get an error, and no other one is started."""

from __future__ import annotations

from pathlib import Path

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent, IBodyProducer, IResponse
from zope.interface import implementer

from ociregistry.errors import Unavailable
from ociregistry.names import Digest, Upstream
from ociregistry.pullthrough.cache import Content, PullThrough
from ociregistry.store.store import Store
from ociregistry.upstream.network import Registries
from ociregistry.upstream.registry import Registry
from tests.unit.support.common import on_reactor, turn, until
from tests.unit.support.http_agents import client_over, exchanges_over, registry_over
from tests.unit.support.registries import MemoryRegistries, Sending
from tests.unit.test_pullthrough_cache import DATA, DIGEST, ELSEWHERE, blob_of


async def stop(cache: PullThrough, clock: Clock) -> None:
    """Stop the cache and wait for it without advancing the clock."""
    stopped = cache.stopService()
    await turn()

    def has_stopped() -> bool:
        clock.advance(0)
        return stopped.called

    await until(has_stopped)


@on_reactor
async def test_idle_cache_stops_immediately(cache: PullThrough, clock: Clock) -> None:
    await stop(cache, clock)


async def begin(cache: PullThrough, upstreams: MemoryRegistries) -> tuple[Content, Sending]:
    """Return the content that a client gets and the upstream's side of it."""
    asked = blob_of(cache)
    await until(lambda: upstreams.calls)
    sending = upstreams[0].stream(len(DATA))
    return (await asked).content, sending


@pytest.mark.parametrize("received", [0, 1000, len(DATA)])
@on_reactor
async def test_blob_in_flight_is_aborted(
    cache: PullThrough, upstreams: MemoryRegistries, clock: Clock, root: Path, received: int
) -> None:
    content, sending = await begin(cache, upstreams)
    if received:
        sending.send(DATA[:received])
        await content.more_than(0)
    waiting = content.more_than(received)
    await turn()
    await stop(cache, clock)
    with pytest.raises(Unavailable, match="stopping"):
        await waiting
    content.close()
    assert sending.connection.closed
    assert list((root / "blobs").iterdir()) == []
    # What came is kept for the next start.
    kept = {path.name: path.read_bytes() for path in (root / "pulls" / "0").glob(f"{DIGEST.hex}*")}
    assert kept.pop(f"{DIGEST.hex}.note", None) is None or received
    assert kept == ({DIGEST.hex: DATA[:received]} if received else {})


@on_reactor
async def test_stop_triggered_by_the_last_client(
    cache: PullThrough, upstreams: MemoryRegistries, clock: Clock
) -> None:
    """The drain ends with the last request, possibly while the download is advancing."""
    content, sending = await begin(cache, upstreams)
    content.close()
    await stop(cache, clock)
    assert sending.connection.closed


@on_reactor
async def test_unanswered_blob_request_is_aborted(
    cache: PullThrough, upstreams: MemoryRegistries, clock: Clock
) -> None:
    asked = blob_of(cache)
    await until(lambda: upstreams.calls)
    await stop(cache, clock)
    with pytest.raises(Unavailable, match="stopping"):
        await asked


@implementer(IAgent)
class NeverAnswers:
    """Agent that never answers; cancelling fails the request as a real Agent does."""

    def __init__(self) -> None:
        self.asked = 0

    def request(
        self, method: bytes, uri: bytes, headers: Headers | None = None, bodyProducer: IBodyProducer | None = None
    ) -> Deferred[IResponse]:
        self.asked += 1
        return Deferred()


@on_reactor
async def test_error_names_the_stop_not_the_upstream(store: Store, clock: Clock) -> None:
    agent = NeverAnswers()

    def registry(upstream: Upstream) -> Registry:
        http = exchanges_over(agent, clock, str(upstream))
        return registry_over(client_over(http, clock), 1)

    cache = PullThrough(store, Registries((), registry), clock)
    asked = blob_of(cache)
    await until(lambda: agent.asked)
    await stop(cache, clock)
    with pytest.raises(Unavailable, match="stopping"):
        await asked


@on_reactor
async def test_no_retry_in_another_repository_after_stop(
    cache: PullThrough, upstreams: MemoryRegistries, clock: Clock, lookups: list[Digest]
) -> None:
    waiting = [blob_of(cache)]
    await until(lambda: upstreams.calls)
    waiting.append(blob_of(cache, str(ELSEWHERE)))
    await until(lambda: len(lookups) == 2)
    await stop(cache, clock)
    for one in waiting:
        assert one.called
        with pytest.raises(Unavailable, match="stopping"):
            await one
    assert len(upstreams) == 1
