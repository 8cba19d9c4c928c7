"""`kill -9` of `prune` and `load` at any instant: kept images lose no blob, and the next run continues."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.disk_faults import Trace, need
from tests.images import Image, Index, make_image, make_index
from tests.processes import Daemon, wait_until
from tests.real.caches import SOON
from tests.real.stores import (
    PATIENCE,
    Contents,
    assert_blobs_match_their_digests,
    assert_verify_finds_no_damage,
    command,
    command_line,
    contents,
    has_all_of,
    hex_of,
    image_list,
    lost_blobs,
    running_command,
)
from tests.upstream import ScriptedRegistry

REPOSITORY = "team/app"
PATTERN = "--pattern=team/app:go"
CHANGES = "/^unlink,/^rename,/^fsync,/^fdatasync"
"""The system calls by which a store is changed, and made durable."""
HANG = 60_000_000
"""Microseconds, longer than until the kill."""

ROUNDS = [pytest.param(10, id="10"), pytest.param(100, id="100", marks=pytest.mark.long)]


@dataclass(frozen=True)
class StoreAndUpstream:
    """A store whose daemon is stopped unless a test starts it, and the content of its upstream."""

    daemon: Daemon
    upstream: ScriptedRegistry
    published: dict[str, Image | Index]
    folder: Path

    @property
    def root(self) -> Path:
        """The store's folder."""
        return self.daemon.image_path

    @property
    def load(self) -> list[str]:
        """The arguments of a load of all images."""
        urls = [f"{self.upstream.host}/{REPOSITORY}:{tag}" for tag in self.published]
        return ["load", "--platform=all", "--concurrent=4", image_list(self.folder / "list", urls)]

    def has_all(self) -> bool:
        """Whether the store has everything."""
        return all(has_all_of(self.root, what) for what in self.published.values())


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[StoreAndUpstream]:
    """Images to keep and to prune that share layers, and indexes, one of which shares an image with a pruned one."""
    base = make_image("killed/base", layers=2, layer_size=100_000)
    images = {name: make_image(name, base=base, layer_size=300_000) for name in ("stay1", "stay2", "go1", "go2")}
    lists = {name: make_index(name, layer_size=50_000) for name in ("stay-list", "go-list")}
    # One image has both a pruned and a kept name, and so has an image of a pruned index.
    twice = {"go-too": images["stay1"], "stay-too": lists["go-list"].images[0]}
    published: dict[str, Image | Index] = {**images, **lists, **twice}
    with ScriptedRegistry() as upstream:
        for tag, what in published.items():
            upstream.add(REPOSITORY, what, tag)
        daemon = Daemon(tmp_path, {upstream.host: "http"}, "--no-complete-images")
        yield StoreAndUpstream(daemon, upstream, published, tmp_path)


@contextmanager
def traced(
    setup: StoreAndUpstream, argv: list[str], inject: str = ""
) -> Iterator[tuple[subprocess.Popen[bytes], Trace]]:
    """Trace the command's changes, delayed as `inject` says; the process to kill is the command itself."""
    need("strace")
    log = setup.folder / "strace"
    log.unlink(missing_ok=True)
    faults = ["-e", f"inject={CHANGES}:{inject}"] if inject else []
    strace = ["strace", "-D", "-f", "-y", "-o", str(log), "-e", f"trace={CHANGES}", *faults]
    with running_command([*strace, *argv], setup.folder) as process:
        wait_until(log.exists, SOON, "strace begins")
        yield process, Trace(log)


