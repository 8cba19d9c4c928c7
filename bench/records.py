"""Measure the time from a daemon's start to its first answer, and its memory, with 10,000 records.

`python -m bench.records [--records N] [--runs N]`, as root so that the page cache can be dropped for cold runs. For
comparison on the same machine: the same daemon with an empty store, and `cat` of the same files.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import twisted
from ociregistry.manifests import OCI_INDEX, OCI_MANIFEST, Manifest
from ociregistry.names import DOCKER_HUB, Digest, ImageReference, Upstream
from ociregistry.store.records import Record
from tests import procfs
from tests.processes import ROOT, free_port, twistd

IMAGES = 4
"""Images of each index, one per platform."""

LAYERS = 10
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_PATIENCE = 120


def documents(indexes: int) -> Iterator[tuple[str, Manifest]]:
    """Yield image URLs and their manifests: for each index its images, then the index itself."""
    for number in range(indexes):
        repository = f"registry.example:5000/team-{number % 50}/service-{number}"
        images = [_image(f"{number}/{image}") for image in range(IMAGES)]
        for image in images:
            yield f"{repository}@{image.digest}", image
        entries = [
            {
                "mediaType": OCI_MANIFEST,
                "digest": image.digest,
                "size": image.size,
                "platform": {"os": "linux", "architecture": f"cpu{which}"},
            }
            for which, image in enumerate(images)
        ]
        yield f"{repository}:v1.{number}", _manifest({"manifests": entries}, OCI_INDEX)


def _image(seed: str) -> Manifest:
    names = ["config", *(f"layer {layer}" for layer in range(LAYERS))]
    config, *layers = (
        {
            "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
            "digest": Digest.of(f"{seed} {name}".encode()),
            "size": 1_000_000 + len(name),
        }
        for name in names
    )
    return _manifest({"config": config, "layers": layers, "annotations": {"seed": seed}}, OCI_MANIFEST)


def _manifest(body: dict[str, object], media_type: str) -> Manifest:
    data = json.dumps({"schemaVersion": 2, "mediaType": media_type, **body}, indent=2).encode()
    return Manifest.parse(data, media_type)


def fill(store: Path, records: int) -> tuple[int, Digest]:
    """Write that many records; return their bytes, and the digest of one."""
    now = datetime.now(UTC)
    digest, size = Digest.of(b""), 0
    for folder in ("fat", "img", "blobs"):
        (store / folder).mkdir(parents=True)
    for url, manifest in documents(records // (IMAGES + 1)):
        image = ImageReference.parse(url, Upstream(DOCKER_HUB))
        data = Record(manifest, {}).confirm(image, now).render()
        (store / ("fat" if manifest.is_list else "img") / manifest.digest.hex).write_bytes(data)
        digest, size = manifest.digest, size + len(data)
    os.sync()
    return size, digest


@dataclass
class Figures:
    """The results of all runs of one task."""

    seconds: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)


def start(store: Path, target: str) -> tuple[float, int, int]:
    """Start a daemon, request `target`, and end it: seconds to the answer; bytes of memory, current and peak."""
    port = free_port()
    began = time.perf_counter()
    options = ["--image-path", str(store), "--listen", f"tcp:{port}:interface=127.0.0.1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # Where Python is configured not to write bytecode, it would compile everything at every start.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    process = subprocess.Popen(twistd(*options), env=environment, cwd=store, stdout=subprocess.DEVNULL)
    try:
        first_answer(port, target, began, process)
        seconds = time.perf_counter() - began
        return seconds, procfs.memory(process.pid), procfs.peak_memory(process.pid)
    finally:
        process.kill()
        process.wait()


def first_answer(port: int, target: str, began: float, process: subprocess.Popen[bytes]) -> None:
    """Wait until the port is open, then for a 200."""
    while process.poll() is None and time.perf_counter() - began < _PATIENCE:
        with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), _PATIENCE) as connection:
            connection.sendall(f"GET {target} HTTP/1.1\r\nHost: bench\r\n\r\n".encode())
            answer = connection.recv(65536)
            if not answer.startswith(b"HTTP/1.1 200 "):
                raise RuntimeError(f"{target} gave {answer[:200]!r}")
            return
        time.sleep(0.001)
    raise RuntimeError("the daemon does not serve")


def cat(store: Path) -> float:
    """Return the seconds needed to read all records' files."""
    began = time.perf_counter()
    command = ["find", str(store / "fat"), str(store / "img"), "-type", "f", "-exec", "cat", "{}", "+"]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def forget() -> None:
    """Drop the page cache."""
    os.sync()
    _DROP_CACHES.write_text("3")


def measure(runs: int, tasks: dict[str, Callable[[Figures], None]], *, cold: bool) -> dict[str, Figures]:
    """Run each task that often, in turn; a first, warm run does not count."""
    figures = {name: Figures() for name in tasks}
    for number in range(runs if cold else runs + 1):
        for name, task in tasks.items():
            if cold:
                forget()
            task(figures[name] if cold or number else Figures())
    return figures


def row(name: str, values: list[float], unit: str) -> str:
    """Format a line of the table."""
    return f"| {name} | {min(values):.2f} | {median(values):.2f} | {max(values):.2f} | {unit} |"


def report(title: str, figures: dict[str, Figures], records: int) -> None:
    """Print a table and its summary."""
    print(f"\n{title}\n\n| | min | median | max | |\n|---|---|---|---|---|")
    for name, figure in figures.items():
        print(row(f"{name}: time", figure.seconds, "s"))
        for which, values in (("memory", figure.resident), ("peak", figure.peak)):
            if values:
                print(row(f"{name}: {which}", [value / 2**20 for value in values], "MiB"))
    full, empty, read = figures.values()
    took = median(full.seconds) - median(empty.seconds)
    held = (median(full.resident) - median(empty.resident)) / records
    print(
        f"\nThe records add {took:.2f} s ({took / median(read.seconds):.1f} times as long as cat takes, "
        f"{took / records * 1e6:.0f} µs each) and {held / 1024:.1f} KiB each."
    )


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-records-") as folder:
        full, empty = Path(folder, "full"), Path(folder, "empty")
        size, digest = fill(full, options.records)
        fill(empty, 0)
        target = f"/v2/team/app/manifests/{digest}?ns=registry.example:5000"

        def daemon(store: Path, path: str) -> Callable[[Figures], None]:
            def run(figures: Figures) -> None:
                seconds, resident, peak = start(store, path)
                figures.seconds.append(seconds)
                figures.resident.append(resident)
                figures.peak.append(peak)

            return run

        tasks: dict[str, Callable[[Figures], None]] = {
            "records": daemon(full, target),
            "empty store": daemon(empty, "/health"),
            "cat": lambda figures: figures.seconds.append(cat(full)),
        }
        print(
            f"{options.records} records of {size / 2**20:.1f} MiB, {LAYERS} layers an image; {options.runs} runs; "
            f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, Twisted {twisted.__version__}"
        )
        report("Warm", measure(options.runs, tasks, cold=False), options.records)
        if os.access(_DROP_CACHES, os.W_OK):
            report("Cold: the page cache dropped", measure(options.runs, tasks, cold=True), options.records)
        else:
            print("\nNo cold runs: only root can drop the page cache.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
