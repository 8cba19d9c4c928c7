"""The bad-link proxy: limited rate and added delay, otherwise transparent."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_twisted
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.task import Clock

from tests.badlink import Counts, amount
from tests.badlink_wire import BUFFER
from tests.unit.support.badlinks import SMALL, LinkTestbed, Peer, advance, pattern, quiet
from tests.unit.support.common import on_reactor, until


@pytest_twisted.async_yield_fixture
async def testbed() -> AsyncIterator[LinkTestbed]:
    """Return a server and a factory of links to it."""
    testbed = LinkTestbed()
    yield testbed
    await testbed.end()


@on_reactor
async def test_unlimited_link_passes_both_directions(testbed: LinkTestbed) -> None:
    link = testbed.link()
    peer = await testbed.client(link, 1_000_000, 0)
    await until(lambda: peer.ended)
    assert peer.received == pattern(0, 1_000_000)
    await until(lambda: link.counts.open == 0)
    assert link.counts == Counts(up=len("1000000\n0\n"), down=1_000_000, accepted=1, dialled=1)
    assert (peer.ended, testbed.senders[0].ended) == (ConnectionDone, ConnectionDone)


@on_reactor
async def test_rate_is_shared_by_all_connections(testbed: LinkTestbed) -> None:
    clock = Clock()
    link = testbed.link(clock, rate=100_000)
    peers = [await testbed.client(link, 200_000) for _ in range(4)]
    await advance(clock, 2)
    assert 150_000 <= link.counts.down <= 200_000
    for peer in peers:
        assert 30_000 <= len(peer.received) <= 60_000
    link.change(rate=None)
    clock.advance(1)
    await until(lambda: all(len(peer.received) == 200_000 for peer in peers))


@on_reactor
async def test_idle_link_accumulates_no_credit(testbed: LinkTestbed) -> None:
    clock = Clock()
    link = testbed.link(clock, rate=10_000)
    clock.advance(60)
    peer = await testbed.client(link, 100_000)
    await advance(clock, 1)
    assert 5_000 <= len(peer.received) <= 10_200


@on_reactor
async def test_each_direction_takes_half_the_round_trip_time(testbed: LinkTestbed) -> None:
    """The handshake, the request and the response each take one way."""
    clock = Clock()
    link = testbed.link(clock, rtt=10)
    peer = await testbed.client(link, 1000)
    await advance(clock, 4.9, 0.1)
    assert link.counts.dialled == 0
    await advance(clock, 9.5, 0.1)
    assert (link.counts.dialled, link.counts.up) == (1, 0)
    await advance(clock, 1, 0.1)
    await until(lambda: testbed.senders[0].received)
    await quiet(peer)
    await advance(clock, 4, 0.1)
    assert link.counts.down == 0
    await advance(clock, 1, 0.1)
    await until(lambda: len(peer.received) == 1000)


@on_reactor
async def test_long_fat_link_is_filled(testbed: LinkTestbed) -> None:
    """With high rate and delay, more than one buffer is in flight."""
    clock = Clock()
    link = testbed.link(clock, rate=1_000_000, rtt=1)
    peer = await testbed.client(link, 5_000_000)
    await advance(clock, 5)
    assert 2_000_000 <= len(peer.received) <= 3_100_000


@on_reactor
async def test_buffering_for_stalled_client_is_bounded(testbed: LinkTestbed) -> None:
    link = testbed.link()
    peer = await testbed.client(link, 5_000_000)
    await until(lambda: peer.received)
    peer.transport.pauseProducing()
    seen = -1
    while testbed.senders[0].given != seen:
        seen = testbed.senders[0].given
        await quiet(peer)
    # One buffer of the proxy, and those of the kernel for four sockets.
    assert seen - len(peer.received) <= BUFFER + 4 * 2 * SMALL + 4 * BUFFER
    peer.transport.resumeProducing()
    await until(lambda: len(peer.received) == 5_000_000)


@on_reactor
async def test_stalled_client_does_not_block_others(testbed: LinkTestbed) -> None:
    link = testbed.link(rate=5_000_000)
    lazy = await testbed.client(link, 5_000_000)
    await until(lambda: lazy.received)
    lazy.transport.pauseProducing()
    await quiet(lazy)
    peer = await testbed.client(link, 500_000, 0)
    await until(lambda: peer.ended)
    assert peer.received == pattern(0, 500_000)
    lazy.transport.abortConnection()


@on_reactor
async def test_half_closed_connection_is_passed_on(testbed: LinkTestbed) -> None:
    link = testbed.link()
    peer = await testbed.client(link, 500_000)
    peer.transport.loseWriteConnection()
    await until(lambda: len(peer.received) == 500_000)


@pytest.mark.parametrize("server", ["is not there", "resets", "is reset"])
@on_reactor
async def test_reset_is_passed_on(testbed: LinkTestbed, server: str) -> None:
    link = testbed.link(rtt=0.01)
    if server == "is not there":
        await testbed.close()
    peer = await testbed.client(link, 1000)
    if server != "is not there":
        await until(lambda: len(peer.received) == 1000)
        other: Peer = testbed.senders[0] if server == "is reset" else peer
        (peer if server == "is reset" else testbed.senders[0]).transport.abortConnection()
        await until(lambda: other.ended)
        assert other.ended is ConnectionLost
    else:
        await until(lambda: peer.ended)
        assert (peer.ended, peer.received, link.counts.dialled) == (ConnectionLost, b"", 0)
    await until(lambda: link.counts.open == 0)


@on_reactor
async def test_stopped_link_leaves_no_connections(testbed: LinkTestbed) -> None:
    link = testbed.link(rate=1000)
    peers = [await testbed.client(link, 100_000) for _ in range(3)]
    await until(lambda: len(testbed.senders) == 3)
    await link.stop()
    assert link.counts.open == 0
    await until(lambda: all(peer.ended for peer in (*peers, *testbed.senders)))
    await link.stop()


def test_parse_amounts() -> None:
    texts = {"10Mbit": 1_250_000, "500 kbit": 62_500, "5MB": 5_000_000, "64KiB": 65_536, "1.5kB": 1500, "7": 7}
    assert {text: amount(text) for text in texts} == texts
    for wrong in ("", "Mbit", "10mbit", "10 Mbit/s", "-1", "1e3"):
        with pytest.raises(ValueError, match="is not an amount"):
            amount(wrong)
