"""Blobs that are kept open: one that was removed or replaced is closed, so that the disk gets its space back."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from ociregistry.names import Digest
from ociregistry.store import blobs, openblobs
from ociregistry.store.files import SharedFile, open_regular
from ociregistry.store.openblobs import Identity, OpenBlobs
from ociregistry.store.store import Store
from ociregistry.store.threads import Threads
from ociregistry.store.verify import Damaged
from tests.procfs import descriptors
from tests.unit.support.common import REACTOR, failed, fired, image, on_reactor, record, turn, until
from tests.unit.support.stores import by_name, image_of, keep_pulled, looked, open_blobs

CONFIG, LAYER = b"config", b"layer" * 1000
IMAGE = image_of(CONFIG, LAYER)
DIGEST = Digest.of(LAYER)
APP = image("reg.example/team/app:1")


def path_of(root: Path, digest: Digest = DIGEST) -> Path:
    """Return the path of a blob."""
    return root / "blobs" / digest.hex


async def opened(store: Store, root: Path) -> None:
    """Store the layer, and open it once."""
    await store.keep(IMAGE, APP)
    path_of(root).write_bytes(LAYER)
    blob = await store.blob(DIGEST)
    assert blob is not None
    blob.close()
    assert is_kept(store)


def is_kept(store: Store, digest: Digest = DIGEST) -> bool:
    """Tell whether a blob is open."""
    blob = store.opened(digest)
    if blob is not None:
        blob.close()
    return blob is not None


def open_in(folder: Path) -> list[str]:
    """Return the files in a folder that this process has open."""
    return [link for link in descriptors(os.getpid()) if link.startswith(str(folder))]


def overwrite(path: Path) -> None:
    """Change its content in place."""
    path.write_bytes(LAYER[:-1])


def overwrite_as_long(path: Path) -> None:
    """Change its content in place, and neither its size nor its mtime."""
    before = path.stat()
    path.write_bytes(LAYER[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    """Give its name to another file, as rsync does."""
    other = path.with_name(".other")
    other.write_bytes(LAYER)
    other.rename(path)


def forbid(path: Path) -> None:
    """Change its permissions."""
    path.chmod(0o200)


def move_store(path: Path) -> None:
    """Rename its folder."""
    (path.parent.parent / "blobs").rename(path.parent.parent / "blobs.moved")


def replace_folder(path: Path) -> None:
    """Put a file in the place of its folder."""
    move_store(path)
    (path.parent.parent / "blobs").touch()


CHANGES: list[Callable[[Path], None]] = [
    *(Path.unlink, overwrite, overwrite_as_long, replace, forbid),
    *(move_store, replace_folder),
]


@on_reactor
async def test_blob_that_was_read_is_kept_open(store: Store, root: Path) -> None:
    assert not is_kept(store)
    await opened(store, root)
    blob = store.opened(DIGEST)
    assert blob is not None
    assert await blob.read(0, len(LAYER)) == LAYER
    blob.close()


@pytest.mark.parametrize("change", CHANGES)
@on_reactor
async def test_blob_that_another_program_changes_is_closed_by_the_next_look(
    store: Store, root: Path, clock: Clock, change: Callable[[Path], None]
) -> None:
    await opened(store, root)
    change(path_of(root))
    clock.advance(1)
    await until(lambda: not is_kept(store))
    await until(lambda: open_blobs(root) == [])


@on_reactor
async def test_blob_that_does_not_change_is_kept(store: Store, root: Path, clock: Clock) -> None:
    await opened(store, root)
    for _ in range(20):
        clock.advance(1)
        for _ in range(5):
            await turn()
        assert is_kept(store)


@on_reactor
async def test_small_blob_is_in_memory(store: Store, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file is not read a second time."""
    await opened(store, root)

    def refuse(*_: object) -> None:
        raise AssertionError

    for call in ("pread", "preadv", "sendfile", "open"):
        monkeypatch.setattr(os, call, refuse)
    blob = store.opened(DIGEST)
    assert blob is not None
    assert blob.data == LAYER
    assert fired(blob.read(3, 7)) == LAYER[3:10]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert fired(blob.send(ours.fileno(), 7, 11, in_thread=True)) == 11
        assert theirs.recv(100) == LAYER[7:18]
    blob.close()


