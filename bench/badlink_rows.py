"""The scenarios of the benchmark: one function for each row of the table."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bench.badlink_caches import REPOSITORY, TAG, Cache, Place
from bench.badlink_client import Pull
from tests.badlink_process import LinkProcess
from tests.images import Image
from tests.peers import DockerRegistry

LINK = ("--rate", "10Mbit", "--rtt", "300")
LIMIT = 120.0
"""Default time limit of a pull, in seconds."""

CLIENTS = 10
_HEAD_START = 8.0
_KILLS = (0.2, 0.45, 0.7)
_LEAVES = (0.25, 0.6)
_AWAY = 5.0
_GONE = 40.0
"""Seconds, longer than a client waits for headers."""
_QUIET = 2.0
_SETTLES = 20.0
_POLL = 0.05


@dataclass
class Outcome:
    """The result of a row."""

    seconds: float
    right: bool
    remark: str
    crossed: int = 0
    memory: int = 0


class Stage:
    """A running cache, its link, and the image to pull."""

    def __init__(self, cache: Cache, link: LinkProcess, image: Image) -> None:
        self._cache = cache
        self.link = link
        self._image = image
        self.size = sum(len(blob.data) for blob in image.blobs)
        self.memory = 0

    def pull(self, limit: float = LIMIT, met: Callable[[], None] = lambda: None) -> Pull:
        """Make a client that is about to begin."""
        return Pull(self._cache.url, REPOSITORY, TAG, self._image.manifest.digest, limit, met)

    def look(self) -> None:
        """Record the cache's peak memory."""
        with suppress(RuntimeError, OSError):
            self.memory = max(self.memory, self._cache.server.peak_memory())

    def kill(self) -> None:
        """Send SIGKILL, and start again."""
        self.look()
        self._cache.server.kill()
        self._cache.server.start()

    def when(self, pull: Pull, share: float, over: threading.Event) -> bool:
        """Return true when the client has that share of the image; false when the pull ended before."""
        while pull.received < share * self.size:
            if over.wait(_POLL):
                return False
        return True

    def settle(self) -> int:
        """Return the bytes that crossed the link, also those after the clients have ended."""
        self.link.tell(schedule=None)
        began = moved = time.monotonic()
        crossed = self.link.counts.down
        while time.monotonic() - moved < _QUIET and time.monotonic() - began < _SETTLES:
            time.sleep(_POLL)
            if (now := self.link.counts.down) != crossed:
                crossed, moved = now, time.monotonic()
        return crossed


def _timed(task: Callable[[], bool]) -> tuple[float, bool]:
    began = time.monotonic()
    right = task()
    return time.monotonic() - began, right


def plain(stage: Stage) -> Outcome:
    """Pull by one client."""
    pull = stage.pull()
    seconds, right = _timed(pull.run)
    return Outcome(seconds, right, pull.summary())


def intermittent(stage: Stage) -> Outcome:
    """Pull by one client over an intermittent link; the first outage is in the middle of its pull."""
    stage.link.tell(schedule=[20, 10])
    time.sleep(_HEAD_START)
    return plain(stage)


def crowd(stage: Stage) -> Outcome:
    """Pull by many clients that begin at once."""
    pulls = [stage.pull(3 * LIMIT) for _ in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        seconds, right = _timed(lambda: all(list(pool.map(Pull.run, pulls))))
    done = sum(pull.right for pull in pulls)
    remarks = {f"{done} of {CLIENTS} right", *(pull.summary() for pull in pulls)} - {""}
    return Outcome(seconds, right, "; ".join(sorted(remarks)[:2]))


def killed(stage: Stage) -> Outcome:
    """Kill the cache while one client pulls."""
    pull, over = stage.pull(), threading.Event()
    kills = 0

    def kill() -> None:
        nonlocal kills
        for share in _KILLS:
            if not stage.when(pull, share, over):
                return
            stage.kill()
            kills += 1

    with ThreadPoolExecutor(1) as pool:
        killer = pool.submit(kill)
        seconds, right = _timed(pull.run)
        over.set()
        killer.result()
    return Outcome(seconds, right, _joined(f"{kills} kills", pull.summary()))


def fickle(stage: Stage) -> Outcome:
    """Pull by a client that gives up, and later continues with what it has."""
    pull, over = stage.pull(), threading.Event()

    def leave(share: float) -> None:
        if stage.when(pull, share, over):
            pull.leave()

    def task() -> bool:
        for share in _LEAVES:
            leaver = threading.Thread(target=leave, args=(share,))
            leaver.start()
            pull.run()
            over.set()
            leaver.join()
            over.clear()
            time.sleep(_AWAY)
        return pull.run()

    seconds, right = _timed(task)
    return Outcome(seconds, right, pull.summary())


def gone(stage: Stage) -> Outcome:
    """Take the link down when the client has the manifest, and restore it later."""
    returned = 0.0

    def leave() -> None:
        stage.link.tell(down=True)
        timer.start()

    def come_back() -> None:
        nonlocal returned
        stage.link.tell(up=True)
        returned = time.monotonic()

    timer = threading.Timer(_GONE, come_back)
    pull = stage.pull(LIMIT, leave)
    seconds, right = _timed(pull.run)
    since = time.monotonic() - returned
    timer.cancel()
    troubles = pull.troubles
    first = f"first {troubles[0].what} after {troubles[0].after:.1f} s" if troubles else "no error"
    first += f"; headers within {pull.slowest_headers:.1f} s" if pull.slowest_headers else ""
    end = f"right {since:.0f} s after the return" if right and returned else "never right"
    return Outcome(seconds, right, _joined(first, pull.summary(), end))


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


@dataclass(frozen=True)
class Row:
    """A line of the table: the link's faults, and the scenario."""

    name: str
    link: Sequence[str]
    run: Callable[[Stage], Outcome]


ROWS: dict[str, Row] = {
    "a": Row("10 Mbit/s and 300 ms", LINK, plain),
    "b": Row("cut (FIN) every 5 MB", (*LINK, "--cut-bytes", "5MB"), plain),
    "c": Row("20 s up, 10 s down", LINK, intermittent),
    "c2": Row("20 s up, 10 s down, cut (RST) on return", (*LINK, "--outage", "cut", "--cut-by", "rst"), intermittent),
    "d": Row(f"{CLIENTS} clients at once", LINK, crowd),
    "e": Row("killed with -9 three times", LINK, killed),
    "f": Row("a client gives up and comes back twice", LINK, fickle),
    "g": Row(f"upstream gone after the manifest, for {_GONE:.0f} s", LINK, gone),
}


def play(row: Row, make: Callable[[Place], Cache], folder: Path, registry: DockerRegistry, image: Image) -> Outcome:
    """Run a row on one cold cache."""
    folder.mkdir()
    with LinkProcess(registry.host, *row.link) as link:
        cache = make(Place(folder, link.host, registry, image))
        with cache.mirror, cache.server:
            stage = Stage(cache, link, image)
            outcome = row.run(stage)
            outcome.crossed = stage.settle()
            stage.look()
            outcome.memory = stage.memory
    return outcome
