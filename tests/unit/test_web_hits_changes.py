"""Hits by the short way while the store changes: no answer is stale."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent

from ociregistry.errors import BlobUnknown, ManifestUnknown
from ociregistry.names import Digest
from ociregistry.pullthrough.cache import PullThrough
from ociregistry.store.records import read_record
from ociregistry.store.store import Store
from ociregistry.store.verify import Damaged
from tests.images import make_image
from tests.unit.support.common import image, manifest, on_reactor, record, texts, until
from tests.unit.support.hits import APP, BLOB, BUILT, IMAGE, MANIFEST, TAG, Served, request
from tests.unit.support.registries import MemoryRegistries
from tests.unit.support.stores import StoreDir, by_name

OTHER = manifest(make_image("moved to"))
LAYER = Digest(BUILT.layers[0].digest)
TARGETS = [TAG, MANIFEST, BLOB]


class Cached:
    """A site whose answers to all `TARGETS` are remembered; its upstream has nothing."""

    def __init__(self, served: Served, upstreams: MemoryRegistries) -> None:
        self.served = served
        self.upstreams = upstreams

    async def ask(self, target: str, method: str = "GET") -> bytes:
        """Send a plain request; return the answer. What the store lacks is not found."""
        before = len(self.upstreams)
        answer = Deferred.fromCoroutine(self.served.ask(request(target, method)))
        await until(lambda: answer.called or len(self.upstreams) > before)
        if not answer.called:
            self.upstreams[before].refuse(BlobUnknown("gone") if target == BLOB else ManifestUnknown("gone"))
        return await answer

    async def is_gone(self, target: str, method: str = "GET") -> bool:
        """Tell whether the next request finds nothing."""
        return (await self.ask(target, method)).startswith(b"HTTP/1.1 404 ")

    async def are_remembered(self, *targets: str) -> bool:
        """Tell whether requests take the short way."""
        return all([await self.served.is_short(request(target)) for target in targets])


@pytest.fixture
def served(root: Path, store: Store, cache: PullThrough, clock: Clock) -> Served:
    """Return a site over the empty store."""
    return Served(root, store, cache, clock)


async def remembered(served: Served, upstreams: MemoryRegistries) -> Cached:
    """Store the image and have all answers remembered."""
    await served.fill()
    for target in TARGETS:
        await served.remember(target)
    cached = Cached(served, upstreams)
    assert await cached.are_remembered(*TARGETS)
    return cached


# This process makes the change: the very next answer is right.


@on_reactor
async def test_tag_moves(served: Served, upstreams: MemoryRegistries, store: Store) -> None:
    cached = await remembered(served, upstreams)
    await store.keep(OTHER, APP)
    assert (await cached.ask(TAG)).endswith(OTHER.data)
    assert (await cached.ask(MANIFEST)).endswith(IMAGE.data)


@on_reactor
async def test_image_is_pruned(served: Served, upstreams: MemoryRegistries, store: Store) -> None:
    cached = await remembered(served, upstreams)
    await store.prune(by_name("team/app"))
    for target in TARGETS:
        assert await cached.is_gone(target)


@on_reactor
async def test_tag_is_pruned(served: Served, upstreams: MemoryRegistries, store: Store) -> None:
    cached = await remembered(served, upstreams)
    await store.keep(IMAGE, image(f"{APP.repository}@{IMAGE.digest}"))
    await store.prune(by_name("team/app:1"))
    assert await cached.is_gone(TAG)
    assert (await cached.ask(MANIFEST)).endswith(IMAGE.data)


@on_reactor
async def test_damaged_blob_is_quarantined(served: Served, upstreams: MemoryRegistries, store: Store) -> None:
    cached = await remembered(served, upstreams)
    path = served.root / "blobs" / LAYER.hex
    path.write_bytes(path.read_bytes()[::-1])
    gone: list[bool] = []

    async def found(damaged: Damaged) -> None:
        gone.append(await cached.is_gone(BLOB))

    await store.verify(None, lambda _done, _all: None, found)
    assert gone == [True]
    assert await cached.are_remembered(TAG, MANIFEST)


@on_reactor
async def test_damaged_record_is_quarantined(served: Served, upstreams: MemoryRegistries, store: Store) -> None:
    cached = await remembered(served, upstreams)
    path = record(served.root, IMAGE.digest)
    path.write_bytes(path.read_bytes().replace(b"schemaVersion", b"schemaversion"))
    gone: list[bool] = []

    async def found(damaged: Damaged) -> None:
        gone.extend([await cached.is_gone(TAG), await cached.is_gone(MANIFEST)])

    await store.verify(None, lambda _done, _all: None, found)
    assert gone == [True, True]


@on_reactor
async def test_damage_that_the_usual_way_finds(served: Served, upstreams: MemoryRegistries) -> None:
    cached = await remembered(served, upstreams)
    record(served.root, IMAGE.digest).write_bytes(b"{")
    with_range = Deferred.fromCoroutine(served.ask(request(TAG, headers="Range: bytes=0-1\r\n")))
    await until(lambda: len(upstreams) == 1)
    upstreams[0].refuse(ManifestUnknown("gone"))
    await with_range
    for target in (TAG, MANIFEST):
        assert await cached.is_gone(target)


# Another program makes the change: the first look at the files, of which there is one a second, is enough.


def remove_record(store: StoreDir) -> None:
    """Remove the record as `rm` does."""
    record(store.root, IMAGE.digest).unlink()


def prune(store: StoreDir) -> None:
    """Prune in another process."""
    store.prune_only(by_name("team/app"))


def move_store(store: StoreDir) -> None:
    """Move the store away, and put an empty one there."""
    store.root.rename(store.root.with_name("moved"))
    StoreDir(store.root)


def spoil_record(store: StoreDir) -> None:
    """Write something else over the record."""
    record(store.root, IMAGE.digest).write_bytes(b"{}")


def remove_blob(store: StoreDir) -> None:
    """Remove the blob."""
    (store.root / "blobs" / LAYER.hex).unlink()


def shorten_blob(store: StoreDir) -> None:
    """Put a file with another size in its place, as a copy that is under way."""
    path = store.root / "blobs" / LAYER.hex
    path.with_name("new").write_bytes(b"short")
    path.with_name("new").rename(path)


CHANGES: list[tuple[Callable[[StoreDir], None], list[str]]] = [
    (remove_record, TARGETS),
    (spoil_record, TARGETS),
    (prune, TARGETS),
    (move_store, TARGETS),
    (remove_blob, [BLOB]),
    (shorten_blob, [BLOB]),
]


def is_noticed(store: Store, gone: list[str]) -> bool:
    """Tell whether the store knows in memory that these are gone."""
    blob = store.opened(LAYER)
    if blob is not None:
        blob.close()
    return (BLOB not in gone or blob is None) and (TAG not in gone or store.entry(IMAGE.digest) is None)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(("change", "gone"), CHANGES)
@on_reactor
async def test_other_program_removes(
    served: Served,
    upstreams: MemoryRegistries,
    store: Store,
    change: Callable[[StoreDir], None],
    gone: list[str],
    method: str,
) -> None:
    cached = await remembered(served, upstreams)
    for target in TARGETS:
        # An answer to GET does not serve HEAD.
        assert await served.is_short(request(target, method)) == (method == "GET")
        assert await served.is_short(request(target, method))
    change(StoreDir(served.root))
    served.clock.advance(1)
    await until(lambda: is_noticed(store, gone))
    for target in TARGETS:
        assert await cached.is_gone(target, method) == (target in gone)


@on_reactor
async def test_other_program_adds_a_record_that_takes_the_tag(
    served: Served, upstreams: MemoryRegistries, store: Store
) -> None:
    cached = await remembered(served, upstreams)
    confirmed = read_record(record(served.root, IMAGE.digest)).images[str(APP)].confirmed
    StoreDir(served.root).put(OTHER, "team/app:1", confirmed=confirmed + timedelta(microseconds=1))
    served.clock.advance(1)
    await until(lambda: store.meaning(APP) == OTHER.digest)
    assert (await cached.ask(TAG)).endswith(OTHER.data)
    assert (await cached.ask(MANIFEST)).endswith(IMAGE.data)


@on_reactor
async def test_folder_that_cannot_be_looked_at(
    served: Served, upstreams: MemoryRegistries, store: Store, events: list[LogEvent]
) -> None:
    """What is in memory may be stale then, so each request reads the record, and finds that it is not there."""
    cached = await remembered(served, upstreams)
    images = served.root / "img"
    images.rename(served.root / "img.moved")
    images.touch()
    served.clock.advance(1)
    await until(lambda: any("cannot scan the store" in text for text in texts(events)))
    assert await cached.is_gone(TAG)
    images.unlink()
    (served.root / "img.moved").rename(images)
    served.clock.advance(1)
    await until(lambda: any("the store can be scanned again" in text for text in texts(events)))
    await served.remember(TAG)
    assert await cached.are_remembered(TAG)


@on_reactor
async def test_other_program_notes_a_pull(served: Served, upstreams: MemoryRegistries, store: Store) -> None:
    """That is no change of what is served."""
    cached = await remembered(served, upstreams)
    path = record(served.root, IMAGE.digest)
    os.utime(path, (0, 0))
    await store._refresh.scan()
    assert await cached.are_remembered(*TARGETS)
    # Nor is a record that says the same.
    path.with_name("copy").write_bytes(path.read_bytes())
    path.with_name("copy").rename(path)
    await store._refresh.scan()
    assert await cached.are_remembered(*TARGETS)
