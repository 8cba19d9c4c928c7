"""Sending to the sockets of clients by their descriptors."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from ociregistry.store.sockets import SocketNumber, send_bytes, send_file
from tests.unit.support.common import is_open, open_descriptors


def test_socket_is_duplicated_only_while_it_has_its_descriptor() -> None:
    here, there = socket.socketpair()
    with here, there:
        number = SocketNumber.of(here.fileno())
        with number.duplicated() as copy:
            assert os.path.samestat(os.fstat(copy), os.fstat(here.fileno()))
        assert not is_open(copy)

    def assert_refused() -> None:
        before = open_descriptors()
        with pytest.raises(ConnectionAbortedError), number.duplicated():
            pass
        assert open_descriptors() == before

    assert_refused()
    others = socket.socketpair()
    with others[0], others[1]:
        assert number.descriptor in {other.fileno() for other in others}
        assert_refused()


def test_lack_of_descriptors_is_no_lost_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client gets the bytes in another way."""

    def fails(_: int) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    here, there = socket.socketpair()
    with here, there:
        number = SocketNumber.of(here.fileno())
        monkeypatch.setattr(os, "dup", fails)
        with pytest.raises(OSError, match="too many open files") as raised, number.duplicated():
            pass
    assert not isinstance(raised.value, ConnectionError)


def test_end_of_the_file_is_no_full_socket(tmp_path: Path) -> None:
    """Else the sender of a file that was cut would try for ever."""
    path = tmp_path / "file"
    path.write_bytes(b"data")
    here, there = socket.socketpair()
    with here, there, path.open("rb") as file:
        assert send_file(here.fileno(), file.fileno(), 1, 10) == 3
        with pytest.raises(EOFError):
            send_file(here.fileno(), file.fileno(), 4, 1)


@pytest.mark.parametrize("number", [errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.EPIPE, errno.ECONNRESET])
def test_error_of_the_connection_is_not_one_of_the_file(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise OSError(number, "the socket failed")

    monkeypatch.setattr(os, "sendfile", fails)
    with pytest.raises(ConnectionError, match="the socket failed"):
        send_file(1, 2, 0, 10)
    monkeypatch.setattr(os, "writev", fails)
    with pytest.raises(ConnectionError, match="the socket failed"):
        send_bytes(1, [memoryview(b"data")])


@pytest.mark.parametrize("size", [100, 1_000_000])
def test_socket_takes_bytes_until_it_is_full(size: int) -> None:
    here, there = socket.socketpair()
    with here, there:
        here.setblocking(False)
        data = memoryview(bytes(range(256)) * 10_000)
        sent = 0
        while more := send_bytes(here.fileno(), [data[at : at + size] for at in range(sent, len(data), size)]):
            sent += more
        assert 0 < sent < len(data)
        here.shutdown(socket.SHUT_WR)
        assert b"".join(iter(lambda: there.recv(65536), b"")) == data[:sent]
