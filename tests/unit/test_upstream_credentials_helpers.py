"""Credential helpers as real programs: valid answers, errors, garbage and hangs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ociregistry.config.registries import Helper, IdentityToken, Password
from ociregistry.errors import Unavailable
from ociregistry.names import Upstream
from ociregistry.upstream.credentials import ask_helper
from tests.unit.support.common import REACTOR, on_reactor, until

HELPER = Helper("fake")
REG = Upstream("reg.example:5000")
GOOD = {"ServerURL": "reg.example:5000", "Username": "user", "Secret": "s3cret"}


class ReactorOnClock:
    """Reactor that runs real programs, with delayed calls on a clock."""

    def __init__(self) -> None:
        self.clock = Clock()

    def spawnProcess(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program."""
        return REACTOR.spawnProcess(*args, **kwargs)

    def callLater(self, *args: Any) -> Any:
        """Schedule on the clock."""
        return self.clock.callLater(*args)


class Programs:
    """A folder in PATH, and what its program received."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, script: str) -> None:
        """Write the helper as this shell script; its arguments are saved, its stdin is the script's."""
        program = self._folder / HELPER.program
        program.write_text(f'#!/bin/sh\ncd "{self._folder}"\nprintf "%s\\n" "$@" > arguments\n{script}\n')
        program.chmod(0o755)

    def prints(self, what: object, status: int = 0) -> None:
        """Write a helper that prints this and saves its input."""
        (self._folder / "answer").write_text(what if isinstance(what, str) else json.dumps(what))
        self.write(f"cat > stdin; cat answer; exit {status}")

    def kept(self, name: str) -> str:
        """Return the content of a file that the helper wrote."""
        return (self._folder / name).read_text()

    async def running(self) -> int:
        """Return the process id that the program wrote into a file."""
        await until(lambda: (self._folder / "pid").exists() and self.kept("pid").endswith("\n"))
        return int(self.kept("pid"))


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """Return a folder without a program."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return Programs(tmp_path)


def asking(machine: Any = REACTOR, upstream: Upstream = REG) -> Deferred[Password | IdentityToken]:
    """Run the helper."""
    return Deferred.fromCoroutine(ask_helper(HELPER, upstream, machine))


def alive(pid: int) -> bool:
    """Return whether a process exists, possibly as a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@on_reactor
async def test_user_and_password(programs: Programs) -> None:
    programs.prints(GOOD)
    assert await asking() == Password("user", "s3cret")
    # The server name is sent on stdin, because command lines are public.
    assert programs.kept("arguments") == "get\n"
    assert programs.kept("stdin") == "reg.example:5000"


@on_reactor
async def test_identity_token(programs: Programs) -> None:
    programs.prints({**GOOD, "Username": "<token>"})
    assert await asking() == IdentityToken("s3cret")


@pytest.mark.parametrize(
    ("name", "server"),
    [
        ("docker.io", "https://index.docker.io/v1/"),
        ("docker.io:443", "docker.io:443"),
        ("123.dkr.ecr.eu-west-1.amazonaws.com", "123.dkr.ecr.eu-west-1.amazonaws.com"),
        ("[::1]:5000", "[::1]:5000"),
    ],
)
@on_reactor
async def test_docker_hub_has_its_legacy_server_name(programs: Programs, name: str, server: str) -> None:
    programs.prints(GOOD)
    await asking(upstream=Upstream.parse(name))
    assert programs.kept("stdin") == server


