"""Processes under test: starting, waiting, measuring and ending them."""

from __future__ import annotations

import os
import random
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from typing import Self

import yaml

from tests.client import fetch

ROOT = Path(__file__).resolve().parent.parent
_PATIENCE = 30
_TWISTD = "from twisted.scripts.twistd import run; run()"


_PORTS = range(10_000, 32_000)
"""Below those that Linux gives to clients, one of which could take the port before the server does."""


def free_port() -> int:
    """Return a port on 127.0.0.1 that is free now."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_until(predicate: Callable[[], object], timeout: float, what: str) -> None:
    """Return as soon as `predicate` is true.

    Raises:
        TimeoutError: it was not within `timeout` seconds; the message contains `what`.
    """
    deadline = time.monotonic() + timeout
    while not predicate():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout} s: {what}")
        time.sleep(0.02)


def answers(url: str) -> bool:
    """Whether a GET of this URL gives 200."""
    try:
        return fetch(url, timeout=5).status == 200
    except (OSError, HTTPException):
        return False


def run(
    argv: Sequence[str], *, check: bool = True, timeout: float = 120, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; `environment` is added to the test's own.

    Raises:
        RuntimeError: the program failed, and `check` is set; the message has its output.
    """
    added = {**os.environ, **(environment or {})}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, check=False, env=added)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(argv)} gave {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


class Server:
    """A server process with its output in a log file; subclasses define the command and when it is ready.

    As a context manager it is started on entry, and killed on exit if it still runs.
    """

    def __init__(self, argv: Sequence[str], log_path: Path, environment: Mapping[str, str] | None = None) -> None:
        self.argv = list(argv)
        self.log_path = log_path
        self.environment = {**os.environ, **(environment or {})}
        """The environment of the next start."""
        self._process: subprocess.Popen[bytes] | None = None

    def ready(self) -> bool:
        """Whether it serves."""
        raise NotImplementedError

    def start(self) -> Self:
        """Start it (again) and wait until it serves.

        Raises:
            RuntimeError: it did not become ready; the message has its log.
        """
        if self.running:
            raise RuntimeError("already running")
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env=self.environment
            )
        serves = False
        try:
            wait_until(lambda: not self.running or self.ready(), _PATIENCE, "ready")
            serves = self.running
        except TimeoutError as problem:
            raise RuntimeError(f"{self.argv} does not become ready:\n{self.log}") from problem
        finally:
            if not serves:
                self.kill()
        if not serves:
            raise RuntimeError(f"{self.argv} ended with {self.process.returncode}:\n{self.log}")
        return self

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process of the last start."""
        if self._process is None:
            raise RuntimeError("not started")
        return self._process

    @property
    def running(self) -> bool:
        """Whether there is a process that has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """Its output to stdout and stderr, over all starts."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def kill(self) -> None:
        """Send SIGKILL, and wait for the end."""
        self.process.kill()
        self.process.wait(_PATIENCE)

    def terminate(self, timeout: float = _PATIENCE) -> int:
        """Send SIGTERM, and wait for the end; return the exit code."""
        self.process.terminate()
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired as problem:
            self.kill()
            raise RuntimeError(f"{self.argv} ignored SIGTERM for {timeout} s:\n{self.log}") from problem

    def peak_memory(self) -> int:
        """Its peak memory so far, in bytes; it must still run."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
        if found is None:
            raise RuntimeError(f"{self.argv} has ended")
        return int(found[1]) * 1024

    def __enter__(self) -> Self:
        """Start it, unless it runs."""
        return self if self.running else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill it if it still runs."""
        if self.running:
            self.kill()


class Daemon(Server):
    """Our daemon, in the foreground, started as an operator would.

    `registries` maps each upstream to its scheme, or to all keys of its entry in the YAML file; `settings` are
    further keys of that file, `extra` further command line options. The store is `image_path`. Unless `extra` says
    otherwise it does not listen for the operator: daemons of several tests would meet at the default address.
    """

    def __init__(
        self,
        folder: Path,
        registries: Mapping[str, str | Mapping[str, object]] | None = None,
        *extra: str,
        settings: Mapping[str, object] | None = None,
        image_path: Path | None = None,
        port: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.port = port or free_port()
        self.host = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.host}"
        self.image_path = image_path or folder / "images"
        self.config_path = folder / f"ociregistry-{self.port}.yaml"
        entries = [
            {"name": name, **({"scheme": entry} if isinstance(entry, str) else entry)}
            for name, entry in (registries or {}).items()
        ]
        self.config_path.write_text(yaml.safe_dump({"registries": entries, **(settings or {})}))
        options = ["--image-path", str(self.image_path), "--config-path", str(self.config_path)]
        super().__init__(
            [*twistd(), *options, "--port", str(self.port), "--admin-listen", "", "--log-level", "debug", *extra],
            folder / f"ociregistry-{self.port}.log",
            {"PYTHONPATH": str(ROOT), **(environment or {})},
        )

    def ready(self) -> bool:
        """Whether its health is good."""
        return answers(f"{self.url}/health")


def twistd(*arguments: str, options: Sequence[str] = ("-n", "--pidfile=")) -> list[str]:
    """Return the command line of our plugin under twistd with its own `options`, on the Python of the tests."""
    return [sys.executable, "-c", _TWISTD, *options, "ociregistry", *arguments]


@contextmanager
def without_free_descriptors(pid: int) -> Iterator[None]:
    """Let a process open no file and no socket until the block ends."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
