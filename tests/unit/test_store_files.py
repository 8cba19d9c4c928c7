"""Files: leases keep descriptors open, commits are atomic, locks are exclusive."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress
from pathlib import Path

import pytest

from ociregistry.store import files as files_module
from ociregistry.store.files import (
    Files,
    SharedFile,
    lock,
    locked,
    open_regular,
    read_regular,
    read_written,
    send_written,
)
from tests.unit.support.common import is_open, open_descriptors


def test_file_is_closed_with_its_last_lease(tmp_path: Path) -> None:
    file = Files().create(tmp_path / "file")
    descriptor = file.fileno()
    assert file.lease() is file
    file.lease()
    file.release()
    file.release()
    assert is_open(descriptor)
    file.release()
    assert not is_open(descriptor)


def test_closed_file_cannot_be_leased(tmp_path: Path) -> None:
    """Its descriptor number may belong to another file by now."""
    file = Files().create(tmp_path / "file")
    file.release()
    with pytest.raises(ValueError, match="closed"):
        file.lease()


def test_create_replaces_the_file_and_keeps_old_readers(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files = Files()
    old = files.create(path)
    files.write(old, b"old", 0)
    new = files.create(path)
    files.write(new, b"newer", 0)
    assert path.read_bytes() == b"newer"
    assert os.pread(old.fileno(), 10, 0) == b"old"
    assert path.stat().st_mode & 0o777 == 0o644 & ~_umask()
    for file in (old, new):
        file.release()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_write_continues_after_a_short_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may accept less than it was given."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:3], offset))
    files = Files()
    file = files.create(tmp_path / "file")
    files.write(file, b"0123456789", 0)
    files.write(file, b"abcd", 10)
    files.write(file, b"", 14)
    file.release()
    assert (tmp_path / "file").read_bytes() == b"0123456789abcd"


class StaleNames:
    """Lets `os.open` fail as on NFS or FUSE after another machine replaced the file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        self.left = times
        self._open = os.open
        monkeypatch.setattr(os, "open", self._fail)

    def _fail(self, path: str, flags: int, mode: int = 0o777) -> int:
        if self.left:
            self.left -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
        return self._open(path, flags, mode)


def test_name_that_leads_to_a_replaced_file_is_looked_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"newer")
    stale = StaleNames(monkeypatch, 3)
    assert read_regular(path) == b"newer"
    assert stale.left == 0
    stale.left = 3
    file = open_regular(path)
    assert (stale.left, file.size()) == (0, 5)
    file.release()


def test_name_that_stays_stale_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example of a store that another machine has replaced by a new one."""
    path = tmp_path / "file"
    path.write_bytes(b"newer")
    monkeypatch.setattr(files_module, "_STALE_FOR", 0.2)
    StaleNames(monkeypatch, 1000)
    for read in (read_regular, open_regular):
        with pytest.raises(OSError, match="Stale file handle"):
            read(path)


def test_file_that_was_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"newer")
    read = os.read
    stale = iter([True, True])

    def fail(descriptor: int, count: int) -> bytes:
        if next(stale, False):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(descriptor, count)

    monkeypatch.setattr(os, "read", fail)
    assert read_regular(path) == b"newer"


def test_error_on_closing_is_none_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS and FUSE report there that another machine replaced the file; the descriptor is free nevertheless."""
    path = tmp_path / "file"
    path.write_bytes(b"content")
    close = os.close

    def fail(descriptor: int) -> None:
        close(descriptor)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    file = open_regular(path)
    descriptor = file.fileno()
    with monkeypatch.context() as patched:
        patched.setattr(os, "close", fail)
        assert read_regular(path) == b"content"
        file.release()
        with locked(tmp_path / "lock"):
            pass
    assert not is_open(descriptor)


