"""Credential helpers: real programs, good ones, bad ones and dead ones."""

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
from tests.unit.support.doubles import REACTOR, on_reactor, until

HELPER = Helper("fake")
REG = Upstream("reg.example:5000")
GOOD = {"ServerURL": "reg.example:5000", "Username": "user", "Secret": "s3cret"}


class Machine:
    """Programs run on the real one, the time is the test's."""

    def __init__(self) -> None:
        self.clock = Clock()

    def spawnProcess(self, *args: Any, **kwargs: Any) -> Any:
        """Runs it."""
        return REACTOR.spawnProcess(*args, **kwargs)

    def callLater(self, *args: Any) -> Any:
        """Calls it when the test says so."""
        return self.clock.callLater(*args)


class Programs:
    """A folder in PATH, and what its program was told."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, script: str) -> None:
        """The helper is this shell script. It keeps its arguments; its stdin is the script's."""
        program = self._folder / HELPER.program
        program.write_text(f'#!/bin/sh\ncd "{self._folder}"\nprintf "%s\\n" "$@" > arguments\n{script}\n')
        program.chmod(0o755)

    def says(self, what: object, status: int = 0) -> None:
        """The helper says this, and keeps what it was told."""
        (self._folder / "answer").write_text(what if isinstance(what, str) else json.dumps(what))
        self.write(f"cat > stdin; cat answer; exit {status}")

    def kept(self, name: str) -> str:
        """What the helper wrote into a file."""
        return (self._folder / name).read_text()

    async def running(self) -> int:
        """The process that has written its number into a file."""
        await until(lambda: (self._folder / "pid").exists() and self.kept("pid").endswith("\n"))
        return int(self.kept("pid"))


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """No program yet."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return Programs(tmp_path)


def asking(machine: Any = REACTOR, upstream: Upstream = REG) -> Deferred[Password | IdentityToken]:
    """Asks the helper."""
    return Deferred.fromCoroutine(ask_helper(HELPER, upstream, machine))


def alive(pid: int) -> bool:
    """Whether a process is there, be it as a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@on_reactor
async def test_a_user_and_a_password(programs: Programs) -> None:
    programs.says(GOOD)
    assert await asking() == Password("user", "s3cret")
    # What it is asked for goes by its stdin: a command line can be read by everybody.
    assert programs.kept("arguments") == "get\n"
    assert programs.kept("stdin") == "reg.example:5000"


@on_reactor
async def test_a_token_in_place_of_them(programs: Programs) -> None:
    programs.says({**GOOD, "Username": "<token>"})
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
async def test_helpers_know_docker_hub_by_another_name(programs: Programs, name: str, server: str) -> None:
    programs.says(GOOD)
    await asking(upstream=Upstream.parse(name))
    assert programs.kept("stdin") == server


@on_reactor
async def test_it_has_our_environment(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Helpers of clouds need it: a region, a profile, a home."""
    monkeypatch.setenv("AWS_PROFILE", "registry")
    programs.write('printf \'{"Username": "%s", "Secret": "s"}\' "$AWS_PROFILE"')
    assert await asking() == Password("registry", "s")


@on_reactor
async def test_one_that_does_not_care_what_it_is_asked(programs: Programs) -> None:
    programs.write('exec < /dev/null; printf \'{"Username": "u", "Secret": "s"}\'')
    assert await asking() == Password("u", "s")


@on_reactor
async def test_what_it_says_beside_is_no_answer(programs: Programs) -> None:
    programs.write('echo deprecated >&2; printf \'{"Username": "u", "Secret": "s"}\'; echo later >&2')
    assert await asking() == Password("u", "s")


@on_reactor
async def test_a_helper_that_has_none_says_why(programs: Programs) -> None:
    programs.says("credentials not found in native keychain\n", status=1)
    with pytest.raises(Unavailable) as raised:
        await asking()
    assert raised.value.message == (
        "reg.example:5000: docker-credential-fake has no credentials: 'credentials not found in native keychain'"
    )


@on_reactor
async def test_what_it_says_then_is_not_taken_at_its_word(programs: Programs) -> None:
    programs.says("\x1b[31m\n2026-01-01 forged\r\n" + "x" * 10_000, status=1)
    with pytest.raises(Unavailable) as raised:
        await asking()
    assert raised.value.message.isprintable()
    assert len(raised.value.message) < 400


@on_reactor
async def test_one_that_was_killed_is_not_believed(programs: Programs) -> None:
    programs.write("printf half; kill -9 $$")
    with pytest.raises(Unavailable, match="has no credentials: 'half'"):
        await asking()


@pytest.mark.parametrize("end", ["exit 1", "kill -9 $$", "exec yes"])
@on_reactor
async def test_a_secret_that_it_gives_before_it_fails_is_told_to_nobody(programs: Programs, end: str) -> None:
    programs.write(f'printf \'{{"Username": "user", "Secret": "s3cret"}}\'; {end}')
    with pytest.raises(Unavailable) as raised:
        await asking()
    assert "s3cret" not in raised.value.message


@pytest.mark.parametrize(
    "said",
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
async def test_garbage_is_no_answer_and_is_not_repeated(programs: Programs, said: object) -> None:
    programs.says(said)
    with pytest.raises(Unavailable) as raised:
        await asking()
    assert raised.value.message == ("reg.example:5000: docker-credential-fake returned no usable Username and Secret")


@on_reactor
async def test_one_that_talks_without_end_is_killed(programs: Programs) -> None:
    programs.write("echo $$ > pid; exec yes")
    with pytest.raises(Unavailable, match="docker-credential-fake"):
        await asking()
    pid = await programs.running()
    await until(lambda: not alive(pid))


@on_reactor
async def test_sixty_four_kibibytes_may_be_said(programs: Programs) -> None:
    programs.says(json.dumps(GOOD).ljust(64 * 1024))
    assert await asking() == Password("user", "s3cret")


@on_reactor
async def test_one_that_hangs_is_killed_after_half_a_minute(programs: Programs) -> None:
    programs.write("echo $$ > pid; exec sleep 1000")
    machine = Machine()
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
async def test_so_is_one_whose_children_hold_its_output(programs: Programs) -> None:
    programs.write("sleep 1000 & echo $! > pid; exit 0")
    machine = Machine()
    waiting = asking(machine)
    os.kill(await programs.running(), 0)
    machine.clock.advance(30)
    with pytest.raises(Unavailable, match="gave no answer within 30 s"):
        await waiting
    os.kill(await programs.running(), 9)


@on_reactor
async def test_a_program_that_is_gone(programs: Programs) -> None:
    with pytest.raises(Unavailable) as raised:
        await asking()
    assert raised.value.message == (
        "reg.example:5000: docker-credential-fake cannot be run: No such file or directory"
    )


@on_reactor
async def test_a_program_that_cannot_be_started(programs: Programs) -> None:
    programs.write("exit 0")

    class Full:
        def spawnProcess(self, *args: object, **kwargs: object) -> None:
            raise OSError(11, "Resource temporarily unavailable")

    with pytest.raises(Unavailable) as raised:
        await asking(Full())
    assert raised.value.message == (
        "reg.example:5000: docker-credential-fake cannot be run: Resource temporarily unavailable"
    )
