"""Measure what 10,000 records cost: the daemon's start, its memory, its scans while idle, and the commands.

`python -m bench.records [--records N] [--runs N]`, as root so that the page cache can be dropped for cold runs. For
comparison on the same machine: the same with an empty store, and `cat` of the same files.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
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
"""Images of each index. The first is wanted and whole; the others are metadata, and only their configs are there."""

LAYERS = 10
_SETTLE, _IDLE = 3.0, 5.0
"""Seconds in which a daemon comes to rest, and for which it is then watched; it scans its store every second."""
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_PATIENCE = 120


def documents(indexes: int) -> Iterator[tuple[str, Manifest, bool | None]]:
    """Yield image URLs, their manifests, and whether these are wanted: the images of each index, then the index."""
    for number in range(indexes):
        repository = f"registry.example:5000/team-{number % 50}/service-{number}"
        images = [_image(f"{number}/{image}") for image in range(IMAGES)]
        for which, image in enumerate(images):
            yield f"{repository}@{image.digest}", image, which == 0
        entries = [
            {
                "mediaType": OCI_MANIFEST,
                "digest": image.digest,
                "size": image.size,
                "platform": {"os": "linux", "architecture": f"cpu{which}"},
            }
            for which, image in enumerate(images)
        ]
        yield f"{repository}:v1.{number}", _manifest({"manifests": entries}, OCI_INDEX), None


def _image(seed: str) -> Manifest:
    names = ["config", *(f"layer {layer}" for layer in range(LAYERS))]
    config, *layers = (
        {
            "mediaType": f"application/vnd.oci.image.{'layer.v1.tar+gzip' if number else 'config.v1+json'}",
            "digest": Digest.of(f"{seed} {name}".encode()),
            "size": 1_000_000 + len(name),
        }
        for number, name in enumerate(names)
    )
    return _manifest({"config": config, "layers": layers, "annotations": {"seed": seed}}, OCI_MANIFEST)


def _manifest(body: dict[str, object], media_type: str) -> Manifest:
    data = json.dumps({"schemaVersion": 2, "mediaType": media_type, **body}, indent=2).encode()
    return Manifest.parse(data, media_type)


def fill(store: Path, records: int) -> tuple[int, Digest]:
    """Write that many records, and blobs without content; return the records' bytes, and the digest of one."""
    now = datetime.now(UTC)
    digest, size = Digest.of(b""), 0
    for folder in ("fat", "img", "blobs"):
        (store / folder).mkdir(parents=True)
    for url, manifest, wanted in documents(records // (IMAGES + 1)):
        image = ImageReference.parse(url, Upstream(DOCKER_HUB))
        data = Record(manifest, {}, wanted).confirm(image, now).render()
        (store / ("fat" if manifest.is_list else "img") / manifest.digest.hex).write_bytes(data)
        for blob in manifest.blobs if wanted else manifest.blobs[:1]:
            with (store / "blobs" / blob.digest.hex).open("wb") as file:
                file.truncate(blob.size)
        digest, size = manifest.digest, size + len(data)
    os.sync()
    return size, digest


Figures = Mapping[str, float]
"""What one run was measured to take: see `UNITS`."""

UNITS = {"time": "s", "processor": "s", "memory": "MiB", "peak": "MiB", "idle": "ms a second"}
"""`processor` is the processor's time, which other work on the machine disturbs less; `idle` too, once at rest."""


def _environment() -> dict[str, str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # Where Python is configured not to write bytecode, it would compile everything at every start.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


def start(store: Path, target: str, *, idle: bool) -> Figures:
    """Start a daemon, request `target`, watch it while it is `idle`, and end it."""
    port = free_port()
    began = time.perf_counter()
    options = ["--image-path", str(store), "--listen", f"tcp:{port}:interface=127.0.0.1"]
    process = subprocess.Popen(twistd(*options), env=_environment(), cwd=store, stdout=subprocess.DEVNULL)
    try:
        first_answer(port, target, began, process)
        figures = {"time": time.perf_counter() - began, "processor": procfs.processor_time(process.pid)}
        if idle:
            time.sleep(_SETTLE)
            before = procfs.processor_time(process.pid)
            time.sleep(_IDLE)
            figures["memory"] = procfs.memory(process.pid) / 2**20
            figures["peak"] = procfs.peak_memory(process.pid) / 2**20
            figures["idle"] = (procfs.processor_time(process.pid) - before) / _IDLE * 1000
        return figures
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


def run(*command: str, cwd: Path) -> Figures:
    """Run a command to its end."""
    began = time.perf_counter()
    process = subprocess.Popen(command, env=_environment(), cwd=cwd, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command[-1]} ended with {process.returncode}")
    return {
        "time": time.perf_counter() - began,
        "processor": usage.ru_utime + usage.ru_stime,
        "peak": usage.ru_maxrss / 1024,
    }


def cat(store: Path) -> Figures:
    """Read all records' files."""
    folders = str(store / "fat"), str(store / "img")
    return run("find", *folders, "-type", "f", "-exec", "cat", "{}", "+", cwd=store)


def forget() -> None:
    """Drop the page cache."""
    os.sync()
    _DROP_CACHES.write_text("3")


Task = Callable[[], Figures]


def measure(runs: int, tasks: Mapping[str, Task], *, cold: bool) -> Mapping[str, Mapping[str, list[float]]]:
    """Run each task that often, in turn, and return its figures; a first, warm run does not count."""
    measured: dict[str, dict[str, list[float]]] = {name: {} for name in tasks}
    for number in range(runs if cold else runs + 1):
        for name, task in tasks.items():
            if cold:
                forget()
            figures = task()
            for what, value in figures.items() if cold or number else ():
                measured[name].setdefault(what, []).append(value)
    return measured


COMMANDS = {
    "list": ["list"],
    "list --long": ["list", "--long"],
    "prune of nothing": ["prune", "--unused-for", "300d", "--dry-run"],
    "prune of all": ["prune", "--pattern", ".", "--dry-run"],
}
"""What is printed -> arguments."""


def tasks_of(full: Path, empty: Path, target: str, *, idle: bool) -> dict[str, Task]:
    """Return the tasks whose names the report knows."""
    return {
        "records": lambda: start(full, target, idle=idle),
        "empty store": lambda: start(empty, "/health", idle=idle),
        "cat": lambda: cat(full),
    }


def commands_of(full: Path, empty: Path) -> dict[str, Task]:
    """Return the commands as tasks, and the first of them with an empty store."""

    def command(store: Path, arguments: list[str]) -> Task:
        return lambda: run(*twistd("--image-path", str(store), *arguments), cwd=store)

    return {name: command(full, arguments) for name, arguments in COMMANDS.items()} | {
        "list of an empty store": command(empty, COMMANDS["list"])
    }


def report(title: str, measured: Mapping[str, Mapping[str, list[float]]]) -> None:
    """Print a table."""
    print(f"\n{title}\n\n| | min | median | max | |\n|---|---|---|---|---|")
    for name, figures in measured.items():
        for what, values in figures.items():
            print(
                f"| {name}: {what} | {min(values):.2f} | {median(values):.2f} | {max(values):.2f} | {UNITS[what]} |"
            )


def summary(measured: Mapping[str, Mapping[str, list[float]]], records: int) -> str:
    """Return what the records add."""
    full, empty, read = (measured[name] for name in ("records", "empty store", "cat"))

    def added(what: str) -> float:
        return median(full[what]) - median(empty[what])

    took, worked = added("time"), added("processor")
    told = (
        f"The records add {took:.2f} s ({took / median(read['time']):.1f} times as long as cat takes, "
        f"{took / records * 1e6:.0f} µs each), {worked:.2f} s of them of the processor"
    )
    return f"{told}, and {added('memory') * 1024 / records:.1f} KiB each." if "memory" in full else f"{told}."


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
        print(
            f"{options.records} records of {size / 2**20:.1f} MiB, {LAYERS} layers an image; {options.runs} runs; "
            f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, Twisted {twisted.__version__}"
        )
        warm = measure(options.runs, tasks_of(full, empty, target, idle=True) | commands_of(full, empty), cold=False)
        report("Warm", warm)
        print(f"\n{summary(warm, options.records)}")
        if os.access(_DROP_CACHES, os.W_OK):
            cold = measure(options.runs, tasks_of(full, empty, target, idle=False), cold=True)
            report("Cold: the page cache dropped", cold)
            print(f"\n{summary(cold, options.records)}")
        else:
            print("\nNo cold runs: only root can drop the page cache.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
