"""Files of the configuration that change while the daemon runs take effect without a signal."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.client import fetch
from tests.images import Image, make_image
from tests.processes import ROOT, Daemon, free_port, run, twistd, wait_until
from tests.real.caches import error_lines
from tests.upstream import ScriptedRegistry
from tests.upstream_auth import Basic

NOTICED = 30.0
"""Seconds within which a change must have taken effect; the documented limit is ten."""


class Volume:
    """A ConfigMap or a Secret of Kubernetes, mounted as a folder: its files are exchanged by one rename of a link."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._number = 0
        folder.mkdir()

    def put(self, **files: str) -> None:
        """Exchange all files; `_` in a name stands for a dot."""
        self._number += 1
        new = self.folder / f"..2026_{self._number}"
        new.mkdir()
        for name, text in files.items():
            file = name.replace("_", ".")
            (new / file).write_text(text)
            if not (self.folder / file).is_symlink():
                (self.folder / file).symlink_to(f"..data/{file}")
        (self.folder / "..data_tmp").symlink_to(new.name)
        (self.folder / "..data_tmp").replace(self.folder / "..data")
        if self._number > 1:
            shutil.rmtree(self.folder / f"..2026_{self._number - 1}")


@pytest.fixture
def image(upstream: ScriptedRegistry) -> Image:
    """An image at the upstream, which requires a password."""
    image = make_image("changed files")
    upstream.add("team/app", image, "1")
    upstream.script("*", Basic({"user": "right"}))
    return image


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that reads its configuration in the folder `mounted`; not started yet."""
    daemon = Daemon(tmp_path)
    daemon.config_path = tmp_path / "mounted" / "ociregistry.yaml"
    daemon.argv[daemon.argv.index("--config-path") + 1] = str(daemon.config_path)
    yield daemon
    if daemon.running:
        daemon.kill()
    assert "Traceback" not in daemon.log


def status(daemon: Daemon, upstream: ScriptedRegistry, tag: str = "1") -> int:
    """Return the status of the daemon's answer."""
    return fetch(f"{daemon.url}/v2/team/app/manifests/{tag}?ns={upstream.host}").status


def wait_logged(daemon: Daemon, text: str, times: int = 1) -> None:
    """Wait until this text has been logged so often."""
    wait_until(lambda: daemon.log.count(text) >= times, NOTICED, f"{times} times {text!r} in\n{daemon.log}")


def test_config_map_and_secret(tmp_path: Path, daemon: Daemon, upstream: ScriptedRegistry, image: Image) -> None:
    """A new password, a file that is no configuration, and one that is; without a restart."""
    settings, secret = Volume(tmp_path / "mounted"), Volume(tmp_path / "secret")
    auth = {"user": "user", "password_file": str(secret.folder / "password")}
    entry = {"name": upstream.host, "scheme": "http", "auth": auth}
    settings.put(ociregistry_yaml=yaml.safe_dump({"registries": [entry]}))
    secret.put(password="wrong")
    daemon.start()
    assert status(daemon, upstream) == 404
    secret.put(password="right")
    wait_logged(daemon, "settings reloaded: 1 upstream")
    assert f"changed: {secret.folder}/password" in daemon.log
    assert status(daemon, upstream) == 200

    since = len(daemon.log)
    settings.put(ociregistry_yaml="registries: [\n")
    wait_logged(daemon, "reload failed, settings unchanged: ")
    assert status(daemon, upstream) == 200
    # So long that an error which is logged at each look would be there twice.
    secret.put(password="another")
    settings.put(ociregistry_yaml=yaml.safe_dump({"registries": [entry], "allow_upstreams": "quay.io"}))
    wait_logged(daemon, "settings reloaded", 2)
    assert status(daemon, upstream, "2") == 403
    (line,) = [line for line in error_lines(daemon, since) if "reload" in line]
    assert f"{daemon.config_path}:2: is not YAML" in line


def test_relative_path_of_a_daemon_in_the_background(tmp_path: Path) -> None:
    """It runs in another folder than the one from which it was started."""
    config, log, pid_file = tmp_path / "ociregistry.yaml", tmp_path / "log", tmp_path / "pid"
    config.write_text("")
    (tmp_path / "elsewhere").mkdir()
    options = ["--pidfile", str(pid_file), "--logfile", str(log), "--rundir", str(tmp_path / "elsewhere")]
    listen = ["--port", str(free_port()), "--admin-listen", "", "--image-path", str(tmp_path / "images")]
    run(
        twistd("--config-path", os.path.relpath(config), *listen, options=options),
        environment={"PYTHONPATH": str(ROOT)},
    )
    try:
        config.write_text("- name: quay.io\n")
        wait_until(lambda: "settings reloaded: 1 upstream" in log.read_text(), NOTICED, "the change")
    finally:
        os.kill(int(pid_file.read_text()), signal.SIGTERM)
    wait_until(lambda: not pid_file.exists(), NOTICED, "the end of the daemon")
