"""Downloads on a full disk fail as if the upstream were unavailable and hold no resources."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ociregistry.config.values import Reserve
from ociregistry.errors import Unavailable
from ociregistry.names import Digest
from ociregistry.pullthrough.cache import PullThrough
from ociregistry.store.files import Files, SharedFile
from ociregistry.store.store import Store
from tests.images import make_image
from tests.unit.support.common import image, manifest, on_reactor, record, until
from tests.unit.support.registries import MemoryRegistries, downloads_ended
from tests.unit.test_pullthrough_download import (
    APP,
    BUILT,
    DATA,
    DIGEST,
    SIZE,
    WHERE,
    begin,
    failure,
    get,
    partial_sizes,
    partials,
)


class Full(Files):
    """A disk that accepts the first thousand bytes of a file."""

    def write(self, file: SharedFile, data: bytes, offset: int) -> None:
        if offset + len(data) > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(file, data, offset)


@on_reactor
async def test_full_disk_ends_the_download(
    open_store: Callable[..., Store], upstreams: MemoryRegistries, clock: Clock
) -> None:
    content, sending = await begin(PullThrough(open_store(files=Full()), upstreams, clock), upstreams)
    sending.send(DATA[:1000])
    assert await content.more_than(0) == 1000
    sending.send(DATA[1000:])
    assert (await failure(content, 1000)).message == f"{WHERE}: cannot be stored: No space left on device"
    assert sending.connection.closed
    content.close()


class NoRoom(Files):
    """A disk on which no file can be created in pulls/."""

    def create(self, path: Path) -> SharedFile:
        if path.parent.parent.name == "pulls":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().create(path)


@on_reactor
async def test_full_disk_releases_the_connection(
    open_store: Callable[..., Store], upstreams: MemoryRegistries, clock: Clock
) -> None:
    asked = get(PullThrough(open_store(files=NoRoom()), upstreams, clock))
    await until(lambda: upstreams.calls)
    sending = upstreams[0].stream(SIZE)
    with pytest.raises(Unavailable, match="cannot be stored: No space"):
        await asked
    assert sending.connection.closed


@on_reactor
async def test_size_in_manifest_exceeding_free_space_is_refused_without_request(
    store: Store, upstreams: MemoryRegistries, clock: Clock, root: Path
) -> None:
    await store.keep(manifest(BUILT), APP)
    store.reconfigure(Reserve(1.0))
    cache = PullThrough(store, upstreams, clock)
    with pytest.raises(Unavailable, match=f"{WHERE}: cannot be stored: the disk of .*: {SIZE} bytes are needed"):
        await get(cache)
    assert (upstreams.asked, partials(root)) == ([], [])


@pytest.mark.parametrize("size", [SIZE, None])
@on_reactor
async def test_partial_of_a_refused_blob_is_kept(
    open_store: Callable[..., Store], upstreams: MemoryRegistries, clock: Clock, root: Path, size: int | None
) -> None:
    store = open_store()
    partial = await store.new_partial(DIGEST, size, APP.repository)
    await partial.append(DATA[:1000])
    partial.close()
    store.reconfigure(Reserve(1.0))
    needed = SIZE - 1000 if size else 1
    with pytest.raises(Unavailable, match=f": {needed} bytes are needed"):
        await get(PullThrough(store, upstreams, clock))
    assert (upstreams.asked, partial_sizes(root)) == ([], [1000])


@on_reactor
async def test_content_length_exceeding_free_space_is_refused(
    store: Store, upstreams: MemoryRegistries, clock: Clock, root: Path
) -> None:
    asked = get(PullThrough(store, upstreams, clock))
    await until(lambda: upstreams.calls)
    sending = upstreams[0].stream(10**18)
    with pytest.raises(Unavailable, match=f": {10**18} bytes are needed"):
        await asked
    assert sending.connection.closed
    assert partials(root) == []


@on_reactor
async def test_unreceived_bytes_are_not_reserved(
    open_store: Callable[..., Store], upstreams: MemoryRegistries, clock: Clock, root: Path
) -> None:
    """Otherwise a large declared size from a slow upstream would block all other downloads."""
    half = shutil.disk_usage(root.parent).free * 2 // 3
    cache = PullThrough(open_store(reserve=Reserve(0.0)), upstreams, clock)
    content, sending = await begin(cache, upstreams, half)
    other = Deferred.fromCoroutine(cache.blob(APP.repository, Digest.of(b"other")))
    await until(lambda: len(upstreams) == 2)
    second = upstreams[1].stream(half)
    (await other).content.close()
    for one in (sending, second):
        one.end()
    await failure(content, 0)
    content.close()
    await downloads_ended(cache)


@on_reactor
async def test_manifest_exceeding_reserve_is_not_stored_but_known_one_gets_new_names(
    store: Store, upstreams: MemoryRegistries, clock: Clock, root: Path
) -> None:
    """Manifests are up to 8 MiB and clients may request any number, so they respect the reserve too."""
    cache = PullThrough(store, upstreams, clock)
    await store.keep(manifest(BUILT), APP)
    store.reconfigure(Reserve(1.0))
    clock.advance(1)
    new = make_image("new")
    asked = Deferred.fromCoroutine(cache.manifest(image("reg.example/team/app:2")))
    await until(lambda: upstreams.calls)
    upstreams[0].answer(manifest(new))
    with pytest.raises(Unavailable, match=r"cannot be stored: the disk of .* are free beside the reserve of "):
        await asked
    assert not record(root, manifest(new).digest).exists()
    # Manifests that the store already holds are accepted, also under new names.
    assert await store.keep(manifest(BUILT), image("reg.example/team/app:3"))
    assert b"team/app:3" in record(root, manifest(BUILT).digest).read_bytes()
