"""Command names and older spellings: which command a command line makes, with which arguments."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from ociregistry.archives.members import GivenName
from ociregistry.commands.export import Export
from ociregistry.commands.list import List
from ociregistry.commands.load import Load
from ociregistry.commands.options import Command
from ociregistry.commands.prune import Prune
from ociregistry.commands.verify import Verify
from ociregistry.platforms import ALL, Platform
from ociregistry.settings import load_settings
from tests.images import make_image
from tests.unit.support.archives import named, write_tar
from tests.unit.support.command_lines import CommandResult, RecordedCommand, record_commands, run, usage_error

PATTERNS = ("--prune", "curl,^quay")
BEFORE = ("--prune-before", "2024-03-01T22:17:30")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[RecordedCommand]:
    """Return the commands that would have run."""
    return record_commands(monkeypatch)


def made(capfd: pytest.CaptureFixture[str], ran: list[RecordedCommand], *argv: str) -> RecordedCommand:
    """Return the only command of a command line; nothing must be printed."""
    assert run(capfd, *argv) == CommandResult(0, "", "")
    return ran.pop()


def expressions(command: Command) -> list[str]:
    """Return the patterns of the command."""
    assert isinstance(command, Prune | List | Export)
    assert command.patterns is not None
    return [one.pattern for one in command.patterns.expressions]


def spellings(*words: str) -> Iterator[tuple[str, ...]]:
    """Return the options of a command in both forms of giving values."""
    yield words
    yield tuple(f"{name}={value}" for name, value in zip(words[::2], words[1::2], strict=True))


@pytest.mark.parametrize("argv", [("--load-images", "images"), ("load", "images"), ("--load-images=images",)])
def test_load_takes_a_file(
    capfd: pytest.CaptureFixture[str], ran: list[RecordedCommand], argv: tuple[str, ...]
) -> None:
    load, settings = made(capfd, ran, *argv).command, made(capfd, ran, *argv).settings
    assert isinstance(load, Load)
    assert load.words == ("images",)
    assert settings == load_settings({}, (), None)


@pytest.mark.parametrize(
    ("word", "status", "why"),
    [
        ("images.tar", 1, "there is no such file, and as an image it needs a tag, a digest or a registry"),
        ("nginx", 1, "there is no such file, and as an image it needs a tag, a digest or a registry: nginx:TAG"),
        ("./nginx:1.25", 1, "No such file or directory"),
        ("nginx:1.25:1", 2, "there is no such file, and it is not an image: "),
        ("UPPER/nginx:1", 2, "there is no such file, and it is not an image: "),
    ],
)
def test_what_is_neither_file_nor_image_is_not_loaded(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, word: str, status: int, why: str
) -> None:
    result = run(capfd, "--image-path", tmp_path / "store", "load", word)
    assert (result.status, result.out) == (status, "")
    (line,) = result.err.splitlines()
    assert line.startswith("ociregistry: ")
    assert f"{word.removeprefix('./')}: {why}" in line
    assert not (tmp_path / "store").exists()


def test_load_name_option_is_refused_with_an_image(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    error = usage_error(capfd, "--image-path", tmp_path, "load", "nginx:1.25", "--name", "nginx:1.26")
    assert "nginx:1.25: is an image, which has its name: --name is for an archive" in error


def test_file_named_like_an_option(capfd: pytest.CaptureFixture[str], ran: list[RecordedCommand]) -> None:
    for argv in (("load", "--", "/-x"), ("load", "--", "-x"), ("--load-images", "/-x"), ("--load-images=-x",)):
        load = made(capfd, ran, *argv).command
        assert isinstance(load, Load)
        assert [Path(word).name for word in load.words] == ["-x"]


ABOUT_LOADING = ("--arch", "amd64", "--os", "linux", "--pull-timeout", "20000", "--concurrent=50")


@pytest.mark.parametrize(
    "argv",
    [
        ("--image-path", "/srv", "--load-images", "/images", *ABOUT_LOADING),
        (*ABOUT_LOADING, "--load-images=/images", "--image-path=/srv"),
        ("--image-path", "/srv", "load", "/images", *ABOUT_LOADING),
        (*ABOUT_LOADING, "load", "--image-path", "/srv", "/images"),
        (*ABOUT_LOADING, "--image-path", "/srv", "load", "--", "/images"),
    ],
)
def test_load_takes_global_options_before_and_after(
    capfd: pytest.CaptureFixture[str], ran: list[RecordedCommand], argv: tuple[str, ...]
) -> None:
    one = made(capfd, ran, *argv)
    assert isinstance(one.command, Load)
    assert one.command.words == ("/images",)
    expected = {"image_path": "/srv", "arch": "amd64", "os": "linux", "pull_timeout": "20000", "concurrent": "50"}
    assert one.settings == load_settings(expected, (), None)
    assert (one.settings.concurrent, one.settings.max_connections) == (50, 100)


def test_load_name_option(capfd: pytest.CaptureFixture[str], ran: list[RecordedCommand], tmp_path: Path) -> None:
    command = made(capfd, ran, "load", "a.tar", "--name", "nginx:1.25").command
    assert isinstance(command, Load)
    assert command.name == GivenName.parse("docker.io/library/nginx:1.25")
    for argv, why in (
        (("a.tar", "b.tar", "--name", "nginx:1.25"), "--name is the name of one image: give one FILE with it"),
        (("a.tar", "--name", "https://quay.io"), "--name 'https://quay.io': "),
    ):
        assert why in usage_error(capfd, "load", *argv)


def test_load_name_option_is_refused_with_image_list(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    listed = tmp_path / "images.txt"
    listed.write_text("nginx:1.25\n")
    error = usage_error(capfd, "--image-path", tmp_path / "store", "load", listed, "--name", "nginx:1.25")
    assert f"{listed}: is an image list, which has the names: --name is for an archive" in error


@pytest.mark.parametrize(
    "argv",
    [
        ("load", "a", "--platform", "linux/arm64", "--arch", "amd64"),
        ("--platform", "linux/arm64", "load", "a", "--os", "linux"),
        ("--arch", "arm64", "load", "--platform", "all", "a"),
        ("--arch", "arm64", "--platform", "all", "--load-images", "a"),
    ],
)
def test_load_platform_excludes_os_and_arch(capfd: pytest.CaptureFixture[str], argv: tuple[str, ...]) -> None:
    assert "give it without --os and --arch" in usage_error(capfd, *argv)


def test_load_with_signatures_is_refused_with_archives_alone(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    archive = write_tar(tmp_path / "a.tar", named(make_image("signatures")))
    store = tmp_path / "store"
    error = usage_error(capfd, "--image-path", store, "load", archive, "--with-signatures")
    assert "--with-signatures is for image lists: an archive brings the signatures that are in it" in error
    assert not store.exists()


def test_load_takes_several_files_and_platforms(
    capfd: pytest.CaptureFixture[str], ran: list[RecordedCommand]
) -> None:
    argv = ("load", "/a", "--platform", "all", "/b.tar", "--with-signatures", "/c/")
    one = made(capfd, ran, *argv)
    assert isinstance(one.command, Load)
    assert one.command.words == ("/a", "/b.tar", "/c/")
    assert (one.settings.platform, one.settings.with_signatures) == (ALL, True)
    one = made(capfd, ran, "--platform", "linux/arm/v7", "load", "/a")
    assert one.settings.platform == (Platform("linux", "arm", "v7"),)


def test_list_cache_lists_everything(capfd: pytest.CaptureFixture[str], ran: list[RecordedCommand]) -> None:
    for argv in (("--list-cache",), ("list",), ("--image-path", "/srv", "--list-cache"), ("list", "--sort=url")):
        command = made(capfd, ran, *argv).command
        assert isinstance(command, List)
        assert (command.patterns, command["sort"], command["long"], command["json"]) == (None, "url", 0, 0)


def test_prune_patterns(capfd: pytest.CaptureFixture[str], ran: list[RecordedCommand]) -> None:
    for argv in (*spellings(*PATTERNS), *(("prune", *words) for words in spellings("--pattern", PATTERNS[1]))):
        command = made(capfd, ran, *argv).command
        assert isinstance(command, Prune)
        assert expressions(command) == ["curl", "^quay"]
        assert (command.before, command.unused_for, command["orphans"], command["dry-run"]) == (None, None, 0, 0)


def test_prune_before(capfd: pytest.CaptureFixture[str], ran: list[RecordedCommand]) -> None:
    for argv in (*spellings(*BEFORE), *(("prune", *words) for words in spellings("--before", BEFORE[1]))):
        command = made(capfd, ran, *argv).command
        assert isinstance(command, Prune)
        assert command.before == datetime(2024, 3, 1, 22, 17, 30).astimezone()
        assert (command.patterns, command.unused_for, command["orphans"], command["dry-run"]) == (None, None, 0, 0)


def test_prune_patterns_and_before(capfd: pytest.CaptureFixture[str], ran: list[RecordedCommand]) -> None:
    for argv in (
        (*PATTERNS, *BEFORE),
        (*BEFORE, *PATTERNS),
        ("prune", "--before", BEFORE[1], "--pattern=curl,^quay"),
    ):
        command = made(capfd, ran, *argv).command
        assert isinstance(command, Prune)
        assert expressions(command) == ["curl", "^quay"]
        assert command.before is not None


@pytest.mark.parametrize(
    "argv",
    [
        (*PATTERNS, "--dry-run"),
        ("--dry-run", *BEFORE),
        (*PATTERNS, "--dry-run", *BEFORE),
        ("prune", "--pattern", "curl", "--dry-run"),
        ("--dry-run", "prune", "--pattern", "curl"),
        ("--dry-run", "prune", "--pattern", "curl", "--dry-run"),
        ("--image-path", "/srv", "--dry-run", "prune", "--unused-for", "1d"),
        ("--dry-run", "prune", "--orphans"),
    ],
)
def test_dry_run_at_any_position(
    capfd: pytest.CaptureFixture[str], ran: list[RecordedCommand], argv: tuple[str, ...]
) -> None:
    command = made(capfd, ran, *argv).command
    assert isinstance(command, Prune)
    assert command["dry-run"]


def test_dry_run_alone_is_a_usage_error(capfd: pytest.CaptureFixture[str], ran: list[RecordedCommand]) -> None:
    loads = (("--load-images", "x"), ("load", "x"))
    for argv in ((), ("serve",), ("--list-cache",), ("list",), ("check",), ("verify",), ("version",), *loads):
        assert "--dry-run goes with prune" in usage_error(capfd, "--dry-run", *argv)
    for argv in (("serve",), ("list",), ("verify",)):
        assert "--dry-run" in usage_error(capfd, *argv, "--dry-run")
    assert ran == []


ACTIONS = [
    ("--load-images", "x"),
    ("--list-cache",),
    PATTERNS,
    BEFORE,
    ("load", "x"),
    ("list",),
    ("images", "x"),
    ("prune", "--orphans"),
    ("verify",),
    ("export", "--pattern", "x", "-o", "y"),
    ("check",),
    ("status",),
    ("version",),
    ("containerd-config",),
    ("serve",),
]


@pytest.mark.parametrize("second", ACTIONS, ids=" ".join)
@pytest.mark.parametrize("first", ACTIONS[:4], ids=" ".join)
def test_two_actions_are_a_usage_error(
    capfd: pytest.CaptureFixture[str], ran: list[RecordedCommand], first: tuple[str, ...], second: tuple[str, ...]
) -> None:
    if first == second or {first, second} == {PATTERNS, BEFORE}:
        made(capfd, ran, *first, *second)
    else:
        assert "one thing at a time" in usage_error(capfd, *first, *second)
        assert ran == []


def test_two_commands_are_a_usage_error(capfd: pytest.CaptureFixture[str], ran: list[RecordedCommand]) -> None:
    for first in (
        "list",
        "verify",
        "check",
        "status",
        "version",
        "containerd-config",
        "prune --orphans",
        "export --pattern x -o y",
    ):
        for second in ("list", "load", "serve"):
            assert "only options are expected here" in usage_error(capfd, *first.split(), second)
    assert ran == []


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (("--prune", "["), "the pattern '[' is not a regular expression"),
        (("--prune", ""), "an empty pattern matches every image URL"),
        (("--prune", "curl,,quay"), "an empty pattern matches every image URL"),
        (("--prune", "[[:alpha:]]"), "'[:alpha:]', which is Go syntax"),
        (("--prune", r"x\z"), "\\Z is the end of the text here"),
        (("--prune-before", "yesterday"), "a local date and time such as 2024-03-01T22:17:30 is expected"),
        (("--prune-before", "2024-02-30T00:00:00"), "a local date and time such as 2024-03-01T22:17:30 is expected"),
        (("--prune-before", ""), "a local date and time such as 2024-03-01T22:17:30 is expected"),
        (("--prune",), "--prune requires argument"),
        (("--list-cache=yes",), "--list-cache must not have an argument"),
        (("--list-cache", "curl"), "curl"),
        (("--load-images", "x", "y"), "y"),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_usage_error_of_older_spelling_is_one_line(
    capfd: pytest.CaptureFixture[str],
    ran: list[RecordedCommand],
    argv: tuple[str, ...],
    why: str,
    dry: tuple[str, ...],
) -> None:
    # An option without its argument comes last.
    assert why in usage_error(capfd, *dry, *argv).replace("option --", "--")
    assert ran == []


def test_export_paths_are_absolute(
    capfd: pytest.CaptureFixture[str], ran: list[RecordedCommand], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/usr")
    for option in (("-o", "a.tar"), ("-oa.tar",), ("--output", "a.tar"), ("--output=a.tar",)):
        command = made(capfd, ran, "export", *option, "--pattern", "curl,^quay", "--since", "/b.tar").command
        assert isinstance(command, Export)
        assert (command.target, command.since) == (Path("/usr/a.tar"), Path("/b.tar"))
        assert expressions(command) == ["curl", "^quay"]


def test_export_compress_option(capfd: pytest.CaptureFixture[str], ran: list[RecordedCommand]) -> None:
    export = ("export", "-o", "a", "--pattern", "x")
    assert made(capfd, ran, *export, "--compress", "zstd").command["compress"] == "zstd"
    assert "--compress 'gzip': zstd is expected" in usage_error(capfd, *export, "--compress", "gzip")


def test_verify_repair_option(capfd: pytest.CaptureFixture[str], ran: list[RecordedCommand]) -> None:
    for argv, repairs in ((("verify",), False), (("verify", "--repair"), True)):
        command = made(capfd, ran, *argv).command
        assert isinstance(command, Verify)
        assert bool(command["repair"]) is repairs


def test_durations_have_units(capfd: pytest.CaptureFixture[str], ran: list[RecordedCommand]) -> None:
    command = made(capfd, ran, "prune", "--unused-for", "30d", "--orphans", "--older-than", "12h").command
    assert isinstance(command, Prune)
    assert (command.unused_for, command.age) == (timedelta(days=30), timedelta(hours=12))


def test_invalid_settings_end_the_command_line(
    capfd: pytest.CaptureFixture[str], ran: list[RecordedCommand], tmp_path: Path
) -> None:
    config = tmp_path / "it.yaml"
    config.write_text("prune: {every: 1h}\n")
    for argv in (("list",), ("--list-cache",), PATTERNS, ("load", "x")):
        assert f"{config}:1: prune: has neither" in usage_error(capfd, "--config-path", config, *argv)
        assert "--concurrent: '0'" in usage_error(capfd, "--concurrent=0", *argv)
    assert ran == []
