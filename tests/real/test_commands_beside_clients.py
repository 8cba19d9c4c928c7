"""`prune`, `load` and `verify` beside a daemon while containerd and other clients pull."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.client import fetch
from tests.disk_faults import need
from tests.images import Image, Index, digest_of, make_image, make_index
from tests.peers import Containerd, hosts_dir
from tests.processes import Daemon, wait_until
from tests.real.caches import daemon_in
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

KEPT, PRUNED = "team/kept", "team/going"
"""The repository that no pattern names, and the one that is pruned repeatedly."""


@dataclass(frozen=True)
class DaemonAndUpstream:
    """A daemon, and the content of its upstream; images of both repositories share layers."""

    daemon: Daemon
    upstream: ScriptedRegistry
    published: Mapping[str, Mapping[str, Image | Index]]
    """Repository -> tag -> image or index."""
    pulled: list[str] = field(default_factory=list)
    """The complete, correct pulls of clients."""

    @property
    def host(self) -> str:
        """The upstream's name."""
        return self.upstream.host

    def url(self, repository: str, tag: str) -> str:
        """Return the image URL."""
        return f"{self.host}/{repository}:{tag}"

    def urls(self, *repositories: str) -> list[str]:
        """Return all image URLs of these repositories."""
        return [self.url(repository, tag) for repository in repositories for tag in self.published[repository]]

    @property
    def root(self) -> Path:
        """The store's folder."""
        return self.daemon.image_path


def published() -> dict[str, dict[str, Image | Index]]:
    """Make images on common layers, indexes with common images, and one image in both repositories."""
    base = make_image("operating/base", layers=3, layer_size=200_000)
    images = [make_image(f"operating/{number}", base=base, layer_size=50_000) for number in range(5)]
    lists = [make_index(f"operating/list/{number}", layer_size=20_000) for number in range(3)]
    shared = make_index("operating/shared")
    return {
        KEPT: {"v0": images[0], "v1": images[1], "list": lists[0], "shared": shared, "same": images[4]},
        PRUNED: {
            **dict(zip(("v2", "v3", "v4", "list", "old"), [*images[2:], *lists[1:]], strict=True)),
            "shared": shared,
        },
    }


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[DaemonAndUpstream]:
    """Everything is at the upstream, nothing is cached."""
    with ScriptedRegistry() as upstream:
        everything = published()
        for repository, tags in everything.items():
            for tag, what in tags.items():
                upstream.add(repository, what, tag)
        with daemon_in(tmp_path, upstream) as daemon:
            yield DaemonAndUpstream(daemon, upstream, everything)


def pull_by_http(setup: DaemonAndUpstream, rng: random.Random) -> None:
    """Pull an image by HTTP, and check all digests."""
    repository = rng.choice([KEPT, PRUNED])
    tag, what = rng.choice(list(setup.published[repository].items()))
    base, ns = f"{setup.daemon.url}/v2/{repository}", f"?ns={setup.host}"
    answer = fetch(f"{base}/manifests/{tag}{ns}")
    assert (answer.status, answer.body) == (200, what.manifest.data), (tag, answer.status, setup.daemon.log[-3000:])
    images = (what,) if isinstance(what, Image) else (what.images[0],)
    blobs = [f"blobs/{blob.digest}" for blob in images[0].blobs]
    for path in (f"manifests/{images[0].manifest.digest}", *rng.sample(blobs, len(blobs))):
        answer = fetch(f"{base}/{path}{ns}")
        assert answer.status == 200, (path, answer.status, setup.daemon.log[-3000:])
        assert digest_of(answer.body) == path.rpartition("/")[2]
    setup.pulled.append(tag)


def pull_by_containerd(setup: DaemonAndUpstream, rng: random.Random, containerd: Containerd, hosts: Path) -> None:
    """Pull by containerd, which verifies every digest."""
    url = rng.choice(setup.urls(KEPT, PRUNED))
    done = containerd.pull(url, hosts)
    assert done.returncode == 0, f"{url}: {done.stderr}\n{setup.daemon.log[-3000:]}"
    assert containerd.unpacked(url)
    containerd.remove(url)
    setup.pulled.append(url)


