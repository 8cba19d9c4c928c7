"""A machine on which the documentation's commands are typed literally.

Its network is a namespace with registries under the Internet's names, on port 443 with certificates that it trusts;
its /etc and /var/lib are folders of the test.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGTERM
from typing import IO, Any

import yaml

from tests.certificates import Authority
from tests.client import fetch
from tests.images import Image, Index
from tests.namespaces import Namespace
from tests.peers import DockerRegistry
from tests.processes import ROOT, answers
from tests.secure_peers import SecureRegistry, ServerTls

URL = "http://localhost:8080"
_WORLD = "10.77.9.1"  # Not a loopback address: `ns` alone may not lead there.
_NAMES = ("registry-1.docker.io", "quay.io", "registry.k8s.io", "registry.internal")
_PLATFORM = "linux/amd64"
_PATIENCE = 60

_PROGRAMS = {
    "python": 'exec "$PYTHON" "$@"',
    "twistd": 'exec "$PYTHON" -c "from twisted.scripts.twistd import run; run()" "$@"',
    "ociregistry": 'exec "$PYTHON" -c "from ociregistry.script import main; main()" "$@"',
    # As ssh does: pass the command to a shell, on a machine with a separate store.
    "ssh": 'shift; exec unshare --mount sh -euc "mount --bind $OTHER /var/lib/ociregistry; $*"',
}
_MOUNTS = """
mount --bind "$1/etc" /etc
mount --bind "$1/var-lib" /var/lib
mount --bind "$1/authorities" /usr/local/share/ca-certificates
shift
exec "$@"
"""


def _platforms(image: Image | Index) -> set[str]:
    return {one.platform for one in (image.images if isinstance(image, Index) else (image,))}


class Internet(SecureRegistry):
    """The registries of the Internet, inside the namespace: one server with the images of all of them."""

    def __init__(self, namespace: Namespace, folder: Path, storage: Path, tls: ServerTls) -> None:
        super().__init__(folder, storage, _WORLD, tls=tls)
        self.argv = namespace.argv(self.argv)
        self._namespace = namespace

    def ready(self) -> bool:
        """Whether it speaks TLS."""
        return self._namespace.call(super().ready)


class Running:
    """A running program, with its output in a file."""

    def __init__(self, process: subprocess.Popen[str], output: Path) -> None:
        self._process, self._output = process, output

    @property
    def printed(self) -> str:
        """Return its output so far."""
        return self._output.read_text()

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def type(self, text: str) -> None:
        """Write to its stdin."""
        stdin: IO[str] | None = self._process.stdin
        assert stdin is not None
        stdin.write(text)
        stdin.flush()

    def end(self) -> None:
        """Send SIGTERM to it and its children, and wait for the end."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, SIGTERM)
        self._process.communicate(timeout=_PATIENCE)


class Machine:
    """A machine, as a context manager; commands are typed in the folder `home`."""

    def __init__(self, folder: Path, namespace: Namespace, images: Mapping[str, Image | Index]) -> None:
        self._folder, self._namespace, self._images = folder, namespace, images
        self.home = folder / "home"
        self.store = folder / "var-lib" / "ociregistry"
        self.other = folder / "other"
        self.etc = folder / "etc"
        self.environment: dict[str, str] = {}
        self._number = 0

    def set_up(self) -> None:
        """Create its programs and its configuration."""
        programs = self._folder / "bin"
        programs.mkdir()
        for name, line in _PROGRAMS.items():
            (programs / name).write_text(f"#!/bin/sh\n{line}\n")
            (programs / name).chmod(0o755)
        shutil.copytree("/etc", self.etc, symlinks=True)
        (self.etc / "hosts").write_text(f"127.0.0.1 localhost\n{_WORLD} {' '.join(_NAMES)}\n")
        (self.etc / "resolv.conf").unlink(missing_ok=True)
        (self.etc / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
        (self.etc / "ociregistry").mkdir(exist_ok=True)
        shutil.copy(ROOT / "etc" / "ociregistry.yaml", self.etc / "ociregistry")
        self.wipe()

    def wipe(self) -> None:
        """Reset it to an unused machine."""
        for path in (self.home, self.store, self.other, self.etc / "containerd"):
            shutil.rmtree(path, ignore_errors=True)
        for path in (self.home / "venv" / "bin", self.store, self.other):
            path.mkdir(parents=True)
        shutil.copy(self._folder / "bin" / "ociregistry", self.home / "venv" / "bin")
        here = [url for url, image in self._images.items() if _PLATFORM in _platforms(image)]
        (self.home / "imagelist").write_text("".join(f"{url}\n" for url in here))
        self.environment.clear()

    @contextmanager
    def registries(self) -> Iterator[None]:
        """Run the registries of the Internet, trusted by the machine, until the block ends."""
        with DockerRegistry(self._folder / "pushing") as registry:
            for url, image in self._images.items():
                name, _, tag = url.partition("/")[2].rpartition(":")
                registry.push(name, image, tag)
        authority = Authority(self._folder / "authority")
        (self._folder / "authorities").mkdir()
        shutil.copy(authority.ca, self._folder / "authorities")
        (self._folder / "hooks").mkdir()
        self.done(f"update-ca-certificates --fresh --hooksdir {self._folder}/hooks")
        self._namespace.ip("address", "add", f"{_WORLD}/32", "dev", "lo")
        tls = ServerTls(*authority.issue(*_NAMES))
        with Internet(self._namespace, self._folder / "world", registry.storage, tls):
            yield

    def inside(self, argv: Sequence[str]) -> list[str]:
        """Return the command line that runs `argv` on the machine."""
        return self._namespace.argv(["sh", "-euc", _MOUNTS, "sh", str(self._folder), *argv])

    def _environ(self) -> dict[str, str]:
        own = {
            "HOME": str(self.home),
            "OTHER": str(self.other),
            "PATH": f"{self._folder}/bin:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            # Output appears at once, also in a file.
            "PYTHONUNBUFFERED": "1",
        }
        return {**os.environ, **own, **self.environment}

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run a script to its end."""
        return subprocess.run(
            self.inside(["bash", "-euc", script]),
            check=False,
            cwd=self.home,
            env=self._environ(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
        )

    def done(self, script: str) -> str:
        """Run a script, which must succeed; return its output."""
        ended = self.run(script)
        assert ended.returncode == 0, ended
        return ended.stdout

    def start(self, script: str) -> Running:
        """Start a script that does not end, in a separate terminal."""
        self._number += 1
        output = self._folder / f"terminal-{self._number}"
        with output.open("w") as file:
            process = subprocess.Popen(
                self.inside(["bash", "-euc", script]),
                cwd=self.home,
                env=self._environ(),
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                text=True,
                start_new_session=True,
            )
        return Running(process, output)

    def serves(self) -> bool:
        """Whether the started daemon answers."""
        return self._namespace.call(lambda: answers(f"{URL}/health"))

    def health(self) -> dict[str, Any]:
        """Return the daemon's /health."""
        document = yaml.safe_load(self._namespace.call(lambda: fetch(f"{URL}/health").body))
        assert isinstance(document, dict)
        return document
