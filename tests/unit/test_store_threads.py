"""A disk that does not answer takes few threads, and nobody waits for it for long."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from twisted.internet.defer import CancelledError
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

import ociregistry.store.threads
from ociregistry.store.files import SharedFile, open_regular
from ociregistry.store.pagecache import SLICE, TURN
from ociregistry.store.threads import READ_WITHIN, WRITTEN_WITHIN, Hung, Threads
from tests.unit.support.common import REACTOR, failed, on_reactor, open_descriptors, texts, turn, until

SICK, OTHER = Path("/store/sick"), Path("/store/other")


class Disk:
    """Reads that return when they are released."""

    def __init__(self) -> None:
        self.began = 0
        self._lock = threading.Lock()
        self._released = threading.Event()

    def read(self) -> bytes:
        """Wait."""
        with self._lock:
            self.began += 1
        self._released.wait()
        return b"late"

    def release(self) -> None:
        """Let all reads return."""
        self._released.set()


@pytest.fixture
def disk() -> Iterator[Disk]:
    """Return a disk that hangs until the test ends."""
    disk = Disk()
    yield disk
    disk.release()


@pytest.fixture
def threads(clock: Clock, disk: Disk) -> Iterator[Threads]:
    """Return the threads of a store."""
    threads = Threads(REACTOR, clock)
    threads.start()
    yield threads
    disk.release()
    threads.stop()


def advance(clock: Clock, seconds: int) -> None:
    """Advance the clock second by second."""
    for _ in range(seconds):
        clock.advance(1)


@on_reactor
async def test_reads_of_a_file_that_hangs_fail_and_take_two_threads(
    threads: Threads, disk: Disk, clock: Clock, events: list[LogEvent]
) -> None:
    late: list[bytes] = []
    reads = [threads.read_file(SICK, disk.read, discard=late.append) for _ in range(100)]
    for _ in range(20):
        assert await threads.read_file(OTHER, lambda: b"here") == b"here"
    assert disk.began == 2
    advance(clock, READ_WITHIN - 1)
    assert not threads.hung
    assert not any(read.called for read in reads)
    advance(clock, 1)
    for read in reads:
        assert str(failed(read, Hung)) == f"[Errno 110] the disk has not answered for 20 s: '{SICK}'"
    # The next one does not wait, and takes no thread.
    failed(threads.read_file(SICK, disk.read), Hung)
    assert threads.hung == f"the disk does not answer: 2 reads and writes have not returned, among them of {SICK}"
    assert texts(events, LogLevel.error) == [
        f"the disk does not answer: 2 reads and writes have not returned, among them of {SICK}",
    ]
    assert await threads.read_file(OTHER, lambda: b"here") == b"here"
    disk.release()
    await until(lambda: not threads.hung)
    assert await threads.read_file(SICK, disk.read) == b"late"
    assert late == [b"late", b"late"]
    assert disk.began == 3
    clock.advance(1)
    assert texts(events, LogLevel.warn) == ["the disk answers again"]


@on_reactor
async def test_many_files_that_hang_delay_others_for_two_seconds(threads: Threads, disk: Disk, clock: Clock) -> None:
    hanging = [threads.read_file(SICK / str(number), disk.read) for number in range(8)]
    waiting = threads.read_file(OTHER, lambda: b"here")
    await until(lambda: disk.began == 8)
    assert not waiting.called
    advance(clock, 2)
    assert await waiting == b"here"
    for read in hanging:
        read.addErrback(lambda _: None)
        read.cancel()


@on_reactor
async def test_disk_that_takes_all_threads(threads: Threads, disk: Disk, clock: Clock) -> None:
    hanging = [threads.read_file(SICK / str(number), disk.read) for number in range(80)]
    advance(clock, 40)
    await until(lambda: disk.began >= 64)
    assert disk.began == 64
    for read in hanging:
        failed(read, Hung)
    failed(threads.read_file(OTHER, lambda: b"here"), Hung)
    disk.release()
    await until(lambda: not threads.hung)
    assert await threads.read_file(OTHER, lambda: b"here") == b"here"


@on_reactor
async def test_open_file_is_released_when_its_read_is_given_up(
    threads: Threads, disk: Disk, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "blob").write_bytes(b"x")

    def opened() -> SharedFile:
        return open_regular(tmp_path / "blob")

    def not_in_memory(*args: object) -> int:
        raise BlockingIOError(11, "")

    before = open_descriptors()
    monkeypatch.setattr(os, "preadv", not_in_memory)
    monkeypatch.setattr(os, "pread", lambda *args: disk.read())
    files = [opened() for _ in range(5)]
    reads = [threads.read_at(file, SICK, 0, 1) for file in files]
    reads[4].addErrback(lambda _: None)
    reads[4].cancel()
    advance(clock, READ_WITHIN)
    for read in reads[:4]:
        failed(read, Hung)
    failed(threads.read_at(files[0], SICK, 0, 1), Hung)
    for file in files:
        file.release()
    disk.release()
    await until(lambda: not threads.hung)
    await until(lambda: open_descriptors() <= before)


@pytest.mark.parametrize("kind", ["read", "write", "write_in_turn"])
@on_reactor
async def test_others_are_told_but_waited_for(threads: Threads, disk: Disk, clock: Clock, kind: str) -> None:
    run: Callable[..., object] = getattr(threads, kind)
    running = run(disk.read)
    advance(clock, max(READ_WITHIN, WRITTEN_WITHIN))
    assert threads.hung == "the disk does not answer: 1 read or write has not returned"
    disk.release()
    assert await running == b"late"  # type: ignore[misc]  # a Deferred
    await turn()
    assert not threads.hung


@on_reactor
async def test_read_of_many_files_that_goes_on_does_not_hang(
    threads: Threads, disk: Disk, clock: Clock, events: list[LogEvent]
) -> None:
    done = 0
    ends = threading.Event()

    def read_many() -> bytes:
        nonlocal done
        while not ends.wait(0.001):
            done += 1
        return disk.read()

    reading = threads.read(read_many)
    for _ in range(3 * READ_WITHIN):
        before = done
        await until(lambda before=before: done > before + 1)  # type: ignore[misc]  # mypy infers no type for it
        clock.advance(1)
    assert texts(events, LogLevel.error) == []
    ends.set()
    await until(lambda: disk.began == 1)
    advance(clock, READ_WITHIN)
    assert threads.hung == "the disk does not answer: 1 read or write has not returned"
    disk.release()
    assert await reading == b"late"


@on_reactor
async def test_stop_does_not_wait_for_what_hangs(
    disk: Disk, clock: Clock, events: list[LogEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ociregistry.store.threads, "_END_WITHIN", 0.5)
    threads = Threads(REACTOR, clock)
    threads.start()
    for run in (threads.read, threads.write, threads.write_in_turn):
        run(disk.read)
    await until(lambda: disk.began == 3)
    threads.stop()
    assert texts(events, LogLevel.error) == [
        "stopping although the disk does not answer: 3 reads and writes have not returned"
    ]


@on_reactor
async def test_machine_that_was_stopped_does_not_look_like_a_disk_that_hangs(
    threads: Threads, disk: Disk, clock: Clock
) -> None:
    reading = threads.read_file(SICK, disk.read)
    clock.advance(3600)
    assert not threads.hung
    disk.release()
    assert await reading == b"late"


@on_reactor
async def test_threads_that_send_are_as_many_as_the_cores(
    threads: Threads, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for one of them keeps no descriptor; reads and what is sent at once do not wait."""
    path = tmp_path / "file"
    path.write_bytes(b"content")
    file = open_regular(path)
    monkeypatch.setattr(ociregistry.store.threads, "is_resident", lambda *_: True)
    monkeypatch.setattr(ociregistry.store.threads, "send_for_a_turn", lambda *_: len(disk.read()))
    cores = min(len(os.sched_getaffinity(0)), 4)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        before = open_descriptors()
        sending = [threads.send_at(file, path, 0, 7, ours.fileno(), in_thread=True) for _ in range(cores + 3)]
        await until(lambda: disk.began == cores)
        assert open_descriptors() - before == cores
        assert await threads.send_at(file, path, 0, 7, ours.fileno(), in_thread=False) == 7
        assert theirs.recv(100) == b"content"
        assert await threads.read_file(OTHER, lambda: b"read") == b"read"
        gone = sending.pop()
        gone.cancel()
        failed(gone, CancelledError)
        disk.release()
        assert [await one for one in sending] == [4] * (cores + 2)
        await turn()
        assert open_descriptors() == before
    file.release()


