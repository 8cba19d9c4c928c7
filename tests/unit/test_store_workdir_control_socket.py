"""The door: how a command finds the daemon on the same store, and what it finds where none runs any more."""

from __future__ import annotations

import os
import socket
from contextlib import closing
from pathlib import Path

import pytest
from twisted.internet.protocol import Factory, Protocol

from ociregistry.store.store import Store
from ociregistry.store.workdir import ControlSocket, find_daemon
from tests.unit.support.doubles import REACTOR, on_reactor


@pytest.fixture
def pulls(root: Path) -> Path:
    """The folder of a process."""
    path = root / "pulls" / "0"
    path.mkdir(parents=True)
    return path


def listening(folder: Path) -> socket.socket:
    """What a daemon does."""
    with closing(ControlSocket(folder)) as control_socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(control_socket.path)
        listener.listen()
    return listener


def open_files() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


def daemon_at(root: Path) -> Path | None:
    """The folder behind the door of the daemon that is found."""
    control_socket = find_daemon(root)
    if control_socket is None:
        return None
    with closing(control_socket):
        assert control_socket.is_open()
        return Path(os.path.realpath(control_socket.path)).parent


def test_no_daemon_runs_on_a_store_that_is_new(root: Path, pulls: Path) -> None:
    assert daemon_at(root / "nowhere") is None
    assert daemon_at(root) is None


def test_a_daemon_that_listens_is_found(root: Path, pulls: Path) -> None:
    with listening(pulls):
        assert daemon_at(root) == pulls
    assert daemon_at(root) is None


def test_it_is_found_behind_what_others_left(root: Path, pulls: Path) -> None:
    """Processes that were killed, commands that have no door, and files that are no sockets."""
    listening(pulls).close()
    for number in (1, 2, 10):
        (root / "pulls" / str(number)).mkdir()
    (root / "pulls" / "1" / "socket").write_bytes(b"no socket")
    (root / "pulls" / "verified").touch()
    (root / "pulls" / "3").touch()
    with listening(root / "pulls" / "10"):
        assert daemon_at(root) == root / "pulls" / "10"
    assert daemon_at(root) is None


def test_a_folder_that_is_no_process_s_has_no_control_socket(root: Path, pulls: Path) -> None:
    for name in ("x", "01", "-1", "1234567"):
        (root / "pulls" / name).mkdir()
        with listening(root / "pulls" / name):
            assert daemon_at(root) is None


def test_a_store_may_be_deep(tmp_path: Path) -> None:
    """A socket's address holds a hundred bytes."""
    root = tmp_path / ("a" * 100) / ("b" * 100) / "store"
    folder = root / "pulls" / "0"
    folder.mkdir(parents=True)
    with listening(folder):
        assert daemon_at(root) == folder
    with pytest.raises(OSError, match="path too long"), socket.socket(socket.AF_UNIX) as direct:
        direct.connect(str(folder / "socket"))


def test_a_control_socket_leads_to_the_folder_wherever_it_is_moved_to(root: Path, pulls: Path) -> None:
    with closing(ControlSocket(pulls)) as control_socket, listening(pulls):
        root.rename(root.with_name("moved"))
        assert control_socket.is_open()


def test_what_a_killed_process_left_is_cleared(pulls: Path) -> None:
    listening(pulls).close()
    with closing(ControlSocket(pulls)) as control_socket:
        assert (pulls / "socket").exists()
        control_socket.clear()
        assert not (pulls / "socket").exists()
        control_socket.clear()
    with listening(pulls), closing(ControlSocket(pulls)) as control_socket:
        assert control_socket.is_open()


def test_who_looks_often_loses_no_descriptor(root: Path, pulls: Path) -> None:
    listening(pulls).close()
    (root / "pulls" / "1").mkdir()
    with listening(root / "pulls" / "1"):
        before = open_files()
        for _ in range(3):
            assert daemon_at(root) == root / "pulls" / "1"
        assert open_files() == before


def test_no_folder_no_control_socket(root: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ControlSocket(root / "pulls" / "0")


class Refusing(socket.socket):
    """The kernel says no."""

    def connect(self, address: object) -> None:
        raise PermissionError(13, "Permission denied")


def test_a_control_socket_that_must_not_be_used_is_an_error(
    root: Path, pulls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon runs there: to go on without it would be a second process that downloads."""
    with listening(pulls), monkeypatch.context() as patched:
        patched.setattr(socket, "socket", Refusing)
        with pytest.raises(PermissionError):
            find_daemon(root)


def test_nor_does_it_lose_a_descriptor(root: Path, pulls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(pulls), monkeypatch.context() as patched:
        patched.setattr(socket, "socket", Refusing)
        before = open_files()
        with pytest.raises(PermissionError):
            find_daemon(root)
        assert open_files() == before


def test_the_control_socket_of_a_store_is_in_its_own_folder(root: Path, store: Store) -> None:
    folder = root / "pulls" / "0"
    listening(folder).close()
    control_socket = store.control_socket()
    with closing(control_socket):
        assert not (folder / "socket").exists()
        assert not control_socket.is_open()
        with listening(folder):
            assert daemon_at(root) == folder


@on_reactor
async def test_twisted_listens_there(root: Path, store: Store) -> None:
    control_socket = store.control_socket()
    port = REACTOR.listenUNIX(control_socket.path, Factory.forProtocol(Protocol), mode=0o600)
    assert daemon_at(root) == root / "pulls" / "0"
    assert (root / "pulls" / "0" / "socket").stat().st_mode & 0o777 == 0o600
    await port.stopListening()
    control_socket.close()
    assert daemon_at(root) is None
