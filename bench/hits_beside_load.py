"""Measure hot manifests while the daemon does other work.

`python -m bench.hits_beside_load [--rounds N] [--seconds N] [--images N]`. Each round measures wrk alone, and beside
two kinds of work. The first is that of a site that powers up: its nodes pull 1,000 images that are cached, and `load`
brings others over the site's link. The second is as much as the daemon can do: 1,000 new images are pulled, and
`load` brings a list of as many, all from an upstream on this machine. Each is measured while a second daemon, with
another store, does the work, then while the same daemon does it. The former tells what the work costs anyway by the
processor time that it takes from a machine with few cores.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import twisted
from bench.speed_client import Connection, Wrk
from bench.speed_servers import Part
from tests.client import ask, connect
from tests.images import Image, make_image
from tests.peers import missing_package
from tests.processes import Daemon, twistd, wait_until
from tests.procfs import processor_time
from tests.upstream import ScriptedRegistry

CONNECTIONS = 16
PULLERS = 4
"""Connections that pull images."""
LINK = "100Mbit"
"""What all upstreams together may bring, a second; small images are not limited by it."""
LARGE = 4_000_000
"""Bytes of an image that is loaded over the link."""
LOADED = 40
"""Such images: more than the link brings while the hits are measured for ten seconds."""
LONG_AGO = 3600.0
"""Seconds since the last pull of each cached image: the time of the next pull is noted in its record."""
ALONE = "alone"
CACHED, NEW = "cached images pulled, load over a link of 100 Mbit/s", "new images pulled and loaded"
ELSEWHERE, HERE = "at another daemon", "at the same daemon"


@dataclass
class Figures:
    """What one condition gave, one figure a round."""

    rates: dict[str, list[float]] = field(default_factory=dict)
    """Kind of request -> hits a second."""
    shares: list[float] = field(default_factory=list)
    """Processor seconds of the measured daemon in a second."""
    pulled: list[float] = field(default_factory=list)
    loaded: list[float] = field(default_factory=list)
    """Images that were pulled and loaded meanwhile."""


class Work:
    """Images that are pulled and loaded meanwhile."""

    def __init__(self, upstream: ScriptedRegistry, folder: Path, images: int) -> None:
        self._upstream = upstream
        self._folder = folder
        self._images = images
        self._number = 0
        self._cached = self._publish("cached", images)
        self._large = self._publish("large", LOADED, LARGE)
        self.pulled = 0

    def _publish(self, kind: str, count: int, size: int = 1000) -> Mapping[str, Image]:
        made = {
            f"{kind}/{self._number + number}": make_image(self._number + number, layers=1, layer_size=size)
            for number in range(count)
        }
        self._number += count
        for name, image in made.items():
            self._upstream.add(name, image, "1")
        return made

    def _list(self, images: Mapping[str, Image]) -> Path:
        path = self._folder / "list"
        path.write_text("".join(f"{self._upstream.host}/{name}:1\n" for name in images))
        return path

    def prepare(self, daemon: Daemon) -> None:
        """Bring the images into the store that are to be cached.

        Raises:
            CalledProcessError: one was not loaded.
        """
        self._run(daemon, "load", str(self._list(self._cached)))

    def _run(self, daemon: Daemon, *command: str) -> None:
        subprocess.run(_twistd(daemon, *command), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    @contextmanager
    def at(self, daemon: Daemon, kind: str, seconds: float) -> Iterator[None]:
        """Pull 1,000 images through the daemon within these seconds, if it can; load others; stop with the block."""
        if kind == CACHED:
            pulled, loaded = self._cached, self._large
            self._run(daemon, "prune", "--pattern", "/large/")
            then = time.time() - LONG_AGO
            for record in (daemon.image_path / "img").iterdir():
                os.utime(record, (then, then))
        else:
            pulled, loaded = self._publish("new", self._images), self._publish("new", self._images)
        self.pulled, ended = 0, threading.Event()
        pullers = [
            threading.Thread(
                target=self._pull, args=(daemon, list(pulled.items())[first::PULLERS], seconds * PULLERS, ended)
            )
            for first in range(PULLERS)
        ]
        with (self._folder / "load.log").open("wb") as log:
            load = subprocess.Popen(_twistd(daemon, "load", str(self._list(loaded))), stdout=log, stderr=log)
            for puller in pullers:
                puller.start()
            try:
                first = next(iter(loaded.values())).manifest.digest.partition(":")[2]
                loading = (daemon.image_path / "img" / first).exists
                wait_until(lambda: self.pulled and loading(), 30, "both have begun")
                yield
            finally:
                ended.set()
                for puller in pullers:
                    puller.join()
                load.terminate()
                load.wait()

    def _pull(
        self, daemon: Daemon, images: Sequence[tuple[str, Image]], seconds: float, ended: threading.Event
    ) -> None:
        began = time.monotonic()
        with closing(Connection(daemon.url, None)) as connection:
            for number, (name, image) in enumerate(images):
                if ended.wait(max(0.0, began + number * seconds / self._images - time.monotonic())):
                    return
                for path, data in (
                    ("manifests/1", image.manifest.data),
                    *((f"blobs/{blob.digest}", blob.data) for blob in image.blobs),
                ):
                    connection.receive(f"{daemon.url}/v2/{name}/{path}?ns={self._upstream.host}", len(data))
                self.pulled += 1


def _twistd(daemon: Daemon, *command: str) -> list[str]:
    common = ["--image-path", str(daemon.image_path), "--config-path", str(daemon.config_path)]
    return twistd(*common, *command, options=())


def _records(daemon: Daemon) -> int:
    return len(list((daemon.image_path / "img").iterdir()))


def measure(wrk: Wrk, daemon: Daemon, hot: Mapping[str, tuple[str, Part]], figures: Figures) -> None:
    """Measure each kind of hit for some seconds."""
    began, processor = time.monotonic(), processor_time(daemon.process.pid)
    for kind, (url, part) in hot.items():
        figures.rates.setdefault(kind, []).append(wrk.rate(url, part, CONNECTIONS))
    figures.shares.append((processor_time(daemon.process.pid) - processor) / (time.monotonic() - began))


def rounds(folder: Path, count: int, seconds: int, images: int) -> dict[tuple[str, str], Figures]:
    """Measure all conditions in each round: what work is done, and where."""
    conditions = [(ALONE, ""), *((kind, where) for kind in (CACHED, NEW) for where in (ELSEWHERE, HERE))]
    found = {condition: Figures() for condition in conditions}
    with ScriptedRegistry() as upstream:
        registries = {upstream.host: "http"}
        options = ("--log-level", "warn", "--no-complete-images", "--max-bandwidth", LINK)
        with (
            Daemon(folder, registries, *options, image_path=folder / "measured") as measured,
            Daemon(folder, registries, *options, image_path=folder / "other") as other,
        ):
            image = make_image("hot")
            upstream.add("hot", image, "1")
            size, digest = len(image.manifest.data), image.manifest.digest
            hot = {
                f"by {kind}": (
                    f"{measured.url}/v2/hot/manifests/{reference}?ns={upstream.host}",
                    Part("", digest, size),
                )
                for kind, reference in (("tag", "1"), ("digest", digest))
            }
            wrk, work = Wrk(folder, seconds), Work(upstream, folder, images)
            for daemon in (measured, other):
                work.prepare(daemon)
                with closing(connect(daemon.url)) as connection:
                    ask(connection, f"{daemon.url}/v2/hot/manifests/1?ns={upstream.host}")
            for _ in range(count):
                measure(wrk, measured, hot, found[ALONE, ""])
                for kind, where in conditions[1:]:
                    at, figures = measured if where == HERE else other, found[kind, where]
                    with work.at(at, kind, len(hot) * seconds):
                        before, fetched = _records(at), work.pulled if kind == NEW else 0
                        measure(wrk, measured, hot, figures)
                        pulled = work.pulled
                        figures.pulled.append(pulled)
                        new = pulled - fetched if kind == NEW else 0
                        figures.loaded.append(_records(at) - before - new)
    return found


def table(found: Mapping[tuple[str, str], Figures]) -> list[str]:
    """Format medians; ratios compare figures of the same round."""
    lines = [
        "| | hits a second by tag | ÷ alone | by digest | ÷ alone | processor share | pulled | loaded |",
        "|---|---|---|---|---|---|---|---|",
    ]
    alone = found[ALONE, ""]
    for condition, figures in found.items():
        cells = []
        for kind, rates in figures.rates.items():
            ratios = [one / idle for one, idle in zip(rates, alone.rates[kind], strict=True)]
            cells += [f"{median(rates):,.0f}", f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"]
        counts = [f"{median(values):,.0f}" if values else "-" for values in (figures.pulled, figures.loaded)]
        share = f"{median(figures.shares):.2f}"
        lines.append(f"| {' | '.join([' '.join(condition).strip(), *cells, share, *counts])} |")
    return lines


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--seconds", type=int, default=10, help="of each kind of hit in each condition [%(default)s]")
    parser.add_argument("--images", type=int, default=1000, help="to pull, and to load, meanwhile [%(default)s]")
    options = parser.parse_args()
    if package := missing_package("wrk"):
        parser.error(f"missing: apt-get install {package}")
    with tempfile.TemporaryDirectory(prefix="bench-hits-") as folder:
        found = rounds(Path(folder), options.rounds, options.seconds, options.images)
    print(
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC: {options.rounds} rounds of {options.seconds} s each; "
        f"{os.cpu_count()} cores, load {os.getloadavg()[1]:.1f}, Python {platform.python_version()}, "
        f"Twisted {twisted.__version__}\n"
    )
    print("\n".join(table(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
