"""Commands run by root switch to the owner of the store with its groups; other users stay as they are."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ociregistry.commands.options import CommandFailed
from ociregistry.commands.running import become_owner


class Owned(type(Path())):  # type: ignore[misc]  # the base class of Path() differs between platforms
    """A store owned by user 4711 and group 4712."""

    def stat(self, **how: Any) -> Any:
        return SimpleNamespace(st_uid=4711, st_gid=4712)


STORE = Owned("/srv/images")


@dataclass
class Process:
    """Records changes of user and groups, in order; fails those that the test forbids."""

    uid: int = 0
    may_not: str = ""
    became: list[tuple[str, object]] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replace the functions of `os` that query and change the user."""
        monkeypatch.setattr(os, "geteuid", lambda: self.uid)
        for name in ("setgroups", "setgid", "setuid"):
            monkeypatch.setattr(os, name, lambda value, name=name: self._become(name, value))

    def _become(self, name: str, value: object) -> None:
        if name == self.may_not:
            raise PermissionError(1, "Operation not permitted")
        self.became.append((name, value))


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Process:
    """Return a process of root on a machine that knows no users or groups."""
    process = Process()
    process.install(monkeypatch)

    def unknown(user: object) -> None:
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)
    return process


def test_root_becomes_owner_with_all_groups(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are set before the user: without root they cannot be changed any more."""
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_name=f"user{uid}", pw_gid=4713))
    monkeypatch.setattr(os, "getgrouplist", lambda name, group: [group, 5000] if name == "user4711" else [])
    become_owner(STORE)
    assert process.became == [("setgroups", [4713, 5000]), ("setgid", 4713), ("setuid", 4711)]


def test_unnamed_user_gets_group_of_folder(process: Process) -> None:
    become_owner(STORE)
    assert process.became == [("setgroups", [4712]), ("setgid", 4712), ("setuid", 4711)]


@pytest.mark.parametrize("uid", [1, 4711])
def test_other_user_stays(process: Process, uid: int) -> None:
    process.uid = uid
    become_owner(STORE)
    assert process.became == []


def test_root_stays_for_own_or_missing_store(
    process: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    become_owner(tmp_path / "none")
    monkeypatch.setattr(Owned, "stat", lambda self: SimpleNamespace(st_uid=0, st_gid=4712))
    become_owner(STORE)
    assert process.became == []


@pytest.mark.parametrize("exists", [True, False])
def test_store_of_the_service_is_made_for_its_user(
    process: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    """Root loads images before the first start of the service, which makes the folder otherwise."""
    root, chowned = tmp_path / "lib" / "ociregistry", []
    if exists:
        root.mkdir(parents=True)
    user = SimpleNamespace(pw_dir=str(root), pw_uid=4711, pw_gid=4712)
    monkeypatch.setattr(pwd, "getpwnam", {"ociregistry": user}.__getitem__)
    monkeypatch.setattr(os, "chown", lambda path, uid, gid: chowned.append((path, uid, gid)))
    become_owner(tmp_path / "another store")
    assert not (tmp_path / "another store").exists()
    become_owner(root)
    assert chowned == [(root, 4711, 4712)]
    assert exists or root.stat().st_mode & 0o777 == 0o750
    (root / "img").mkdir()
    become_owner(root)
    assert len(chowned) == 1


@pytest.mark.parametrize("what", ["setgroups", "setgid", "setuid"])
def test_denied_switch_is_one_line(process: Process, what: str) -> None:
    """Happens in a container without the capability."""
    process.may_not = what
    with pytest.raises(CommandFailed) as failed:
        become_owner(STORE)
    why = "/srv/images: cannot switch to its owner, the user 4711: Operation not permitted"
    assert (str(failed.value), failed.value.status) == (why, 1)
