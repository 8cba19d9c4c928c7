"""Two machines that replicate their stores, in network and mount namespaces, and an upstream that both reach."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from tests.client import Response, fetch
from tests.images import Image, digest_of
from tests.namespaces import Namespace, Routed
from tests.processes import ROOT, Daemon, answers, run, twistd
from tests.real.caches import error_lines
from tests.upstream import ScriptedRegistry

_PATIENCE = 60
# Ends with its input, so also when the tests are killed, and with it all processes and mounts of the machine.
_INIT = 'eval "$1"; echo up; exec cat'
# A process of the tests finds itself in its own /proc alone.
_VISITOR = 'mount -t proc proc /proc; exec "$@"'


class Machine:
    """A machine with processes and mounts of its own, as a context manager; the rest of the disk is the tests'."""

    def __init__(self, folder: Path, namespace: Namespace, address: str, mounts: str = "") -> None:
        """Set up a machine at `address`; `mounts` is the script that makes its mounts."""
        self.folder = folder
        self.namespace = namespace
        self.address = address
        self._mounts = mounts
        self._stack = ExitStack()
        self._init = 0

    def __enter__(self) -> Self:
        """Start it."""
        self.folder.mkdir(parents=True)
        argv = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-euc", _INIT, "sh"]
        with ExitStack() as stack:
            process = stack.enter_context(
                subprocess.Popen(
                    self.namespace.argv([*argv, self._mounts]),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(process.kill)
            assert process.stdout is not None
            if process.stdout.readline() != "up\n":
                raise RuntimeError(f"the machine in {self.folder} did not start")
            self._init = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all of its processes, and wait for that: its mounts and sockets go with them."""
        self._stack.close()

    def inside(self, argv: Sequence[str]) -> list[str]:
        """Return the command line that runs `argv` with its network and mounts; it becomes that process."""
        visitor = ["unshare", "--mount", "sh", "-euc", _VISITOR, "sh"]
        return ["nsenter", f"--target={self._init}", "--mount", "--net", *visitor, *argv]

    def run(self, *argv: str, timeout: float = _PATIENCE) -> str:
        """Run a program, with the processes of the machine alone in view; return its output.

        What it leaves behind ends with the machine.
        """
        return run(["nsenter", f"--target={self._init}", "--all", *argv], timeout=timeout).stdout

    def seen(self, path: Path) -> Path:
        """Return where the test finds what the machine has at `path`."""
        return Path(f"/proc/{self._init}/root{path}")


class Replica(Daemon):
    """The daemon of a machine, with its store at `image_path` of the machine."""

    def __init__(self, machine: Machine, upstream: ScriptedRegistry, image_path: Path) -> None:
        super().__init__(machine.folder, {upstream.host: "http"}, image_path=image_path)
        self._machine = machine
        self._upstream = upstream.host
        self.argv = machine.inside(self.argv)

    def ready(self) -> bool:
        """Whether its health is good."""
        return self._machine.namespace.call(lambda: answers(f"{self.url}/health"))

    @property
    def files(self) -> Path:
        """The store, as the test finds it."""
        return self._machine.seen(self.image_path)

    def ask(self, path: str) -> Response:
        """Request `path` below /v2/."""
        url = f"{self.url}/v2/{path}?ns={quote(self._upstream, safe='')}"
        return self._machine.namespace.call(lambda: fetch(url))

    def health(self) -> Mapping[str, Any]:
        """Return its /health."""
        document: Mapping[str, Any] = json.loads(
            self._machine.namespace.call(lambda: fetch(f"{self.url}/health")).body
        )
        return document

    def has(self, repository: str, image: Image, tag: str = "1") -> bool:
        """Request all of an image, by tag and by digest; tell whether all was served. No answer may be wrong."""
        names = {f"manifests/{tag}": image.manifest.digest}
        parts = (*(f"manifests/{image.manifest.digest}",), *(f"blobs/{blob.digest}" for blob in image.blobs))
        names |= {part: part.partition("/")[2] for part in parts}
        whole = True
        for name, digest in names.items():
            answer = self.ask(f"{repository}/{name}")
            if answer.status == 200:
                assert digest_of(answer.body) == digest, name
            whole = whole and answer.status == 200
        return whole

    def means(self, repository: str, tag: str) -> str | None:
        """Return the digest of a tag, or None where it is not served."""
        answer = self.ask(f"{repository}/manifests/{tag}")
        return answer.headers["Docker-Content-Digest"] if answer.status == 200 else None

    def holds(self, image: Image) -> bool:
        """Whether the files of an image are in the store, with their sizes."""
        record = self.files / "img" / image.manifest.digest[7:]
        blobs = {self.files / "blobs" / blob.digest[7:]: len(blob.data) for blob in image.blobs}
        try:
            return record.stat().st_size > 0 and all(path.stat().st_size == size for path, size in blobs.items())
        except OSError:
            return False

    def command(self, *words: str) -> list[str]:
        """Return the lines that a command prints; it must succeed."""
        argv = twistd(*words, "--image-path", str(self.image_path), "--config-path", str(self.config_path))
        environment = {"PYTHONPATH": str(ROOT)}
        return run(self._machine.inside(argv), environment=environment, timeout=_PATIENCE).stdout.splitlines()

    def listed(self) -> dict[str, str]:
        """Return the image URLs that `list` prints, with their digests."""
        return {row["url"]: row["digest"] for row in json.loads("\n".join(self.command("list", "--json")))}

    def failures(self) -> list[str]:
        """Return the lines of errors in its log."""
        return error_lines(self, 0)


@dataclass(frozen=True)
class Pair:
    """Two replicas, the network between them, and the upstream."""

    network: Routed
    upstream: ScriptedRegistry
    one: Replica
    two: Replica
    same: Callable[[], bool]
    """Whether what replicates the stores has nothing left to do."""

    @property
    def shared(self) -> bool:
        """Whether there is one store, not a replica on each machine."""
        return not self.one.files.parent.joinpath("syncthing").exists()

    @property
    def both(self) -> tuple[Replica, Replica]:
        """The replicas."""
        return self.one, self.two

    def agree(self) -> bool:
        """Whether both list the same, and nothing is left to replicate."""
        return self.one.listed() == self.two.listed() and self.same()

    def sent(self, image: Image) -> dict[str, float]:
        """Return how many times its size the upstream sent of each layer."""
        return {layer.digest: self.upstream.bytes_sent(layer.digest) / len(layer.data) for layer in image.layers}


@contextmanager
def machines(folder: Path, mounts: Mapping[str, str]) -> Iterator[tuple[Routed, Machine, Machine]]:
    """Start the machines `one` and `two`, with the scripts that make their mounts, until the block ends."""
    with Routed() as network, ExitStack() as stack:
        one, two = (
            stack.enter_context(Machine(folder / name, namespace, address, mounts.get(name, "")))
            for name, namespace, address in (
                ("one", network.near, Routed.NEAR),
                ("two", network.far, Routed.FAR),
            )
        )
        yield network, one, two


@contextmanager
def pair_on(
    network: Routed, one: tuple[Machine, Path], two: tuple[Machine, Path], same: Callable[[], bool]
) -> Iterator[Pair]:
    """Run an upstream, and a daemon with a store at this path on each machine, until the block ends."""
    upstream = network.router.call(lambda: ScriptedRegistry(address=Routed.GATEWAY))
    with upstream, Replica(one[0], upstream, one[1]) as first, Replica(two[0], upstream, two[1]) as second:
        yield Pair(network, upstream, first, second, same)
        for replica in (first, second):
            assert replica.running, replica.log
            assert "Traceback (most recent call last)" not in replica.log
            assert "unhandled error" not in replica.log.lower()
