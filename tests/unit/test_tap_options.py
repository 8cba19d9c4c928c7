"""Command-line options: parsed before anything starts, so that a usage error ends the process."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twisted.application.service import IService, IServiceMaker
from twisted.plugin import IPlugin
from twisted.python.reflect import namedAny
from twisted.scripts._twistd_unix import ServerOptions

from ociregistry import __version__
from ociregistry.config.nodes import ConfigInvalid
from ociregistry.config.proxy import NO_PROXIES, NoProxy, ProxySettings
from ociregistry.config.values import Reserve
from ociregistry.names import Upstream
from ociregistry.platforms import Platform
from ociregistry.settings import OPTIONS, AdminListen, Settings, load_settings
from ociregistry.tap import Options, makeService
from tests.unit.support.command_lines import CommandResult, RecordedCommand, record_commands, run, usage_error
from tools.commandline import commands

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine must not fail the test by a deadline."""

COMMANDS = ("load", "list", "images", "prune", "verify", "export", "check", "status", "version", "containerd-config")


@pytest.fixture(autouse=True)
def ran(monkeypatch: pytest.MonkeyPatch) -> list[RecordedCommand]:
    """Return the commands that would have run."""
    return record_commands(monkeypatch)


def parse(*argv: str) -> Settings:
    """Return the settings of a command line."""
    options = Options()
    options.parseOptions(argv)
    return options.settings


def test_defaults() -> None:
    assert parse() == parse("serve") == load_settings({}, (), None)


ALL = (
    *("--image-path", "/srv/images", "--port", "5000", "--log-level", "debug", "--pull-timeout", "1000"),
    *("--max-connections", "3", "--allow-upstreams", "docker.io,quay.io", "--default-ns", "quay.io"),
    *("--concurrent", "50", "--arch", "arm64", "--os", "windows", "--platform", "linux/arm64,linux/arm/v7"),
    *("--os-version", "10.0.17763", "--log-format", "json"),
    *("--with-signatures", "--preload-images", "/etc/images", "--max-bandwidth", "8kbit"),
    *("--listen", "tcp:5001", "--listen", "tcp:5002", "--reserve", "10%"),
    *("--admin-listen", "unix:/run/admin.sock"),
)


@pytest.mark.parametrize("argv", [ALL, ("serve", *ALL), (*ALL[:6], "serve", *ALL[6:])])
def test_options_before_and_after_serve(argv: tuple[str, ...]) -> None:
    settings = parse(*argv)
    assert settings == Settings(
        image_path=Path("/srv/images"),
        port=5000,
        listen=("tcp:5001", "tcp:5002"),
        admin_listen=AdminListen("unix:/run/admin.sock", given=True),
        reserve=Reserve(0.1),
        log_level="debug",
        log_format="json",
        pull_timeout=1.0,
        concurrent=50,
        max_connections=3,
        arch="arm64",
        os="windows",
        os_version="10.0.17763",
        platform=(Platform("linux", "arm64", "", "10.0.17763"), Platform("linux", "arm", "v7", "10.0.17763")),
        with_signatures=True,
        preload_images=Path("/etc/images"),
        allow_upstreams=("docker.io", "quay.io"),
        default_ns=Upstream("quay.io"),
        registries={},
        proxy=ProxySettings(NO_PROXIES, NoProxy()),
        always_pull_latest=False,
        air_gapped=False,
        complete_metadata=True,
        complete_platforms=(),
        complete_images=True,
        max_bandwidth=1000.0,
        bandwidth=(),
        prune=None,
        verify=None,
        tls=None,
        warnings=(),
        files={},
    )


def test_last_value_of_a_repeated_option_wins() -> None:
    assert parse("--port", "1", "--port", "2").port == 2
    assert parse("--port", "1", "serve", "--port", "2").port == 2
    assert parse("--port=1", "serve").port == 1
    assert parse("--listen", "tcp:1", "serve", "--listen", "tcp:2").listen == ("tcp:1", "tcp:2")


@pytest.mark.parametrize("flag", ["always_pull_latest", "air_gapped", "with_signatures"])
def test_flags(tmp_path: Path, flag: str) -> None:
    option = f"--{flag.replace('_', '-')}"
    assert not getattr(parse(), flag)
    for argv in ((option,), ("serve", option), (option, "serve", option)):
        assert getattr(parse(*argv), flag)
    config = tmp_path / "it.yaml"
    for text, value in (("true", True), ("false", False)):
        config.write_text(f"{flag}: {text}\n")
        assert getattr(parse("--config-path", str(config)), flag) is value
        assert getattr(parse("--config-path", str(config), option), flag)


