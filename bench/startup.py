"""Measure the start of the daemon with an empty store, beside `twistd web`, which only serves files.

`python -m bench.startup [--rounds N] [--other CHECKOUT]`. Each start lasts from the creation of the process to the
first answer. `--other` adds the daemon of another checkout. The table gives wall and CPU time, in seconds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median

from tests.client import fetch
from tests.processes import ROOT, free_port, twistd

_LONGEST = 60.0
"""Seconds after which a start has failed."""


def started(arguments: Sequence[str], checkout: Path, port: int) -> tuple[float, float]:
    """Start a process, wait until it answers on `port`, end it; return the wall and the CPU time until then."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        process = subprocess.Popen(
            arguments,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(checkout)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while time.monotonic() < began + _LONGEST:
                with suppress(OSError):
                    fetch(f"http://127.0.0.1:{port}/")
                    return time.monotonic() - began, _cpu_time(process.pid)
                time.sleep(0.002)
            raise RuntimeError(f"{checkout}: no answer within {_LONGEST:.0f} s")
        finally:
            process.terminate()
            process.wait()


def _cpu_time(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--other", type=Path, help="another checkout")
    options = parser.parse_args()
    checkouts = [ROOT, *([options.other.resolve()] if options.other else [])]
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(options.rounds):
        for checkout in checkouts:
            port = free_port()
            arguments = twistd("--image-path", "images", "--port", str(port))
            found.setdefault(f"ociregistry in {checkout.name}", []).append(started(arguments, checkout, port))
        port = free_port()
        web = [sys.executable, "-m", "twisted", "web", "--listen", f"tcp:{port}", "--path", "."]
        found.setdefault("twistd web", []).append(started(web, ROOT, port))
    print("| process | wall, median | wall, least | CPU, median | CPU, least |\n|---|---|---|---|---|")
    for what, times in found.items():
        columns = [f"{function(values):.2f}" for values in zip(*times, strict=True) for function in (median, min)]
        print(f"| {what} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
