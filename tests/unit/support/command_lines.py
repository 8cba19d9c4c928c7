"""Run command lines in the process of the tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from ociregistry.commands.containerd_config import ContainerdConfig
from ociregistry.commands.export import Export
from ociregistry.commands.images import Images
from ociregistry.commands.list import List
from ociregistry.commands.load import Load
from ociregistry.commands.options import Command
from ociregistry.commands.prune import Prune
from ociregistry.commands.status import Status
from ociregistry.commands.verify import Verify
from ociregistry.settings import Settings
from ociregistry.tap import Options


@dataclass(frozen=True)
class CommandResult:
    """Exit status and output of a command line."""

    status: object
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """Return the lines of stdout."""
        return self.out.splitlines()


def run(capfd: pytest.CaptureFixture[str], *argv: object) -> CommandResult:
    """Run a command line to its end."""
    with pytest.raises(SystemExit) as ended:
        Options().parseOptions([str(word) for word in argv])
    return CommandResult(ended.value.code, *capfd.readouterr())


def usage_error(capfd: pytest.CaptureFixture[str], *argv: object) -> str:
    """Return the usage error of a command line: one line, with exit status 2."""
    result = run(capfd, *argv)
    assert (result.status, result.out) == (2, "")
    (line,) = result.err.splitlines()
    assert line.startswith("ociregistry: ")
    return line


@dataclass(frozen=True)
class RecordedCommand:
    """A command that would have run."""

    command: Command
    settings: Settings


def record_commands(monkeypatch: pytest.MonkeyPatch) -> list[RecordedCommand]:
    """Replace commands that use files by a recorder, and return the recorded commands."""
    ran: list[RecordedCommand] = []

    def record(command: Command, settings: Settings) -> int:
        ran.append(RecordedCommand(command, settings))
        return 0

    commands: Sequence[type[Command]] = (Load, List, Images, Prune, Verify, Export, Status, ContainerdConfig)
    for command in commands:
        monkeypatch.setattr(command, "run", record)
    return ran


def file_contents(root: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return inode, ctime and content of every file and folder below `root`."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        data = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(root))] = (status.st_ino, status.st_ctime_ns, data)
    return found
