"""Root's commands become the owner of the store, with the owner's groups, and nobody else becomes anybody."""

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


class Owned(type(Path())):  # type: ignore[misc]  # what Path() is differs from machine to machine
    """A store of the user 4711 and the group 4712."""

    def stat(self, **how: Any) -> Any:
        return SimpleNamespace(st_uid=4711, st_gid=4712)


STORE = Owned("/srv/images")


@dataclass
class Process:
    """What this process has become, in order; it may not if it is told so."""

    uid: int = 0
    may_not: str = ""
    became: list[tuple[str, object]] = field(default_factory=list)

    def put_in_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on it is this process that is asked, and changed."""
        monkeypatch.setattr(os, "geteuid", lambda: self.uid)
        for name in ("setgroups", "setgid", "setuid"):
            monkeypatch.setattr(os, name, lambda value, name=name: self._become(name, value))

    def _become(self, name: str, value: object) -> None:
        if name == self.may_not:
            raise PermissionError(1, "Operation not permitted")
        self.became.append((name, value))


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Process:
    """Root's; the users and groups of the machine are unknown to it."""
    process = Process()
    process.put_in_place(monkeypatch)

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    return process


def test_root_becomes_the_user_with_all_groups(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this order: who is no longer root may not change groups."""
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_name=f"user{uid}", pw_gid=4713))
    monkeypatch.setattr(os, "getgrouplist", lambda name, group: [group, 5000] if name == "user4711" else [])
    become_owner(STORE)
    assert process.became == [("setgroups", [4713, 5000]), ("setgid", 4713), ("setuid", 4711)]


def test_of_a_user_without_a_name_it_has_the_group_of_the_folder(process: Process) -> None:
    become_owner(STORE)
    assert process.became == [("setgroups", [4712]), ("setgid", 4712), ("setuid", 4711)]


@pytest.mark.parametrize("uid", [1, 4711])
def test_who_is_not_root_stays_what_he_is(process: Process, uid: int) -> None:
    process.uid = uid
    become_owner(STORE)
    assert process.became == []


def test_roots_own_store_and_one_that_is_not_there_leave_it_root(
    process: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    become_owner(tmp_path / "none")
    monkeypatch.setattr(Owned, "stat", lambda self: SimpleNamespace(st_uid=0, st_gid=4712))
    become_owner(STORE)
    assert process.became == []


@pytest.mark.parametrize("what", ["setgroups", "setgid", "setuid"])
def test_what_it_may_not_become_is_one_line(process: Process, what: str) -> None:
    """Such as in a container without the capability."""
    process.may_not = what
    with pytest.raises(CommandFailed) as failed:
        become_owner(STORE)
    why = "/srv/images: cannot switch to its owner, the user 4711: Operation not permitted"
    assert (str(failed.value), failed.value.status) == (why, 1)
