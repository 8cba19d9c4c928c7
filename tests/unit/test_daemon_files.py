"""The daemon notices that files of its configuration have changed, and reloads as on a signal."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from twisted.internet.task import Clock
from twisted.logger import LogEvent

from ociregistry.config.files import Version, Versions
from ociregistry.config.nodes import ConfigInvalid
from ociregistry.daemon import Daemon
from ociregistry.settings import load_settings
from tests.certificates import Authority
from tests.unit.support.common import on_reactor, texts, turn, until
from tests.unit.support.daemons import Daemons

Look = Callable[[Daemon], Awaitable[None]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of the configuration file."""
    return tmp_path / "ociregistry.yaml"


@pytest.fixture
def look(clock: Clock) -> Look:
    """Return a function that lets a daemon look at its files more often than it must, and reload."""

    async def look(daemon: Daemon) -> None:
        for _ in range(4):
            clock.advance(5)
            await until(lambda: not daemon._threads.working)
            await turn()
            await until(lambda: not daemon._reloading.locked)

    return look


def reloads(events: list[LogEvent]) -> list[str]:
    """Return what was logged about reloads, and forget it."""
    found = [text for text in texts(events) if text.startswith(("settings reloaded", "reload failed", "changed: "))]
    events.clear()
    return found


def files(path: Path) -> Versions:
    """Return the files that a configuration is made of, whether it is valid or not."""
    try:
        return load_settings({}, (), path).files
    except ConfigInvalid as error:
        return error.files


def test_every_file_that_the_configuration_names_is_known(path: Path, tmp_path: Path, authority: Authority) -> None:
    """Not the list of images to preload, which is read once."""
    server, client = authority.issue("server"), authority.issue("client")
    ca = Authority(tmp_path, "other").ca
    password, preload = tmp_path / "password", tmp_path / "images"
    password.write_text("secret\n")
    preload.write_text("")
    path.write_text(
        f"preload_images: {preload}\n"
        f"tls: {{cert: {server[0].name}, key: {server[1].name}, client_ca: {authority.ca.name}}}\n"
        "registries:\n"
        f"- name: a.example\n  auth: {{user: u, password_file: {password.name}}}\n"
        f"  tls: {{ca: {ca}, cert: {client[0].name}, key: {client[1].name}}}\n"
    )
    named = [path, *server, authority.ca, password, ca, *client]
    assert files(path) == {one: Version.of(one) for one in named}
    assert load_settings({}, (), path).warnings == ()
    # Of an invalid one those that were read, and the one that could not be.
    password.unlink()
    known = files(path)
    assert (known[path], known[password]) == (Version.of(path), None)
    assert set(known) <= set(named)
    path.write_text("port: http\n")
    assert files(path) == {path: Version.of(path)}
    path.unlink()
    assert files(path) == {path: None}
    assert load_settings({}, (), None).files == {}


@on_reactor
async def test_changed_files_are_read(
    daemons: Daemons, look: Look, path: Path, tmp_path: Path, events: list[LogEvent]
) -> None:
    password = tmp_path / "password"
    password.write_text("one")
    path.write_text("- name: a.example\n  scheme: http\n  auth: {user: u, password_file: password}\n")
    daemon = daemons.start("--config-path", str(path))
    await look(daemon)
    assert reloads(events) == []
    password.write_text("another one")
    await look(daemon)
    assert reloads(events) == [f"changed: {password}", "settings reloaded: 1 upstream configured"]
    path.write_text("- name: a.example\n- name: b.example\n")
    await look(daemon)
    assert reloads(events) == [f"changed: {path}", "settings reloaded: 2 upstreams configured"]
    password.write_text("the file is not named any more")
    await look(daemon)
    assert reloads(events) == []


@on_reactor
async def test_invalid_file_is_one_error_until_it_changes(
    daemons: Daemons, look: Look, path: Path, events: list[LogEvent]
) -> None:
    path.write_text("default_ns: quay.io\n")
    daemon = daemons.start("--config-path", str(path))
    for text in ("port: http\n", "- name: [\n"):
        path.write_text(text)
        await look(daemon)
        await look(daemon)
        changed, failed = reloads(events)
        assert changed == f"changed: {path}"
        assert failed.startswith(f"reload failed, settings unchanged: {path}:")
    path.write_text("- name: a.example\n")
    await look(daemon)
    assert reloads(events) == [f"changed: {path}", "settings reloaded: 1 upstream configured"]


@on_reactor
async def test_new_configuration_may_come_before_the_files_that_it_names(
    daemons: Daemons, look: Look, path: Path, authority: Authority, events: list[LogEvent]
) -> None:
    """Each file is copied on its own, over a link that is slow."""
    path.write_text("")
    daemon = daemons.start("--config-path", str(path))
    path.write_text("- name: a.example\n  tls: {cert: late.crt, key: late.key}\n")
    await look(daemon)
    assert "late.crt cannot be read" in reloads(events)[1]
    certificate, key = authority.issue("late")
    private = key.read_bytes()
    key.unlink()
    await look(daemon)
    changed, failed = reloads(events)
    assert changed == f"changed: {certificate}"
    assert "late.key cannot be read" in failed
    key.write_bytes(private)
    await look(daemon)
    assert reloads(events) == [f"changed: {key}", "settings reloaded: 1 upstream configured"]


@on_reactor
async def test_removed_file_changes_nothing_and_is_no_error(
    daemons: Daemons, look: Look, path: Path, events: list[LogEvent]
) -> None:
    """It may be about to be replaced. A signal still asks for it to be read."""
    path.write_text("")
    daemon = daemons.start("--config-path", str(path))
    path.unlink()
    await look(daemon)
    assert reloads(events) == []
    await daemon.reload()
    assert "cannot be read" in reloads(events)[0]
    path.write_text("")
    await look(daemon)
    assert reloads(events) == [f"changed: {path}", "settings reloaded: 0 upstreams configured"]


@on_reactor
async def test_change_that_a_signal_has_read_is_not_read_again(
    daemons: Daemons, look: Look, path: Path, events: list[LogEvent]
) -> None:
    path.write_text("")
    daemon = daemons.start("--config-path", str(path))
    path.write_text("- name: a.example\n")
    await daemon.reload()
    assert len(reloads(events)) == 1
    await look(daemon)
    assert reloads(events) == []


@on_reactor
async def test_change_between_parsing_and_start_is_noticed(
    daemons: Daemons, look: Look, path: Path, events: list[LogEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_text("")
    load = Daemon.privilegedStartService

    def starts(daemon: Daemon) -> None:
        path.write_text("- name: a.example\n")
        load(daemon)

    monkeypatch.setattr(Daemon, "privilegedStartService", starts)
    await look(daemons.start("--config-path", str(path)))
    assert reloads(events) == [f"changed: {path}", "settings reloaded: 1 upstream configured"]


@on_reactor
async def test_renewed_certificate_is_read_when_both_of_its_files_are_there(
    daemons: Daemons, look: Look, path: Path, authority: Authority, events: list[LogEvent]
) -> None:
    certificate, key = authority.issue("a")
    path.write_text("tls: {cert: a.crt, key: a.key}\n")
    daemon = daemons.start("--config-path", str(path))
    old = key.read_bytes()
    authority.issue("a")
    new = key.read_bytes()
    key.write_bytes(old)
    await look(daemon)
    changed, failed = reloads(events)
    assert changed.startswith(f"changed: {certificate}")
    assert "is not the key of the certificate" in failed
    key.write_bytes(new)
    await look(daemon)
    assert reloads(events) == [f"changed: {key}", "settings reloaded: 0 upstreams configured"]
