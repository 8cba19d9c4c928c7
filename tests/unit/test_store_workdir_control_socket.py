"""The control socket in the store: commands find the daemon, and stale sockets are recognised."""

from __future__ import annotations

import os
import socket
from contextlib import closing
from pathlib import Path

import pytest
from twisted.internet.protocol import Factory, Protocol

from ociregistry.store.store import Store
from ociregistry.store.workdir import ControlSocket, find_daemon
from tests.unit.support.common import REACTOR, on_reactor, open_descriptors


@pytest.fixture
def pulls(root: Path) -> Path:
    """Return the pulls folder of a process."""
    path = root / "pulls" / "0"
    path.mkdir(parents=True)
    return path


def listening(folder: Path) -> socket.socket:
    """Return a socket listening like a daemon's."""
    with closing(ControlSocket(folder)) as control_socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(control_socket.path)
        listener.listen()
    return listener


def daemon_at(root: Path) -> Path | None:
    """Return the pulls folder of the daemon that is found."""
    control_socket = find_daemon(root)
    if control_socket is None:
        return None
    with closing(control_socket):
        assert control_socket.is_open()
        return Path(os.path.realpath(control_socket.path)).parent


def test_no_daemon_on_a_new_store(root: Path, pulls: Path) -> None:
    assert daemon_at(root / "nowhere") is None
    assert daemon_at(root) is None


def test_listening_daemon_is_found(root: Path, pulls: Path) -> None:
    with listening(pulls):
        assert daemon_at(root) == pulls
    assert daemon_at(root) is None


def test_daemon_is_found_among_leftovers(root: Path, pulls: Path) -> None:
    """Leftovers: stale sockets, folders without socket, and files that are no sockets."""
    listening(pulls).close()
    for number in (1, 2, 10):
        (root / "pulls" / str(number)).mkdir()
    (root / "pulls" / "1" / "socket").write_bytes(b"no socket")
    (root / "pulls" / "verified").touch()
    (root / "pulls" / "3").touch()
    with listening(root / "pulls" / "10"):
        assert daemon_at(root) == root / "pulls" / "10"
    assert daemon_at(root) is None


def test_folders_without_a_number_are_ignored(root: Path, pulls: Path) -> None:
    for name in ("x", "01", "-1", "1234567"):
        (root / "pulls" / name).mkdir()
        with listening(root / "pulls" / name):
            assert daemon_at(root) is None


def test_deep_store_path(tmp_path: Path) -> None:
    """A socket address is limited to about a hundred bytes."""
    root = tmp_path / ("a" * 100) / ("b" * 100) / "store"
    folder = root / "pulls" / "0"
    folder.mkdir(parents=True)
    with listening(folder):
        assert daemon_at(root) == folder
    with pytest.raises(OSError, match="path too long"), socket.socket(socket.AF_UNIX) as direct:
        direct.connect(str(folder / "socket"))


def test_control_socket_path_follows_a_moved_folder(root: Path, pulls: Path) -> None:
    with closing(ControlSocket(pulls)) as control_socket, listening(pulls):
        root.rename(root.with_name("moved"))
        assert control_socket.is_open()


def test_stale_socket_is_cleared(pulls: Path) -> None:
    listening(pulls).close()
    with closing(ControlSocket(pulls)) as control_socket:
        assert (pulls / "socket").exists()
        control_socket.clear()
        assert not (pulls / "socket").exists()
        control_socket.clear()
    with listening(pulls), closing(ControlSocket(pulls)) as control_socket:
        assert control_socket.is_open()


def test_repeated_lookups_leak_no_descriptor(root: Path, pulls: Path) -> None:
    listening(pulls).close()
    (root / "pulls" / "1").mkdir()
    with listening(root / "pulls" / "1"):
        before = open_descriptors()
        for _ in range(3):
            assert daemon_at(root) == root / "pulls" / "1"
        assert open_descriptors() <= before


def test_missing_folder_is_an_error(root: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ControlSocket(root / "pulls" / "0")


class Refusing(socket.socket):
    """A socket that the kernel refuses to connect."""

    def connect(self, address: object) -> None:
        raise PermissionError(13, "Permission denied")


def test_forbidden_control_socket_is_an_error(root: Path, pulls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon runs there; without it, a second process would download."""
    with listening(pulls), monkeypatch.context() as patched:
        patched.setattr(socket, "socket", Refusing)
        with pytest.raises(PermissionError):
            find_daemon(root)


def test_forbidden_control_socket_leaks_no_descriptor(
    root: Path, pulls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening(pulls), monkeypatch.context() as patched:
        patched.setattr(socket, "socket", Refusing)
        before = open_descriptors()
        with pytest.raises(PermissionError):
            find_daemon(root)
        assert open_descriptors() <= before


def test_control_socket_is_in_the_stores_own_folder(root: Path, store: Store) -> None:
    folder = root / "pulls" / "0"
    listening(folder).close()
    control_socket = store.control_socket()
    with closing(control_socket):
        assert not (folder / "socket").exists()
        assert not control_socket.is_open()
        with listening(folder):
            assert daemon_at(root) == folder


@on_reactor
async def test_twisted_listens_on_the_control_socket(root: Path, store: Store) -> None:
    control_socket = store.control_socket()
    port = REACTOR.listenUNIX(control_socket.path, Factory.forProtocol(Protocol), mode=0o600)
    assert daemon_at(root) == root / "pulls" / "0"
    assert (root / "pulls" / "0" / "socket").stat().st_mode & 0o777 == 0o600
    await port.stopListening()
    control_socket.close()
    assert daemon_at(root) is None
