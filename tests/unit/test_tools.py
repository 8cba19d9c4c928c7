"""Generated files of the package: manual pages and shell completion match the code."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from twisted.python import usage

from ociregistry import __version__
from ociregistry.commands.help import Option, options_of
from ociregistry.settings import OPTIONS
from ociregistry.tap import Options
from tools import completion, manual
from tools.commandline import Command, commands, common, former
from tools.generate import generated, main

ROOT = Path(__file__).resolve().parents[2]
PORT = Option("port", True, "TCP port [0-65535]: it's the clients'.", "8080")
QUIET = Option("quiet", False, "Say nothing.", letter="q")
KEEP = Option("keep", True, ".begins like a request of roff", letter="k")
PRUNE = Command("prune", "remove what is old", "[options] PATTERN", "", (KEEP,))
LIST = Command("list", "print what there is", "[options]", "Prints what there is.", ())


def plain(roff: str) -> str:
    return roff.replace("\\-", "-").replace("\\fB", "").replace("\\fR", "")


def test_every_option_and_command_is_in_the_manual() -> None:
    files = generated()
    names = [option.name for option in OPTIONS]
    assert len(names) > 5
    assert {*names, "config-path", "listen", "help", "version"} <= {option.name for option in common()}
    table: Sequence[Any] = Options.subCommands
    assert {command.name for command in commands()} == {name for name, *_ in table}
    for command in commands():
        assert f"{command.name}:" in files["_ociregistry"]
        assert re.search(rf"^\.TP\n{command.name} ", plain(files["ociregistry.8"]), re.MULTILINE)
    for name in (option.name for option in common()):
        assert f"--{name}\n" in plain(files["ociregistry.8"]).replace(" \\fIvalue", "")
        assert f"--{name} " in files["ociregistry.bash"].replace("'", " ")
        assert f"'*--{name}" in files["_ociregistry"]


def test_options_are_listed_with_their_commands() -> None:
    """`--dry-run` belongs to prune and also to its older spelling."""
    takes = {command.name: {option.name for option in command.options} for command in commands()}
    assert {name for name, options in takes.items() if "dry-run" in options} == {"prune"}
    assert {option.name for option in former()} == {"dry-run", "list-cache", "load-images", "prune", "prune-before"}
    files = generated()
    page = plain(files["ociregistry.8"]).replace(" \\fIvalue", "")
    others = page.partition("OTHER SPELLINGS\n")[2].partition(".SH")[0]
    for option in former():
        assert f"--{option.name}\n" in others
        assert page.count(f"--{option.name}\n") == (2 if option.name == "dry-run" else 1)
    assert "--list-cache" not in files["ociregistry.bash"] + files["_ociregistry"]


def test_every_configuration_key_is_in_the_manual() -> None:
    page = plain(generated()["ociregistry.yaml.5"])
    found = {key for heading in re.findall(r"^\.B (.*)$", page, re.MULTILINE) for key in heading.split(", ")}
    assert {*(option.key for option in OPTIONS), "listen", "tls", "registries", "bandwidth"} <= found


def test_no_placeholder_remains() -> None:
    for name in ("ociregistry.8", "ociregistry.yaml.5"):
        page = generated()[name]
        assert re.search("@[A-Z]+@", page) is None
        assert f"ociregistry {__version__}" in page


def test_files_are_written(tmp_path: Path) -> None:
    main(tmp_path / "new" / "folder")
    assert {path.name: path.read_text() for path in (tmp_path / "new" / "folder").iterdir()} == generated()


def test_package_version() -> None:
    changelog = (ROOT / "debian" / "changelog").read_text()
    assert changelog.startswith(f"ociregistry ({__version__}) ")


def test_option_in_the_manual() -> None:
    text = manual.options_text([PORT, QUIET, KEEP])
    assert text == (
        ".TP\n\\fB\\-\\-port\\fR \\fIvalue\\fR\nTCP port [0\\-65535]: it's the clients'. Default: 8080.\n"
        ".TP\n\\fB\\-q\\fR, \\fB\\-\\-quiet\\fR\nSay nothing.\n"
        ".TP\n\\fB\\-k\\fR, \\fB\\-\\-keep\\fR \\fIvalue\\fR\n\\&.begins like a request of roff\n"
    )


@pytest.mark.parametrize(
    ("doc", "default", "text", "shown"),
    [
        ("For so long [1d].", None, "For so long.", "1d"),
        ("For so long. [1d]", None, "For so long.", "1d"),
        ("For so long.", "1d", "For so long.", "1d"),
        ("All of [a-z]\n   there are.", None, "All of [a-z] there are.", ""),
    ],
)
def test_defaults_are_found(doc: str, default: str | None, text: str, shown: str) -> None:
    class Table(usage.Options):
        optParameters = [["older-than", "o", default, doc]]

    found = next(option for option in options_of(Table()) if option.name == "older-than")
    assert found == Option("older-than", True, text, shown, "o")


def test_command_in_the_manual() -> None:
    text = manual.commands_text([LIST, PRUNE])
    assert text.startswith(
        ".TP\n\\fBlist\\fR [options]\nPrints what there is.\n.TP\n\\fBprune\\fR [options] PATTERN\n"
    )
    assert "Remove what is old.\n.RS\n.TP\n\\fB\\-k\\fR, \\fB\\-\\-keep\\fR" in text
    assert text.endswith(".RE\n")


def test_settings_in_the_manual() -> None:
    top = "# The top.\n#\n# Two\n# lines.\n"
    example = f"{top}\n# Where\n# it is.\n#path: /a-b\n#other: 1\n\n# A list.\n#list:\n#  - a\n\n# On its own.\n"
    assert manual.introduction(example) == "The top.\n.PP\nTwo lines.\n"
    assert manual.settings_text(example) == (
        ".TP\n.B path, other\nWhere it is.\n.IP\n.EX\npath: /a\\-b\nother: 1\n.EE\n"
        ".TP\n.B list\nA list.\n.IP\n.EX\nlist:\n  \\- a\n.EE\n"
        ".PP\nOn its own.\n"
    )


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["pr"], {"prune"}),
        ([""], {"list", "prune", "--port", "--quiet", "--log-level"}),
        (["--q"], {"--quiet"}),
        (["prune", "--"], {"--port", "--quiet", "--keep", "--log-level"}),
        (["list", "--k"], set()),
        (["--port", "8080", "prune", "--k"], {"--keep"}),
        (["--port", "p"], set()),
        (["prune", "--keep", "l"], set()),
        (["prune", "-k", "l"], set()),
        (["prune", "l"], set()),
        (["--log-level", "w"], {"warn"}),
        (["--log-level", "=", "t"], {"trace"}),
        (["--log-level", "="], {"trace", "debug", "info", "warn", "error"}),
    ],
)
def test_bash_completion(tmp_path: Path, typed: list[str], offered: set[str]) -> None:
    script = tmp_path / "completion"
    level = Option("log-level", True, "How much to log.", "error")
    script.write_text(completion.bash([PORT, QUIET, level], [LIST, PRUNE]))
    tell = '. "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _ociregistry; printf "%s\\n" "${COMPREPLY[@]}"'
    argv = ["bash", "-uc", tell, "bash", str(script), "ociregistry", *typed]
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert result.stderr == ""
    assert set(result.stdout.split()) == offered


def test_zsh_completion_of_special_arguments() -> None:
    text = completion.zsh([PORT, QUIET, KEEP], [PRUNE])
    assert "'*--port=[TCP port \\[0-65535\\]\\: it'\\''s the clients'\\''.]:port:_files'\n" in text
    assert "'*--quiet[Say nothing.]'\n        '*-q[Say nothing.]'\n" in text
    assert "'*-k+[.begins like a request of roff]:keep:_files'" in text
    assert "'prune:remove what is old'\n" in text
