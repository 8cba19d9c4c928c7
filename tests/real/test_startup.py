"""Starting the daemon: its command line, readiness, and errors."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from ociregistry import __version__
from tests.client import fetch
from tests.images import make_image
from tests.processes import ROOT, Daemon, free_port, twistd, wait_until
from tests.upstream import ScriptedRegistry

_SOON = 10.0
_PATIENCE = 20
_DAEMONIZE = ("--pidfile", "twistd.pid", "--logfile", "twistd.log")


@pytest.fixture
def empty_folder(tmp_path: Path) -> Path:
    """An empty folder to start processes in, where they would leave pid and log files."""
    empty_folder = tmp_path / "empty"
    empty_folder.mkdir()
    return empty_folder


def _ended(empty_folder: Path, argv: list[str]) -> subprocess.CompletedProcess[str]:
    """Return exit status, output and files of a process that ends by itself."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        argv,
        check=False,
        cwd=empty_folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
    )


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port on which another process listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_taken_port_exits_with_1(empty_folder: Path, taken_port: int) -> None:
    """Exit status 1, and one line that names the port."""
    done = _ended(empty_folder, twistd("--image-path", "images", "--port", str(taken_port), options=["-n"]))
    assert done.returncode == 1
    assert re.fullmatch(rf"ociregistry: .*\b{taken_port}\b.*\n", done.stderr)
    assert "Traceback" not in done.stdout
    assert not (empty_folder / "twistd.pid").exists()


def test_taken_port_exits_with_1_in_the_background(empty_folder: Path, taken_port: int) -> None:
    """The parent process reports it, and no process is left."""
    with closing(_Background(empty_folder)) as background:
        done = _ended(empty_folder, twistd("--image-path", "images", "--port", str(taken_port), options=_DAEMONIZE))
        assert done.returncode == 1
        assert str(taken_port) in done.stderr
        # It reports the error before it has cleaned up.
        wait_until(lambda: not background.pid_file.exists(), _SOON, "no pid file")


def test_store_that_cannot_be_created_exits_with_1(empty_folder: Path) -> None:
    """Exit status 1, and one line that names the folder."""
    file = empty_folder / "file"
    file.touch()
    folder = file / "images"
    done = _ended(empty_folder, twistd("--image-path", str(folder), "--port", str(free_port())))
    assert done.returncode == 1
    assert re.fullmatch(rf"ociregistry: .*{re.escape(str(folder))}.*\n", done.stderr)
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ("--frobnicate", "--frobnicate"),
        ("--port", "--port"),
        ("--port abc", "--port"),
        ("serve --port=0", "--port"),
        ("--log-level loud", "--log-level"),
        ("--default-ns https://docker.io/", "--default-ns"),
        ("--dry-run", "--dry-run"),
        ("serve --load-images", "--load-images"),
        ("load", "load"),
        ("frobnicate", "frobnicate"),
        ("serve --config-path missing.yaml", "missing.yaml"),
    ],
)
def test_usage_error_exits_with_2(empty_folder: Path, arguments: str, wrong: str) -> None:
    """Exit status 2 and one line that names the mistake; nothing is written, no daemon starts."""
    done = _ended(empty_folder, twistd(*arguments.split(), options=()))
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(rf"ociregistry: .*{wrong}\b.*\n", done.stderr)
    assert list(empty_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("port: 8080\nlog_levl: debug\n", 2, "log_levl"),
        ("log_level: info\nport: abc\n", 2, "port"),
        ("registries:\n  - name: a.example\n    scheme: ftp\n", 3, "scheme"),
        ("- name: a.example\n  auth:\n    user: u\n    password: p\n    password_env: P\n", 5, "auth.password_env"),
        ("- name: a.example\n  tls:\n    ca: missing.crt\n", 3, "tls.ca"),
        ("port: 8080\nverify: {max_rate: 7MB}\n", 2, "verify.every"),
    ],
    ids=["unknown key", "wrong type", "wrong value", "too much", "unreadable file", "a key that is missing"],
)
def test_invalid_configuration_exits_with_2(empty_folder: Path, text: str, line: int, key: str) -> None:
    """Exit status 2 and one line with file, line and key."""
    path = empty_folder / "ociregistry.yaml"
    path.write_text(text)
    done = _ended(empty_folder, twistd("--config-path", str(path), options=()))
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(rf"ociregistry: {re.escape(str(path))}:{line}: {key}: .+\n", done.stderr)
    assert list(empty_folder.iterdir()) == [path]


