"""SIGHUP: the configuration is reread while the daemon serves."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from tests.client import fetch
from tests.images import Image, make_image
from tests.processes import Daemon, wait_until
from tests.real.caches import SOON, error_lines, scripted
from tests.upstream import ScriptedRegistry
from tests.upstream_auth import Basic
from tests.upstream_rules import Hold

StartDaemon = Callable[..., Daemon]


@pytest.fixture
def image(upstream: ScriptedRegistry) -> Image:
    """An image at the upstream, which requires a password."""
    image = make_image("reload", layer_size=200_000)
    upstream.add("team/app", image, "1")
    upstream.script("*", Basic({"user": "right"}))
    return image


def entry(password: str) -> dict[str, object]:
    """Return the upstream's entry."""
    return {"scheme": "http", "auth": {"user": "user", "password": password}}


def hang_up(daemon: Daemon, config: object, logged: str) -> None:
    """Write the configuration, send SIGHUP, and wait for this line in the log."""
    since = len(daemon.log)
    text = config if isinstance(config, str) else yaml.safe_dump(config)
    daemon.config_path.write_text(text)
    os.kill(daemon.process.pid, signal.SIGHUP)
    wait_until(lambda: logged in daemon.log[since:], SOON, logged)


def status(daemon: Daemon, upstream: ScriptedRegistry, path: str = "manifests/1") -> int:
    """Return the status of the daemon's answer."""
    return fetch(f"{daemon.url}/v2/team/app/{path}?ns={upstream.host}").status


def test_reload_applies_a_changed_entry(upstream: ScriptedRegistry, start_daemon: StartDaemon, image: Image) -> None:
    daemon = start_daemon({upstream.host: entry("wrong")}, "--log-level", "error")
    assert status(daemon, upstream) == 404
    registries = [{"name": upstream.host, **entry("right")}]
    hang_up(daemon, {"registries": registries}, "settings reloaded: 1 upstream")
    assert status(daemon, upstream) == 200
    for blob in image.blobs:
        assert status(daemon, upstream, f"blobs/{blob.digest}") == 200
    hang_up(daemon, {"registries": registries, "allow_upstreams": "quay.io"}, "settings reloaded")
    assert status(daemon, upstream) == 403


def test_reload_of_an_invalid_file_changes_nothing(
    upstream: ScriptedRegistry, start_daemon: StartDaemon, image: Image
) -> None:
    daemon = start_daemon({upstream.host: entry("right")})
    for text, why in (
        (f"- name: {upstream.host}\n  auth: {{user: u}}\n", ":2: auth.user: "),
        ("registries: [\n", ":2: is not YAML"),
        ("- name: a.example\n  tls: {cert: missing.crt, key: missing.key}\n", ":2: tls.cert: "),
    ):
        since = len(daemon.log)
        hang_up(daemon, text, "reload failed, settings unchanged")
        (line,) = error_lines(daemon, since)
        assert f"{daemon.config_path}{why}" in line
    daemon.config_path.unlink()
    os.kill(daemon.process.pid, signal.SIGHUP)
    wait_until(lambda: "cannot be read" in daemon.log, SOON, "the refusal")
    assert status(daemon, upstream) == 200


def test_reload_does_not_disturb_an_answer_in_flight(
    upstream: ScriptedRegistry, start_daemon: StartDaemon, image: Image
) -> None:
    daemon = start_daemon({upstream.host: entry("right")})
    layer = image.layers[0]
    hold = Hold(50_000)
    with scripted(upstream, "*/blobs/*", hold), ThreadPoolExecutor(1) as client:
        asked = client.submit(fetch, f"{daemon.url}/v2/team/app/blobs/{layer.digest}?ns={upstream.host}")
        assert hold.reached.wait(SOON)
        hang_up(daemon, {"pull_timeout": 5000, "registries": []}, "take effect at the next start")
        hold.release.set()
        assert asked.result(SOON).body == layer.data
    # Its name is no longer in the configuration.
    assert status(daemon, upstream, "manifests/other") == 403


def test_reload_without_a_file_is_harmless(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    del daemon.argv[daemon.argv.index("--config-path") : daemon.argv.index("--config-path") + 2]
    daemon.terminate()
    daemon.start()
    os.kill(daemon.process.pid, signal.SIGHUP)
    wait_until(lambda: "settings reloaded" in daemon.log, SOON, "the reload is logged")
    assert fetch(f"{daemon.url}/health").status == 200
