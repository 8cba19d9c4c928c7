"""The bad link as a separate process, for tests and benchmarks that block."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from types import TracebackType
from typing import Any, Self

from tests.badlink import Counts
from tests.processes import ROOT

_PATIENCE = 30


class LinkProcess:
    """Runs the bad link in front of a server: `with LinkProcess("127.0.0.1:5000", "--rate", "10Mbit") as link:`.

    Clients connect to `link.host`. `link.tell(down=True)` sends a command of tests/badlink.py. After the block
    `counts` are final.
    """

    def __init__(self, target: str, *options: str) -> None:
        self._argv = [sys.executable, "-m", "tests.badlink", *options, target]
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._counts = Counts()
        self.host = ""
        self.port = 0

    def __enter__(self) -> Self:
        """Start the process; it listens, unless it refuses."""
        self._process = subprocess.Popen(
            self._argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        where = self._read()
        self.host, self.port = where["host"], where["port"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process."""
        assert self._process is not None
        with self._process as process:
            try:
                assert process.stdin is not None
                process.stdin.close()
                self._counts = Counts(**self._read())
                process.wait(_PATIENCE)
            finally:
                process.kill()
        self._process = None

    def tell(self, **command: Any) -> Counts:
        """Send a command; return the counts after it was executed."""
        with self._lock:
            if self._process is None:
                raise RuntimeError("the link does not run")
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            answer = self._read()
        if "error" in answer:
            raise ValueError(answer["error"])
        return Counts(**answer)

    @property
    def counts(self) -> Counts:
        """The counts so far."""
        return self._counts if self._process is None else self.tell(count=True)

    def _read(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the link ended: {self._argv}")
        answer: dict[str, Any] = json.loads(line)
        return answer
