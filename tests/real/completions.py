"""Daemons that complete images, and the state of completion."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.client import fetch
from tests.images import Blob, Manifest
from tests.processes import Daemon, wait_until
from tests.real.caches import SOON, Cache, blob_file
from tests.upstream import ScriptedRegistry


@contextmanager
def completing_in(folder: Path, *options: str, settings: Mapping[str, object] | None = None) -> Iterator[Cache]:
    """Run a daemon that completes images, as is the default, and its scripted upstream, until the block ends.

    `settings` are further keys of its configuration file.
    """
    with (
        ScriptedRegistry() as upstream,
        Daemon(folder, {upstream.host: "http"}, *options, settings=settings) as daemon,
    ):
        yield Cache(daemon, upstream)
        assert daemon.running, daemon.log
    assert "Traceback (most recent call last)" not in daemon.log
    assert "unhandled error" not in daemon.log.lower()


def health(daemon: Daemon) -> dict[str, int]:
    """Return the counts of GET /health."""
    document: dict[str, int] = json.loads(fetch(f"{daemon.url}/health").body)
    return document


def incomplete(daemon: Daemon) -> tuple[int, int]:
    """Return how many images are incomplete, and how many bytes they lack, according to GET /health."""
    document = health(daemon)
    return document["incomplete_images"], document["missing_bytes"]


def pending_file(daemon: Daemon, manifest: Manifest, number: int = 0) -> Path:
    """Return the file of the pending image in pulls/<number>/."""
    return daemon.image_path / "pulls" / str(number) / f"{manifest.digest.partition(':')[2]}.wish"


def wait_complete(
    daemon: Daemon, blobs: Iterable[Blob], timeout: float = SOON, refused: tuple[int, int] = (0, 0)
) -> None:
    """Return when these blobs and all metadata are stored, and no completion remains.

    `refused` is how many images stay incomplete, and how many bytes these lack.
    """
    wait_until(lambda: all(blob_file(daemon, blob.digest).exists() for blob in blobs), timeout, "all blobs")
    wait_until(lambda: incomplete(daemon) == refused, timeout, "nothing else is incomplete")
    wait_until(lambda: health(daemon)["incomplete_indexes"] == 0, timeout, "all metadata")
    wait_until(lambda: not list(daemon.image_path.glob("pulls/*/*.wish")), timeout, "no pending image is left")


def log_lines(daemon: Daemon, level: str, *words: str, since: int = 0) -> list[str]:
    """Return the log lines at this level that contain all these words."""
    return [
        line
        for line in daemon.log[since:].splitlines()
        if f"#{level}]" in line and all(word in line for word in words)
    ]
