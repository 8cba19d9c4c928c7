"""Download priority: background downloads pause while a client waits for data, and only while data flows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionLost
from twisted.internet.task import Clock

from ociregistry.context import Priority
from ociregistry.names import Digest
from ociregistry.pullthrough.cache import Content, PullThrough
from ociregistry.pullthrough.transfer import PriorityScheduler
from tests.images import Blob, make_image
from tests.unit.support.common import image, on_reactor, turn, until
from tests.unit.support.registries import MemoryRegistries, Sending, downloads_ended
from tests.unit.test_pullthrough_download import read_all
from tests.unit.test_pullthrough_download_resume import again

FIRST, SECOND = make_image("precedence", layer_size=100_000).layers
REPOSITORY = image("reg.example/team/app:1").repository
SIZE = len(FIRST.data)
assert len(SECOND.data) == SIZE


def request_of(blob: Blob, start: int = 0) -> str:
    """Return the expected request for it."""
    return f"blob {REPOSITORY} {blob.digest}" + (f" from {start}" if start else "")


class DownloadHarness:
    """A cache whose upstream's answers the test sends."""

    def __init__(self, cache: PullThrough, upstreams: MemoryRegistries, clock: Clock, root: Path) -> None:
        self.cache = cache
        self.upstreams = upstreams
        self.clock = clock
        self.root = root

    async def answer(self, count: int, size: int = SIZE, start: int = 0) -> Sending:
        """Answer request number `count`."""
        await again(self.upstreams, self.clock, count)
        return self.upstreams[-1].stream(size, start)

    def ask(self, blob: Blob) -> Deferred[Content]:
        """Request the blob as a client."""
        asked = Deferred.fromCoroutine(self.cache.blob(REPOSITORY, Digest(blob.digest)))
        return asked.addCallback(lambda found: found.content)

    def fetch(self, blob: Blob) -> Deferred[None]:
        """Fetch the blob in the background."""
        return Deferred.fromCoroutine(self.cache.fetch(REPOSITORY, Digest(blob.digest)))

    async def client(self, blob: Blob) -> tuple[Content, Sending]:
        """Request the blob as a client and send its first bytes."""
        asked = self.ask(blob)
        sending = await self.answer(len(self.upstreams) + 1)
        content = await asked
        sending.send(blob.data[:1000])
        await content.more_than(0)
        return content, sending

    async def background(self, blob: Blob) -> tuple[Deferred[None], Sending]:
        """Fetch the blob in the background and send its first bytes."""
        fetched = self.fetch(blob)
        sending = await self.answer(len(self.upstreams) + 1)
        sending.send(blob.data[:1000])
        await until(lambda: self.received(blob) == 1000)
        return fetched, sending

    async def pause_background(self) -> tuple[Deferred[None], Sending, Content, Sending]:
        """Return a background download paused after 2000 bytes, and the client's download that paused it."""
        fetched, one = await self.background(FIRST)
        content, two = await self.client(SECOND)
        one.send(FIRST.data[1000:2000])
        await until(lambda: one.connection.paused)
        assert self.received(FIRST) == 2000
        return fetched, one, content, two

    async def wait_for_queue(self) -> None:
        """Wait until a download waits for its turn."""

        def waiting() -> bool:
            self.clock.advance(0.1)
            return bool(self.cache._scheduler._changed._waiting)

        await until(waiting)

    def received(self, blob: Blob) -> int:
        """Return the size of the blob's partial."""
        return sum(path.stat().st_size for path in (self.root / "pulls").rglob(Digest(blob.digest).hex))

    async def finish(self, blob: Blob, sending: Sending, start: int) -> None:
        """Send the rest of the blob."""
        await until(lambda: not sending.connection.paused)
        sending.send(blob.data[start:]).end()
        await until((self.root / "blobs" / Digest(blob.digest).hex).exists)


@pytest.fixture
def harness(cache: PullThrough, upstreams: MemoryRegistries, clock: Clock, root: Path) -> DownloadHarness:
    """Return a harness without downloads."""
    return DownloadHarness(cache, upstreams, clock, root)


