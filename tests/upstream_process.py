"""The scripted registry as a separate process, for example in another network namespace.

`python -m tests.upstream_process ADDRESS REPOSITORY BYTES RATE` serves `plain_image(REPOSITORY, BYTES)` by the tag 1,
its layer at RATE bytes a second. The first line of its output is its host. When its stdin ends, the second line is a
JSON list of the requests, each as `Asked`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from tests.namespaces import Namespace
from tests.processes import ROOT
from tests.real.caches import plain_image
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Drip

_PATIENCE = 60


@dataclass(frozen=True)
class Asked:
    """A request that was received."""

    method: str
    path: str
    range: str | None
    connection: int


class UpstreamProcess:
    """The registry in `process`, serving as `host`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._output = process.stdout
        self._input = process.stdin
        self.host = self._output.readline().strip()

    def end(self) -> list[Asked]:
        """End it; return the requests that it received."""
        self._input.close()
        asked = [Asked(**entry) for entry in json.loads(self._output.read())]
        if self._process.wait(_PATIENCE):
            raise RuntimeError(f"the upstream ended with {self._process.returncode}")
        return asked


@contextmanager
def upstream_in(
    namespace: Namespace, address: str, repository: str, size: int, rate: int
) -> Iterator[UpstreamProcess]:
    """Run a registry at `address` in `namespace` until the block ends."""
    argv = [sys.executable, "-m", __name__, address, repository, str(size), str(rate)]
    process = subprocess.Popen(
        namespace.argv(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    with process:
        try:
            yield UpstreamProcess(process)
        finally:
            process.kill()


def main(address: str, repository: str, size: str, rate: str) -> None:
    """Serve until stdin ends."""
    with ScriptedRegistry(address=address) as registry:
        registry.add(repository, plain_image(repository, int(size)), "1")
        registry.script("*/blobs/*", Drip(int(rate)))
        sys.stdout.write(f"{registry.host}\n")
        sys.stdout.flush()
        sys.stdin.read()
        asked = [
            Asked(request.method, request.path, request.header("Range"), request.connection)
            for request in registry.requests
        ]
    json.dump([asdict(one) for one in asked], sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
