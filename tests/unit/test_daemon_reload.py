"""Reload: a changed file takes effect, an invalid one changes nothing."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from twisted.application import service
from twisted.internet.defer import gatherResults
from twisted.logger import ILogObserver, LogEvent, Logger, LogLevel
from twisted.scripts._twistd_unix import ServerOptions

from ociregistry.daemon import Daemon
from ociregistry.log import LevelFilter
from ociregistry.settings import LOG_LEVELS, Settings, load_settings
from ociregistry.tap import Options, makeService
from tests.certificates import Authority
from tests.images import make_image
from tests.unit.support.common import REACTOR, RecordingObserver, on_reactor, texts, until
from tests.unit.support.daemons import Daemons, get, make
from tests.unit.support.wire import Network
from tests.upstream import ScriptedRegistry

BUILT = make_image("reload")
MANIFEST = "/v2/team/app/manifests/1"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of the configuration file."""
    return tmp_path / "ociregistry.yaml"


def warnings_and_errors(events: list[LogEvent]) -> list[str]:
    """Return the warnings and errors, which must pass the filter at every level."""
    found = [event for event in events if event["log_level"] in (LogLevel.warn, LogLevel.error)]
    assert logged("error", found) == found
    return texts(found)


def logged(level: str, events: list[LogEvent]) -> list[LogEvent]:
    """Return the events that pass at a level."""
    observer = RecordingObserver()
    passes = LevelFilter(level).before(observer)
    for event in events:
        passes(event)
    return observer.events


def reload_messages(events: list[LogEvent]) -> list[str]:
    """Return the log lines of successful reloads."""
    return [text for text in texts(events, LogLevel.info) if "settings reloaded" in text]


@on_reactor
async def test_changed_registry_entry_takes_effect(
    daemons: Daemons, network: Network, events: list[LogEvent], upstream: ScriptedRegistry, path: Path
) -> None:
    upstream.add("team/app", BUILT, "1")
    path.write_text(f"- name: {upstream.host}\n  scheme: https\n")
    daemon = daemons.start("--default-ns", upstream.host, "--config-path", str(path))
    assert (await get(network, events, MANIFEST)).status == 503
    path.write_text(f"- name: {upstream.host}\n  scheme: http\n- name: quay.io\n")
    assert (await get(network, events, MANIFEST)).status == 503
    await daemon.reload()
    assert (await get(network, events, MANIFEST)).status == 200
    assert reload_messages(events) == ["settings reloaded: 2 upstreams configured"]


@on_reactor
async def test_changed_reserve_takes_effect(
    daemons: Daemons, network: Network, events: list[LogEvent], upstream: ScriptedRegistry, path: Path
) -> None:
    upstream.add("team/app", BUILT, "1")
    path.write_text("reserve: 1000TB\n")
    daemon = daemons.start("--no-complete-images", "--default-ns", upstream.host, "--config-path", str(path))
    for reserve, status in (("1000TB", 503), ("0%", 200)):
        path.write_text(f"reserve: {reserve}\n")
        await daemon.reload()
        assert (await get(network, events, f"/v2/team/app/blobs/{BUILT.layers[0].digest}")).status == status


@on_reactor
async def test_changed_allow_upstreams_takes_effect(
    daemons: Daemons, network: Network, events: list[LogEvent], upstream: ScriptedRegistry, path: Path
) -> None:
    upstream.add("team/app", BUILT, "1")
    path.write_text("allow_upstreams: quay.io\n")
    daemon = daemons.start("--no-complete-images", "--default-ns", upstream.host, "--config-path", str(path))
    for allowed, status in (("quay.io", 403), ("127.*", 200), ("quay.io", 403), ("", 200)):
        path.write_text(f"allow_upstreams: '{allowed}'\n")
        await daemon.reload()
        assert (await get(network, events, MANIFEST)).status == status
    refused = [text for text in texts(events, LogLevel.info) if ": 403 DENIED: " in text]
    assert len(refused) == 2
    assert warnings_and_errors(events) == []


