"""The bad-link proxy: cuts, silence, refused connections and scheduled outages."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_twisted
from twisted.internet import error
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.task import Clock

from tests.badlink import Counts
from tests.badlink_wire import BUFFER
from tests.unit.support.badlinks import LinkTestbed, advance, pattern, quiet
from tests.unit.support.common import on_reactor, until


@pytest_twisted.async_yield_fixture
async def testbed() -> AsyncIterator[LinkTestbed]:
    """Return a server and a factory of links to it."""
    testbed = LinkTestbed()
    yield testbed
    await testbed.end()


@pytest.mark.parametrize(("by", "ended"), [("fin", ConnectionDone), ("rst", ConnectionLost)])
@on_reactor
async def test_connection_is_cut_after_exact_byte_count(testbed: LinkTestbed, by: str, ended: type) -> None:
    link = testbed.link(cut_bytes=100_001, cut_by=by)
    peers = [await testbed.client(link, 60_000, 60_000) for _ in range(2)]
    await until(lambda: link.counts.cut == 2 and link.counts.open == 0)
    await until(lambda: all(peer.ended for peer in (*peers, *testbed.senders)))
    for peer in peers:
        assert (peer.ended, peer.received) == (ended, pattern(0, 100_001))
    assert link.counts.down == 200_002


@on_reactor
async def test_connection_falls_silent_instead_of_cut(testbed: LinkTestbed) -> None:
    link = testbed.link(cut_bytes=100_000, cut_by="silence")
    peer = await testbed.client(link, 200_000)
    await until(lambda: len(peer.received) == 100_000)
    peer.transport.write(b"5000\n")
    await quiet(peer)
    assert (peer.ended, len(peer.received), link.counts.cut) == (None, 100_000, 1)
    other = await testbed.client(link, 1000)
    await until(lambda: len(other.received) == 1000)


@on_reactor
async def test_connection_is_cut_after_a_time(testbed: LinkTestbed) -> None:
    clock = Clock()
    link = testbed.link(clock, cut_seconds=30)
    peer = await testbed.client(link, 1000)
    await until(lambda: len(peer.received) == 1000)
    clock.advance(29)
    await quiet(peer)
    assert peer.ended is None
    clock.advance(2)
    await until(lambda: peer.ended and testbed.senders[0].ended)


@on_reactor
async def test_black_hole_accepts_and_never_answers(testbed: LinkTestbed) -> None:
    link = testbed.link(hole=True)
    peer = await testbed.client(link, 1000)
    await until(lambda: link.counts.lost)
    await quiet(peer)
    assert link.counts == Counts(lost=len("1000\n"), accepted=1, open=1)
    assert peer.ended is None
    link.change(hole=False)
    other = await testbed.client(link, 1000)
    await until(lambda: len(other.received) == 1000)
    assert peer.received == b""


@on_reactor
async def test_established_connections_fall_silent(testbed: LinkTestbed) -> None:
    link = testbed.link()
    peer = await testbed.client(link, 1000)
    await until(lambda: len(peer.received) == 1000)
    link.silence()
    peer.transport.write(b"1000\n")
    testbed.senders[0].transport.write(b"hello")
    await until(lambda: link.counts.lost == len("1000\n" + "hello"))
    other = await testbed.client(link, 1000)
    await until(lambda: len(other.received) == 1000)
    assert (peer.ended, len(peer.received)) == (None, 1000)
    # The close is not passed on either.
    peer.transport.loseConnection()
    await until(lambda: peer.ended)
    await quiet(peer)
    assert testbed.senders[0].ended is None


@on_reactor
async def test_link_refuses_then_listens_on_same_port(testbed: LinkTestbed) -> None:
    link = testbed.link()
    before = await testbed.client(link, 1000)
    await until(lambda: len(before.received) == 1000)
    await link.change(refuse=True)
    with pytest.raises(error.ConnectionRefusedError):
        await testbed.client(link)
    before.transport.write(b"1000\n")
    await until(lambda: len(before.received) == 2000)
    await link.change(refuse=False)
    after = await testbed.client(link, 1000)
    await until(lambda: len(after.received) == 1000)


@on_reactor
async def test_data_held_during_outage_is_delivered_afterwards(testbed: LinkTestbed) -> None:
    link = testbed.link()
    peer, leaving = await testbed.client(link, 100_000), await testbed.client(link, 100_000)
    await until(lambda: len(peer.received) == len(leaving.received) == 100_000)
    link.set_down(True)
    peer.transport.write(b"100000\n")
    leaving.transport.loseConnection()
    during = await testbed.client(link, 100_000, 0)
    await quiet(peer, during)
    assert (len(peer.received), during.received, peer.ended, during.ended) == (100_000, b"", None, None)
    assert [producer.ended for producer in testbed.senders] == [None, None]
    link.set_down(False)
    await until(lambda: during.ended and len(peer.received) == 200_000)
    assert (during.received, peer.received) == (pattern(0, 100_000), pattern(0, 200_000))
    await until(lambda: any(producer.ended for producer in testbed.senders[:2]))


@on_reactor
async def test_outage_mid_transfer_loses_no_byte(testbed: LinkTestbed) -> None:
    clock = Clock()
    link = testbed.link(clock, rate=1_000_000, rtt=0.2)
    peer = await testbed.client(link, 1_000_000, 0)
    await advance(clock, 0.7)
    link.set_down(True)
    received = len(peer.received)
    assert 0 < received < 700_000
    await advance(clock, 1)
    await quiet(peer)
    assert len(peer.received) <= received + BUFFER
    link.set_down(False)
    await advance(clock, 2)
    await until(lambda: peer.ended)
    assert peer.received == pattern(0, 1_000_000)


@on_reactor
async def test_outage_may_cut_open_connections(testbed: LinkTestbed) -> None:
    link = testbed.link(outage="cut", cut_by="rst")
    peer = await testbed.client(link, 1000)
    await until(lambda: len(peer.received) == 1000)
    link.set_down(True)
    during = await testbed.client(link, 1000)
    await quiet(peer, during)
    assert (peer.ended, during.ended, testbed.senders[0].ended) == (None, None, None)
    link.set_down(False)
    await until(lambda: peer.ended and during.ended and testbed.senders[0].ended)
    assert (peer.ended, during.ended, link.counts.cut) == (ConnectionLost, ConnectionLost, 2)
    after = await testbed.client(link, 1000)
    await until(lambda: len(after.received) == 1000)


@on_reactor
async def test_scheduled_outages(testbed: LinkTestbed) -> None:
    clock = Clock()
    link = testbed.link(clock, schedule=(20, 10))
    seen: list[bool] = []
    for _ in range(70):
        clock.advance(1)
        seen.append(link.is_down)
    assert seen == [second % 30 >= 20 for second in range(1, 71)]
    link.change(schedule=(3, 1))
    assert not link.is_down
    clock.advance(3)
    assert link.is_down
    link.change(schedule=None)
    clock.advance(100)
    assert not link.is_down
