"""Images that the daemon completes by itself: what the tests of that look at."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.client import fetch
from tests.images import Blob, Manifest
from tests.processes import Daemon, wait_until
from tests.real.scripted import SOON, Cache, blob_file
from tests.upstream import ScriptedRegistry


@contextmanager
def completing_in(folder: Path, *options: str, settings: Mapping[str, object] | None = None) -> Iterator[Cache]:
    """A daemon that completes images, as it does by default, and its scripted upstream, until the block ends.

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
    """What GET /health counts."""
    document: dict[str, int] = json.loads(fetch(f"{daemon.url}/health").body)
    return document


def incomplete(daemon: Daemon) -> tuple[int, int]:
    """How many images are incomplete, and how many bytes they lack, as GET /health tells."""
    document = health(daemon)
    return document["incomplete_images"], document["missing_bytes"]


def pending_file(daemon: Daemon, manifest: Manifest, number: int = 0) -> Path:
    """Where the process with this pulls/<n>/ notes that an image is to be completed."""
    return daemon.image_path / "pulls" / str(number) / f"{manifest.digest.partition(':')[2]}.wish"


def wait_complete(
    daemon: Daemon, blobs: Iterable[Blob], timeout: float = SOON, refused: tuple[int, int] = (0, 0)
) -> None:
    """Return when all is there, metadata too, and nothing is to be fetched any more.

    `refused` are the images that stay incomplete, and the bytes that these lack.
    """
    wait_until(lambda: all(blob_file(daemon, blob.digest).exists() for blob in blobs), timeout, "all blobs")
    wait_until(lambda: incomplete(daemon) == refused, timeout, "nothing else is incomplete")
    wait_until(lambda: health(daemon)["incomplete_indexes"] == 0, timeout, "all metadata")
    wait_until(lambda: not list(daemon.image_path.glob("pulls/*/*.wish")), timeout, "no wish is left")


def lines(daemon: Daemon, level: str, *words: str, since: int = 0) -> list[str]:
    """The lines of the log at this level that say all these words."""
    return [
        line
        for line in daemon.log[since:].splitlines()
        if f"#{level}]" in line and all(word in line for word in words)
    ]