@on_reactor
async def test_changed_log_level_takes_effect(root: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    application = service.Application("ociregistry")
    path.write_text("log_level: warn\n")
    daemon = make(root, "--config-path", str(path))
    daemon.setServiceParent(application)
    log = Logger(namespace="ociregistry", observer=ILogObserver(application))
    with with_threads(daemon):
        for level in ("info", "error"):
            log.info("an info before it is {next}", next=level)
            log.warn("a warning before it is {next}", next=level)
            path.write_text(f"log_level: {level}\n")
            await daemon.reload()
    log.warn("a warning in the end")
    assert [line.partition("] ")[2] for line in capsys.readouterr().out.splitlines()] == [
        "a warning before it is info",
        "an info before it is error",
        "a warning before it is error",
    ]


@pytest.mark.parametrize("text", ["port: http\n", "- name: [\n", "tls: {cert: nowhere, key: nowhere}\n", None])
@on_reactor
async def test_invalid_file_changes_nothing_and_is_one_line(
    daemons: Daemons,
    network: Network,
    events: list[LogEvent],
    upstream: ScriptedRegistry,
    path: Path,
    text: str | None,
) -> None:
    upstream.add("team/app", BUILT, "1")
    path.write_text("allow_upstreams: 127.*\n")
    daemon = daemons.start("--default-ns", upstream.host, "--config-path", str(path))
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    await daemon.reload()
    (line,) = warnings_and_errors(events)
    assert line.startswith(f"reload failed, settings unchanged: {path}:")
    assert reload_messages(events) == []
    assert (await get(network, events, MANIFEST)).status == 200
    assert (await get(network, events, "/v2/quay.io/team/app/manifests/1")).status == 403
    # A later valid file is accepted again.
    path.write_text("allow_upstreams: quay.io\n")
    await daemon.reload()
    assert (await get(network, events, MANIFEST)).status == 403


@contextmanager
def with_threads(daemon: Daemon) -> Iterator[Daemon]:
    """Let a daemon that was not started reload its settings until the block ends."""
    daemon._threads.start()
    yield daemon
    daemon._threads.end()


def unstarted(path: Path, text: str, *argv: str) -> Daemon:
    """Return a daemon with this configuration file that was not started."""
    path.write_text(text)
    options = Options()
    options.parent = ServerOptions()
    options.parseOptions(["--config-path", str(path), *argv])
    daemon = makeService(options, REACTOR)
    assert isinstance(daemon, Daemon)
    return daemon


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("image_path: elsewhere", "image_path"),
        ("port: 5000", "port"),
        ("listen: [tcp:1]", "listen"),
        ("pull_timeout: 1", "pull_timeout"),
        ("concurrent: 2", "concurrent"),
        ("log_format: json", "log_format"),
        ("platform: all", "platform"),
        ("arch: other", "platform"),
        ("os: other", "platform"),
        ("with_signatures: true", "with_signatures"),
        ("preload_images: images", "preload_images"),
        ("tls: {cert: a.crt, key: a.key}", "tls"),
        ("default_ns: quay.io\nport: 5000\ntls: {cert: a.crt, key: a.key}", "port, tls"),
    ],
)
@on_reactor
async def test_setting_that_needs_restart_is_a_warning(
    path: Path, authority: Authority, events: list[LogEvent], text: str, keys: str
) -> None:
    authority.issue("a")
    daemon = unstarted(path, "log_level: warn\n")
    path.write_text(text)
    with with_threads(daemon):
        await daemon.reload()
    assert warnings_and_errors(events) == [f"{keys}: changes take effect at the next start"]
    assert len(reload_messages(events)) == 1


@on_reactor
async def test_changed_default_upstream_takes_effect(
    daemons: Daemons, network: Network, events: list[LogEvent], upstream: ScriptedRegistry, path: Path
) -> None:
    """It may be a private one, which is reachable only because the settings name it."""
    upstream.add("team/app", BUILT, "1")
    path.write_text("default_ns: quay.io\nallow_upstreams: '127.*'\n")
    daemon = daemons.start("--config-path", str(path))
    assert (await get(network, events, MANIFEST)).status == 403
    path.write_text(f"default_ns: {upstream.host}\n")
    await daemon.reload()
    assert (await get(network, events, MANIFEST)).status == 200


