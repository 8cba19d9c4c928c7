"""Two daemons on two machines: on one GlusterFS, or with stores that Syncthing replicates (docs/several-machines.md).

The figures that it has are printed: run with -s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from http.client import HTTPException
from pathlib import Path

import pytest

from tests.images import MIB, Image, digest_of
from tests.peers import missing_package
from tests.processes import wait_until
from tests.real.caches import plain_image, repository_for
from tests.real.gluster import gluster_pair
from tests.real.syncthing import syncthing_pair
from tests.real.two_machines import Pair, Replica
from tests.upstream_rules import Drip, Reply

pytestmark = pytest.mark.long

SOON = 150.0
"""Seconds within which the stores are the same again, on a busy machine."""
LOOKED = 10.0
"""Seconds within which a daemon has looked at its files, on a busy machine; it does so every second."""
SIZE = 5 * MIB

_PAIRS: dict[str, Callable[[Path], AbstractContextManager[Pair]]] = {
    "gluster": gluster_pair,
    "syncthing": syncthing_pair,
}


@pytest.fixture(scope="module", params=_PAIRS)
def machines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two daemons for all tests of this file."""
    if packages := {missing_package(one) for one in ("glusterd", "syncthing", "unshare")} - {None}:
        pytest.fail(f"a peer is missing: apt-get install {' '.join(map(str, packages))}", pytrace=False)
    with _PAIRS[request.param](tmp_path_factory.mktemp("machines") / request.param) as pair:
        yield pair


@pytest.fixture
def pair(machines: Pair) -> Iterator[Pair]:
    """The daemons; neither may log an error, other than the answers of `assert_hit`."""
    since = {replica: len(replica.failures()) for replica in machines.both}
    yield machines
    for replica in machines.both:
        failures = replica.failures()[since[replica] :]
        assert [line for line in failures if "the upstream answered 404" not in line] == []


@pytest.fixture
def repository(request: pytest.FixtureRequest) -> str:
    """A repository for this test alone."""
    return repository_for(request.node.name)


def report(pair: Pair, text: str) -> None:
    """Print a figure."""
    print(f"\n{'GlusterFS' if pair.shared else 'Syncthing'}: {text}")  # noqa: T201  # it is for the documentation


def seconds(started: float) -> str:
    """Return the time since `started`, as a figure."""
    return f"{time.monotonic() - started:.2f} s"


def published(pair: Pair, repository: str, tag: str, size: int = SIZE) -> Image:
    """Publish an image upstream."""
    image = plain_image(f"{repository} {tag}", size)
    pair.upstream.add(repository, image, tag)
    return image


def wait_same(pair: Pair) -> None:
    """Return when both daemons list the same, and nothing is left to replicate or to fetch."""
    wait_until(pair.agree, SOON, "both list the same")
    for replica in pair.both:
        wait_until(lambda replica=replica: not replica.health()["incomplete_images"], SOON, "whole images")  # type: ignore[misc]  # mypy infers no type for a default


def assert_hit(pair: Pair, replica: Replica, repository: str, image: Image, tag: str = "1") -> None:
    """Check that all of an image is served without the upstream, as soon as the daemon has looked at its files."""

    def served() -> bool:
        return replica.means(repository, tag) == image.manifest.digest and replica.has(repository, image, tag)

    restore = pair.upstream.script(f"/v2/{repository}/*", Reply(404))
    try:
        wait_until(served, LOOKED, f"{tag} is served")
    finally:
        restore()


def assert_sent_at_most_twice(pair: Pair, *images: Image, lost: int = 0) -> None:
    """Check that the upstream sent each layer once to each daemon at most, and `lost` bytes beside."""
    for image in images:
        for layer in image.layers:
            assert pair.upstream.bytes_sent(layer.digest) <= 2 * len(layer.data) + lost


def knows(replica: Replica, image: Image, before: int) -> bool:
    """Tell whether a daemon has the image, and tells of more images than `before`."""
    return replica.holds(image) and replica.health()["images"] > before


def test_each_sees_what_the_other_pulled(pair: Pair, repository: str) -> None:
    for number in range(5):
        image = published(pair, repository, str(number))
        there, here = pair.both if number % 2 else reversed(pair.both)
        images = here.health()["images"]
        assert there.has(repository, image, str(number))
        wait_until(partial(there.holds, image), SOON, "it is stored")
        began = time.monotonic()
        wait_until(partial(knows, here, image, images), SOON, "the other one knows it")
        report(pair, f"an image of 5 MiB was seen by the other machine after {seconds(began)}")
        wait_same(pair)
        assert_hit(pair, here, repository, image, str(number))
        report(pair, f"times that the upstream sent it: {pair.sent(image).values()}")
        assert_sent_at_most_twice(pair, image)


