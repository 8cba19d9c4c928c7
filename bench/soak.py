"""Run clients, broken links and kills at random: every answer is compared, and nothing may be left over.

`python -m bench.soak [--seconds N] [--seed N]`. Exits with 1 when anything was wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from bench.soak_clients import Client, Life, Published, Tally
from ociregistry.names import Digest
from ociregistry.store.records import Record
from tests import procfs
from tests.images import digest_of
from tests.processes import Daemon, wait_until
from tests.real.caches import plain_image
from tests.upstream import ScriptedRegistry
from tests.upstream_http import Rule
from tests.upstream_rules import ContentRange, Cut, Drip, Flip, Hold, IgnoreRange, NoLength, Reply

IMAGES = 16
SPOILED = 3
CLIENTS = 8
LARGEST = 12_000_000

# The store's two pools, one thread for each concurrent look-up, the reactor's pool, and the main thread.
MOST_THREADS = 8 + 16 + 1 + 10 + 1

_QUIET = 5.0
_SETTLES = 90.0
"""Seconds: a download without clients is retried every 30 s."""


class Soak:
    """A daemon, its upstream, its clients, and the sources of faults."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.tally = Tally()
        self.life = Life()
        self._seed = seed
        self._random = random.Random(f"{seed}/trouble")
        self.upstream = ScriptedRegistry()
        self.daemon = Daemon(folder, {self.upstream.host: "http"}, "--log-level", "warn")
        self.trouble: Counter[str] = Counter()
        self._rules: list[tuple[Callable[[], None], Rule]] = []
        self.published = [self._publish(number) for number in range(IMAGES)]
        self._clients = [self._client(number) for number in range(CLIENTS)]
        self._over = threading.Event()

    def _publish(self, number: int) -> Published:
        size = int(LARGEST ** self._random.uniform(0.7, 1))
        one = Published(f"soak/{number}", plain_image(f"{self._seed}/{number}", size), spoiled=number < SPOILED)
        self.upstream.add(one.repository, one.image, "1")
        return one

    def _client(self, number: int) -> Client:
        return Client(number, self._seed, self.daemon, self.upstream.host, self.published, self.tally, self.life)

    @property
    def pid(self) -> int:
        """The process id of the running daemon."""
        return self.daemon.process.pid

    def kinds(self) -> Counter[str]:
        """The daemon's descriptors by kind, without its connections to the upstream."""
        kinds = Counter(re.sub(r"\[\d+\]", "", what) for what in procfs.descriptors(self.pid))
        kinds["socket:"] -= procfs.connections_to(self.pid, self.upstream.port)
        return +kinds

    # Faults

    def run(self, seconds: float) -> None:
        """Run for that many seconds, and end."""
        troubles = [(self._break, 0.02, 0.3), (self._prune, 0.02, 0.3), (self._kill, 3.0, 10.0)]
        threads = [threading.Thread(target=self._at_random, args=trouble) for trouble in troubles]
        for thread in (*self._clients, *threads):
            thread.start()
        time.sleep(seconds)
        self._over.set()
        for thread in threads:
            thread.join()
        self._heal()
        for client in self._clients:
            client.stop.set()
        for client in self._clients:
            client.join()

    def _at_random(self, make: Callable[[random.Random], None], least: float, most: float) -> None:
        source = random.Random(f"{self._seed}/{make.__name__}")
        while not self._over.wait(source.uniform(least, most)):
            try:
                make(source)
            except Exception as problem:
                self.tally.violation(f"{make.__name__}: {type(problem).__name__}: {problem}")
                return

    def _break(self, source: random.Random) -> None:
        """Break something at the upstream, for one request or a few."""
        one = source.choice(self.published)
        blob = source.choice(one.blobs)
        somewhere = source.randrange(len(blob.data))
        rules: list[tuple[str, Rule, int]] = [
            (f"*{blob.digest}", Cut(somewhere, reset=source.random() < 0.5), source.randint(1, 3)),
            (f"*{blob.digest}", Drip(source.choice((200_000, 2_000_000))), 1),
            (f"*{blob.digest}", Hold(somewhere), 1),
            (f"*{blob.digest}", NoLength(source.choice(("chunked", "close"))), 1),
            (f"*{blob.digest}", IgnoreRange(), 1),
            (f"*{blob.digest}", ContentRange(source.choice((None, "bytes 0-0/1"))), 1),
            (f"/v2/{one.repository}/*", Cut(None), 2),
            (f"/v2/{one.repository}/*", Reply(source.choice((429, 500, 503))), 2),
        ]
        if one.spoiled and blob in one.image.layers:  # All images share the config.
            rules = [(f"*{blob.digest}", Flip(somewhere), 1)]
        path, rule, times = source.choice(rules)
        self.trouble[type(rule).__name__] += 1
        self._rules.append((self.upstream.script(path, rule, times=times), rule))
        if source.random() < 0.05:
            self.trouble["all connections dropped"] += 1
            self.upstream.disconnect()

    def _prune(self, source: random.Random) -> None:
        """Remove a file from the store, so that there is always something to fetch."""
        folder = source.choice(("blobs", "blobs", "blobs", "img"))
        files = sorted((self.daemon.image_path / folder).iterdir())
        if files:
            source.choice(files).unlink(missing_ok=True)
            self.trouble[f"a file of {folder}/ removed"] += 1

    def _kill(self, source: random.Random) -> None:
        self.life.changes += 1
        if source.random() < 0.2:
            self.trouble["SIGTERM"] += 1
            self.daemon.terminate(60)
        else:
            self.trouble["SIGKILL"] += 1
            self.daemon.kill()
        self.daemon.start()
        self.life.changes += 1

    def _heal(self) -> None:
        for unscript, rule in self._rules:
            unscript()
            if isinstance(rule, Hold):
                rule.release.set()

    # Conditions at the end

    def check_quiet(self, kinds: Counter[str]) -> None:
        """Check that everything can be pulled, and that then no activity and no leftovers remain."""
        client = self._client(CLIENTS)
        for one in self.published:
            client.guarded(client.whole, one)
        self._until(lambda: not self.partials(), lambda: f"partials are left: {self.partials()}")
        self._until(lambda: not self.kinds() - kinds, lambda: f"descriptors are left: {self.kinds() - kinds}")
        asked, used = self.upstream.count(), procfs.processor_time(self.pid)
        time.sleep(_QUIET)
        if self.upstream.count() != asked:
            self.tally.violation(f"the upstream is still asked: {self.upstream.requests[asked:]}")
        if procfs.processor_time(self.pid) - used > _QUIET / 4:
            self.tally.violation(f"uses {procfs.processor_time(self.pid) - used:.1f} s of {_QUIET} s idle")
        if procfs.threads(self.pid) > MOST_THREADS:
            self.tally.violation(f"{procfs.threads(self.pid)} threads")

    def _until(self, predicate: Callable[[], bool], what: Callable[[], str]) -> None:
        try:
            wait_until(predicate, _SETTLES, "")
        except TimeoutError:
            self.tally.violation(what())

    def partials(self) -> list[str]:
        """List the files in pulls/ except the locks."""
        pulls = self.daemon.image_path / "pulls"
        return [str(path.relative_to(pulls)) for path in pulls.rglob("*") if path.is_file() and path.name != "lock"]

    def check_store(self) -> None:
        """Check that every blob has the digest that its name says."""
        for path in (self.daemon.image_path / "blobs").iterdir():
            if digest_of(path.read_bytes()) != f"sha256:{path.name}":
                self.tally.violation(f"blobs/{path.name} is wrong")
        for path in (self.daemon.image_path / "img").iterdir():
            digest = Digest.from_hex(path.name)
            assert digest is not None
            Record.parse(path.read_bytes(), digest)

    def check_alone(self) -> None:
        """Check that after one more kill everything is served without the upstream."""
        self.daemon.kill()
        self.upstream.close()
        self.daemon.start()
        client = self._client(CLIENTS + 1)
        for one in self.published:
            client.guarded(client.whole, one)

    def check_log(self) -> None:
        """Check that no defect was logged."""
        for word in ("Traceback", "#critical]", "nhandled"):
            if word in self.daemon.log:
                at = self.daemon.log.index(word)
                self.tally.violation(f"the log says {self.daemon.log[max(0, at - 300) : at + 2000]}")