@contextmanager
def repeated(clients: ThreadPoolExecutor, *pulls: Callable[[], None]) -> Iterator[None]:
    """Repeat each of these until the block ends.

    Raises:
        Exception: the first error of a client.
    """
    enough = threading.Event()

    def loop(pull: Callable[[], None]) -> None:
        while not enough.is_set():
            pull()

    looping: list[Future[None]] = [clients.submit(loop, pull) for pull in pulls]
    try:
        yield
        for one in looping:
            assert not one.done() or one.exception() is None, one.exception()
    finally:
        enough.set()
        for one in looping:
            one.result()


def run_prune(setup: DaemonAndUpstream, rng: random.Random) -> None:
    """Prune by one or several patterns for some of the images."""
    tags = rng.sample(list(setup.published[PRUNED]), rng.randint(1, 3))
    patterns = f"/going:({'|'.join(tags)})$", ",".join(f"{PRUNED}:{tag}$" for tag in tags), "team/going[@:]"
    done = command(setup.daemon, "prune", f"--pattern={rng.choice(patterns)}")
    assert KEPT not in done.stdout


def run_load(setup: DaemonAndUpstream, rng: random.Random) -> None:
    """Load all or some images."""
    urls = setup.urls(KEPT, PRUNED)
    listed = image_list(setup.root.parent / f"list-{rng.random()}", rng.sample(urls, rng.randint(1, len(urls))))
    platforms = rng.choice(["linux/amd64", "linux/amd64,linux/arm64", "all"])
    done = command(setup.daemon, "load", f"--platform={platforms}", f"--concurrent={rng.choice([1, 4])}", listed)
    assert "0 failed" in done.stdout


def run_verify(setup: DaemonAndUpstream, rng: random.Random) -> None:
    """Verify: nothing is damaged; blobs missing during a pull are repaired, or set the exit status."""
    if rng.choice([True, False]):
        assert_verify_finds_no_damage(setup.daemon)
    else:
        assert ", 0 damaged" in command(setup.daemon, "verify", "--repair").stdout


def records_of(setup: DaemonAndUpstream, repository: str) -> dict[str, frozenset[str]]:
    """Return the image URLs in this repository of each record."""
    begins = f"{setup.host}/{repository}"
    found = {
        digest: frozenset(url for url in kept.images if url.startswith((f"{begins}:", f"{begins}@")))
        for digest, kept in contents(setup.root).items()
    }
    return {digest: urls for digest, urls in found.items() if urls}


def assert_nothing_is_lost(setup: DaemonAndUpstream, before: Contents, names: dict[str, frozenset[str]]) -> None:
    """Assert that nothing was lost since these were the store's contents."""
    assert not lost_blobs(before, contents(setup.root))
    now = records_of(setup, KEPT)
    for digest, urls in names.items():
        assert urls <= now.get(digest, frozenset()), (digest, urls)
    for what in setup.published[KEPT].values():
        assert has_all_of(setup.root, what)
    # This includes blobs that a client has fetched again in the meantime.
    needed = {blob.digest for what in setup.published[KEPT].values() for blob in what.blobs}
    asked = Counter(one.path.rpartition("/")[2] for one in setup.upstream.requests)
    assert all(asked[digest] == 1 for digest in needed), asked
    assert all(count == 1 for path, count in manifests_asked(setup).items() if f"/{KEPT}/" in path)


def manifests_asked(setup: DaemonAndUpstream) -> Counter[str]:
    """Count the upstream's requests for each manifest."""
    return Counter(one.path for one in setup.upstream.requests if "/manifests/" in one.path)


