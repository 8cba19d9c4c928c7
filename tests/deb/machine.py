"""A Debian booted by systemd-nspawn in a folder: everything but the kernel is real, without a network."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.processes import run, wait_until

_BOOTED = ("running", "degraded")
_PATIENCE = 60
_POWER_OFF = signal.SIGRTMIN + 4  # how systemd is told to power off
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NSPAWN = (
    *("systemd-nspawn", "--quiet", "--boot", "--private-network", "--register=no", "--keep-unit"),
    *("--link-journal=no", "--resolv-conf=off", "--timezone=off", "--console=pipe"),
)


class Machine:
    """A machine with the file system `root`, unpacked from `archive`; it runs until the block ends."""

    def __init__(self, archive: Path, root: Path) -> None:
        self._archive = archive
        self.root = root
        self._container: subprocess.Popen[bytes] | None = None
        self._leader = 0
        self._name = f"oci-{os.getpid()}-{root.name}"
        # systemd-nspawn creates groups beside itself, always with the same names: two machines must not share them.
        self._groups = [hierarchy / self._name for hierarchy in _control_groups()]

    def __enter__(self) -> Self:
        """Unpack and boot the machine."""
        self.root.mkdir(parents=True)
        run(["tar", "-xf", str(self._archive), "-C", str(self.root), "--numeric-owner"])
        self.write("/etc/hosts", "127.0.0.1 localhost\n")
        self.write("/etc/machine-id", "")
        try:
            self._boot()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Power the machine off, and remove its files."""
        self._end()

    def write(self, path: str, text: str) -> None:
        """Write a file, and create its folders."""
        target = self.path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def path(self, path: str) -> Path:
        """Return our path of a file of the machine; not for its /run and /tmp, which are in its memory."""
        return self.root / path.lstrip("/")

    def argv(self, argv: Sequence[str]) -> list[str]:
        """Return the command line that runs `argv` inside, as root."""
        namespaces = ("-m", "-u", "-i", "-n", "-p", "-C")
        environment = ("env", "-i", f"PATH={_PATH}", "DEBIAN_FRONTEND=noninteractive", "LANG=C.UTF-8")
        return ["nsenter", "-t", str(self._leader), *namespaces, "--root", "--wdns=/", *environment, *argv]

    def run(self, command: str, *, check: bool = True, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a shell command inside.

        Raises:
            RuntimeError: the command failed, and `check` is set; the message has its output.
        """
        done = run(self.argv(["sh", "-c", command]), check=False, timeout=timeout)
        if check and done.returncode:
            raise RuntimeError(f"{command} gave {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    def says(self, command: str) -> str:
        """Run a command that has to succeed; return its output without the trailing newline."""
        return self.run(command).stdout.rstrip("\n")

    def is_so(self, command: str) -> bool:
        """Whether a command succeeds."""
        return self.run(command, check=False).returncode == 0

    def shows(self, unit: str, key: str) -> str:
        """Return a property of a unit."""
        return self.says(f"systemctl show --value --property {shlex.quote(key)} {shlex.quote(unit)}")

    def _boot(self) -> None:
        environment = {**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}
        console = self.root.with_name(f"{self.root.name}.console")
        for group in self._groups:
            group.mkdir()
        join = "".join(f"echo $$ >{group}/cgroup.procs; " for group in self._groups)
        argv = [*_NSPAWN, "--directory", str(self.root), "--machine", self._name]
        with console.open("wb") as log:
            self._container = subprocess.Popen(
                ["sh", "-ec", f'{join}exec "$@"', "sh", *argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        try:
            wait_until(self._is_booted, _PATIENCE, "booted")
        except TimeoutError as problem:
            raise RuntimeError(f"it does not boot:\n{console.read_text(errors='replace')}") from problem

    def _is_booted(self) -> bool:
        self._leader = self._child()
        return self._leader != 0 and self.run("systemctl is-system-running", check=False).stdout.strip() in _BOOTED

    def _child(self) -> int:
        """Return the machine's first process, 0 for none. Before, systemd-nspawn has other children."""
        assert self._container is not None
        if self._container.poll() is not None:
            raise RuntimeError(f"systemd-nspawn gave {self._container.returncode}")
        pid = self._container.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else 0

    def _end(self) -> None:
        if self._container is not None and self._container.poll() is None:
            self._signal(_POWER_OFF)
            try:
                self._container.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self._signal(signal.SIGKILL)
                self._container.wait(_PATIENCE)
        for top in self._groups:
            for group, _, _ in os.walk(top, topdown=False):
                os.rmdir(group)
        shutil.rmtree(self.root)

    def _signal(self, number: int) -> None:
        leader = self._child()
        if leader:
            os.kill(leader, number)


def _control_groups() -> Iterator[Path]:
    """Return the hierarchies of control groups that systemd uses: that of version 2, and its own of version 1."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, folder, kind, options, *_ = line.split()
        if kind == "cgroup2" or (kind == "cgroup" and "name=systemd" in options.split(",")):
            yield Path(folder)
