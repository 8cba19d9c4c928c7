"""What the kernel has in memory of a file: told exactly where the file system can tell, and sent for a turn."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ociregistry.store import pagecache
from ociregistry.store.files import Files, SharedFile, open_regular
from ociregistry.store.pagecache import SLICE, TURN, is_resident, read_resident, send_for_a_turn, send_resident

PAGE = os.sysconf("SC_PAGESIZE")
SIZE = 1024 * 1024
HOLE = 2 * PAGE
"""Bytes."""


@pytest.fixture
def file(tmp_path: Path) -> Iterator[SharedFile]:
    """A file whose bytes are on the disk and in memory, on a file system that can tell."""
    path = tmp_path / "file"
    # By single pages: the kernel keeps the bytes of a large write in pieces that it drops only as a whole.
    with path.open("wb", buffering=0) as made:
        for _ in range(SIZE // PAGE):
            made.write(os.urandom(PAGE))
        os.fsync(made.fileno())
    file = open_regular(path)
    try:
        if os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT) != 1:
            pytest.fail("the file was dropped from memory")
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        pytest.fail("the file system of the tests cannot tell what is in memory, such as tmpfs", pytrace=False)
    yield file
    file.release()


def drop(file: SharedFile, offset: int, count: int) -> None:
    """Drop some bytes of the file from memory."""
    os.posix_fadvise(file.fileno(), offset, count, os.POSIX_FADV_DONTNEED)


def pages(file: SharedFile) -> list[bool]:
    """Tell of each page whether it is in memory."""
    return [pagecache._in_core(file.fileno(), at, at + PAGE, ()) for at in range(0, SIZE, PAGE)]


def test_resident(file: SharedFile) -> None:
    for offset, count in ((0, SIZE), (0, 1), (SIZE - 1, 1), (17, SIZE), (PAGE - 1, 300_001)):
        assert is_resident(file.fileno(), offset, count)


@pytest.mark.parametrize("at", [0, 3 * 128 * 1024 + 32 * 1024, SIZE - HOLE], ids=["begin", "middle", "end"])
def test_hole(file: SharedFile, at: int) -> None:
    """Before, after and around it, the file is resident or not, exactly; not if its end is missing."""
    drop(file, at, HOLE)
    assert not is_resident(file.fileno(), 0, SIZE)
    assert not is_resident(file.fileno(), at, 1)
    assert not is_resident(file.fileno(), max(0, at - 1), HOLE)
    if at:
        assert is_resident(file.fileno(), 0, at) == (at + HOLE < SIZE)
    if at + HOLE < SIZE:
        assert is_resident(file.fileno(), at + HOLE, SIZE - at - HOLE)


@pytest.mark.parametrize("count", [10, SIZE])
def test_what_is_missing_is_not_read_to_see_that(
    file: SharedFile, pair: tuple[socket.socket, socket.socket], count: int
) -> None:
    """A read that does not wait for the disk starts one all the same, and waits where the disk takes no more."""
    drop(file, 0, SIZE)
    missing = [False] * (SIZE // PAGE)
    assert pages(file) == missing
    assert not is_resident(file.fileno(), 0, count)
    assert read_resident(file.fileno(), 0, count) == b""
    assert send_resident(file, 0, count, pair[0].fileno()) == 0
    assert pages(file) == missing


def test_what_is_resident_is_read_without_reading_ahead(file: SharedFile) -> None:
    """The kernel marks a page where a read begins to read more: here, a few pages behind the first."""
    drop(file, 0, SIZE)
    os.pread(file.fileno(), PAGE, 0)
    for at in range(0, SIZE, PAGE):
        before = pages(file)
        if read_resident(file.fileno(), at, PAGE):
            assert pages(file) == before


def test_the_same_where_the_end_was_read_before(file: SharedFile) -> None:
    """Clients that pull layers lazily read their end first."""
    drop(file, 0, SIZE)
    os.pread(file.fileno(), 10, SIZE - 10)
    os.pread(file.fileno(), PAGE, 0)
    assert is_resident(file.fileno(), SIZE - 10, 10)
    for at in range(0, SIZE, PAGE):
        before = pages(file)
        if read_resident(file.fileno(), at, PAGE):
            assert pages(file) == before


def test_file_of_another_user(file: SharedFile) -> None:
    """The kernel would tell that all of it is in memory."""
    fcntl.fcntl(file.fileno(), fcntl.F_SETFL, fcntl.fcntl(file.fileno(), fcntl.F_GETFL) & ~os.O_NOATIME)
    assert not is_resident(file.fileno(), 0, SIZE)


def test_file_that_was_given_to_another_user(file: SharedFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was opened by its owner, who would be told now that all of it is in memory."""
    other = os.fstat(file.fileno()).st_uid + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    assert not is_resident(file.fileno(), 0, SIZE)


def test_end_of_the_file(file: SharedFile) -> None:
    """What is behind it is not in memory: a thread finds out."""
    assert not is_resident(file.fileno(), SIZE, 1)
    assert is_resident(file.fileno(), SIZE - 10, 20)
    assert read_resident(file.fileno(), SIZE - 10, 20) == os.pread(file.fileno(), 10, SIZE - 10)


def test_end_of_the_file_within_a_page(file: SharedFile) -> None:
    """The kernel has that page in memory, and nothing of what is asked for."""
    size = SIZE - 100
    os.truncate(f"/proc/self/fd/{file.fileno()}", size)
    assert is_resident(file.fileno(), size - 10, 20)
    assert not is_resident(file.fileno(), size, 1)
    assert not is_resident(file.fileno(), size + 50, 10)