@on_reactor
async def test_small_blobs_in_memory_are_bounded(store: Store, root: Path) -> None:
    """All stay open, 16 MiB of them in memory; others, and readers of those that are dropped, read the files."""
    contents = [number.to_bytes(2) * 32 * 1024 for number in range(300)]
    digests = [Digest.of(content) for content in contents]
    await store.keep(image_of(CONFIG, *contents), APP)
    reading = []
    for digest, content in zip(digests, contents, strict=True):
        path_of(root, digest).write_bytes(content)
        blob = await store.blob(digest)
        assert blob is not None
        reading.append(blob)
    assert all(is_kept(store, digest) for digest in digests)
    assert [bool(blob.data) for blob in reading] == [number < 256 for number in range(300)]
    await store.prune(by_name("team/app"))
    assert not any(blob.data for blob in reading)
    for blob, content in zip(reading, contents, strict=True):
        assert await blob.read(1, len(content)) == content[1:]
        blob.close()
    # There is room for others then.
    await opened(store, root)
    blob = store.opened(DIGEST)
    assert blob is not None
    assert blob.data == LAYER
    blob.close()


@on_reactor
async def test_small_blob_that_is_not_kept_is_not_in_memory(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing would bound how many there are."""
    await store.keep(IMAGE, APP)
    path_of(root).write_bytes(LAYER)
    monkeypatch.setattr(openblobs, "descriptors_are_scarce", lambda: True)
    blob = await store.blob(DIGEST)
    assert blob is not None
    assert blob.data == b""
    assert await blob.read(3, 7) == LAYER[3:10]
    blob.close()


@on_reactor
async def test_pruned_blob_is_closed_at_once(store: Store, root: Path) -> None:
    await opened(store, root)
    reading = store.opened(DIGEST)
    assert reading is not None
    await store.prune(by_name("team/app"))
    assert not is_kept(store)
    # One that is being sent stays open for its client alone.
    await until(lambda: len(open_blobs(root)) == 1)
    assert await reading.read(0, 5) == LAYER[:5]
    reading.close()
    await until(lambda: open_blobs(root) == [])


class Opening:
    """Opens a blob in a thread, which waits with the open file until `end`."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self.has_opened = threading.Event()
        self._may_end = threading.Event()
        original = blobs.open_blob

        def wait(path: Path, failed_at: int | None) -> tuple[SharedFile, Identity] | None:
            opened = original(path, failed_at)
            self.has_opened.set()
            assert self._may_end.wait(10)
            return opened

        monkeypatch.setattr(blobs, "open_blob", wait)
        self.opening = Deferred.fromCoroutine(store.blob(DIGEST))

    def go_on(self) -> None:
        """Let the thread go on."""
        self._may_end.set()

    async def end(self) -> None:
        """Let the thread go on, and close the blob."""
        self.go_on()
        blob = await self.opening
        assert blob is not None
        blob.close()


async def opening_of(content: bytes, store: Store, root: Path, monkeypatch: pytest.MonkeyPatch) -> Opening:
    """Begin to open the blob, whose file has this content; return when the file is open."""
    await store.keep(IMAGE, APP)
    path_of(root).write_bytes(content)
    opening = Opening(store, monkeypatch)
    await until(opening.has_opened.is_set)
    return opening


@on_reactor
async def test_blob_that_is_opened_twice_at_once_is_kept_once(store: Store, root: Path) -> None:
    await store.keep(IMAGE, APP)
    path_of(root).write_bytes(LAYER)
    opening = [Deferred.fromCoroutine(store.blob(DIGEST)) for _ in range(2)]
    for blob in [await one for one in opening]:
        assert blob is not None
        blob.close()
    await until(lambda: len(open_blobs(root)) == 1)
    await store.prune(by_name("team/app"))
    await until(lambda: open_blobs(root) == [])


@pytest.mark.parametrize("last", ["store", "reader"])
@on_reactor
async def test_space_of_a_removed_blob_is_freed_in_a_thread(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    """It is when the last descriptor is closed: that of the store, or of a reader."""
    await opened(store, root)
    reading = store.opened(DIGEST)
    assert reading is not None
    if last == "store":
        reading.close()
    freed: list[threading.Thread] = []
    close = os.close

    def noting_close(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}") == f"{path_of(root)} (deleted)":
            freed.append(threading.current_thread())
        close(descriptor)

    monkeypatch.setattr(os, "close", noting_close)
    await store.prune(by_name("team/app"))
    if last == "reader":
        reading.close()
    await until(lambda: freed)
    assert freed[0] is not threading.current_thread()


async def ignore(damaged: Damaged) -> None:
    """Do nothing about a damaged file."""


@on_reactor
async def test_blob_that_is_quarantined_while_it_is_being_opened_is_not_kept(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next look would find that, but this process knows it already."""
    opening = await opening_of(LAYER[::-1], store, root, monkeypatch)
    await store.verify(None, lambda _done, _all: None, ignore)
    await opening.end()
    assert not is_kept(store)


@on_reactor
async def test_blob_that_is_removed_while_it_is_being_opened_is_kept_for_a_second(
    store: Store, root: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another program. To look at once would be to wait for the disk."""
    opening = await opening_of(LAYER, store, root, monkeypatch)
    path_of(root).unlink()
    await opening.end()
    clock.advance(1)
    await until(lambda: not is_kept(store))


@on_reactor
async def test_blob_that_is_opened_for_a_client_that_has_gone_is_closed(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening = await opening_of(LAYER, store, root, monkeypatch)
    opening.opening.cancel()
    failed(opening.opening, CancelledError)
    assert len(open_blobs(root)) == 1
    opening.go_on()
    await until(lambda: open_blobs(root) == [])


@on_reactor
async def test_small_blob_that_is_cut_while_it_is_being_opened_is_not_in_memory(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer would have more bytes in its head than behind that."""
    opening = await opening_of(LAYER, store, root, monkeypatch)
    path_of(root).write_bytes(LAYER[:100])
    opening.go_on()
    blob = await opening.opening
    assert blob is not None
    assert (blob.size, blob.data) == (len(LAYER), b"")
    blob.close()


@on_reactor
async def test_committed_blob_replaces_the_one_that_is_open(store: Store, root: Path) -> None:
    await opened(store, root)
    before = path_of(root).stat().st_ino
    await keep_pulled(store, IMAGE, APP, LAYER)
    assert path_of(root).stat().st_ino != before
    assert not is_kept(store)


@on_reactor
async def test_damaged_blob_is_closed_when_it_is_quarantined(store: Store, root: Path) -> None:
    await opened(store, root)
    path_of(root).write_bytes(LAYER[::-1])
    seen: list[bool] = []

    async def found(damaged: Damaged) -> None:
        seen.append(is_kept(store))

    await store.verify(None, lambda _done, _all: None, found)
    assert seen == [False]
    await until(lambda: open_blobs(root) == [])


@on_reactor
async def test_file_of_a_wrong_size_is_not_served(store: Store, root: Path, clock: Clock) -> None:
    """The manifest that gave the blob this size may be gone."""
    await opened(store, root)
    record(root, IMAGE.digest).unlink()
    await looked(clock, lambda: store.entry(IMAGE.digest) is None)
    assert not is_kept(store)
    # Nor is it held open by those that asked for it.
    path_of(root).unlink()
    clock.advance(1)
    await until(lambda: open_blobs(root) == [])


@on_reactor
async def test_none_is_kept_while_descriptors_are_scarce(
    store: Store, root: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await opened(store, root)
    monkeypatch.setattr(openblobs, "descriptors_are_scarce", lambda: True)
    clock.advance(1)
    assert not is_kept(store)
    blob = await store.blob(DIGEST)
    assert blob is not None
    blob.close()
    await until(lambda: open_blobs(root) == [])


@on_reactor
async def test_none_is_kept_while_descriptors_are_scarce_and_a_look_hangs(
    store: Store, root: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that does not answer must not keep the descriptors."""
    await opened(store, root)
    looking, answers = threading.Event(), threading.Event()
    lstat = os.lstat

    def hang(path: Path) -> os.stat_result:
        if Path(path).name == DIGEST.hex:
            looking.set()
            assert answers.wait(10)
        return lstat(path)

    monkeypatch.setattr(os, "lstat", hang)
    clock.advance(1)
    await until(looking.is_set)
    clock.advance(1)
    assert is_kept(store)
    monkeypatch.setattr(openblobs, "descriptors_are_scarce", lambda: True)
    clock.advance(1)
    assert not is_kept(store)
    answers.set()
    await until(lambda: open_blobs(root) == [])


@on_reactor
async def test_look_at_many_files_is_many_reads(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each counts as hung after 20 s: over a network, a look at 2,000 files may take as long."""
    threads = Threads(REACTOR, clock)
    threads.start()
    kept = OpenBlobs(threads, clock)
    kept.start()
    digests = [Digest.of(str(number).encode()) for number in range(600)]
    lstat, looks = os.lstat, threading.Semaphore(0)
    looked_at: list[Path] = []

    def slow_lstat(path: Path) -> os.stat_result:
        assert looks.acquire(timeout=10)
        looked_at.append(path)
        return lstat(path)

    try:
        for digest in digests:
            file = file_of(tmp_path, digest)
            kept.add(digest, tmp_path / digest.hex, file, Identity.of(os.fstat(file.fileno())), kept.forgotten)
            file.release()
        (tmp_path / digests[0].hex).unlink()
        monkeypatch.setattr(os, "lstat", slow_lstat)
        for second in range(1, 25):
            clock.advance(1)
            looks.release(24)
            await until(lambda: len(looked_at) == 24 * second)  # noqa: B023  # it is called in this turn
        assert threads.hung == ""
        # What is gone is closed before the last was looked at.
        await until(lambda: kept.get(digests[0]) is None)
    finally:
        monkeypatch.undo()
        looks.release(600)
        kept.stop()
        threads.stop()


def file_of(folder: Path, digest: Digest) -> SharedFile:
    """Return a new open file that is named like a blob."""
    (folder / digest.hex).write_bytes(LAYER)
    return open_regular(folder / digest.hex)


@pytest.mark.parametrize(("most", "descriptors"), [(3, 1000), (1000, 15)])
@on_reactor
async def test_the_blobs_that_were_used_last_are_kept(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, most: int, descriptors: int
) -> None:
    """No more than a quarter of the descriptors is used for them."""
    monkeypatch.setattr(openblobs, "most_descriptors", lambda: descriptors)
    threads = Threads(REACTOR, clock)
    threads.start()
    kept = OpenBlobs(threads, clock, most)
    kept.start()
    digests = [Digest.of(bytes([number])) for number in range(5)]
    try:
        for digest in digests:
            file = file_of(tmp_path, digest)
            identity = Identity.of(os.fstat(file.fileno()))
            kept.add(digest, tmp_path / digest.hex, file, identity, kept.forgotten)
            file.release()
            # The first is used again and again. The looks of each second are no uses.
            leased = kept.get(digests[0])
            assert leased is not None
            leased[0].release()
            clock.advance(1)
            for _ in range(3):
                await turn()
        left = {digest.hex for digest in (digests[0], *digests[3:])}
        await until(lambda: {link.rpartition("/")[2] for link in open_in(tmp_path)} == left)
    finally:
        kept.stop()
        threads.stop()
    assert open_in(tmp_path) == []


@on_reactor
async def test_file_that_is_opened_during_a_stop_is_not_kept(tmp_path: Path, clock: Clock) -> None:
    """Nothing would close it."""
    threads = Threads(REACTOR, clock)
    kept = OpenBlobs(threads, clock)
    kept.start()
    file = file_of(tmp_path, DIGEST)
    kept.stop()
    kept.add(DIGEST, tmp_path / DIGEST.hex, file, Identity.of(os.fstat(file.fileno())), kept.forgotten)
    file.release()
    assert kept.get(DIGEST) is None
    assert open_in(tmp_path) == []