@on_reactor
async def test_unchanged_settings_cause_no_warning(path: Path, authority: Authority, events: list[LogEvent]) -> None:
    authority.issue("a")
    daemon = unstarted(path, "port: 5000\nlog_level: info\ntls: {cert: a.crt, key: a.key}\n")
    authority.issue("a")
    path.write_text("log_level: error\nport: 5000\nallow_upstreams: a.b\ntls: {key: a.key, cert: a.crt}\n")
    with with_threads(daemon):
        await daemon.reload()
    assert warnings_and_errors(events) == []


@on_reactor
async def test_command_line_still_takes_precedence(path: Path, events: list[LogEvent]) -> None:
    daemon = unstarted(path, "port: 5000\n", "--port", "5001")
    path.write_text("port: 5002\n")
    with with_threads(daemon):
        await daemon.reload()
    assert warnings_and_errors(events) == []


@on_reactor
async def test_reload_without_a_file(root: Path, events: list[LogEvent]) -> None:
    with with_threads(make(root)) as daemon:
        await daemon.reload()
    assert warnings_and_errors(events) == []
    assert reload_messages(events) == ["settings reloaded: 0 upstreams configured"]


WARNED = "- name: a.b\n  tls: {ca: test-authority.crt, insecure_skip_verify: true}\n"


@on_reactor
async def test_configuration_warnings_pass_every_log_level(
    daemons: Daemons, path: Path, authority: Authority, events: list[LogEvent]
) -> None:
    path.write_text(WARNED)
    daemon = daemons.start("--config-path", str(path))
    (event,) = [event for event in events if event["log_level"] is LogLevel.warn]
    assert all(logged(level, [event]) == [event] for level in LOG_LEVELS)
    (warning,) = warnings_and_errors(events)
    assert warning.startswith(f"{path}:2: tls.ca: has no effect with insecure_skip_verify")
    path.write_text(f"\n{WARNED}")
    await daemon.reload()
    assert warnings_and_errors(events) == [warning, warning.replace(":2:", ":3:")]


@on_reactor
async def test_sighup_reloads(daemons: Daemons, path: Path, events: list[LogEvent]) -> None:
    path.write_text("")
    daemons.start("--config-path", str(path))
    assert callable(signal.getsignal(signal.SIGHUP)), "it would end the tests"
    path.write_text("- name: quay.io\n")
    os.kill(os.getpid(), signal.SIGHUP)
    await until(lambda: reload_messages(events) == ["settings reloaded: 1 upstream configured"])
    path.write_text("- name:\n")
    os.kill(os.getpid(), signal.SIGHUP)
    await until(lambda: warnings_and_errors(events))
    assert warnings_and_errors(events)[0].startswith(f"reload failed, settings unchanged: {path}:1: name: ")


@on_reactor
async def test_later_of_two_concurrent_reloads_wins(events: list[LogEvent]) -> None:
    """Each reads the file in its own thread, and the earlier one may take longer."""
    first, second = (load_settings({"port": port}, (), None) for port in ("1", "2"))
    later = threading.Event()
    loads = iter([first, second])

    def load() -> Settings:
        settings = next(loads)
        if settings is second:
            later.set()
        elif later.wait(0.2):
            time.sleep(0.1)
        return settings

    with with_threads(Daemon(first, load, REACTOR, ServerOptions())) as daemon:
        await gatherResults([daemon.reload(), daemon.reload()])
    assert daemon._network._settings is second


@pytest.mark.expect_logged_failures
@on_reactor
async def test_defect_in_a_reload_is_logged_and_does_not_block_the_next(events: list[LogEvent]) -> None:
    settings = load_settings({}, (), None)
    loads = iter([1, 0])

    def load() -> Settings:
        if next(loads):
            raise ZeroDivisionError
        return settings

    with with_threads(Daemon(settings, load, REACTOR, ServerOptions())) as daemon:
        await daemon.reload()
        assert [event["log_failure"].type for event in events if "log_failure" in event] == [ZeroDivisionError]
        assert reload_messages(events) == []
        await daemon.reload()
    assert len(reload_messages(events)) == 1


@on_reactor
async def test_reload_after_shutdown_is_ignored(daemons: Daemons, path: Path, events: list[LogEvent]) -> None:
    path.write_text("")
    daemon = daemons.start("--config-path", str(path))
    daemons.stop()
    await until(daemons.stopped)
    await daemon.reload()
    assert warnings_and_errors(events) == []