def copied(source: Path, target: Path) -> None:
    """Restore the store from a copy."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def seconds_of(argv: list[str], folder: Path) -> float:
    """Return how long the command takes; it must succeed."""
    began = time.monotonic()
    with running_command(argv, folder) as process:
        assert process.wait(PATIENCE) == 0, (folder / "stderr").read_text()
    return time.monotonic() - began


def assert_sound(setup: StoreAndUpstream, before: Contents) -> None:
    """After a kill, assert that kept images have all their blobs, and that nothing in the store is wrong."""
    assert_verify_finds_no_damage(setup.daemon)
    after = contents(setup.root)
    assert not lost_blobs(before, after)
    for tag, what in setup.published.items():
        record = hex_of(what.manifest.digest)
        if tag.startswith("stay") and record in before:
            assert after[record].there >= before[record].there
    # Records are removed before their blobs: none that exists lacks a blob it had.
    assert all(kept.there >= before[digest].there for digest, kept in after.items() if digest in before)
    assert_blobs_match_their_digests(setup.root)


def is_pruned(setup: StoreAndUpstream) -> bool:
    """Whether the images named by the pattern are gone, and the others complete."""
    left = [url for kept in contents(setup.root).values() for url in kept.images]
    stays = [what for tag, what in setup.published.items() if tag.startswith("stay")]
    kept = {hex_of(manifest.digest) for what in stays for manifest in what.manifests}
    whole = all(has_all_of(setup.root, what) for what in stays)
    return whole and not any(":go" in url for url in left) and contents(setup.root).keys() == kept


def finish_pruning(setup: StoreAndUpstream) -> None:
    """Finish the prune; unneeded blobs that are left are pruned as orphans."""
    command(setup.daemon, "prune", PATTERN)
    assert is_pruned(setup)


def finish_loading(setup: StoreAndUpstream) -> None:
    """Finish the load, which fetches only what is missing."""
    blobs = {path.name for path in (setup.root / "blobs").iterdir()} if (setup.root / "blobs").exists() else set()
    asked = len(setup.upstream.requests)
    assert "0 failed" in command(setup.daemon, *setup.load).stdout
    assert setup.has_all()
    again = {one.path.rpartition(":")[2] for one in setup.upstream.requests[asked:] if "/blobs/" in one.path}
    assert not again & blobs
    assert_blobs_match_their_digests(setup.root)


@pytest.mark.parametrize("rounds", ROUNDS)
def test_prune_killed_at_random_times(setup: StoreAndUpstream, tmp_path: Path, rounds: int) -> None:
    command(setup.daemon, *setup.load)
    full = tmp_path / "full"
    copied(setup.root, full)
    argv = command_line(setup.daemon, "prune", PATTERN)
    takes = seconds_of(argv, tmp_path)
    assert is_pruned(setup)
    rng = random.Random(rounds)
    for _ in range(rounds):
        copied(full, setup.root)
        before = contents(setup.root)
        with running_command(argv, tmp_path) as process:
            time.sleep(rng.uniform(0, takes))
            process.kill()
        assert_sound(setup, before)
        finish_pruning(setup)


@pytest.mark.parametrize("rounds", ROUNDS)
def test_prune_killed_between_changes(setup: StoreAndUpstream, tmp_path: Path, rounds: int) -> None:
    """Kill before and after each of a random choice of changes."""
    command(setup.daemon, *setup.load)
    full = tmp_path / "full"
    copied(setup.root, full)
    argv = command_line(setup.daemon, "prune", PATTERN)
    with traced(setup, argv) as (process, trace):
        assert process.wait(PATIENCE) == 0
        wait_until(lambda: "exited with 0" in trace.text, SOON, "strace ends")
        changes = trace.begun
    assert changes > 20, trace.text
    assert is_pruned(setup)
    rng = random.Random(rounds)
    for _ in range(rounds):
        copied(full, setup.root)
        before = contents(setup.root)
        kill_at(setup, argv, rng.randint(1, changes), rng.choice(["delay_enter", "delay_exit"]))
        assert_sound(setup, before)
        finish_pruning(setup)


def kill_at(setup: StoreAndUpstream, argv: list[str], number: int, when: str) -> None:
    """Kill the command at its change of this number: where it begins, or where it has ended."""
    with traced(setup, argv, f"{when}={HANG}:when={number}") as (process, trace):
        wait_until(
            lambda: trace.begun >= number or process.poll() is not None, PATIENCE, f"{number} changes:\n{trace.text}"
        )
        # Otherwise strace would keep the dead process until the delay is over.
        told = Path(f"/proc/{process.pid}/status").read_text()
        strace = int(re.search(r"^TracerPid:\t(\d+)$", told, re.MULTILINE)[1])  # type: ignore[index]  # the kernel always has that line
        process.kill()
        if strace:
            os.kill(strace, signal.SIGKILL)
        process.wait(PATIENCE)


@pytest.mark.parametrize("rounds", ROUNDS)
def test_load_killed_at_random_times(setup: StoreAndUpstream, tmp_path: Path, rounds: int) -> None:
    first = load_one(setup)
    argv = command_line(setup.daemon, *setup.load)
    takes = seconds_of(argv, tmp_path)
    assert setup.has_all()
    rng = random.Random(rounds)
    for _ in range(rounds):
        copied(first, setup.root)
        before = contents(setup.root)
        with running_command(argv, tmp_path) as process:
            time.sleep(rng.uniform(0, takes))
            process.kill()
        assert_sound(setup, before)
        finish_loading(setup)


def load_one(setup: StoreAndUpstream) -> Path:
    """Store one of the images; return a copy of that store."""
    (url,) = [f"{setup.upstream.host}/{REPOSITORY}:stay1"]
    command(setup.daemon, "load", image_list(setup.folder / "one", [url]))
    assert has_all_of(setup.root, setup.published["stay1"])
    copied(setup.root, setup.folder / "first")
    return setup.folder / "first"


@pytest.mark.parametrize("rounds", ROUNDS)
def test_load_through_the_daemon_killed_at_random_times(setup: StoreAndUpstream, tmp_path: Path, rounds: int) -> None:
    """The daemon continues what it has begun, and nothing is fetched twice."""
    with setup.daemon:
        argv = command_line(setup.daemon, *setup.load)
        takes = seconds_of(argv, tmp_path)
        assert setup.has_all()
        rng = random.Random(rounds)
        for _ in range(rounds):
            command(setup.daemon, "prune", r"--pattern=team/app@,team/app:(?!stay1$)")
            before = contents(setup.root)
            assert len(before) == 1
            asked = len(setup.upstream.requests)
            with running_command(argv, tmp_path) as process:
                time.sleep(rng.uniform(0, takes))
                process.kill()
            assert_sound(setup, before)
            finish_loading(setup)
            paths = [one.path for one in setup.upstream.requests[asked:]]
            assert len(paths) == len(set(paths)), sorted(paths)
        assert "Traceback" not in setup.daemon.log


@pytest.mark.parametrize("rounds", ROUNDS)
def test_load_killed_between_changes(setup: StoreAndUpstream, tmp_path: Path, rounds: int) -> None:
    """Several threads take turns in any order, so a number is not always the same change."""
    first = load_one(setup)
    argv = command_line(setup.daemon, *setup.load)
    with traced(setup, argv) as (process, trace):
        assert process.wait(PATIENCE) == 0
        wait_until(lambda: "exited with 0" in trace.text, SOON, "strace ends")
        changes = trace.begun
    assert changes > 50, trace.text
    rng = random.Random(rounds)
    for _ in range(rounds):
        copied(first, setup.root)
        before = contents(setup.root)
        kill_at(setup, argv, rng.randint(1, changes), rng.choice(["delay_enter", "delay_exit"]))
        assert_sound(setup, before)
        finish_loading(setup)