class StaleSize:
    """Lets a file seem to end too early, as on FUSE while another thread writes it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        self.left = times
        self._pread, self._sendfile = os.pread, os.sendfile
        monkeypatch.setattr(os, "pread", self._read)
        monkeypatch.setattr(os, "sendfile", self._send)

    def _is_short(self) -> bool:
        self.left -= 1
        return self.left >= 0

    def _read(self, descriptor: int, count: int, offset: int) -> bytes:
        return b"" if self._is_short() else self._pread(descriptor, count, offset)

    def _send(self, to: int, descriptor: int, offset: int, count: int) -> int:
        return 0 if self._is_short() else self._sendfile(to, descriptor, offset, count)


def test_bytes_that_are_known_to_be_there_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    file = open_regular(path)
    stale = StaleSize(monkeypatch, 2)
    assert read_written(file.fileno(), 10, 3) == b"tent"
    stale.left = 2
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert send_written(ours.fileno(), file.fileno(), 3, 10) == 4
        assert theirs.recv(10) == b"tent"
    file.release()


def test_file_that_was_cut_ends_early_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    monkeypatch.setattr(files_module, "_STALE_FOR", 0.2)
    file = open_regular(path)
    assert read_written(file.fileno(), 10, 7) == b""
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(EOFError):
        send_written(ours.fileno(), file.fileno(), 7, 10)
    file.release()


class Recorded(Files):
    """Records the operations in their order."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def sync(self, file: SharedFile) -> None:
        self.done.append("sync")
        super().sync(file)

    def rename(self, path: Path, target: Path) -> None:
        self.done.append(f"rename {path.name} {target.name}")
        super().rename(path, target)

    def sync_folder(self, folder: Path) -> None:
        self.done.append(f"sync {folder.name}/")
        super().sync_folder(folder)


def test_commit_syncs_before_rename(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    files = Recorded()
    file = files.create(tmp_path / "partial")
    files.write(file, b"content", 0)
    files.commit(file, tmp_path / "partial", tmp_path / "blobs" / "blob")
    file.release()
    assert files.done == ["sync", "rename partial blob", "sync blobs/"]
    assert (tmp_path / "blobs" / "blob").read_bytes() == b"content"
    assert not (tmp_path / "partial").exists()


def test_unlink_of_missing_file_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    Files().unlink(tmp_path / "file")
    Files().unlink(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_lock_is_exclusive(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = lock(path)
    assert first is not None
    assert lock(path, wait=False) is None
    os.close(first)
    second = lock(path, wait=False)
    assert second is not None
    os.close(second)


def test_lock_is_released_on_error(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with suppress(ZeroDivisionError), locked(path):
        assert lock(path, wait=False) is None
        raise ZeroDivisionError
    again = lock(path, wait=False)
    assert again is not None
    os.close(again)


def test_failed_lock_leaves_no_open_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    before = open_descriptors()
    with locked(path):
        for _ in range(5):
            assert lock(path, wait=False) is None
    assert open_descriptors() <= before


# read_regular


def test_file_is_read_whole_where_a_read_gives_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really, path = os.read, tmp_path / "file"
    path.write_bytes(b"0123456789")
    monkeypatch.setattr(os, "read", lambda descriptor, count: really(descriptor, min(count, 3)))
    assert read_regular(path) == read_regular(str(path), 10) == b"0123456789"


def test_file_that_grows_while_it_is_read_is_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really, path = os.fstat, tmp_path / "file"
    path.write_bytes(b"01234")

    def fstat(descriptor: int) -> os.stat_result:
        found = really(descriptor)
        with path.open("ab") as file:
            file.write(b"56789" * 1000)
        return found

    monkeypatch.setattr(os, "fstat", fstat)
    assert read_regular(path) == b"01234" + b"56789" * 1000
    with pytest.raises(OSError, match="larger than 10004 bytes"):
        read_regular(path, 10_004)


def test_file_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    monkeypatch.setattr(os, "read", None)
    before = open_descriptors()
    with pytest.raises(OSError, match="larger than 9 bytes"):
        read_regular(path, 9)
    assert open_descriptors() <= before