@on_reactor
async def test_environment_is_inherited(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cloud helpers need it: region, profile, home."""
    monkeypatch.setenv("AWS_PROFILE", "registry")
    programs.write('printf \'{"Username": "%s", "Secret": "s"}\' "$AWS_PROFILE"')
    assert await asking() == Password("registry", "s")


@pytest.mark.parametrize(
    "script",
    [
        pytest.param('exec < /dev/null; printf \'{"Username": "u", "Secret": "s"}\'', id="closed stdin"),
        pytest.param('echo deprecated >&2; printf \'{"Username": "u", "Secret": "s"}\'; echo later >&2', id="stderr"),
    ],
)
@on_reactor
async def test_closed_stdin_and_stderr_output_are_ignored(programs: Programs, script: str) -> None:
    programs.write(script)
    assert await asking() == Password("u", "s")


@on_reactor
async def test_helper_error_is_reported(programs: Programs) -> None:
    programs.prints("credentials not found in native keychain\n", status=1)
    with pytest.raises(Unavailable) as raised:
        await asking()
    assert raised.value.message == (
        "reg.example:5000: docker-credential-fake has no credentials: 'credentials not found in native keychain'"
    )


@on_reactor
async def test_helper_error_text_is_sanitized(programs: Programs) -> None:
    programs.prints("\x1b[31m\n2026-01-01 forged\r\n" + "x" * 10_000, status=1)
    with pytest.raises(Unavailable) as raised:
        await asking()
    assert raised.value.message.isprintable()
    assert len(raised.value.message) < 400


@on_reactor
async def test_killed_helper_is_an_error(programs: Programs) -> None:
    programs.write("printf half; kill -9 $$")
    with pytest.raises(Unavailable, match="has no credentials: 'half'"):
        await asking()


@pytest.mark.parametrize("end", ["exit 1", "kill -9 $$", "exec yes"])
@on_reactor
async def test_secret_of_failed_helper_is_not_reported(programs: Programs, end: str) -> None:
    programs.write(f'printf \'{{"Username": "user", "Secret": "s3cret"}}\'; {end}')
    with pytest.raises(Unavailable) as raised:
        await asking()
    assert "s3cret" not in raised.value.message


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "null",
        "[]",
        '"text"',
        "{}",
        "{",
        "\xff",
        "[" * 20_000,
        {**GOOD, "Username": ""},
        {**GOOD, "Secret": ""},
        {**GOOD, "Username": None},
        {**GOOD, "Secret": 5},
        {**GOOD, "Secret": ["s3cret"]},
        {**GOOD, "Username": "user:name"},
        {**GOOD, "Username": "user\r\nX-Injected: 1"},
        {**GOOD, "Secret": "s3cret\n"},
        {**GOOD, "Secret": "s3cret\0"},
        {"username": "user", "secret": "s3cret"},
    ],
)
@on_reactor
async def test_malformed_answer_is_an_error_without_its_text(programs: Programs, answer: object) -> None:
    programs.prints(answer)
    with pytest.raises(Unavailable) as raised:
        await asking()
    assert raised.value.message == ("reg.example:5000: docker-credential-fake returned no usable Username and Secret")


@on_reactor
async def test_endless_output_is_killed(programs: Programs) -> None:
    programs.write("echo $$ > pid; exec yes")
    with pytest.raises(Unavailable, match="docker-credential-fake"):
        await asking()
    pid = await programs.running()
    await until(lambda: not alive(pid))


@on_reactor
async def test_output_of_64_kib_is_accepted(programs: Programs) -> None:
    programs.prints(json.dumps(GOOD).ljust(64 * 1024))
    assert await asking() == Password("user", "s3cret")


@on_reactor
async def test_hanging_helper_is_killed_after_30_seconds(programs: Programs) -> None:
    programs.write("echo $$ > pid; exec sleep 1000")
    machine = ReactorOnClock()
    waiting = asking(machine)
    pid = await programs.running()
    machine.clock.advance(29.9)
    assert not waiting.called
    machine.clock.advance(0.1)
    with pytest.raises(Unavailable) as raised:
        await waiting
    assert raised.value.message == "reg.example:5000: docker-credential-fake gave no answer within 30 s"
    await until(lambda: not alive(pid))
    assert machine.clock.getDelayedCalls() == []


@on_reactor
async def test_child_holding_the_output_is_a_timeout(programs: Programs) -> None:
    programs.write("sleep 1000 & echo $! > pid; exit 0")
    machine = ReactorOnClock()
    waiting = asking(machine)
    os.kill(await programs.running(), 0)
    machine.clock.advance(30)
    with pytest.raises(Unavailable, match="gave no answer within 30 s"):
        await waiting
    os.kill(await programs.running(), 9)


@on_reactor
async def test_missing_program(programs: Programs) -> None:
    with pytest.raises(Unavailable) as raised:
        await asking()
    assert raised.value.message == (
        "reg.example:5000: docker-credential-fake cannot be run: No such file or directory"
    )


@on_reactor
async def test_program_that_cannot_be_started(programs: Programs) -> None:
    programs.write("exit 0")

    class Full:
        def spawnProcess(self, *args: object, **kwargs: object) -> None:
            raise OSError(11, "Resource temporarily unavailable")

    with pytest.raises(Unavailable) as raised:
        await asking(Full())
    assert raised.value.message == (
        "reg.example:5000: docker-credential-fake cannot be run: Resource temporarily unavailable"
    )