@pytest.mark.parametrize("arguments", ["--version", "serve --version"])
def test_version_is_printed(empty_folder: Path, arguments: str) -> None:
    """Our version, not twistd's."""
    done = _ended(empty_folder, twistd(*arguments.split(), options=()))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"ociregistry {__version__}\n", "")
    assert list(empty_folder.iterdir()) == []


def test_serve_command_is_optional(upstream: ScriptedRegistry, start_daemon: Callable[..., Daemon]) -> None:
    """Options are accepted before and after it."""
    image = make_image("process")
    upstream.add("team/app", image, "v1")
    daemon = start_daemon({upstream.host: "http"}, "serve", "--default-ns", upstream.host)
    assert fetch(f"{daemon.url}/v2/team/app/manifests/v1").body == image.manifest.data
    assert (daemon.image_path / "img" / image.manifest.digest.removeprefix("sha256:")).exists()


# What is imported

_OF_COMMANDS = {"ociregistry.archives", "tarfile", "tqdm", "zstandard"}
_OF_THE_DAEMON = {"ociregistry.daemon", "ociregistry.web", "twisted.web.server"}


def _imported(stderr: str) -> set[str]:
    """Return the modules that a process imported, from what `python -X importtime` prints."""
    return {line.split("|")[2].strip() for line in stderr.splitlines() if line.startswith("import time:")}


def test_daemon_imports_nothing_that_only_commands_need(empty_folder: Path) -> None:
    """Imports are most of the time from the start to the first answer."""
    port = free_port()
    _python, *arguments = twistd("--image-path", "images", "--port", str(port))
    errors = empty_folder / "errors"
    with errors.open("wb") as stderr:
        daemon = subprocess.Popen(
            [sys.executable, "-X", "importtime", *arguments],
            cwd=empty_folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
    try:
        wait_until(lambda: _answers(port), _PATIENCE, "an answer")
    finally:
        daemon.terminate()
        daemon.wait(_PATIENCE)
    imported = _imported(errors.read_text())
    assert imported >= _OF_THE_DAEMON
    assert not imported & _OF_COMMANDS
    # The first scrape imports it.
    assert "prometheus_client" not in imported


def test_command_imports_nothing_that_only_the_daemon_needs(empty_folder: Path) -> None:
    """`list`, which people run often, starts sooner for it."""
    python, *arguments = twistd("--image-path", "images", "list")
    (empty_folder / "images").mkdir()
    done = _ended(empty_folder, [python, "-X", "importtime", *arguments])
    imported = _imported(done.stderr)
    assert "ociregistry.store.snapshot" in imported
    assert not imported & _OF_THE_DAEMON


def _answers(port: int) -> bool:
    with suppress(OSError):
        return fetch(f"http://127.0.0.1:{port}/health").status == 200
    return False


# In the background


class _Background:
    """The daemon that twistd leaves running in `folder`; `close` ends it."""

    def __init__(self, empty_folder: Path) -> None:
        self._place = empty_folder
        self.pid_file = empty_folder / "twistd.pid"
        self.pid = 0

    @property
    def running(self) -> bool:
        """Whether the process exists, and is no zombie."""
        if self.pid_file.exists():
            self.pid = int(self.pid_file.read_text())
        process = Path(f"/proc/{self.pid}")
        with suppress(FileNotFoundError, ProcessLookupError):
            ours = (process / "cwd").resolve(strict=True) == self._place
            return ours and "State:\tZ" not in (process / "status").read_text()
        return False

    def close(self) -> None:
        """Send SIGKILL, if it still exists."""
        if self.running:
            os.kill(self.pid, signal.SIGKILL)


def test_background_daemon_writes_and_removes_its_pid_file(empty_folder: Path) -> None:
    """twistd returns when the port is open; SIGTERM to the pid in its file ends the daemon and removes the file."""
    port = free_port()
    with closing(_Background(empty_folder)) as background:
        done = _ended(empty_folder, twistd("--image-path", "images", "--port", str(port), options=_DAEMONIZE))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert background.running
        assert fetch(f"http://127.0.0.1:{port}/health").status == 200
        os.kill(background.pid, signal.SIGTERM)
        wait_until(lambda: not background.running, _SOON, "the end of the daemon")
        assert not background.pid_file.exists()
    assert f"store {empty_folder / 'images'} with 0 lists and 0 images" in (empty_folder / "twistd.log").read_text()
