"""Measure time and memory of loading many small images, compared with `skopeo sync` of the same images.

`python -m bench.loading [--images N] [--concurrent N,N] [--rounds N]`. All images come from one docker-registry on
loopback, to which they were just pushed. In each round every program runs once, in sequence, with an empty target;
the time is that of the whole process. Both sync every blob to the disk; `load` also syncs records and folders.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median

import yaml

import twisted
from tests.images import Image, make_image
from tests.peers import DockerRegistry, missing_package
from tests.processes import ROOT, twistd

SKOPEO = "skopeo sync"

Play = Callable[[Path], "Run"]
"""Brings all images into an empty folder."""


@dataclass(frozen=True)
class Run:
    """One process, from start to end."""

    seconds: float
    memory: int
    """Peak memory in bytes."""
    processor: float
    """Processor time in seconds."""


def run(argv: Sequence[str]) -> Run:
    """Run a program to its end.

    Raises:
        RuntimeError: the program failed; the message has its output.
    """
    with tempfile.TemporaryFile() as said:
        began = time.monotonic()
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        if process.returncode:
            raise RuntimeError(f"{argv} gave {process.returncode}:\n{said.read().decode(errors='replace')}")
    return Run(seconds, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime)


def load(folder: Path, host: str, images: Mapping[str, Image], concurrent: int) -> Run:
    """Run our `load` into the store `folder`."""
    listed, config = folder.with_suffix(".txt"), folder.with_suffix(".yaml")
    listed.write_text("".join(f"{host}/{name}:v1\n" for name in images))
    config.write_text(yaml.safe_dump([{"name": host, "scheme": "http"}]))
    options = ["--image-path", str(folder), "--config-path", str(config), "--concurrent", str(concurrent)]
    ended = run(twistd(*options, "load", str(listed)))
    blobs = {blob.digest.partition(":")[2]: len(blob.data) for image in images.values() for blob in image.blobs}
    _compare({path.name: path.stat().st_size for path in (folder / "blobs").iterdir()}, blobs)
    records = {image.manifest.digest.partition(":")[2]: 0 for image in images.values()}
    _compare({path.name: 0 for path in (folder / "img").iterdir()}, records)
    return ended


def sync(folder: Path, host: str, images: Mapping[str, Image]) -> Run:
    """Run `skopeo sync` into folders below `folder`."""
    listed = folder.with_suffix(".yaml")
    listed.write_text(yaml.safe_dump({host: {"tls-verify": False, "images": {name: ["v1"] for name in images}}}))
    argv = ["skopeo", "--insecure-policy", "sync", "--src", "yaml", "--dest", "dir", str(listed), str(folder)]
    ended = run(argv)
    expected = {
        f"{name.rpartition('/')[2]}:v1/{blob.digest.partition(':')[2]}": len(blob.data)
        for name, image in images.items()
        for blob in image.blobs
    }
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("manifest.json", "version")]
    _compare({str(path.relative_to(folder)): path.stat().st_size for path in files}, expected)
    return ended


def _compare(found: Mapping[str, int], expected: Mapping[str, int]) -> None:
    if found != expected:
        raise RuntimeError(f"{len(found)} files were brought, and {len(expected)} expected; or their sizes differ")


def measure(plays: Mapping[str, Play], rounds: int, root: Path) -> dict[str, list[Run]]:
    """Run all programs, round by round, each in a separate folder below `root`."""
    found: dict[str, list[Run]] = {name: [] for name in plays}
    for number in range(rounds):
        # Each round begins with another program.
        names = list(plays)[number % len(plays) :] + list(plays)[: number % len(plays)]
        for name in names:
            folder = root / f"{number}-{len(found[name])}-{name.replace(' ', '-')}"
            folder.mkdir()
            os.sync()
            found[name].append(plays[name](folder))
    return found


def table(found: Mapping[str, Sequence[Run]], images: int) -> list[str]:
    """Format medians, with minimum and maximum in brackets; ratios compare runs of the same round."""
    lines = ["| | images a second | processor | peak memory | rate ÷ skopeo's |", "|---|---|---|---|---|"]
    for name, runs in found.items():
        rates = [images / one.seconds for one in runs]
        ratios = [other.seconds / one.seconds for one, other in zip(runs, found[SKOPEO], strict=True)]
        memory = f"{median(one.memory for one in runs) / 2**20:.0f} MiB"
        busy = f"{median(one.processor for one in runs):.1f} s"
        lines.append(f"| {name} | {_spread(rates, 0)} | {busy} | {memory} | {_spread(ratios, 2)} |")
    return lines


def _spread(values: Sequence[float], places: int) -> str:
    return f"{median(values):.{places}f} ({min(values):.{places}f} to {max(values):.{places}f})"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--layer-size", type=int, default=20_000, help="bytes [%(default)s]")
    parser.add_argument("--concurrent", default="1,8,32", help="[%(default)s]")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    lacking = {package for program in ("docker-registry", "skopeo") if (package := missing_package(program))}
    if lacking:
        parser.error(f"missing: apt-get install {' '.join(sorted(lacking))}")
    images = {
        f"team/app{number}": make_image(f"loading/{number}", layers=options.layers, layer_size=options.layer_size)
        for number in range(options.images)
    }
    with tempfile.TemporaryDirectory(prefix="bench-loading-") as folder:
        root = Path(folder)
        with DockerRegistry(root / "registry") as registry:
            for name, image in images.items():
                registry.push(name, image, "v1")
            plays: dict[str, Play] = {
                f"load --concurrent {number}": partial(
                    load, host=registry.host, images=images, concurrent=int(number)
                )
                for number in options.concurrent.split(",")
            }
            plays[SKOPEO] = partial(sync, host=registry.host, images=images)
            found = measure(plays, options.rounds, root)
    print(
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC: {len(images)} images of {options.layers} layers of "
        f"{options.layer_size} bytes; {options.rounds} rounds; {os.cpu_count()} cores, load "
        f"{os.getloadavg()[1]:.1f}, Python {platform.python_version()}, Twisted {twisted.__version__}\n"
    )
    print("\n".join(table(found, len(images))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
