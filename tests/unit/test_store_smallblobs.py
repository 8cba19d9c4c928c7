"""Small blobs: in memory until they are whole, and on disk then, or where their download ends."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from ociregistry.config.values import Reserve
from ociregistry.names import Digest, Repository, Upstream
from ociregistry.store.files import Files
from ociregistry.store.partials import DigestMismatch
from ociregistry.store.smallblobs import LARGEST_SMALL, is_small
from ociregistry.store.store import Store
from tests.unit.support.common import on_reactor

DATA = bytes(range(256)) * 100
DIGEST = Digest.of(DATA)
SOURCE = Repository(Upstream("reg.example"), "team/app")


def kept(root: Path) -> dict[str, bytes]:
    """Return the files of downloads in pulls/."""
    return {path.name: path.read_bytes() for path in (root / "pulls").rglob(f"{DIGEST.hex}*")}


def test_largest_small_blob() -> None:
    assert [is_small(size) for size in (0, LARGEST_SMALL, LARGEST_SMALL + 1, None)] == [True, True, False, False]


@on_reactor
async def test_one_file_is_written_when_the_blob_is_whole(store: Store, root: Path) -> None:
    partial = store.small_partial(DIGEST, len(DATA), SOURCE)
    reader = partial.reader()
    await partial.append(DATA[:10], DATA[10:15])
    assert (partial.length, await reader.read(5, 100)) == (15, DATA[5:15])
    await partial.append(DATA[15:])
    await partial.verify()
    assert kept(root) == {}
    assert await store.blob(DIGEST) is None
    await store.commit(partial)
    assert kept(root) == {}
    assert (root / "blobs" / DIGEST.hex).read_bytes() == DATA
    stored = await store.blob(DIGEST)
    assert stored is not None
    stored.close()
    assert await reader.read(0, len(DATA)) == DATA
    reader.close()
    partial.close()


@on_reactor
async def test_wrong_bytes_are_no_blob(store: Store) -> None:
    partial = store.small_partial(DIGEST, len(DATA), SOURCE)
    await partial.append(DATA[:-1], b"x")
    with pytest.raises(DigestMismatch, match="do not have the digest"):
        await partial.verify()


@pytest.mark.parametrize("mirrored", [False, True])
@on_reactor
async def test_unfinished_blob_is_resumed(store: Store, root: Path, mirrored: bool) -> None:
    partial = store.small_partial(DIGEST, len(DATA), SOURCE, mirrored=mirrored)
    await partial.append(DATA[:10])
    await partial.sync()
    assert partial.sound
    assert kept(root).keys() == {DIGEST.hex, f"{DIGEST.hex}.note"}
    left = await store.old_partial(DIGEST, len(DATA))
    assert left is not None
    assert (left.length, left.size, left.mirrored) == (10, len(DATA), mirrored)
    await left.append(DATA[10:])
    await left.verify()
    await store.commit(left)
    left.close()
    assert (root / "blobs" / DIGEST.hex).read_bytes() == DATA


@on_reactor
async def test_nothing_is_left_of_a_download_without_bytes(store: Store, root: Path) -> None:
    await store.small_partial(DIGEST, len(DATA), SOURCE).sync()
    assert kept(root) == {}


@pytest.mark.parametrize("mirrored", [False, True])
@on_reactor
async def test_bytes_from_the_first_of_a_mirror_on_are_cut(store: Store, mirrored: bool) -> None:
    partial = store.small_partial(DIGEST, len(DATA), SOURCE, mirrored=mirrored)
    await partial.append(DATA[:10])
    assert partial.mirrored is mirrored
    await partial.note_mirror()
    await partial.append(b"wrong")
    assert partial.mirrored
    assert await partial.cut_mirrored() is not mirrored
    left = await store.old_partial(DIGEST, len(DATA))
    if mirrored:
        assert left is None
    else:
        assert left is not None
        assert (left.length, left.mirrored) == (10, False)
        left.close()


@on_reactor
async def test_full_disk(open_store: Callable[..., Store], root: Path) -> None:
    store = open_store(reserve=Reserve(1.0))
    partial = store.small_partial(DIGEST, len(DATA), SOURCE)
    await partial.append(DATA)
    with pytest.raises(OSError, match="no room") as failed:
        await store.commit(partial)
    assert failed.value.errno == errno.ENOSPC
    # Nothing can be kept of it, which is no second error.
    await partial.sync()
    assert kept(root) == {}


class NoSync(Files):
    """A disk that cannot sync a file."""

    def sync(self, file: object) -> None:
        """Fail."""
        raise OSError(errno.EIO, "Input/output error")


@on_reactor
async def test_blob_that_cannot_be_synced_is_none(open_store: Callable[..., Store], root: Path) -> None:
    files = NoSync()
    store = open_store()
    store._files = files
    partial = store.small_partial(DIGEST, len(DATA), SOURCE)
    await partial.append(DATA)
    with pytest.raises(OSError, match="Input/output error"):
        await store.commit(partial)
    assert list((root / "blobs").iterdir()) == []
    assert kept(root) == {}


@on_reactor
async def test_old_partial_of_another_size_is_discarded(store: Store, root: Path) -> None:
    partial = store.small_partial(DIGEST, len(DATA), SOURCE)
    await partial.append(DATA[:10])
    await partial.sync()
    assert await store.old_partial(DIGEST, len(DATA) + 1) is None
    assert kept(root) == {}
