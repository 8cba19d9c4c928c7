"""Downloads: many clients read a blob while it arrives, and it is complete only after digest verification."""

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
from tests.unit.support.common import image, manifest, on_reactor, texts, until
from tests.unit.support.registries import MemoryRegistries, Sending, downloads_ended

BUILT = make_image("download", layer_size=100_000)
DATA = BUILT.layers[0].data
SIZE = len(DATA)
DIGEST = Digest(BUILT.layers[0].digest)
APP = image("reg.example/team/app:1")
WHERE = f"{APP.repository}@{DIGEST}"


def get(cache: PullThrough, repository: str = "reg.example/team/app") -> Deferred[FoundBlob]:
    """Request the blob."""
    return Deferred.fromCoroutine(cache.blob(image(f"{repository}:1").repository, DIGEST))


async def begin(cache: PullThrough, upstreams: MemoryRegistries, size: int | None = SIZE) -> tuple[Content, Sending]:
    """Return the content that a client gets and the upstream's side of it."""
    before = len(upstreams)
    asked = get(cache)
    await until(lambda: len(upstreams) > before)
    sending = upstreams[-1].stream(size)
    return (await asked).content, sending


async def read_all(content: Content) -> bytes:
    """Return all bytes that a client gets."""
    received = bytearray()
    while len(received) < content.size:
        await content.more_than(len(received))
        received += await content.read(len(received), 30_000)
    return bytes(received)


async def failure(content: Content, offset: int) -> Unavailable:
    """Return the error raised after an offset."""
    with pytest.raises(Unavailable) as failed:
        await content.more_than(offset)
    return failed.value


def blobs(root: Path) -> list[bytes]:
    """Return the contents of the blobs in the store."""
    return [path.read_bytes() for path in (root / "blobs").iterdir()]


def partials(root: Path) -> list[Path]:
    """Return the contents of the partials."""
    return list((root / "pulls").rglob(f"{DIGEST.hex}*"))


def partial_sizes(root: Path) -> list[int]:
    """Return the sizes of the partials."""
    return [path.stat().st_size for path in (root / "pulls").rglob(DIGEST.hex)]


@on_reactor
async def test_bytes_are_readable_while_they_arrive(
    cache: PullThrough, upstreams: MemoryRegistries, root: Path
) -> None:
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
    await downloads_ended(cache)
    assert (blobs(root), partials(root)) == ([DATA], [])


@on_reactor
async def test_last_byte_is_withheld_until_digest_is_verified(
    cache: PullThrough, upstreams: MemoryRegistries
) -> None:
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
async def test_wrong_bytes_are_never_complete(
    cache: PullThrough, upstreams: MemoryRegistries, root: Path, spoil: Callable[[bytes], bytes], why: str
) -> None:
    content, sending = await begin(cache, upstreams)
    sending.send(spoil(DATA)).end()
    error = await failure(content, SIZE - 1)
    assert error.message.startswith(f"{WHERE}: ")
    assert why in error.message
    content.close()
    assert blobs(root) == []
    # The next client gets the blob from a working upstream.
    content, sending = await begin(cache, upstreams)
    assert upstreams.asked == [f"blob {APP.repository} {DIGEST}"] * 2
    sending.send(DATA).end()
    assert await read_all(content) == DATA
    content.close()
    await downloads_ended(cache)
    assert (blobs(root), partials(root)) == ([DATA], [])


@on_reactor
async def test_disconnected_client_does_not_stop_the_download(
    cache: PullThrough, upstreams: MemoryRegistries, root: Path
) -> None:
    content, sending = await begin(cache, upstreams)
    sending.send(DATA[:10])
    await content.more_than(0)
    content.close()
    sending.send(DATA[10:]).end()
    await downloads_ended(cache)
    assert blobs(root) == [DATA]
    found = await get(cache)
    assert (found.cache_status.is_hit, await read_all(found.content)) == (True, DATA)
    found.content.close()
    assert len(upstreams) == 1


@on_reactor
async def test_size_from_the_manifest_only(cache: PullThrough, upstreams: MemoryRegistries, store: Store) -> None:
    await store.keep(manifest(BUILT), APP)
    content, sending = await begin(cache, upstreams, None)
    assert content.size == SIZE
    sending.send(DATA).end()
    assert await read_all(content) == DATA
    content.close()


@on_reactor
async def test_unknown_size_is_known_at_the_end(cache: PullThrough, upstreams: MemoryRegistries, root: Path) -> None:
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
async def test_size_mismatch_with_manifest_is_refused_before_reading(
    cache: PullThrough, upstreams: MemoryRegistries, store: Store
) -> None:
    await store.keep(manifest(BUILT), APP)
    asked = get(cache)
    await until(lambda: upstreams.calls)
    sending = upstreams[0].stream(SIZE + 1)
    with pytest.raises(Unavailable, match=f"has {SIZE + 1} bytes, expected {SIZE}"):
        await asked
    assert sending.connection.closed


@pytest.mark.parametrize("size", [0, None])
@on_reactor
async def test_empty_blob(cache: PullThrough, upstreams: MemoryRegistries, root: Path, size: int | None) -> None:
    empty = Digest.of(b"")
    for _ in range(2):
        asked = Deferred.fromCoroutine(cache.blob(APP.repository, empty))
        await until(lambda: upstreams.calls)
        if not asked.called and not upstreams[0].result.called:
            upstreams[0].stream(size).end()
        content = (await asked).content
        assert content.size == 0
        content.close()
        await downloads_ended(cache)
        assert blobs(root) == [b""]
    assert len(upstreams) == 1


@on_reactor
async def test_empty_body_for_nonempty_blob_is_an_error(cache: PullThrough, upstreams: MemoryRegistries) -> None:
    asked = get(cache)
    await until(lambda: upstreams.calls)
    upstreams[0].stream(0).end()
    with pytest.raises(Unavailable, match="digest"):
        await asked


@on_reactor
async def test_failure_without_readers_is_one_log_line(
    cache: PullThrough, upstreams: MemoryRegistries, events: list[LogEvent]
) -> None:
    content, sending = await begin(cache, upstreams)
    content.close()
    sending.send(DATA + b"\0").end()
    await until(lambda: texts(events, LogLevel.error))
    (line,) = texts(events, LogLevel.error)
    assert line.startswith(f"{WHERE}: ")


@on_reactor
async def test_failure_with_readers_is_raised_and_not_logged(
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
async def test_defect_is_logged_and_hidden_from_clients(
    cache: PullThrough, upstreams: MemoryRegistries, events: list[LogEvent]
) -> None:
    asked = get(cache)
    await until(lambda: upstreams.calls)
    upstreams[0].refuse(ZeroDivisionError("a secret"))
    with pytest.raises(Unavailable) as failed:
        await asked
    assert "secret" not in failed.value.message
    assert [event["log_failure"].type for event in events if "log_failure" in event] == [ZeroDivisionError]
