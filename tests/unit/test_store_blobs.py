"""Blobs and partials: readable while written, and committed only after digest verification."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from twisted.internet.defer import gatherResults
from twisted.internet.task import Clock

import ociregistry.store.partials
import ociregistry.store.store
from ociregistry.names import Digest, Repository, Upstream
from ociregistry.store.blobs import open_blob
from ociregistry.store.files import Files, SharedFile
from ociregistry.store.partials import DigestMismatch
from ociregistry.store.store import Store
from ociregistry.store.threads import Threads
from ociregistry.store.workdir import PullsFolder
from tests.unit.support.common import REACTOR, fired, on_reactor, open_descriptors, until
from tests.unit.support.power_cuts import InlineThreads, result

DATA = bytes(range(256)) * 100
DIGEST = Digest.of(DATA)
PATH = Path("file")
SOURCE = Repository(Upstream("reg.example"), "team/app")


@pytest.fixture
def threads() -> Iterator[Threads]:
    """Return the threads of a store."""
    threads = Threads(REACTOR, Clock())
    threads.start()
    yield threads
    threads.stop()


@pytest.fixture
def file(tmp_path: Path) -> SharedFile:
    """Return a file that contains DATA; the test releases it."""
    (tmp_path / "file").write_bytes(DATA)
    opened = open_blob(tmp_path / "file")
    assert opened is not None
    assert opened[1].size == len(DATA)
    return opened[0]


def test_missing_blob(tmp_path: Path) -> None:
    assert open_blob(tmp_path / "file") is None


@on_reactor
async def test_read_at_offset(file: SharedFile, threads: Threads) -> None:
    assert await threads.read_at(file, PATH, 0, 10) == DATA[:10]
    assert await threads.read_at(file, PATH, 300, 5) == DATA[300:305]
    assert await threads.read_at(file, PATH, len(DATA) - 3, 100) == DATA[-3:]
    assert await threads.read_at(file, PATH, len(DATA), 100) == b""
    file.release()


@pytest.mark.parametrize("why", [errno.EAGAIN, errno.EOPNOTSUPP])
@on_reactor
async def test_uncached_read_runs_in_a_thread(
    file: SharedFile, threads: Threads, why: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> int:
        raise OSError(why, os.strerror(why))

    monkeypatch.setattr(os, "preadv", fail)
    reading = threads.read_at(file, PATH, 300, 5)
    assert not reading.called
    # After release by the client, the descriptor stays valid until the thread has read.
    descriptor = file.fileno()
    file.release()
    assert await reading == DATA[300:305]
    await until(lambda: not Path(f"/proc/self/fd/{descriptor}").is_symlink())


def test_cached_read_is_immediate(file: SharedFile, threads: Threads) -> None:
    assert fired(threads.read_at(file, PATH, 300, 100)) == DATA[300:400]
    file.release()


def test_disk_error_is_raised(file: SharedFile, threads: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match="Input/output"):
        fired(threads.read_at(file, PATH, 0, 100))
    file.release()


def test_each_process_has_its_own_pulls_folder(tmp_path: Path) -> None:
    first, second = PullsFolder(tmp_path, Files()), PullsFolder(tmp_path, Files())
    assert (first.path, second.path) == (tmp_path / "pulls" / "0", tmp_path / "pulls" / "1")
    first.close()
    third = PullsFolder(tmp_path, Files())
    assert third.path == tmp_path / "pulls" / "0"
    third.close()
    second.close()


def test_quarantined_files_stay(tmp_path: Path) -> None:
    first = PullsFolder(tmp_path, Files())
    (first.path / "bad").mkdir()
    (first.path / "bad" / DIGEST.hex).touch()
    first.close()
    second = PullsFolder(tmp_path, Files())
    assert (second.path / "bad" / DIGEST.hex).exists()
    second.close()


@on_reactor
async def test_partial_is_readable_while_it_grows(store: Store, root: Path) -> None:
    partial = await store.new_partial(DIGEST, None, SOURCE)
    reader = partial.reader()
    assert partial.length == 0
    await partial.append(DATA[:1000])
    assert partial.length == 1000
    assert await reader.read(100, 10) == DATA[100:110]
    assert await reader.read(990, 100) == DATA[990:1000]
    await partial.append(DATA[1000:])
    assert await reader.read(999, 2) == DATA[999:1001]
    await partial.verify()
    await store.commit(partial)
    partial.close()
    # A reader of the partial continues in the blob.
    assert await reader.read(0, len(DATA)) == DATA
    reader.close()
    assert (root / "blobs" / DIGEST.hex).read_bytes() == DATA


@on_reactor
async def test_partial_is_no_blob(store: Store, root: Path) -> None:
    partial = await store.new_partial(DIGEST, None, SOURCE)
    await partial.append(DATA)
    assert await store.blob(DIGEST) is None
    assert list((root / "blobs").iterdir()) == []
    await partial.verify()
    await store.commit(partial)
    partial.close()
    blob = await store.blob(DIGEST)
    assert blob is not None
    assert await blob.more_than(0) == blob.size == len(DATA)
    blob.close()


@pytest.mark.parametrize("received", [b"", DATA[:-1], DATA[:-1] + b"\0", DATA + b"\0"])
@on_reactor
async def test_wrong_bytes_fail_verification(store: Store, received: bytes) -> None:
    partial = await store.new_partial(DIGEST, None, SOURCE)
    await partial.append(received)
    with pytest.raises(DigestMismatch, match=DIGEST):
        await partial.verify()
    await partial.discard()
    partial.close()


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
@on_reactor
async def test_every_digest_algorithm_is_verified(store: Store, algorithm: str) -> None:
    digest = Digest.of(DATA, algorithm)
    partial = await store.new_partial(digest, None, SOURCE)
    await partial.append(DATA)
    await partial.verify()
    await store.commit(partial)
    partial.close()
    blob = await store.blob(digest)
    assert blob is not None
    blob.close()


@on_reactor
async def test_discarded_partial_is_readable_only_by_open_readers(store: Store, root: Path) -> None:
    partial = await store.new_partial(DIGEST, None, SOURCE)
    reader = partial.reader()
    await partial.append(DATA)
    await partial.discard()
    partial.close()
    assert not [path for path in (root / "pulls").rglob("*") if path.name.startswith(DIGEST.hex)]
    assert await reader.read(5, 5) == DATA[5:10]
    reader.close()


@on_reactor
async def test_no_descriptor_is_left_open(store: Store) -> None:
    await store.blob(DIGEST)  # starts the threads
    before = open_descriptors()
    partial = await store.new_partial(DIGEST, None, SOURCE)
    readers = [partial.reader() for _ in range(5)]
    await partial.append(DATA)
    await partial.verify()
    await store.commit(partial)
    partial.close()
    blobs = await gatherResults([reader.read(0, 10) for reader in readers])
    assert blobs == [DATA[:10]] * 5
    for reader in readers:
        reader.close()
    blob = await store.blob(DIGEST)
    assert blob is not None
    blob.close()
    # A thread releases its lease just after it returned its result.
    # The store keeps the blob itself open.
    await until(lambda: open_descriptors() <= before + 1)


class Synced(Files):
    """A disk that keeps the size of each file that was synced."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def sync_data(self, file: SharedFile) -> None:
        self.sizes.append(file.size())
        super().sync_data(file)