@on_reactor
async def test_disk_that_does_not_answer_holds_up_no_turn(
    threads: Threads, disk: Disk, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in memory is sent, also of a file whose other parts wait for the disk, and beside many that do."""
    monkeypatch.setattr(ociregistry.store.threads, "is_resident", lambda *_: True)
    sick = tmp_path / "sick"
    sick.write_bytes(b"content")
    file = open_regular(sick)
    reads = [threads.read_file(path, disk.read) for path in (sick, *map(Path, map(str, range(20)))) for _ in range(2)]
    await until(lambda: disk.began == 8)
    ours, theirs = socket.socketpair()

    async def sent() -> None:
        sending = [threads.send_at(file, sick, 0, 7, ours.fileno(), in_thread=True) for _ in range(10)]
        assert [await one for one in sending] == [7] * 10
        assert theirs.recv(100) == b"content" * 10

    with ours, theirs:
        await sent()
        advance(clock, READ_WITHIN)
        assert threads.hung
        await sent()
        failed(reads[0], Hung)
    for read in reads[1:]:
        read.addErrback(lambda _: None)
    file.release()


@on_reactor
async def test_thread_sends_more_at_once_than_the_reactor(
    threads: Threads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def send(to: int, descriptor: int, offset: int, count: int) -> int:
        asked.append(count)
        return 1

    monkeypatch.setattr(ociregistry.store.threads, "is_resident", lambda *_: True)
    for name in ("send_for_a_turn", "send_file"):
        monkeypatch.setattr(ociregistry.store.threads, name, send)
    path = tmp_path / "file"
    path.write_bytes(b"content")
    file = open_regular(path)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for in_thread in (True, False):
            assert await threads.send_at(file, path, 0, 2 * TURN, ours.fileno(), in_thread=in_thread) == 1
    assert asked == [TURN, SLICE]
    file.release()


@on_reactor
async def test_turn_that_might_need_the_disk_by_now_is_not_taken(
    threads: Threads, disk: Disk, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waited for its turn is told that nothing was sent, and asks again."""
    path = tmp_path / "file"
    path.write_bytes(b"content")
    file = open_regular(path)
    resident = [True]
    monkeypatch.setattr(ociregistry.store.threads, "is_resident", lambda *_: resident[0])
    monkeypatch.setattr(ociregistry.store.threads, "send_for_a_turn", lambda *_: len(disk.read()))
    cores = min(len(os.sched_getaffinity(0)), 4)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sending = [threads.send_at(file, path, 0, 7, ours.fileno(), in_thread=True) for _ in range(cores + 3)]
        await until(lambda: disk.began == cores)
        resident[0] = False
        disk.release()
        assert [await one for one in sending] == [4] * cores + [0] * 3
    file.release()


@on_reactor
async def test_what_waits_for_the_disk_has_no_duplicate_of_its_socket(
    threads: Threads, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of clients may wait for a slow disk: a second descriptor for each would be too many."""
    monkeypatch.setattr(ociregistry.store.threads, "is_resident", lambda *_: False)
    monkeypatch.setattr(ociregistry.store.threads, "send_for_a_turn", lambda *_: len(disk.read()))
    path = tmp_path / "file"
    path.write_bytes(b"content")
    file = open_regular(path)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        before = open_descriptors()
        sending = [threads.send_at(file, path, 0, 7, ours.fileno(), in_thread=False) for _ in range(20)]
        await until(lambda: disk.began == 2)
        assert open_descriptors() - before == 2
        disk.release()
        assert [await one for one in sending] == [4] * 20
        await turn()
        assert open_descriptors() == before
    file.release()


@pytest.mark.parametrize("resident", [False, True])
@on_reactor
async def test_connection_that_is_closed_before_its_turn(
    threads: Threads, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resident: bool
) -> None:
    """The number of its socket may be that of another one by then, which must not get the bytes."""
    path = tmp_path / "file"
    path.write_bytes(b"content")
    file = open_regular(path)
    sent: list[int] = []

    def send(*to: int) -> int:
        sent.append(os.fstat(to[0]).st_ino)
        return len(disk.read())

    monkeypatch.setattr(ociregistry.store.threads, "is_resident", lambda *_: resident)
    monkeypatch.setattr(ociregistry.store.threads, "send_for_a_turn", send)
    at_once = min(len(os.sched_getaffinity(0)), 4) if resident else 2
    ours, theirs = socket.socketpair()
    first, number = os.fstat(ours.fileno()).st_ino, ours.fileno()
    sending = [threads.send_at(file, path, 0, 7, number, in_thread=True) for _ in range(at_once + 2)]
    await until(lambda: disk.began == at_once)
    ours.close()
    # One of them has that number.
    others = socket.socketpair()
    assert number in {other.fileno() for other in others}
    disk.release()
    assert [await one for one in sending[:at_once]] == [4] * at_once
    for one in sending[at_once:]:
        with pytest.raises(ConnectionError):
            await one
    assert set(sent) == {first}
    for end in (theirs, *others):
        end.close()
    file.release()


@on_reactor
async def test_clients_of_what_is_in_memory_hold_up_no_read_of_the_same_file(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fast client ends each turn, and begins the next one: on four cores, four of them run all the time."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(4)))
    monkeypatch.setattr(ociregistry.store.threads, "is_resident", lambda *_: True)
    released = threading.Semaphore(0)

    def send(*_: int) -> int:
        assert released.acquire(timeout=10)
        return 7

    monkeypatch.setattr(ociregistry.store.threads, "send_for_a_turn", send)
    path = tmp_path / "file"
    path.write_bytes(b"content")
    file = open_regular(path)
    threads = Threads(REACTOR, clock)
    threads.start()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sending = [threads.send_at(file, path, 0, 7, ours.fileno(), in_thread=True) for _ in range(8)]
        reading = threads.read_file(path, lambda: b"from the disk")
        await until(lambda: reading.called)
        assert await reading == b"from the disk"
        released.release(8)
        assert [await one for one in sending] == [7] * 8
    threads.stop()
    file.release()
