"""Run twenty clients on an intermittent link: does memory grow with time, and is anything left over?

`python -m bench.flapping [--seconds N]`. Exits with 1 when memory grew, or something was left over.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from statistics import median

from tests import procfs
from tests.badlink_process import LinkProcess
from tests.client import fetch
from tests.images import Image
from tests.processes import Daemon, wait_until
from tests.real.caches import plain_image
from tests.upstream import ScriptedRegistry

CLIENTS = 20
IMAGES = 500
LAYER = 1_000_000
LINK = ("--rate", "8Mbit", "--rtt", "50", "--up", "15", "--down", "13", "--outage", "cut")
EVERY = 5.0
MOST_GROWTH = 10.0
"""Allowed growth in MiB, beside the records of new images."""
_SETTLES = 120.0
_MIB = 1024 * 1024


class Client(threading.Thread):
    """Pulls images in sequence, and retries after a refusal or a broken connection."""

    def __init__(self, number: int, base: str, ns: str, images: list[Image], tally: Counter[str]) -> None:
        super().__init__()
        self._random = random.Random(number)
        self._base = base
        self._ns = ns
        self._images = images
        self._tally = tally
        self.over = threading.Event()

    def run(self) -> None:
        """Pull until the end of the benchmark."""
        while not self.over.is_set():
            number = self._random.randrange(len(self._images))
            image = self._images[number]
            paths = {f"manifests/v{number}": image.manifest.data}
            paths |= {f"blobs/{blob.digest}": blob.data for blob in image.blobs}
            for path, data in paths.items():
                self._tally[self._ask(path, data)] += 1

    def _ask(self, path: str, data: bytes) -> str:
        try:
            answer = fetch(f"{self._base}/v2/team/app/{path}?ns={self._ns}", timeout=90)
        except (OSError, HTTPException):
            return "short or cut"
        if answer.status != 200:
            self.over.wait(min(5, int(answer.headers["Retry-After"] or 1)))
            return str(answer.status)
        return "right" if answer.body == data else "WRONG"


def left_over(daemon: Daemon, threads: int) -> list[str]:
    """List what should be gone when no client asks for anything."""
    kept = daemon.image_path / "pulls" / "0"
    partials = {path.stem for path in kept.iterdir() if path.is_file() and path.name != "lock"}
    found = [f"partial {name}" for name in sorted(partials)]
    health = json.loads(fetch(f"{daemon.url}/health").body)
    found += [f"{health['incomplete_images']} incomplete images"] if health["incomplete_images"] else []
    sockets = [name for name in procfs.descriptors(daemon.process.pid) if name.startswith("socket:")]
    found += [f"{len(sockets)} sockets"] if len(sockets) > 40 else []
    running = procfs.threads(daemon.process.pid)
    found += [f"{running} threads"] if running > threads else []
    return found


def main() -> None:
    """Run, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600)
    seconds = parser.parse_args().seconds
    images = [plain_image(f"flapping {number}", LAYER) for number in range(IMAGES)]
    tally: Counter[str] = Counter()
    memory: list[float] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        ScriptedRegistry() as upstream,
        LinkProcess(upstream.host, *LINK) as link,
        Daemon(Path(folder), {link.host: "http"}, "--log-level", "warn") as daemon,
    ):
        for number, image in enumerate(images):
            upstream.add("team/app", image, f"v{number}")
        clients = [Client(number, daemon.url, link.host, images, tally) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(EVERY)
            memory.append(procfs.memory(daemon.process.pid) / _MIB)
        for client in clients:
            client.over.set()
        for client in clients:
            client.join()
        link.tell(schedule=None, up=True)
        # The store's two pools, its writer in turn, one look-up, the reactor's pool, and the main thread.
        threads = 8 + 16 + 1 + 1 + 10 + 1
        with suppress(TimeoutError):  # The leftovers are reported below.
            wait_until(lambda: not left_over(daemon, threads), _SETTLES, "all is completed")
        left = left_over(daemon, threads)
        changes = daemon.log.count("can be reached again")
        defects = daemon.log.count("Traceback")
    quarter = max(1, len(memory) // 4)
    early, late = median(memory[quarter : 2 * quarter]), median(memory[-quarter:])
    print(f"{seconds} s, {CLIENTS} clients, link: {' '.join(LINK)}")
    print(f"answers: {dict(tally)}; the link was up again {changes} times")
    print(f"memory, MiB: {early:.1f} in the second quarter, {late:.1f} in the last, {max(memory):.1f} at most")
    print(f"left over: {left or 'nothing'}; tracebacks: {defects}")
    wrong = tally["WRONG"] or left or defects or late - early > MOST_GROWTH
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
