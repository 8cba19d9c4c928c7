"""The faults of the soak, each at random times: of the upstream, the link, the store, the clock and the process."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

from bench.soak_clients import ENDLESS, Life, Published, Tally
from tests.badlink_process import LinkProcess
from tests.clocks import FakeClock
from tests.processes import Daemon
from tests.upstream import ScriptedRegistry
from tests.upstream_http import Answer, Handler, Request, Rule
from tests.upstream_rules import ContentRange, Cut, Drip, Flip, Hold, IgnoreRange, NoLength, Reply

_JUMPS = (timedelta(days=3650), timedelta(days=-365), timedelta(hours=1), timedelta(0))
_LONGEST_SILENCE = 20.0
_WRONG_CLOCKS = 0.2
"""The share of starts of the daemon with a clock that is set; libfaketime makes it ten times slower."""
_STOPS_WITHIN = 60.0
_ZEROS = bytes(64_000_000)


class _NeverEnding(Rule):
    """Answer every request with zero bytes, more than anybody waits for."""

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Return the answer without calling the handler."""
        return Answer(200, (), _ZEROS, framing="chunked", rate=200_000)


class Faults:
    """What goes wrong. `counts` says how often each did."""

    def __init__(
        self,
        seed: int,
        daemon: Daemon,
        upstream: ScriptedRegistry,
        link: LinkProcess,
        clock: FakeClock,
        published: Sequence[Published],
        tally: Tally,
        life: Life,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._seed = seed
        self._daemon = daemon
        self._upstream = upstream
        self._link = link
        self._clock = clock
        self._published = published
        self._tally = tally
        self._life = life
        self._rules: list[tuple[Callable[[], None], Rule]] = []
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._at_random, args=fault)
            for fault in (
                (self._break, 0.02, 0.3),
                (self._remove, 0.02, 0.3),
                (self._make_unreadable, 0.2, 2.0),
                (self._kill, 3.0, 10.0),
                (self._empty, 20.0, 60.0),
                (self._set_clock, 1.0, 3.0),
                (self._silence, 20.0, 60.0),
            )
        ]

    def start(self) -> None:
        """Begin."""
        self._rules.append((self._upstream.script(f"/v2/{ENDLESS}/blobs/*", _NeverEnding()), _NeverEnding()))
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End all faults; what they did to the store stays."""
        self._over.set()
        for thread in self._threads:
            thread.join()
        for unscript, rule in self._rules:
            unscript()
            if isinstance(rule, Hold):
                rule.release.set()
        self._life.changes += 1
        self._daemon.terminate(_STOPS_WITHIN)
        self._start(fake_clock=False)
        self._life.changes += 1

    def _at_random(self, make: Callable[[random.Random], None], least: float, most: float) -> None:
        source = random.Random(f"{self._seed}/{make.__name__}")
        while not self._over.wait(source.uniform(least, most)):
            try:
                make(source)
            except Exception as problem:
                self._tally.violation(f"{make.__name__}: {type(problem).__name__}: {problem}")
                return

    # The upstream and the link

    def _break(self, source: random.Random) -> None:
        """Break something at the upstream, for one request or a few."""
        one = source.choice(self._published)
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
            rules = [
                (f"*{blob.digest}", Flip(somewhere), 1),
                (f"*{blob.digest}", _NeverEnding(), 1),
            ]
        path, rule, times = source.choice(rules)
        self.counts[type(rule).__name__.strip("_")] += 1
        self._rules.append((self._upstream.script(path, rule, times=times), rule))
        if source.random() < 0.05:
            self.counts["all connections dropped"] += 1
            self._upstream.disconnect()

    def _silence(self, source: random.Random) -> None:
        """Let the link swallow everything for a while."""
        self.counts["silent link"] += 1
        self._link.tell(outage=source.choice(("hold", "cut")))
        self._link.tell(down=True)
        self._over.wait(source.uniform(1.0, _LONGEST_SILENCE))
        self._link.tell(up=True)

    # The store

    def _files(self, source: random.Random) -> tuple[str, list[Path]]:
        folder = source.choice(("blobs", "blobs", "blobs", "img"))
        try:
            return folder, sorted((self._daemon.image_path / folder).iterdir())
        except FileNotFoundError:
            return folder, []

    def _remove(self, source: random.Random) -> None:
        """Remove a file from the store, so that there is always something to fetch."""
        folder, files = self._files(source)
        if files:
            _remove(source.choice(files))
            self.counts[f"a file of {folder}/ removed"] += 1

    def _make_unreadable(self, source: random.Random) -> None:
        """Put something in the place of a file that is none, or is another one."""
        folder, files = self._files(source)
        if not files:
            return
        path = source.choice(files)
        makers: list[Callable[[Path], object]] = [Path.mkdir, os.mkfifo, _link_to_nothing, _link_out, Path.touch]
        make = source.choice(makers)
        _remove(path)
        try:
            make(path)
        except (FileExistsError, FileNotFoundError):
            # The daemon was quicker, or the store has been emptied.
            return
        self.counts[f"an unreadable file in {folder}/"] += 1

    def _empty(self, source: random.Random) -> None:
        """Remove everything in the store, or the store itself."""
        store = self._daemon.image_path
        if source.random() < 0.5:
            moved = store.with_name("moved")
            store.rename(moved)
            store.mkdir()
            shutil.rmtree(moved)
        else:
            for path in store.iterdir():
                shutil.rmtree(path, ignore_errors=True)
        self.counts["store emptied"] += 1

    # The machine and the process

    def _set_clock(self, source: random.Random) -> None:
        if "LD_PRELOAD" in self._daemon.environment:
            self._clock.set(source.choice(_JUMPS))
            self.counts["clock set"] += 1

    def _kill(self, source: random.Random) -> None:
        self._life.changes += 1
        if source.random() < 0.2:
            self.counts["SIGTERM"] += 1
            self._daemon.terminate(_STOPS_WITHIN)
        else:
            self.counts["SIGKILL"] += 1
            self._daemon.kill()
        self._start(fake_clock=source.random() < _WRONG_CLOCKS)
        self._life.changes += 1

    def _start(self, *, fake_clock: bool) -> None:
        for name, value in self._clock.environment.items():
            self._daemon.environment.pop(name, None)
            if fake_clock:
                self._daemon.environment[name] = value
        self._daemon.start()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def _link_out(path: Path) -> None:
    path.symlink_to("/etc/hostname")