def test_images_are_completed_by_default(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert parse().complete_images
    assert not parse("--no-complete-images").complete_images
    assert not parse("serve", "--no-complete-images").complete_images
    config = tmp_path / "it.yaml"
    config.write_text("complete_images: false\n")
    assert not parse("--config-path", str(config)).complete_images
    assert parse("--config-path", str(config), "--complete-images").complete_images
    line = usage_error(capfd, "--complete-images", "serve", "--no-complete-images")
    assert "--complete-images and --no-complete-images exclude each other" in line


def test_config_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("port: 1\nlog_level: info\n")
    (tmp_path / "two.yaml").write_text("port: 2\n")
    one, two = str(tmp_path / "one.yaml"), str(tmp_path / "two.yaml")
    settings = parse("--config-path", one, "--log-level", "warn")
    assert (settings.port, settings.log_level) == (1, "warn")
    assert parse("--config-path", one, "serve", "--config-path", two).port == 2


def test_reload_works_after_chdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("it.yaml").write_text("port: 1\nlog_level: info\n")
    options = Options()
    options.parseOptions(["--config-path", "it.yaml", "serve", "--port", "2", "--listen", "tcp:3"])
    assert options.load() == options.settings
    Path("it.yaml").write_text("port: 4\nlog_level: warn\nlisten: [tcp:5]\n")
    monkeypatch.chdir("/")
    again = options.load()
    assert (again.port, again.log_level, again.listen) == (2, "warn", ("tcp:3",))
    assert options.settings.log_level == "info"
    (tmp_path / "it.yaml").unlink()
    with pytest.raises(ConfigInvalid, match=f"^{tmp_path}/it.yaml: cannot be read"):
        options.load()


def test_reload_without_a_file() -> None:
    options = Options()
    options.parseOptions(["--port", "2"])
    assert options.load() == options.settings == load_settings({"port": "2"}, (), None)


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--config-path", ""], "--config-path: the path of a file is expected"),
        (["--port", "http"], "--port: 'http': a number from 1 to 65535 is expected"),
        (["serve", "--log-level", "loud"], "--log-level: 'loud'"),
        (["--default-ns", "https://quay.io"], "--default-ns: 'https://quay.io': host or host:port is expected"),
        (["--config-path", "/nowhere/at/all.yaml"], "/nowhere/at/all.yaml: cannot be read"),
        (["--nonsense"], "--nonsense"),
        (["--nonsense=5"], "--nonsense"),
        (["--port"], "port"),
        (["nonsense"], "nonsense"),
        (["serve", "nonsense"], "'nonsense': only options are expected here"),
        (["serve", "serve"], "only options are expected here"),
        (["check", "serve"], "only options are expected here"),
        (["check", "--port", "http"], "--port: 'http': a number from 1 to 65535 is expected"),
        (["--concurrent", "0"], "--concurrent: '0': a number from 1 to 1000 is expected"),
        (["serve", "--arch", "arm/v7"], "--arch: 'arm/v7': a word such as "),
        (["--os", "linux/amd64"], "--os: 'linux/amd64': a word such as "),
        (["--platform", "arm64"], "--platform: 'arm64': a platform such as linux/amd64 or linux/arm/v7 is expected"),
    ],
)
def test_usage_error_is_one_line(capfd: pytest.CaptureFixture[str], argv: list[str], why: str) -> None:
    assert why in usage_error(capfd, *argv)


@pytest.mark.parametrize("word", [*COMMANDS, "serve"])
def test_option_value_is_no_command(word: str) -> None:
    assert parse("--image-path", f"/{word}").image_path == Path(f"/{word}")
    assert parse("--image-path", word).image_path.name == word
    assert parse("--default-ns", word).default_ns.name == word
    assert parse("--arch", word).arch == word


@pytest.mark.parametrize("word", ["", "serve", *COMMANDS])
def test_version(capfd: pytest.CaptureFixture[str], ran: list[RecordedCommand], word: str) -> None:
    assert run(capfd, *filter(None, [word]), "--version") == CommandResult(0, f"ociregistry {__version__}\n", "")
    assert run(capfd, "version") == CommandResult(0, f"ociregistry {__version__}\n", "")
    assert ran == []