@pytest.mark.parametrize("why", [EOFError(), OSError(errno.EIO, "Input/output error")])
def test_failure_to_send_at_once_is_left_to_the_next_try(
    file: SharedFile, why: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It tells it to those that wait."""

    def fails(*_: object) -> int:
        raise why

    monkeypatch.setattr(pagecache, "send_file", fails)
    assert send_resident(file, 0, 10, -1) == 0


def test_file_that_cannot_be_mapped(file: SharedFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagecache, "_mmap", lambda *_: pagecache._FAILED)
    assert not is_resident(file.fileno(), 0, SIZE)


@pytest.mark.parametrize("why", [errno.EAGAIN, errno.EOPNOTSUPP])
def test_file_system_that_cannot_tell(file: SharedFile, why: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(why, os.strerror(why))

    monkeypatch.setattr(os, "preadv", refuse)
    assert not is_resident(file.fileno(), 0, 10)
    assert not is_resident(file.fileno(), 0, SIZE)


def test_reading_leaves_the_access_time(tmp_path: Path) -> None:
    """Also where a change since the last read would have it noted."""
    path = tmp_path / "file"
    created = Files().create(path)
    path.write_bytes(b"data")
    for file in (created, open_regular(path)):
        os.utime(path, (1, 2))
        assert os.pread(file.fileno(), 10, 0) == b"data"
        file.release()
        assert path.stat().st_atime == 1


@pytest.mark.parametrize("count", [10, SIZE])
def test_nothing_is_asked_of_a_file_system_that_cannot_tell(
    file: SharedFile, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call may wait for the server of such a file system, even one for the status of an open file."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    asked: list[object] = []
    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", refuse)
        patched.setattr(os, "fstat", asked.append)
        patched.setattr(pagecache, "_in_core", lambda *about: asked.append(about))
        told = is_resident(file.fileno(), 0, count)
    assert (told, asked) == (False, [])


class Takes:
    """A socket that takes these numbers of bytes, one after the other; stands for `send_file`."""

    def __init__(self, *takes: int | type[Exception]) -> None:
        self._takes = list(takes)
        self.asked: list[tuple[int, int]] = []
        """The offsets and counts with which it was called."""

    def __call__(self, to: int, descriptor: int, offset: int, most: int) -> int:
        """Take some."""
        self.asked.append((offset, most))
        taken = self._takes.pop(0)
        if isinstance(taken, int):
            return taken
        raise taken


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a connection, of which nothing is read."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def turn(
    monkeypatch: pytest.MonkeyPatch, to: socket.socket, takes: Takes, most: int = TURN, resident: int = 2 * TURN
) -> int:
    """Send to a socket that takes what `takes` says. The file is in memory up to the offset `resident`."""
    monkeypatch.setattr(pagecache, "is_resident", lambda _, offset, count: offset + count <= resident)
    monkeypatch.setattr(pagecache, "send_file", takes)
    monkeypatch.setattr(pagecache, "send_written", takes)
    return send_for_a_turn(to.fileno(), -1, 7, most)


Pair = tuple[socket.socket, socket.socket]


def test_turn_goes_on_while_the_client_is_fast(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    takes = Takes(SLICE, 100_000, SLICE - 100_000, 5)
    assert turn(monkeypatch, pair[0], takes, 2 * SLICE + 5) == 2 * SLICE + 5
    assert takes.asked == [(7, SLICE), (7 + SLICE, SLICE), (100_007 + SLICE, SLICE - 100_000), (7 + 2 * SLICE, 5)]


@pytest.mark.parametrize("taken", [0, 5000])
def test_turn_of_a_slow_client_ends(pair: Pair, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert turn(monkeypatch, pair[0], Takes(taken)) == taken
    assert turn(monkeypatch, pair[0], Takes(SLICE, taken)) == SLICE + taken


def test_turn_ends_when_the_client_takes_no_more(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    with suppress(BlockingIOError):
        while True:
            pair[0].send(bytes(65536))
    began = time.monotonic()
    assert turn(monkeypatch, pair[0], Takes(SLICE)) == SLICE
    # A turn lasts a twentieth of a second; others have one, too.
    assert time.monotonic() - began < 1


def test_turn_sends_no_second_slice_that_must_be_read_from_the_disk(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is the caller's to look for: it may be read as well."""
    assert turn(monkeypatch, pair[0], Takes(100_000, SLICE - 100_000), resident=0) == SLICE
    assert turn(monkeypatch, pair[0], Takes(SLICE, SLICE), resident=7 + 3 * SLICE - 1) == 2 * SLICE


def test_turn_ends_in_time(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    hundredths = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: next(hundredths) / 100)
    assert turn(monkeypatch, pair[0], Takes(*[SLICE] * 10), 10 * SLICE) < 10 * SLICE


def test_turn_begins_as_with_a_file_that_grows_on_another_machine(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end may be a stale one."""
    takes, file_ends = Takes(SLICE), Takes(EOFError)
    monkeypatch.setattr(pagecache, "is_resident", lambda *_: True)
    monkeypatch.setattr(pagecache, "send_written", takes)
    monkeypatch.setattr(pagecache, "send_file", file_ends)
    assert send_for_a_turn(pair[0].fileno(), -1, 7, TURN) == SLICE
    assert (takes.asked, file_ends.asked) == ([(7, SLICE)], [(7 + SLICE, SLICE)])


@pytest.mark.parametrize("why", [ConnectionAbortedError, OSError, EOFError])
def test_failure_during_a_turn_is_that_of_the_next(
    pair: Pair, why: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert turn(monkeypatch, pair[0], Takes(SLICE, why)) == SLICE
    with pytest.raises(why):
        turn(monkeypatch, pair[0], Takes(why))