def test_partial_is_synced_at_intervals(open_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> None:
    """After enough bytes; after 30 s, however few they are, unless there are none."""
    monkeypatch.setattr(ociregistry.store.partials, "_SYNC_BYTES", 100)
    monkeypatch.setattr(ociregistry.store.store, "Threads", InlineThreads)
    disk, clock = Synced(), Clock()
    partial = result(open_store(files=disk).new_partial(DIGEST, len(DATA), SOURCE))

    def synced(seconds: float, count: int) -> list[int]:
        """Wait `seconds`, append `count` bytes, and return the sizes at which the file was then synced."""
        clock.advance(seconds)
        result(partial.append(DATA[partial.length : partial.length + count]))
        disk.sizes.clear()
        partial.checkpoint(clock)
        return list(disk.sizes)

    assert synced(0, 99) == []
    assert synced(1, 1) == [100]
    assert synced(1, 1000) == [1100]
    assert synced(29, 99) == []
    assert synced(1, 0) == [1199]
    assert synced(31, 0) == []
    assert synced(31, 1) == [1200]
    assert synced(29, 99) == []
    assert synced(0, 1) == [1300]
    partial.close()


class Full(Files):
    """A disk that accepts ten bytes of a file once it is `full`."""

    full = False

    def write(self, file: SharedFile, data: bytes, offset: int) -> None:
        if self.full and offset + len(data) > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(file, data, offset)


@on_reactor
async def test_failed_append_does_not_grow_the_partial(open_store: Callable[..., Store]) -> None:
    disk = Full()
    store = open_store(files=disk)
    partial = await store.new_partial(DIGEST, None, SOURCE)
    disk.full = True
    await partial.append(DATA[:10])
    with pytest.raises(OSError, match="No space"):
        await partial.append(DATA[10:])
    assert partial.length == 10
    await partial.discard()
    partial.close()


@on_reactor
async def test_pieces_are_appended_all_or_none(open_store: Callable[..., Store]) -> None:
    disk = Full()
    store = open_store(files=disk)
    partial = await store.new_partial(DIGEST, None, SOURCE)
    disk.full = True
    with pytest.raises(OSError, match="No space"):
        await partial.append(DATA[:5], DATA[5:10], DATA[10:])
    assert (partial.length, partial.sound) == (0, True)
    disk.full = False
    await partial.append(DATA[:5], DATA[5:10], DATA[10:])
    assert partial.length == len(DATA)
    await partial.verify()
    await store.commit(partial)
    partial.close()


@pytest.mark.parametrize("mirrored", [False, True])
@on_reactor
async def test_bytes_from_the_first_of_a_mirror_on_are_cut(open_store: Callable[..., Store], mirrored: bool) -> None:
    store = open_store()
    partial = await store.new_partial(DIGEST, len(DATA), SOURCE, mirrored=mirrored)
    await partial.append(DATA[:10])
    assert partial.mirrored is mirrored
    await partial.note_mirror()
    await partial.append(b"wrong")
    await partial.sync()
    assert partial.mirrored
    partial.close()
    left = await store.old_partial(DIGEST)
    assert left is not None
    assert left.mirrored
    # Where a mirror sent the first byte, none is kept, and the caller discards the partial.
    assert await left.cut_mirrored() is not mirrored
    left.close()
    again = await store.old_partial(DIGEST)
    assert again is not None
    assert (again.length, again.mirrored) == ((15, True) if mirrored else (10, False))
    if not mirrored:
        await again.append(DATA[10:])
        await again.verify()
    again.close()