@pytest.mark.parametrize(
    ("seed", "rounds"),
    [(1, 10), *(pytest.param(seed, 100, marks=pytest.mark.long) for seed in (2, 3))],
)
def test_commands_beside_clients_lose_nothing_and_serve_correct_content(
    setup: DaemonAndUpstream, containerd: Containerd, tmp_path: Path, seed: int, rounds: int
) -> None:
    """Neither clients nor the store lose or get wrong content while commands run."""
    hosts = hosts_dir(tmp_path / "certs.d", setup.daemon.url, "_default")
    rng = random.Random(seed)
    command(setup.daemon, "load", "--platform=all", image_list(tmp_path / "list", setup.urls(KEPT)))
    told = random.Random(seed + 1000), random.Random(seed + 2000), random.Random(seed + 3000)
    with (
        ThreadPoolExecutor() as clients,
        repeated(
            clients,
            lambda: pull_by_containerd(setup, told[0], containerd, hosts),
            lambda: pull_by_http(setup, told[1]),
            lambda: pull_by_http(setup, told[2]),
        ),
    ):
        for number in range(rounds):
            # Each command runs in the first rounds, and randomly afterwards; sometimes two run at once.
            first = (
                (run_prune, run_load, run_verify)[number]
                if number < 3
                else rng.choice([run_prune, run_load, run_verify])
            )
            jobs = [first, *([rng.choice([run_load, run_verify, run_prune])] if rng.random() < 0.5 else [])]
            before, names = contents(setup.root), records_of(setup, KEPT)
            seeds = [random.Random(rng.random()) for _ in jobs]
            running = [clients.submit(job, setup, chance) for job, chance in zip(jobs, seeds, strict=True)]
            for one in running:
                one.result()
            assert_nothing_is_lost(setup, before, names)
    assert len(setup.pulled) >= rounds
    assert_blobs_match_their_digests(setup.root)
    # With everything pruned, the rest is complete, and no unneeded blob is left.
    command(setup.daemon, "prune", "--pattern=team/going[@:]")
    assert all(has_all_of(setup.root, what) for what in setup.published[KEPT].values())
    assert records_of(setup, PRUNED) == {}
    kept = {hex_of(manifest.digest) for what in setup.published[KEPT].values() for manifest in what.manifests}
    assert contents(setup.root).keys() == kept


def test_import_keeps_blobs_it_found_during_a_prune(setup: DaemonAndUpstream, tmp_path: Path) -> None:
    """The images that the existing blobs belonged to are pruned before the import ends."""
    need("strace")
    urls = setup.urls(PRUNED)
    kept, going = setup.published[KEPT]["v0"], setup.published[PRUNED]["v2"]
    command(setup.daemon, "load", image_list(tmp_path / "list", [setup.url(KEPT, "v0")]))
    archive = str(tmp_path / "carried.tar")
    command(setup.daemon, "export", "--pattern=team/kept:v0$", "-o", archive)
    command(setup.daemon, "load", image_list(tmp_path / "list", [url for url in urls if url.endswith(":v2")]))
    command(setup.daemon, "prune", "--pattern=team/kept")
    assert hex_of(going.manifest.digest) in contents(setup.root)
    # It has found the shared layers in the store, and is about to rename the files that it brought.
    trace = tmp_path / "strace"
    layer = hex_of(kept.blobs[-1].digest)
    slowly = ["-e", "trace=/^rename", "-e", "inject=/^rename:delay_enter=8000000:when=1"]
    pulls = setup.root / "pulls" / "1" / f"{layer}.staged"
    argv = ["strace", "-D", "-f", "-o", str(trace), *slowly, "-P", str(pulls)]
    with running_command([*argv, *command_line(setup.daemon, "load", archive)], tmp_path) as load:
        wait_until(
            lambda: trace.exists() and layer in trace.read_text(),
            PATIENCE,
            "the image's own layer is about to be renamed",
        )
        command(setup.daemon, "prune", "--pattern=team/going")
        assert load.wait(PATIENCE) == 0
    assert "1 loaded" in (tmp_path / "stdout").read_text()
    assert has_all_of(setup.root, kept)
