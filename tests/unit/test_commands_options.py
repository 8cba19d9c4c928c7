"""Options common to all commands: position, values, output, errors and exit status."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twisted.python import usage

from ociregistry.commands.list import List
from ociregistry.commands.options import Command, CommandFailed, CommonOptions, print_lines
from ociregistry.process import print_error
from ociregistry.settings import OPTIONS
from ociregistry.tap import Options
from tests.unit.support.command_lines import CommandResult, file_contents, run

ROOT = Path(__file__).resolve().parents[2]
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine must not fail the test by a deadline."""


class ExampleCommand(Command):
    """A command with an option, a flag, a short option and arguments."""

    optParameters = [["spice", None, None, "What with."], ["output", "o", None, "Where to."]]
    optFlags = [["hot", None, "Whether it is hot."]]

    def parseArgs(self, *arguments: str) -> None:
        """Accept any number of arguments."""
        self.arguments = arguments


def parsed(*argv: str) -> ExampleCommand:
    """Return the command made from a command line."""
    command = ExampleCommand()
    command.parseOptions(argv)
    return command


def values(*argv: str) -> tuple[object, ...]:
    """Return all values of the command."""
    command = parsed(*argv)
    return command.arguments, command["spice"], command["output"], command["hot"], command["port"], command.listen


GIVEN = (
    ["--spice", "salt"],
    ["-o", "table"],
    ["--hot"],
    ["--port=5"],
    ["--listen", "tcp:1"],
    ["--listen=tcp:2"],
)
EXPECTED = (("soup", "fish"), "salt", "table", 1, "5", ["tcp:1", "tcp:2"])


@pytest.mark.parametrize("place", range(len(GIVEN) + 1))
def test_options_before_between_and_after_arguments(place: int) -> None:
    before, behind = itertools.chain.from_iterable(GIVEN[:place]), list(itertools.chain.from_iterable(GIVEN[place:]))
    words = [*before, "soup"]
    assert values(*words, *behind, "fish") == values(*words, "fish", *behind) == EXPECTED


def test_double_dash_ends_options() -> None:
    assert parsed("soup", "--", "--hot", "-o").arguments == ("soup", "--hot", "-o")
    assert parsed("--", "--hot")["hot"] == 0
    assert parsed("-", "soup").arguments == ("-", "soup")
    assert parsed("--", "--").arguments == ("--",)


def test_value_may_look_like_an_option() -> None:
    assert parsed("soup", "--spice", "--hot")["spice"] == "--hot"
    assert parsed("soup", "--spice", "--hot")["hot"] == 0
    assert parsed("--spice", "--")["spice"] == "--"
    assert parsed("--spice=")["spice"] == ""
    assert parsed("-o", "-x")["output"] == "-x"
    assert parsed("-otable", "soup")["output"] == "table"


@pytest.mark.parametrize(
    "argv",
    [["--nonsense"], ["soup", "--nonsense"], ["soup", "--spice"], ["--hot=yes"], ["soup", "-x"], ["soup", "-o"]],
)
def test_unknown_option_is_a_usage_error(argv: list[str]) -> None:
    with pytest.raises(usage.UsageError, match=argv[-1].partition("=")[0].lstrip("-")):
        parsed(*argv)


@UNHURRIED
@given(
    st.lists(
        st.text("-=ophst", max_size=7) | st.sampled_from(["--hot", "--spice", "-o", "--", "--listen"]), max_size=5
    )
)
def test_any_arguments_are_parsed_or_a_usage_error(argv: list[str]) -> None:
    try:
        command = parsed(*argv)
    except (usage.UsageError, SystemExit):
        return
    assert len(command.arguments) <= len(argv)
    assert set(command.arguments) <= set(argv)


def test_common_options_belong_to_every_command() -> None:
    for options in (CommonOptions(), ExampleCommand()):
        for option in OPTIONS:
            assert options[option.name] in (None, 0), f"{option.name}: it must show whether it was given"


def number(text: str) -> int:
    """Parse a number below 10."""
    if text != "1":
        raise ValueError("1 is expected")
    return 1


def test_invalid_value_names_its_option() -> None:
    assert parsed("--spice", "1").value("spice", number) == 1
    assert parsed().value("spice", number) is None
    for text in ("2", "", "a'b"):
        with pytest.raises(usage.UsageError) as refused:
            parsed("--spice", text).value("spice", number)
        assert str(refused.value) == f"--spice {text!r}: 1 is expected"


def test_lines_are_printed(capfd: pytest.CaptureFixture[str]) -> None:
    print_lines(["one", "two ü", ""])
    print_lines([])
    print_error("three")
    assert capfd.readouterr() == ("one\ntwo ü\n\n", "ociregistry: three\n")


def test_unprintable_characters_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    print_lines(["ü \udcff"])
    assert out.buffer.getvalue() == b"\\xfc \\udcff\n"