@pytest.mark.parametrize("word", ["", "serve", *COMMANDS])
def test_help_lists_options_with_defaults(
    capfd: pytest.CaptureFixture[str], ran: list[RecordedCommand], word: str
) -> None:
    result = run(capfd, *filter(None, [word]), "--help")
    assert not result.status
    for option in OPTIONS:
        assert re.search(rf"--{option.name}{'' if option.is_flag else '='}(?![\w-])", result.out)
    assert "[/var/lib/ociregistry]" in result.out
    assert "--listen=" in result.out
    assert "[]" not in result.out
    assert "[None]" not in result.out
    assert ran == []


@pytest.mark.parametrize("word", ["", "serve", *COMMANDS])
def test_help_begins_with_usage_and_ends_with_examples_that_can_be_typed(
    capfd: pytest.CaptureFixture[str], ran: list[RecordedCommand], monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    for typed, program in (("/usr/bin/twistd3", "twistd3 ociregistry"), ("/usr/bin/ociregistry", "ociregistry")):
        monkeypatch.setattr(sys, "argv", [typed])
        text = run(capfd, *filter(None, [word]), "-h").out
        assert text == run(capfd, *filter(None, [word]), "--help").out
        first, *_ = text.splitlines()
        assert first.startswith(" ".join(filter(None, [f"Usage: {program}", word, "[options]"])))
        examples = text.partition("\nExamples:\n")[2].splitlines()
        assert len(examples) == 2
        for example in examples:
            assert example.startswith(f"  {program} ")
            words = shlex.split(example.removeprefix(f"  {program} "))
            assert (word or words[0]) in (words[0], "version")
            assert max(map(len, text.splitlines())) <= 100
    assert ran == []


@pytest.mark.parametrize("word", COMMANDS)
def test_help_of_a_command_describes_its_own_options_first(capfd: pytest.CaptureFixture[str], word: str) -> None:
    text = run(capfd, word, "--help").out
    own = {option.name for command in commands() if command.name == word for option in command.options}
    first, _, shared = text.partition("\nOptions of all commands:\n")
    listed = re.findall(r"^  (?:-\w, )?--([\w-]+)", first, re.MULTILINE)
    if own:
        assert set(listed) == own
        assert "--image-path" in shared
    else:
        assert "--image-path" in first


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (("lst",), "list"),
        (("containerd_config",), "containerd-config"),
        (("list", "--lnog"), "--long"),
        (("--image-pth", "x"), "--image-path"),
        (("load", "x", "--platfrom=all"), "--platform"),
    ],
)
def test_mistyped_word_suggests_the_near_one(
    capfd: pytest.CaptureFixture[str], argv: tuple[str, ...], meant: str
) -> None:
    listed = "options" if meant.startswith("-") else "commands"
    assert usage_error(capfd, *argv).endswith(f": did you mean {meant}? (--help lists the {listed})")


def test_word_that_is_near_to_nothing_suggests_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    for argv in (("zzz",), ("--zzz",), ("list", "--zzz")):
        assert "did you mean" not in usage_error(capfd, *argv)


def test_help_lists_commands(capfd: pytest.CaptureFixture[str]) -> None:
    text = run(capfd, "--help").out
    for command in (*COMMANDS, "serve"):
        assert re.search(rf"^ +{command} ", text, re.MULTILINE)
    assert "not in this version" not in text


@UNHURRIED
@given(
    st.lists(
        st.text("-aehoprst=,./: 5", max_size=12)
        | st.sampled_from(
            ["--port", "serve", "--listen", *COMMANDS, "--dry-run", "--prune", "--load-images", "--json"]
        ),
        max_size=5,
    )
)
def test_any_arguments_make_settings_or_exit(argv: list[str]) -> None:
    try:
        settings = parse(*argv)
    except SystemExit as ended:
        status = ended.code
    else:
        status = 0
        assert isinstance(settings, Settings)
    assert status in (0, 2, None)


def test_make_service(tmp_path: Path) -> None:
    options = Options()
    options.parent = ServerOptions()
    options.parseOptions(["--image-path", str(tmp_path / "images")])
    assert IService.providedBy(makeService(options))
    # Nothing has been opened yet: the process may still have to daemonize.
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("interrupts")
def test_twistd_plugin() -> None:
    plugin = namedAny("twisted.plugins.ociregistry_plugin.ociregistry")
    assert IPlugin.providedBy(plugin)
    assert IServiceMaker.providedBy(plugin)
    assert (plugin.tapname, plugin.options, plugin.makeService) == ("ociregistry", Options, makeService)
    names = [
        name
        for name, value in vars(namedAny("twisted.plugins.ociregistry_plugin")).items()
        if IPlugin.providedBy(value)
    ]
    assert names == ["ociregistry"]
