"""Run clients and faults of all kinds at random: every answer is compared, and nothing may be left over.

`python -m bench.soak [--seconds N] [--seed N]`. Exits with 1 when anything was wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.soak_clients import Client, Life, Published, Tally
from bench.soak_faults import Faults
from ociregistry.names import Digest
from ociregistry.store.records import Record
from tests import procfs
from tests.badlink_process import LinkProcess
from tests.client import fetch
from tests.clocks import FakeClock
from tests.images import digest_of
from tests.processes import Daemon, wait_until
from tests.real.caches import plain_image
from tests.upstream import ScriptedRegistry

IMAGES = 16
SPOILED = 3
CLIENTS = 8
LARGEST = 12_000_000

# The store's two pools, one thread for each concurrent look-up, the reactor's pool, and the main thread.
MOST_THREADS = 8 + 16 + 1 + 10 + 1

_QUIET = 5.0
_SETTLES = 90.0
"""Seconds: a download without clients is retried every 30 s."""
_RETURNS = 45.0
"""Seconds from the link's return until a client's request must find it: the longest interval of probes, and slack."""


class Soak:
    """A daemon, its upstream, its clients, and the sources of faults."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.tally = Tally()
        self.life = Life()
        self._seed = seed
        self._folder = folder
        self._random = random.Random(f"{seed}/images")
        self._running = ExitStack()

    def __enter__(self) -> Self:
        """Start the upstream, the link and the daemon."""
        self.upstream = self._running.enter_context(ScriptedRegistry())
        self.published = [self._publish(number) for number in range(IMAGES)]
        self._link = self._running.enter_context(LinkProcess(self.upstream.host))
        clock = FakeClock(self._folder)
        options = ("--log-level", "warn")
        daemon = Daemon(self._folder, {self._link.host: "http"}, *options)
        self.daemon = self._running.enter_context(daemon)
        self.faults = Faults(
            self._seed, daemon, self.upstream, self._link, clock, self.published, self.tally, self.life
        )
        self._clients = [self._client(number) for number in range(CLIENTS)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End them."""
        self._running.close()

    def _publish(self, number: int) -> Published:
        size = int(LARGEST ** self._random.uniform(0.7, 1))
        one = Published(f"soak/{number}", plain_image(f"{self._seed}/{number}", size), spoiled=number < SPOILED)
        self.upstream.add(one.repository, one.image, "1")
        return one

    def _client(self, number: int) -> Client:
        return Client(number, self._seed, self.daemon, self._link.host, self.published, self.tally, self.life)

    @property
    def pid(self) -> int:
        """The process id of the running daemon."""
        return self.daemon.process.pid

    def kinds(self) -> Counter[str]:
        """The daemon's descriptors by kind, without its connections to the upstream, and those of libfaketime.

        One of each whole blob does not count either: the daemon keeps those open that were sent last.
        """
        opened = [what for what in procfs.descriptors(self.pid) if "faketime" not in what]
        kinds = Counter(re.sub(r"\[\d+\]", "", what) for what in opened)
        kinds -= Counter(map(str, (self.daemon.image_path / "blobs").iterdir()))
        kinds["socket:"] -= procfs.connections_to(self.pid, self._link.port)
        return +kinds

    def run(self, seconds: float) -> None:
        """Run clients and faults for that many seconds, and end both."""
        for client in self._clients:
            client.start()
        self.faults.start()
        time.sleep(seconds)
        self.faults.stop()
        for client in self._clients:
            client.stop.set()
        for client in self._clients:
            client.join()

    # Conditions at the end

    def check_quiet(self, kinds: Counter[str]) -> None:
        """Check that everything can be pulled, and that then no activity and no leftovers remain."""
        self._until(self._reachable, lambda: "the return of the link was not found", _RETURNS)
        client = self._client(CLIENTS)
        for one in self.published:
            if one.spoiled:
                # What came with the faults may be wrong: an answer that continues it ends short, the next is whole.
                client.guarded(client.blobs, one)
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

    def _reachable(self) -> bool:
        """Tell whether the daemon asks the upstream for what it does not have."""
        return fetch(f"{self.daemon.url}/v2/soak/0/manifests/nothing?ns={self._link.host}").status == 404

    def _until(self, predicate: Callable[[], bool], what: Callable[[], str], within: float = _SETTLES) -> None:
        try:
            wait_until(predicate, within, "")
        except TimeoutError:
            self.tally.violation(what())

    def partials(self) -> list[str]:
        """List the files in pulls/ except the locks, what is quarantined, and what came of never-ending blobs."""
        pulls = self.daemon.image_path / "pulls"
        images = {digest_of(blob.data).partition(":")[2] for one in self.published for blob in one.blobs}
        files = [path for path in pulls.rglob("*") if path.is_file() and path.parent.name != "bad"]
        return [str(path.relative_to(pulls)) for path in files if path.name.partition(".")[0] in images]

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
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, Soak(Path(folder), seed) as one:
        wait_until(lambda: one.kinds()["socket:"] == 2, _QUIET, "only the port and the control socket are open")
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
    print(f"faults: {json.dumps(dict(one.faults.counts.most_common()))}")
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
