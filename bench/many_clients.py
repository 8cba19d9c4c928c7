"""Measure many clients that pull many images each from the hot cache, all at once.

`python -m bench.many_clients [--connections N] [--images N]`. One process has all connections. Each pulls all images,
beginning with another one: the manifest by tag and by digest, the config, and the layers. Every answer is compared
with what was published. This is done twice: at first no answer is remembered, then all are.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from urllib.parse import quote

import twisted
from tests.client import ask, connect
from tests.images import MIB, Image, make_image
from tests.processes import Daemon, wait_until
from tests.procfs import memory, peak_memory, processor_time
from tests.upstream import ScriptedRegistry

SMALL_LAYERS, SMALL = 3, 20_000
LARGE = MIB
LARGE_EVERY = 10
"""One image in as many has a layer of `LARGE` bytes."""


@dataclass(frozen=True)
class Wanted:
    """One request, and its right answer."""

    kind: str
    target: str
    body: bytes = field(repr=False)


@dataclass
class Found:
    """What all clients found."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Kind -> how long each answer took."""
    errors: list[str] = field(default_factory=list)
    began: float = 0.0
    """When all were connected, and the first request was sent."""
    ended: float = 0.0


def published(number: int) -> Image:
    """Return the image of this number."""
    image = make_image(f"many/{number}", layers=SMALL_LAYERS, layer_size=SMALL)
    if number % LARGE_EVERY:
        return image
    return make_image(f"many/{number}/large", layers=1, layer_size=LARGE, base=image)


def pull_of(image: Image, number: int, ns: str) -> list[Wanted]:
    """Return the requests of one pull, in their order."""

    def wanted(kind: str, path: str, body: bytes) -> Wanted:
        return Wanted(kind, f"/v2/many/{number}/{path}?ns={quote(ns, safe='')}", body)

    config, *layers = image.blobs
    return [
        wanted("manifest by tag", "manifests/1", image.manifest.data),
        wanted("manifest by digest", f"manifests/{image.manifest.digest}", image.manifest.data),
        wanted("config", f"blobs/{config.digest}", config.data),
        *(
            wanted(
                "layer of 1 MB" if len(layer.data) >= LARGE else "layer of 20 kB", f"blobs/{layer.digest}", layer.data
            )
            for layer in layers
        ),
    ]


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, wanted: Wanted) -> None:
    writer.write(f"GET {wanted.target} HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        raise ValueError(f"{wanted.target}: {head!r}")
    length = head.lower().partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0]
    if await reader.readexactly(int(length)) != wanted.body:
        raise ValueError(f"{wanted.target}: wrong bytes")


async def _client(
    streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], pulls: Sequence[Sequence[Wanted]], found: Found
) -> None:
    for pull in pulls:
        for wanted in pull:
            began = time.perf_counter()
            try:
                await _answer(*streams, wanted)
            except (OSError, EOFError, ValueError) as error:
                found.errors.append(f"{wanted.kind}: {error}")
                return
            found.seconds.setdefault(wanted.kind, []).append(time.perf_counter() - began)
    streams[1].close()


async def _all_clients(port: int, connections: int, pulls: Sequence[Sequence[Wanted]]) -> Found:
    found = Found()
    opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(connections)]
    found.began = time.perf_counter()
    turns = ([*pulls[first:], *pulls[:first]] for first in (number % len(pulls) for number in range(connections)))
    await asyncio.gather(*(_client(streams, turn, found) for streams, turn in zip(opened, turns, strict=True)))
    found.ended = time.perf_counter()
    return found


@dataclass(frozen=True)
class Run:
    """What one run found."""

    found: Found
    memory_before: int
    memory_peak: int
    """Bytes of the daemon: before, and at most so far."""
    processor: float
    """Processor seconds of the daemon."""

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.found.ended - self.found.began


def runs(folder: Path, connections: int, images: int) -> Iterator[Run]:
    """Let that many clients pull that many images each, twice, from a daemon with its store in `folder`."""
    made = {number: published(number) for number in range(images)}
    with ScriptedRegistry() as upstream, Daemon(folder, {upstream.host: "http"}, "--log-level", "warn") as daemon:
        for number, image in made.items():
            upstream.add(f"many/{number}", image, "1")
        pulls = [pull_of(image, number, upstream.host) for number, image in made.items()]
        with closing(connect(daemon.url)) as connection:
            for pull in pulls:
                for wanted in pull:
                    if ask(connection, daemon.url + wanted.target).body != wanted.body:
                        raise RuntimeError(f"{wanted.target}: wrong bytes")
        blobs = {blob.digest for image in made.values() for blob in image.blobs}
        wait_until(lambda: len(list((daemon.image_path / "blobs").iterdir())) == len(blobs), 60, "all is stored")
        for _ in range(2):
            yield _run(daemon, upstream, connections, pulls)


def _run(daemon: Daemon, upstream: ScriptedRegistry, connections: int, pulls: Sequence[Sequence[Wanted]]) -> Run:
    sent, pid = len(upstream.requests), daemon.process.pid
    before, processor = memory(pid), processor_time(pid)
    # The lists of figures make each collection slower, which would count as the daemon's time.
    gc.disable()
    try:
        found = asyncio.run(_all_clients(daemon.port, connections, pulls))
    finally:
        gc.enable()
    if len(upstream.requests) != sent:
        found.errors.append("the upstream was asked")
    if not daemon.running:
        found.errors.append("the daemon has ended")
    return Run(found, before, peak_memory(pid), processor_time(pid) - processor)


def table(seconds: Mapping[str, Sequence[float]]) -> list[str]:
    """Format the times of each kind."""
    lines = ["| | answers | median | p99 | longest |", "|---|---|---|---|---|"]
    for kind, times in seconds.items():
        middle, late, last = (value * 1000 for value in (median(times), percentile(times, 99), max(times)))
        lines.append(f"| {kind} | {len(times):,} | {middle:.0f} ms | {late:.0f} ms | {last:.0f} ms |")
    return lines


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the least value that this part of the values does not exceed."""
    return sorted(values)[-(-len(values) * percent // 100) - 1]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=500, help="[%(default)s]")
    parser.add_argument("--images", type=int, default=50, help="[%(default)s]")
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    print(
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC: {options.connections} connections, {options.images} images each; "
        f"{os.cpu_count()} cores, load {os.getloadavg()[1]:.1f}, Python {platform.python_version()}, "
        f"Twisted {twisted.__version__}"
    )
    errors = []
    with tempfile.TemporaryDirectory(prefix="bench-many-clients-") as folder:
        for title, done in zip(
            ("At first", "Again"), runs(Path(folder), options.connections, options.images), strict=True
        ):
            print(f"\n{title}:\n")
            print("\n".join(table(done.found.seconds)))
            answers = sum(map(len, done.found.seconds.values()))
            print(
                f"\n{len(done.found.errors)} errors; {answers / done.seconds:,.0f} answers a second for "
                f"{done.seconds:.0f} s, of which the daemon computed {done.processor:.0f} s; its memory was "
                f"{done.memory_before / MIB:.0f} MiB before and at most {done.memory_peak / MIB:.0f} MiB"
            )
            errors += done.found.errors
    for error in errors[:10]:
        print(f"- {error}")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