def test_both_pull_at_once(pair: Pair, repository: str) -> None:
    same = [published(pair, repository, f"same{number}") for number in range(3)]
    others = {replica: published(pair, repository, f"of-{replica.port}") for replica in pair.both}
    with ThreadPoolExecutor(8) as clients:
        pulls = [
            clients.submit(replica.has, repository, image, f"same{number}")
            for number, image in enumerate(same)
            for replica in pair.both
        ]
        pulls += [
            clients.submit(replica.has, repository, image, f"of-{replica.port}") for replica, image in others.items()
        ]
        assert all(pull.result() for pull in pulls)
    wait_same(pair)
    for replica in pair.both:
        for number, image in enumerate(same):
            assert_hit(pair, replica, repository, image, f"same{number}")
        for other, image in others.items():
            assert_hit(pair, replica, repository, image, f"of-{other.port}")
    assert_sent_at_most_twice(pair, *same, *others.values())


def test_names_of_one_image_that_both_note_at_once(pair: Pair, repository: str) -> None:
    """One volume: none is lost. Replicas: they agree, and what they do not know they ask for again."""
    image = published(pair, repository, "0", 10_000)
    for number in range(1, 20):
        pair.upstream.add(repository, image, str(number))
    with ThreadPoolExecutor(4) as clients:
        asked = clients.map(lambda number: pair.both[number % 2].has(repository, image, str(number)), range(20))
        assert all(asked)
    wait_same(pair)
    known = sum(f"/{repository}:" in url for url in pair.one.listed())
    report(pair, f"of 20 names that both noted in one record at once, {known} are known")
    if pair.shared:
        assert known == 20
    for replica in pair.both:
        assert all(replica.has(repository, image, str(number)) for number in range(20))
    assert_sent_at_most_twice(pair, image)


@pytest.mark.parametrize("machines", ["syncthing"], indirect=True)
def test_conflict_files_and_temporaries_are_ignored(pair: Pair, repository: str) -> None:
    """A conflict file that Syncthing copies, with a whole record in it, and temporaries of both folders."""
    image = published(pair, repository, "0", 10_000)
    assert pair.one.has(repository, image, "0")
    wait_same(pair)
    digest = image.manifest.digest[7:]
    record = (pair.one.files / "img" / digest).read_bytes()
    conflict = pair.one.files / "img" / f"{digest}.sync-conflict-20260101-120000-ABCDEFG"
    conflict.write_bytes(record.replace(f"{repository}:0".encode(), f"{repository}:never".encode()))
    for replica in pair.both:
        for folder in ("img", "blobs"):
            (replica.files / folder / f".syncthing.{digest}.tmp").write_bytes(b"half")
    wait_until(lambda: len(conflicts(pair, image)) == 2, SOON, "both have the conflict file")
    wait_same(pair)
    assert names(pair, repository) == {f"{repository}:0"}
    counts = {(health["lists"], health["images"], health["status"]) for health in map(Replica.health, pair.both)}
    assert len(counts) == 1
    for replica in pair.both:
        assert_hit(pair, replica, repository, image, "0")
        assert "conflict" not in replica.log
        assert ".tmp" not in replica.log
        replica.command("verify")
        replica.command("prune", "--pattern", f"{repository}:never$")
    assert len(conflicts(pair, image)) == 2


def conflicts(pair: Pair, image: Image) -> list[Path]:
    """Return the conflict files of the record of an image."""
    name = f"{image.manifest.digest[7:]}.sync-conflict-*"
    return [path for replica in pair.both for path in (replica.files / "img").glob(name)]


def test_moved_tag(pair: Pair, repository: str) -> None:
    first = published(pair, repository, "1")
    assert pair.one.has(repository, first)
    wait_same(pair)
    assert_hit(pair, pair.two, repository, first)
    second = plain_image(f"{repository} moved", SIZE)
    pair.upstream.add(repository, second, "1")
    assert_hit(pair, pair.two, repository, first)
    pair.two.command("prune", "--pattern", f"{repository}:1$")
    wait_until(lambda: pair.two.means(repository, "1") == second.manifest.digest, SOON, "the second asks anew")
    assert pair.two.has(repository, second)
    wait_same(pair)
    for replica in pair.both:
        assert_hit(pair, replica, repository, second)
    assert_sent_at_most_twice(pair, first, second)


def test_pruned_on_one(pair: Pair, repository: str) -> None:
    """It is gone on both, or whole on both, also while clients of the other one pull it; it comes again."""
    images = [published(pair, repository, str(number)) for number in range(4)]
    for number, image in enumerate(images):
        assert pair.both[number % 2].has(repository, image, str(number))
    wait_same(pair)
    with ThreadPoolExecutor(2) as clients:
        pulling = clients.submit(
            lambda: [pair.two.has(repository, images[number % 2], str(number % 2)) for number in range(20)]
        )
        pair.one.command("prune", "--pattern", f"{repository}:[0-2]$")
        assert all(pulling.result())
    wait_same(pair)
    report(pair, f"left of 3 pruned images while another pulled two of them: {names(pair, repository)}")
    assert f"{repository}:3" in names(pair, repository)
    assert f"{repository}:2" not in names(pair, repository)
    for replica in pair.both:
        for number, image in enumerate(images):
            assert replica.has(repository, image, str(number))
    wait_same(pair)
    for replica in pair.both:
        replica.command("verify")
        assert len(names(pair, repository)) == 4


