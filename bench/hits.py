"""Measure hits while the upstream is a black hole, compared with hits while it is up.

`python -m bench.hits [--rounds N] [--hits N]`. In each round the link is first up, then silent.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import closing
from pathlib import Path
from statistics import median

from tests.badlink_process import LinkProcess
from tests.client import ask, connect
from tests.images import make_image
from tests.processes import Daemon, wait_until
from tests.upstream import ScriptedRegistry


def timed(url: str, hits: int) -> float:
    """Return the median time of a hit over one connection, in milliseconds."""
    times = []
    with closing(connect(url)) as connection:
        for _ in range(hits):
            began = time.perf_counter()
            answer = ask(connection, url)
            times.append((time.perf_counter() - began) * 1000)
            if answer.status != 200:
                raise RuntimeError(f"{url} gave {answer.status}")
    return median(times)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--hits", type=int, default=300, help="of each kind, in each half of a round")
    options = parser.parse_args()
    image = make_image("hits", layer_size=20_000)
    with (
        tempfile.TemporaryDirectory() as folder,
        ScriptedRegistry() as upstream,
        LinkProcess(upstream.host) as link,
        Daemon(Path(folder), {link.host: "http"}, "--log-level", "error") as daemon,
    ):
        upstream.add("team/app", image, "1")
        paths = {"manifest by tag": "manifests/1", "blob of 20 kB": f"blobs/{image.layers[0].digest}"}
        urls = {what: f"{daemon.url}/v2/team/app/{path}?ns={link.host}" for what, path in paths.items()}
        timed(urls["manifest by tag"], 1)
        blobs = daemon.image_path / "blobs"
        wait_until(lambda: len(list(blobs.iterdir())) == len(image.blobs), 30, "the whole image")
        found: dict[tuple[str, bool], list[float]] = {}
        for _ in range(options.rounds):
            for down in (False, True):
                link.tell(down=True) if down else link.tell(up=True)
                asked = link.counts.up
                for what, url in urls.items():
                    found.setdefault((what, down), []).append(timed(url, options.hits))
                if link.counts.up != asked:
                    raise RuntimeError("a hit asked the upstream")
    print(f"{options.rounds} rounds of {options.hits} hits of each kind; medians in ms, over rounds: min median max")
    for what in urls:
        there, gone = found[what, False], found[what, True]
        ratios = sorted(one / other for one, other in zip(gone, there, strict=True))
        for name, values in (("up", there), ("black hole", gone)):
            print(f"| {what} | {name} | {min(values):.2f} | {median(values):.2f} | {max(values):.2f} |")
        print(f"| {what} | black hole ÷ up | {ratios[0]:.2f} | {median(ratios):.2f} | {ratios[-1]:.2f} |")


if __name__ == "__main__":
    main()
