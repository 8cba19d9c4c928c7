"""podman with all its files in a folder of its own, and containers that it runs."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from datetime import datetime
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.client import fetch
from tests.processes import free_port, run, wait_until

_PATIENCE = 60
# As the restricted profile of Kubernetes asks for, and more: nothing is writable but the volume. The limits of
# podman's own are higher than some machines permit.
_RESTRICTED = (
    *("--network", "host", "--read-only", "--read-only-tmpfs=false", "--cap-drop", "all"),
    *("--security-opt", "no-new-privileges", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"),
)


class Podman:
    """Runs podman on storage of its own; its files are removed when the block ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.storage = ("--root", str(folder / "root"), "--runroot", str(folder / "run"))
        """The options that name it, which other programs take too."""
        self._argv = ("podman", *self.storage, "--tmpdir", str(folder / "tmp"), "--cgroup-manager", "cgroupfs")
        # Locks in memory would be shared with another podman on this machine.
        settings = folder / "containers.conf"
        settings.write_text('[engine]\nlock_type = "file"\nevents_logger = "file"\n')
        self._environment = {"CONTAINERS_CONF": str(settings)}

    def __call__(self, *arguments: str, timeout: float = 120) -> str:
        """Run a command; return its output without the newline at its end.

        Raises:
            RuntimeError: it failed.
        """
        return self.run(*arguments, timeout=timeout).stdout.rstrip("\n")

    def run(self, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command; return what it wrote.

        Raises:
            RuntimeError: it failed.
        """
        return run([*self._argv, *arguments], timeout=timeout, environment=self._environment)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove all containers, and what is mounted for them; the images are files in the folder."""
        self("rm", "--all", "--force", "--time", "0")
        shutil.rmtree(self._folder)


class Container:
    """The daemon in a container without privileges, on loopback, until the block ends."""

    def __init__(self, podman: Podman, image: str, *options: str, arguments: Sequence[str] = ()) -> None:
        self.port = free_port()
        self.host = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.host}"
        listening = ("--port", str(self.port), "--admin-listen", "", "--log-level", "info")
        self._podman = podman
        self._argv = ["run", "--detach", *_RESTRICTED, *options, image, *listening, *arguments]
        self._id = ""

    def __enter__(self) -> Self:
        """Start it, and wait until it is ready."""
        self._id = self._podman(*self._argv)
        wait_until(lambda: not self.state["Running"] or self._ready(), _PATIENCE, "the container is ready")
        if not self.state["Running"]:
            raise RuntimeError(f"it ended: {self.log}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove it, but not its volumes."""
        self._podman("rm", "--force", "--time", "0", self._id)

    @property
    def state(self) -> dict[str, Any]:
        """What podman tells of its process."""
        (found,) = json.loads(self._podman("container", "inspect", self._id))
        state: dict[str, Any] = found["State"]
        return state

    @property
    def log(self) -> str:
        """Its output."""
        done = self._podman.run("logs", self._id)
        return done.stdout + done.stderr

    @property
    def started(self) -> datetime:
        """When its process was started."""
        # Python reads microseconds, podman writes nanoseconds.
        text = self.state["StartedAt"]
        return datetime.fromisoformat(f"{text[:26]}{text[-6:]}" if text[-6] in "+-" else f"{text[:26]}+00:00")

    def exec(self, *argv: str) -> str:
        """Run a program beside it, in the container; return its output."""
        return self._podman("exec", self._id, *argv)

    def stop(self) -> int:
        """Send SIGTERM, and wait for the end; return the exit status, 137 if it had to be killed."""
        self._podman("stop", "--time", str(_PATIENCE), self._id)
        return int(self.state["ExitCode"])

    def _ready(self) -> bool:
        try:
            return fetch(f"{self.url}/readyz", timeout=5).status == 200
        except (OSError, HTTPException):
            return False
