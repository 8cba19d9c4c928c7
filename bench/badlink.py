"""Measure time and bytes of a pull over a bad link: our daemon, docker-registry as a proxy, and drayage.

`python -m bench.badlink [--rows a,b] [--caches NAMES] [--runs N] [--image-mb M]`. Each row runs on all caches at the
same time, each with a separate link of tests/badlink.py to the same registry; the caches are cold. drayage is
installed from PyPI for the run. With `--caches damaged,short,html` each cache is our daemon with a bad mirror before
the registry.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import twisted
from bench.badlink_caches import CACHES, REPOSITORY, TAG, missing
from bench.badlink_chains import CHAINS
from bench.badlink_rows import ROWS, Outcome, play
from tests.images import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, Blob, Image, Manifest, digest_of, random_bytes
from tests.peers import DockerRegistry

_MAKERS = CACHES | CHAINS
_SHARES = (0.5, 0.27, 0.17, 0.06)


def image_of(size: int) -> Image:
    """Make an image of `size` bytes in four incompressible layers."""
    config = _blob(json.dumps({"architecture": "amd64", "os": "linux"}).encode(), OCI_CONFIG)
    layers = [_blob(b"".join(random_bytes(f"layer {share}", int(size * share))), OCI_LAYER) for share in _SHARES]
    body = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": _descriptor(config),
        "layers": [_descriptor(layer) for layer in layers],
    }
    data = json.dumps(body).encode()
    return Image(Manifest(digest_of(data), data, OCI_MANIFEST), (config, *layers), "")


def _blob(data: bytes, media_type: str) -> Blob:
    return Blob(digest_of(data), data, media_type)


def _descriptor(blob: Blob) -> dict[str, object]:
    return {"mediaType": blob.media_type, "digest": blob.digest, "size": len(blob.data)}


def line(title: str, cache: str, outcomes: Sequence[Outcome], size: int) -> str:
    """Format a line of the table: the median time, the most bytes, and whether all runs were correct."""
    seconds = f"{median(one.seconds for one in outcomes):.1f} s"
    if len(outcomes) > 1:
        seconds += f" ({min(one.seconds for one in outcomes):.1f} to {max(one.seconds for one in outcomes):.1f})"
    right = sum(one.right for one in outcomes)
    verdict = ("yes" if right else "no") if len(outcomes) == 1 else f"{right} of {len(outcomes)}"
    crossed = f"{max(one.crossed for one in outcomes) / size:.3f}"
    memory = f"{max(one.memory for one in outcomes) / 2**20:.0f} MiB"
    return f"| {title} | {cache} | {seconds} | {crossed} | {verdict} | {memory} | {outcomes[-1].remark} |"


def measure(
    rows: Sequence[str], caches: Sequence[str], runs: int, image: Image, root: Path
) -> dict[tuple[str, str], list[Outcome]]:
    """Run the rows in folders below `root`, and print a line for each."""
    size = sum(len(blob.data) for blob in image.blobs) + len(image.manifest.data)
    found: dict[tuple[str, str], list[Outcome]] = {(row, cache): [] for row in rows for cache in caches}
    with ThreadPoolExecutor(len(caches)) as pool, DockerRegistry(root / "upstream") as upstream:
        upstream.push(REPOSITORY, image, TAG)
        for row in rows:
            for run in range(runs):
                folders = {cache: root / f"{row}-{run}-{cache}" for cache in caches}
                played = {
                    cache: pool.submit(play, ROWS[row], _MAKERS[cache], folder, upstream, image)
                    for cache, folder in folders.items()
                }
                for cache, playing in played.items():
                    try:
                        found[row, cache].append(playing.result())
                    except Exception as problem:
                        print(f"({row}) {cache} could not be measured: {problem!r}", file=sys.stderr)
            for cache in caches:
                if found[row, cache]:
                    print(line(f"({row}) {ROWS[row].name}", cache, found[row, cache], size), flush=True)
    return found


def ratios(found: Mapping[tuple[str, str], Sequence[Outcome]], caches: Sequence[str]) -> str:
    """Format how much longer ten clients wait than one."""
    took = {key: median(one.seconds for one in outcomes) for key, outcomes in found.items() if outcomes}
    both = [cache for cache in caches if {("a", cache), ("d", cache)} <= set(took)]
    told = [f"{cache} {took['d', cache] / took['a', cache]:.2f}" for cache in both]
    return f"\nThe time of (d) ÷ that of (a): {', '.join(told)}."


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default=",".join(ROWS), help="[%(default)s]")
    parser.add_argument("--caches", default=",".join(CACHES), help="[%(default)s]")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--image-mb", type=float, default=25)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the logs and stores there")
    options = parser.parse_args()
    rows, caches = options.rows.split(","), options.caches.split(",")
    if unknown := [*(set(rows) - set(ROWS)), *(set(caches) - set(_MAKERS))]:
        parser.error(f"unknown: {', '.join(unknown)}")
    image = image_of(int(options.image_mb * 1e6))
    print(
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC: an image of {options.image_mb:g} MB in {len(image.layers)} layers, "
        f"the largest {max(len(layer.data) for layer in image.layers) / 1e6:g} MB; {options.runs} runs; "
        f"{os.cpu_count()} cores, Python {platform.python_version()}, Twisted {twisted.__version__}\n"
    )
    print("| scenario | cache | time | bytes ÷ image | correct | memory | errors of the client |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with ExitStack() as stack:
        root = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-badlink-")))
        root.mkdir(parents=True, exist_ok=True)
        reasons = {cache: missing(cache, root) for cache in caches}
        caches = [cache for cache in caches if reasons[cache] is None]
        found = measure(rows, caches, options.runs, image, root)
    for cache, reason in reasons.items():
        if reason is not None:
            print(f"| all | {cache} | | | | | {reason} |")
    if {"a", "d"} <= set(rows):
        print(ratios(found, caches))
    return 0 if all(len(outcomes) == options.runs for outcomes in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
