"""A blob in flight: followed by many as it comes, and whole for nobody before its digest holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from twisted.internet.defer import Deferred
from twisted.logger import LogEvent, LogLevel

from ociregistry.errors import BlobUnknown, Unavailable
from ociregistry.names import Digest
from ociregistry.pullthrough.cache import Content, FoundBlob, PullThrough
from ociregistry.store.store import Store
from tests.images import make_image
from tests.unit.support.doubles import image, manifest, on_reactor, texts, until
from tests.unit.support.registries import MemoryRegistries, Sending, landed

BUILT = make_image("download", layer_size=100_000)
DATA = BUILT.layers[0].data
SIZE = len(DATA)
DIGEST = Digest(BUILT.layers[0].digest)
APP = image("reg.example/team/app:1")
WHERE = f"{APP.repository}@{DIGEST}"


def get(cache: PullThrough, repository: str = "reg.example/team/app") -> Deferred[FoundBlob]:
    """A client asks for the blob."""
    return Deferred.fromCoroutine(cache.blob(image(f"{repository}:1").repository, DIGEST))


async def begin(cache: PullThrough, upstreams: MemoryRegistries, size: int | None = SIZE) -> tuple[Content, Sending]:
    """The blob as a client gets it, and as the upstream sends it."""
    before = len(upstreams)
    asked = get(cache)
    await until(lambda: len(upstreams) > before)
    sending = upstreams[-1].stream(size)
    return (await asked).content, sending


async def read_all(content: Content) -> bytes:
    """What a client gets in the end."""
    received = bytearray()
    while len(received) < content.size:
        await content.more_than(len(received))
        received += await content.read(len(received), 30_000)
    return bytes(received)


async def failure(content: Content, offset: int) -> Unavailable:
    """Why no more will come after an offset."""
    with pytest.raises(Unavailable) as failed:
        await content.more_than(offset)
    return failed.value


def blobs(root: Path) -> list[bytes]:
    """The blobs of the store."""
    return [path.read_bytes() for path in (root / "blobs").iterdir()]


def partials(root: Path) -> list[Path]:
    """What is left of downloads."""
    return list((root / "pulls").rglob(f"{DIGEST.hex}*"))


def partial_sizes(root: Path) -> list[int]:
    """How much has come of what is in flight."""
    return [path.stat().st_size for path in (root / "pulls").rglob(DIGEST.hex)]


@on_reactor
async def test_bytes_can_be_read_as_they_come(cache: PullThrough, upstreams: MemoryRegistries, root: Path) -> None:
    content, sending = await begin(cache, upstreams)
    assert upstreams.asked == [f"blob {APP.repository} {DIGEST}"]
    assert content.size == SIZE
    waiting = content.more_than(0)
    assert not waiting.called
    sending.send(DATA[:1000])
    assert await waiting == 1000
    assert await content.read(900, 200) == DATA[900:1000]
    assert await content.more_than(0) == 1000
    waiting = content.more_than(1000)
    sending.send(DATA[1000:5000])
    assert await waiting == 5000
    sending.send(DATA[5000:]).end()
    assert await read_all(content) == DATA
    content.close()
    await landed(cache)
    assert (blobs(root), partials(root)) == ([DATA], [])


@on_reactor
async def test_the_last_byte_waits_for_the_digest(cache: PullThrough, upstreams: MemoryRegistries) -> None:
    content, sending = await begin(cache, upstreams)
    sending.send(DATA)
    assert await content.more_than(SIZE - 2) == SIZE - 1
    waiting = content.more_than(SIZE - 1)
    assert not waiting.called
    sending.end()
    assert await waiting == SIZE
    content.close()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda data: data[:-1] + b"\xff", "digest"),
        (lambda data: b"\0" + data[1:], "digest"),
        (lambda data: data + b"\0", "more than"),
    ],
)
@on_reactor
async def test_wrong_bytes_are_never_whole(
    cache: PullThrough, upstreams: MemoryRegistries, root: Path, spoil: Callable[[bytes], bytes], why: str
) -> None:
    content, sending = await begin(cache, upstreams)
    sending.send(spoil(DATA)).end()
    error = await failure(content, SIZE - 1)
    assert error.message.startswith(f"{WHERE}: ")
    assert why in error.message
    content.close()
    assert blobs(root) == []
    # The next client gets what a healthy upstream sends.
    content, sending = await begin(cache, upstreams)
    assert upstreams.asked == [f"blob {APP.repository} {DIGEST}"] * 2
    sending.send(DATA).end()
    assert await read_all(content) == DATA
    content.close()
    await landed(cache)
    assert (blobs(root), partials(root)) == ([DATA], [])


@on_reactor
async def test_a_client_that_goes_away_stops_nothing(
    cache: PullThrough, upstreams: MemoryRegistries, root: Path
) -> None:
    content, sending = await begin(cache, upstreams)
    sending.send(DATA[:10])
    await content.more_than(0)
    content.close()
    sending.send(DATA[10:]).end()
    await landed(cache)
    assert blobs(root) == [DATA]
    found = await get(cache)
    assert (found.hit, await read_all(found.content)) == (True, DATA)
    found.content.close()
    assert len(upstreams) == 1


@on_reactor
async def test_a_size_that_only_the_manifest_tells(
    cache: PullThrough, upstreams: MemoryRegistries, store: Store
) -> None:
    await store.keep(manifest(BUILT), APP)
    content, sending = await begin(cache, upstreams, None)
    assert content.size == SIZE
    sending.send(DATA).end()
    assert await read_all(content) == DATA
    content.close()


@on_reactor
async def test_a_size_that_nobody_tells_is_known_in_the_end(
    cache: PullThrough, upstreams: MemoryRegistries, root: Path
) -> None:
    asked = get(cache)
    await until(lambda: upstreams.calls)
    sending = upstreams[0].stream(None)
    sending.send(DATA)
    await until(lambda: partial_sizes(root) == [SIZE])
    assert not asked.called
    sending.end()
    content = (await asked).content
    assert (content.size, await read_all(content)) == (SIZE, DATA)
    content.close()


@on_reactor
async def test_an_upstream_that_has_another_size_than_its_manifest_is_not_read(
    cache: PullThrough, upstreams: MemoryRegistries, store: Store
) -> None:
    await store.keep(manifest(BUILT), APP)
    asked = get(cache)
    await until(lambda: upstreams.calls)
    sending = upstreams[0].stream(SIZE + 1)
    with pytest.raises(Unavailable, match=f"has {SIZE + 1} bytes, expected {SIZE}"):
        await asked
    assert sending.connection.closed


@pytest.mark.parametrize("told", [0, None])
@on_reactor
async def test_an_empty_blob(cache: PullThrough, upstreams: MemoryRegistries, root: Path, told: int | None) -> None:
    empty = Digest.of(b"")
    for _ in range(2):
        asked = Deferred.fromCoroutine(cache.blob(APP.repository, empty))
        await until(lambda: upstreams.calls)
        if not asked.called and not upstreams[0].result.called:
            upstreams[0].stream(told).end()
        content = (await asked).content
        assert content.size == 0
        content.close()
        await landed(cache)
        assert blobs(root) == [b""]
    assert len(upstreams) == 1


@on_reactor
async def test_an_empty_body_is_not_the_empty_blob(cache: PullThrough, upstreams: MemoryRegistries) -> None:
    asked = get(cache)
    await until(lambda: upstreams.calls)
    upstreams[0].stream(0).end()
    with pytest.raises(Unavailable, match="digest"):
        await asked


@on_reactor
async def test_a_failure_that_nobody_follows_is_one_line(
    cache: PullThrough, upstreams: MemoryRegistries, events: list[LogEvent]
) -> None:
    content, sending = await begin(cache, upstreams)
    content.close()
    sending.send(DATA + b"\0").end()
    await until(lambda: texts(events, LogLevel.error))
    (line,) = texts(events, LogLevel.error)
    assert line.startswith(f"{WHERE}: ")


@on_reactor
async def test_a_failure_that_somebody_waits_for_is_his_to_tell(
    cache: PullThrough, upstreams: MemoryRegistries, events: list[LogEvent]
) -> None:
    asked = get(cache)
    await until(lambda: upstreams.calls)
    upstreams[0].refuse(BlobUnknown("not there"))
    with pytest.raises(BlobUnknown, match="not there"):
        await asked
    assert texts(events, LogLevel.error) == []


@pytest.mark.expect_logged_failures
@on_reactor
async def test_a_defect_is_told_and_hidden_from_clients(
    cache: PullThrough, upstreams: MemoryRegistries, events: list[LogEvent]
) -> None:
    asked = get(cache)
    await until(lambda: upstreams.calls)
    upstreams[0].refuse(ZeroDivisionError("a secret"))
    with pytest.raises(Unavailable) as failed:
        await asked
    assert "secret" not in failed.value.message
    assert [event["log_failure"].type for event in events if "log_failure" in event] == [ZeroDivisionError]