def soak(seconds: float, seed: int) -> int:
    """Run the soak, print the figures, and return the exit status."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        one = Soak(Path(folder), seed)
        with one.upstream, one.daemon:
            wait_until(lambda: one.kinds()["socket:"] == 1, _QUIET, "only the port is open")
            kinds, before = one.kinds(), procfs.memory(one.pid)
            one.run(seconds)
            one.check_quiet(kinds)
            after, threads = procfs.memory(one.pid), procfs.threads(one.pid)
            peak = procfs.peak_memory(one.pid)
            sent = sum(request.sent for request in one.upstream.requests)
            one.check_store()
            one.check_alone()
            one.check_log()
    content = sum(len(blob.data) for image in one.published for blob in image.blobs)
    print(f"{seconds:.0f} s with seed {seed}: {CLIENTS} clients, {IMAGES} images of {content / 1e6:.0f} MB in all")
    print(f"answers: {json.dumps(dict(one.tally.outcomes.most_common()))}")
    print(f"trouble: {json.dumps(dict(one.trouble.most_common()))}")
    print(f"bytes: {one.tally.received / 1e6:.0f} MB to clients, {sent / 1e6:.0f} MB from the upstream")
    print(f"slowest headers: {one.tally.slowest_headers:.1f} s")
    print(
        f"memory: {before >> 20} MiB at the start, {after >> 20} MiB at the end, at most {peak >> 20} MiB since the "
        f"last kill; {threads} threads; descriptors as at the start"
    )
    for violation in one.tally.violations[:20]:
        print(f"WRONG: {violation}")
    print(f"{len(one.tally.violations)} violations")
    return 1 if one.tally.violations or not one.tally.outcomes["right"] else 0


def main() -> int:
    """Parse the options, and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    return soak(options.seconds, options.seed)


if __name__ == "__main__":
    sys.exit(main())