PRINTS = """
import sys
from ociregistry.commands.options import CommandFailed, print_lines
try:
    print_lines(str(number) for number in range(100_000))
except CommandFailed as error:
    print(error, file=sys.stderr)
    raise SystemExit(7)
print("all of it was taken", file=sys.stderr)
"""


def printing(out: int, redirection: str = "") -> tuple[int, str]:
    """Run a process that prints much to `out`; return its exit status and its stderr."""
    ran = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-c", PRINTS],
        stdout=out,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        timeout=60,
        check=False,
    )
    return ran.returncode, ran.stderr


@pytest.fixture
def closed_pipe() -> Iterator[int]:
    """Return a pipe without reader, like one to a `head` that has exited."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


def test_closed_pipe_ends_it_silently(closed_pipe: int) -> None:
    assert printing(closed_pipe) == (1, "")


def test_full_disk_is_reported() -> None:
    with Path("/dev/full").open("wb") as full:
        assert printing(full.fileno()) == (7, "cannot print: No space left on device\n")


def test_closed_stdout_is_reported() -> None:
    status, values = printing(subprocess.DEVNULL, ">&-")
    assert (status, len(values.splitlines())) == (7, 1)


def test_closed_stderr_is_ignored(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "__stderr__", None)
    print_error("something")
    assert capsys.readouterr().out == ""


def test_command_failed_has_a_status() -> None:
    assert (CommandFailed("x").status, CommandFailed("x", 2).status, str(CommandFailed("x"))) == (1, 2, "x")


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (CommandFailed("it could not be done"), CommandResult(1, "", "ociregistry: it could not be done\n")),
        (CommandFailed("it cannot be meant", 2), CommandResult(2, "", "ociregistry: it cannot be meant\n")),
        (
            PermissionError(13, "Permission denied", "/srv/img"),
            CommandResult(
                1,
                "",
                f"ociregistry: cannot use the store /srv: Permission denied: /srv/img, as the user {os.geteuid()}\n",
            ),
        ),
        (
            FileNotFoundError(2, "No such file or directory", "/srv"),
            CommandResult(1, "", "ociregistry: cannot use the store /srv: No such file or directory\n"),
        ),
        (OSError("something"), CommandResult(1, "", "ociregistry: cannot use the store /srv: something\n")),
    ],
)
def test_command_failure_is_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: CommandResult
) -> None:
    def fail(command: Command, settings: object) -> int:
        raise raised

    monkeypatch.setattr(List, "run", fail)
    assert run(capfd, "--image-path", "/srv", "list") == expected


ON_A_STORE = {
    "list": "list",
    "prune": "prune --pattern x",
    "verify": "verify",
    "export": "export --pattern . -o images.tar",
    "status": "status",
}
"""Commands that use a store and do not fill it."""
_OTHERS = {"serve", "load", "images", "check", "version", "containerd-config"}
WITHOUT_STORE = [*ON_A_STORE.values(), "prune --orphans", "prune --orphans --dry-run", "verify --repair"]


def test_each_command_that_uses_a_store_is_known_here() -> None:
    commands: Sequence[Any] = Options.subCommands
    assert {command[0] for command in commands} == ON_A_STORE.keys() | _OTHERS


@pytest.mark.parametrize("command", WITHOUT_STORE)
def test_folder_without_a_store_is_one_line_and_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "notes").touch()
    before = file_contents(tmp_path)
    status, line = 1, f"cannot use the store {folder}: there is none in this folder"
    if command == "status":
        status, line = 2, f"no daemon runs, and there is no store at {folder}"
    result = run(capfd, "--image-path", folder, *command.split())
    assert result == CommandResult(status, "", f"ociregistry: {line} (--image-path names another)\n")
    assert file_contents(tmp_path) == before


def test_file_with_the_name_of_a_folder_is_no_store(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "img").touch()
    result = run(capfd, "--image-path", tmp_path, "list")
    assert result.status == 1
    assert "there is none in this folder" in result.err


@pytest.mark.parametrize("kept", ["blobs", "fat", "img", "pulls"])
def test_store_that_lost_folders_is_one(tmp_path: Path, capfd: pytest.CaptureFixture[str], kept: str) -> None:
    (tmp_path / kept).mkdir()
    assert run(capfd, "--image-path", tmp_path, "list") == CommandResult(0, "", "")


@pytest.mark.parametrize("status", [0, 1])
def test_exit_status_of_command(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(List, "run", lambda command, settings: status)
    assert run(capfd, "list").status == status
    assert run(capfd, "--list-cache").status == status


IMPORTED = """
import sys
from ociregistry import tap
from ociregistry.commands import list, prune
sys.exit("OpenSSL" in sys.modules)
"""


def test_commands_import_no_openssl_without_certificates() -> None:
    """It takes a fifth of the start of a command."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", IMPORTED], env=environment, timeout=60, check=False).returncode == 0