@on_reactor
async def test_background_download_pauses_for_a_client_and_continues_afterwards(harness: DownloadHarness) -> None:
    fetched, one, content, two = await harness.pause_background()
    assert not two.connection.paused
    two.send(SECOND.data[1000:2000])
    await content.more_than(1000)
    assert one.connection.paused
    two.send(SECOND.data[2000:]).end()
    assert await read_all(content) == SECOND.data
    await harness.finish(FIRST, one, 2000)
    await fetched
    content.close()
    await downloads_ended(harness.cache)
    assert harness.upstreams.asked == [request_of(FIRST), request_of(SECOND)]


@on_reactor
async def test_background_download_continues_while_the_other_has_no_connection(harness: DownloadHarness) -> None:
    fetched, one, content, two = await harness.pause_background()
    two.end(ConnectionLost())
    await until(lambda: not one.connection.paused)
    one.send(FIRST.data[2000:3000])
    await until(lambda: harness.received(FIRST) == 3000)
    # It pauses again once the other has one.
    two = await harness.answer(3, SIZE, 1000)
    assert harness.upstreams.asked[2] == request_of(SECOND, 1000)
    one.send(FIRST.data[3000:4000])
    await until(lambda: one.connection.paused)
    two.send(SECOND.data[1000:]).end()
    await harness.finish(FIRST, one, 4000)
    await fetched
    content.close()
    await downloads_ended(harness.cache)


@on_reactor
async def test_background_download_continues_when_a_client_requests_it(harness: DownloadHarness) -> None:
    fetched, one, content, two = await harness.pause_background()
    followed = await harness.ask(FIRST)
    await until(lambda: not one.connection.paused)
    # Both are active now.
    for start in range(2000, 5000, 1000):
        one.send(FIRST.data[start : start + 1000])
        two.send(SECOND.data[start - 1000 : start])
        await until(lambda start=start: harness.received(FIRST) == start + 1000)  # type: ignore[misc]  # the value of this iteration
        assert not one.connection.paused
        assert not two.connection.paused
    # When that client leaves, this one pauses again and the other does not.
    followed.close()
    one.send(FIRST.data[5000:6000])
    await until(lambda: one.connection.paused)
    await harness.finish(SECOND, two, 4000)
    content.close()
    await harness.finish(FIRST, one, 6000)
    await fetched
    await downloads_ended(harness.cache)


@on_reactor
async def test_background_download_continues_when_the_other_client_leaves(harness: DownloadHarness) -> None:
    fetched, one, content, two = await harness.pause_background()
    second = await harness.ask(SECOND)
    content.close()
    await turn()
    assert one.connection.paused
    second.close()
    await until(lambda: not one.connection.paused)
    # Now neither has a client.
    await harness.finish(FIRST, one, 2000)
    await harness.finish(SECOND, two, 1000)
    await fetched
    await downloads_ended(harness.cache)


@on_reactor
async def test_two_downloads_without_clients_do_not_wait_for_each_other(harness: DownloadHarness) -> None:
    content, one = await harness.client(FIRST)
    other, two = await harness.client(SECOND)
    content.close()
    one.send(FIRST.data[1000:2000])
    await until(lambda: one.connection.paused)
    other.close()
    await harness.finish(FIRST, one, 2000)
    await harness.finish(SECOND, two, 1000)
    await downloads_ended(harness.cache)


@pytest.mark.parametrize("why", [ConnectionLost(), None], ids=["broke", "ended"])
@on_reactor
async def test_paused_connection_ends(harness: DownloadHarness, why: Exception | None) -> None:
    fetched, one, content, two = await harness.pause_background()
    one.end(why)
    two.send(SECOND.data[1000:]).end()
    await until((harness.root / "blobs" / Digest(SECOND.digest).hex).exists)
    content.close()
    one = await harness.answer(3, SIZE, 2000)
    await harness.finish(FIRST, one, 2000)
    await fetched
    await downloads_ended(harness.cache)


