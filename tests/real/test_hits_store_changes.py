"""Remembered answers while other programs change the store's files: none is stale for long, and space is freed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.images import Image
from tests.processes import run, wait_until
from tests.procfs import descriptors
from tests.real.caches import SEEN, Cache, blob_file, pull, record
from tests.real.stores import command
from tests.upstream_rules import Reply

FROM_CACHE = ("serving manifest from cache: ", "serving blob from cache: ")
"""What the usual way logs of a hit, and the short way does not."""

Change = Callable[[Cache, str, Image], object]


def remember(cache: Cache, path: str) -> None:
    """Have the daemon answer this by the short way."""

    def is_short() -> bool:
        before = sum(cache.daemon.log.count(words) for words in FROM_CACHE)
        assert cache.ask(path).status == 200
        return sum(cache.daemon.log.count(words) for words in FROM_CACHE) == before

    assert cache.ask(path).status == 200
    wait_until(is_short, SEEN, f"{path} is answered by the short way")


def is_missed(cache: Cache, path: str) -> bool:
    """Tell whether the next request for this asks the upstream, which does not answer."""
    return cache.ask(path).status == 503


def remove_record(cache: Cache, repository: str, image: Image) -> None:
    """Remove the record."""
    run(["rm", str(record(cache, image.manifest))])


def remove_blobs(cache: Cache, repository: str, image: Image) -> None:
    """Remove all blobs."""
    run(["rm", *(str(blob_file(cache.daemon, blob.digest)) for blob in image.blobs)])


def replace_blobs(cache: Cache, repository: str, image: Image) -> None:
    """Put shorter files in the place of the blobs, as rsync does."""
    for blob in image.blobs:
        path = blob_file(cache.daemon, blob.digest)
        path.with_suffix(".new").write_bytes(blob.data[:-1])
        path.with_suffix(".new").rename(path)


def prune(cache: Cache, repository: str, image: Image) -> None:
    """Prune the image by a command."""
    command(cache.daemon, "prune", "--pattern", f"{cache.upstream.host}/{repository}:")


def move(cache: Cache, repository: str, image: Image) -> None:
    """Move all files of the store away."""
    for folder in ("img", "fat", "blobs"):
        at: Path = cache.daemon.image_path / folder
        run(["mv", str(at), f"{at}.away"])


CHANGES: list[tuple[Change, set[str]]] = [
    (remove_record, {"manifests"}),
    (remove_blobs, {"blobs"}),
    (replace_blobs, {"blobs"}),
    (prune, {"manifests", "blobs"}),
    (move, {"manifests", "blobs"}),
]
"""What is done, and what is gone then."""


@pytest.mark.parametrize(("change", "gone"), CHANGES, ids=[change.__name__ for change, _ in CHANGES])
def test_change(cache: Cache, repository: str, image: Image, change: Change, gone: set[str]) -> None:
    pull(cache, repository, image)
    manifests = [f"{repository}/manifests/1", f"{repository}/manifests/{image.manifest.digest}"]
    blobs = [f"{repository}/blobs/{blob.digest}" for blob in image.blobs]
    paths = [*manifests, *blobs]
    for path in paths:
        remember(cache, path)
    with cache.scripted(f"/v2/{repository}/*", Reply(503)):
        change(cache, repository, image)
        for path in paths:
            if path.split("/")[-2] in gone:
                wait_until(partial(is_missed, cache, path), SEEN, f"{path} is a miss")
        for path in paths:
            assert (cache.ask(path).status == 503) == (path.split("/")[-2] in gone)
    if "blobs" not in gone:
        return
    files = [str(blob_file(cache.daemon, blob.digest)) for blob in image.blobs]
    wait_until(
        lambda: not [link for link in descriptors(cache.daemon.process.pid) if link.startswith(tuple(files))],
        SEEN,
        "the files are closed, so that the disk has their space",
    )
    pull(cache, repository, image)
