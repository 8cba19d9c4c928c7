"""pulls/<n>/: numbering, locking and adoption of leftovers."""

from __future__ import annotations

import os
import socket
from contextlib import closing
from pathlib import Path

import pytest

from ociregistry.names import Digest
from ociregistry.store.paths import pulls_folders
from ociregistry.store.workdir import ControlSocket, PullsFolder
from tests.unit.support.stores import Unsynced

LEFT, PENDING = Digest.of(b"left").hex, f"{Digest.of(b'an image').hex}.wish"


def leave(folder: Path, *names: str) -> None:
    """Create files as left by a process."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(f"{folder.name}/{name}")


def found(root: Path) -> set[str]:
    """Return the files below pulls/ except locks."""
    pulls = root / "pulls"
    return {str(path.relative_to(pulls)) for path in pulls.rglob("*") if path.is_file() and path.name != "lock"}


def test_folders_are_ordered_by_number(root: Path) -> None:
    assert pulls_folders(root) == []
    for name in ("0", "1", "2", "10", "999999", "01", "x", "-1", "1000000", "1 "):
        leave(root / "pulls" / name)
    (root / "pulls" / "3").touch()
    assert [path.name for path in pulls_folders(root)] == ["0", "1", "2", "10", "999999"]


def test_without_adopting_other_folders_are_unchanged(root: Path) -> None:
    names = (LEFT, f"{LEFT}.note", PENDING, f"{LEFT}.record", "socket")
    leave(root / "pulls" / "3", *names)
    before = found(root)
    with closing(PullsFolder(root, Unsynced(), adopts=False)) as pulls:
        assert pulls.path == root / "pulls" / "0"
        assert found(root) == before
    with closing(PullsFolder(root, Unsynced())) as pulls:
        assert pulls.path == root / "pulls" / "0"
        assert found(root) == {f"0/{LEFT}", f"0/{LEFT}.note", f"0/{PENDING}"}


def test_without_adopting_folders_with_leftovers_are_skipped(root: Path) -> None:
    """A daemon that starts later adopts them."""
    leave(root / "pulls" / "0", LEFT, f"{LEFT}.note")
    leave(root / "pulls" / "1", PENDING)
    leave(root / "pulls" / "2" / "bad", LEFT)
    leave(root / "pulls" / "2", f"{LEFT}.record", f"{LEFT}.new")
    with closing(PullsFolder(root, Unsynced(), adopts=False)) as pulls:
        assert pulls.path == root / "pulls" / "2"
        assert found(root) == {f"0/{LEFT}", f"0/{LEFT}.note", f"1/{PENDING}", f"2/bad/{LEFT}"}


@pytest.mark.parametrize("adopts", [False, True])
def test_next_folder_beside_a_running_process(root: Path, adopts: bool) -> None:
    with closing(PullsFolder(root, Unsynced())) as living:
        leave(living.path, LEFT, f"{LEFT}.note", PENDING)
        with closing(PullsFolder(root, Unsynced(), adopts=adopts)) as pulls:
            assert pulls.path == root / "pulls" / "1"
            assert found(root) == {f"0/{LEFT}", f"0/{LEFT}.note", f"0/{PENDING}"}


def test_stale_socket_stays_until_cleared(root: Path) -> None:
    killed = PullsFolder(root, Unsynced())
    with (
        closing(killed),
        closing(ControlSocket(killed.path)) as control_socket,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        listener.bind(control_socket.path)
    with closing(PullsFolder(root, Unsynced())) as pulls, closing(ControlSocket(pulls.path)) as control_socket:
        assert not control_socket.is_open()
        control_socket.clear()
        assert [path.name for path in pulls.path.iterdir()] == ["lock"]


def test_bad_folder_is_created_on_demand_and_stays(root: Path) -> None:
    with closing(PullsFolder(root, Unsynced())) as pulls:
        assert os.listdir(pulls.path) == ["lock"]
        leave(pulls.bad, LEFT)
    with closing(PullsFolder(root, Unsynced())) as again:
        assert (again.bad / LEFT).exists()