@on_reactor
async def test_background_download_opens_no_connection_meanwhile(harness: DownloadHarness) -> None:
    content, two = await harness.client(SECOND)
    fetched = harness.fetch(FIRST)
    await harness.wait_for_queue()
    harness.clock.advance(1000)
    assert harness.upstreams.asked == [request_of(SECOND)]
    await harness.finish(SECOND, two, 1000)
    content.close()
    one = await harness.answer(2)
    await harness.finish(FIRST, one, 0)
    await fetched
    await downloads_ended(harness.cache)


@on_reactor
async def test_client_request_opens_the_connection_immediately(harness: DownloadHarness) -> None:
    content, two = await harness.client(SECOND)
    fetched = harness.fetch(FIRST)
    await harness.wait_for_queue()
    asked = harness.ask(FIRST)
    one = await harness.answer(2)
    followed = await asked
    await harness.finish(FIRST, one, 0)
    await harness.finish(SECOND, two, 1000)
    await fetched
    followed.close()
    content.close()
    await downloads_ended(harness.cache)


@on_reactor
async def test_broken_background_download_is_not_resumed_meanwhile(harness: DownloadHarness) -> None:
    fetched, one = await harness.background(FIRST)
    content, two = await harness.client(SECOND)
    one.end(ConnectionLost())
    await harness.wait_for_queue()
    assert len(harness.upstreams) == 2
    await harness.finish(SECOND, two, 1000)
    content.close()
    one = await harness.answer(3, SIZE, 1000)
    await harness.finish(FIRST, one, 1000)
    await fetched
    await downloads_ended(harness.cache)


@on_reactor
async def test_long_paused_download_resumes_on_a_new_connection(harness: DownloadHarness) -> None:
    """Servers close connections from which nothing is read."""
    fetched, one, content, two = await harness.pause_background()
    harness.clock.advance(301)
    one.end(ConnectionLost())
    await harness.finish(SECOND, two, 1000)
    content.close()
    one = await harness.answer(3, SIZE, 2000)
    await harness.finish(FIRST, one, 2000)
    await fetched
    await downloads_ended(harness.cache)


@pytest.mark.parametrize("watched", [True, False])
@on_reactor
async def test_resume_for_a_waiting_client_is_urgent(harness: DownloadHarness, watched: bool) -> None:
    asked, sending = await (harness.client(FIRST) if watched else harness.background(FIRST))
    background = Priority.BACKGROUND
    assert harness.upstreams[0].context.priority is (Priority.CLIENT if watched else background)
    sending.end(ConnectionLost())
    await again(harness.upstreams, harness.clock, 2)
    assert harness.upstreams[1].timeout == 10.0
    assert harness.upstreams[1].context.priority is (Priority.URGENT if watched else background)
    await harness.finish(FIRST, harness.upstreams[1].stream(SIZE, 1000), 1000)
    if isinstance(asked, Deferred):
        await asked
    else:
        asked.close()
    await downloads_ended(harness.cache)


@pytest.mark.parametrize(
    ("change", "pauses"),
    [
        (lambda scheduler: scheduler.flows(1, Priority.CLIENT), True),
        (lambda scheduler: (scheduler.flows(1, Priority.CLIENT), scheduler.flows(2, Priority.BACKGROUND)), True),
        (lambda scheduler: (scheduler.flows(1, Priority.CLIENT), scheduler.flows(1, Priority.PRELOAD)), False),
        (lambda scheduler: (scheduler.flows(1, Priority.CLIENT), scheduler.flows(1, None)), False),
    ],
)
def test_background_downloads_pause_while_a_client_download_flows(
    change: Callable[[PriorityScheduler], object], pauses: bool
) -> None:
    scheduler = PriorityScheduler()
    change(scheduler)
    for priority in Priority:
        assert scheduler.pauses(priority) is (pauses and priority < Priority.CLIENT)