def names(pair: Pair, repository: str) -> set[str]:
    """Return the names of this repository that both list, without the upstream."""
    return {url.partition("/")[2] for url in pair.one.listed() if f"/{repository}:" in url}


def test_killed_in_a_pull(pair: Pair, repository: str) -> None:
    image = published(pair, repository, "1", 8 * MIB)
    layer = image.layers[0]
    slow = pair.upstream.script(f"*{layer.digest}", Drip(2 * MIB))
    try:
        assert pair.two.ask(f"{repository}/manifests/1").status == 200
        with ThreadPoolExecutor(1) as clients:
            pulling = clients.submit(pair.two.ask, f"{repository}/blobs/{layer.digest}")
            wait_until(lambda: pair.upstream.bytes_sent(layer.digest) > 3 * MIB, SOON, "some of it")
            pair.two.kill()
            with pytest.raises((OSError, HTTPException)):
                pulling.result()
    finally:
        slow()
    assert not (pair.one.files / "blobs" / layer.digest[7:]).exists()
    assert pair.one.has(repository, image)
    began = time.monotonic()
    pair.two.start()
    report(pair, f"started again after {seconds(began)}")
    wait_same(pair)
    for replica in pair.both:
        assert_hit(pair, replica, repository, image)
    # What the killed daemon had received, but not written yet, is sent again.
    assert_sent_at_most_twice(pair, image, lost=2 * MIB)


def test_split(pair: Pair, repository: str) -> None:
    """Each serves and pulls alone; afterwards both have all, the newer meaning of a tag, and no half image."""
    before, pruned = (published(pair, repository, tag) for tag in ("before", "pruned"))
    first = published(pair, repository, "moved")
    for tag, image in (("before", before), ("pruned", pruned), ("moved", first)):
        assert pair.one.has(repository, image, tag)
    wait_same(pair)
    ours, theirs, both = (published(pair, repository, tag) for tag in ("ours", "theirs", "both"))
    with pair.network.split():
        for replica in pair.both:
            for _ in range(2):
                began = time.monotonic()
                assert_hit(pair, replica, repository, before, "before")
                report(pair, f"a hit in the split took {seconds(began)}")
        began = time.monotonic()
        with ThreadPoolExecutor(4) as clients:
            asked = [
                clients.submit(replica.has, repository, image, tag)
                for replica, image, tag in (
                    (pair.one, ours, "ours"),
                    (pair.two, theirs, "theirs"),
                    (pair.one, both, "both"),
                    (pair.two, both, "both"),
                )
            ]
            assert all(pull.result() for pull in asked)
        report(pair, f"two pulls on each side in the split took {seconds(began)}")
        pair.one.command("prune", "--pattern", f"{repository}:pruned$")
        second = plain_image(f"{repository} moved again", SIZE)
        pair.upstream.add(repository, second, "moved")
        pair.two.command("prune", "--pattern", f"{repository}:moved$")
        wait_until(lambda: pair.two.means(repository, "moved") == second.manifest.digest, SOON, "it asks anew")
        assert pair.two.has(repository, second, "moved")
        assert pair.one.means(repository, "moved") == first.manifest.digest
    began = time.monotonic()
    wait_same(pair)
    report(pair, f"both list the same {seconds(began)} after the split: {sorted(names(pair, repository))}")
    images = {"before": before, "ours": ours, "theirs": theirs, "both": both, "moved": second}
    for replica in pair.both:
        for tag, image in images.items():
            assert_hit(pair, replica, repository, image, tag)
    assert_sent_at_most_twice(pair, *images.values())
    for replica in pair.both:
        assert replica.has(repository, pruned, "pruned")
    wait_same(pair)
    for replica in pair.both:
        replica.command("verify")


def test_hits_are_as_fast_as_the_file_system(pair: Pair, repository: str, tmp_path: Path) -> None:
    """Print what a large layer takes, the first time and from memory, beside a read of the file."""
    image = published(pair, repository, "1", 200 * MIB)
    layer = image.layers[0]
    assert pair.one.has(repository, image)
    wait_same(pair)
    for replica in pair.both:
        for _ in range(3):
            began = time.monotonic()
            answer = replica.ask(f"{repository}/blobs/{layer.digest}")
            rate = len(layer.data) / MIB / (time.monotonic() - began)
            report(pair, f"a layer of 200 MiB at {rate:.0f} MiB/s")
            assert digest_of(answer.body) == layer.digest
