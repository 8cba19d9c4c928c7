"""Chains: our daemon with a bad mirror near it, and with the registry behind the bad link."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench.badlink_caches import REPOSITORY, TAG, Cache, Place, below_v2, ours
from tests.client import fetch
from tests.processes import Daemon, free_port, wait_until
from tests.upstream import ScriptedRegistry
from tests.upstream_http import Rule
from tests.upstream_rules import Reply, Resize

_DAMAGE = b"damaged"
_STORED_WITHIN = 30.0
"""Seconds."""
_HTML = Reply(200, b"<html><body>Please log in.</body></html>", (("Content-Type", "text/html"),))


@contextmanager
def _damaged(place: Place, port: int) -> Iterator[None]:
    """Run a daemon that has the image, got without the bad link, with wrong bytes at both ends of each blob.

    It serves them, as only `verify` reads stored blobs again.
    """
    folder = place.folder / "mirror"
    folder.mkdir()
    sources = {place.link: {"scheme": "http", "mirrors": [place.registry.url]}}
    with Daemon(folder, sources, "--log-level", "warn", port=port) as daemon:
        fetch(below_v2(daemon, place, f"{REPOSITORY}/manifests/{TAG}"))
        for blob in place.image.blobs:
            fetch(below_v2(daemon, place, f"{REPOSITORY}/blobs/{blob.digest}"))
            _damage(daemon.image_path / "blobs" / blob.digest.removeprefix("sha256:"))
        yield


def _damage(path: Path) -> None:
    wait_until(path.exists, _STORED_WITHIN, str(path))
    with path.open("r+b") as file:
        for offset, whence in ((0, os.SEEK_SET), (-len(_DAMAGE), os.SEEK_END)):
            file.seek(offset, whence)
            file.write(_DAMAGE)


@contextmanager
def _scripted(place: Place, rule: Rule, port: int) -> Iterator[None]:
    """Run a registry that has the image, and answers each GET by this rule."""
    with ScriptedRegistry(port=port) as mirror:
        mirror.add(REPOSITORY, place.image, TAG)
        mirror.script("*", rule, method="GET")
        yield


def _behind(place: Place, mirror: Callable[[int], AbstractContextManager[None]]) -> Cache:
    port = free_port()
    return replace(ours(place, f"http://127.0.0.1:{port}"), mirror=mirror(port))


CHAINS: dict[str, Callable[[Place], Cache]] = {
    "damaged": lambda place: _behind(place, partial(_damaged, place)),
    "short": lambda place: _behind(place, partial(_scripted, place, Resize(-1))),
    "html": lambda place: _behind(place, partial(_scripted, place, _HTML)),
}
"""Our daemon with a mirror that serves wrong bytes, sends each body one byte short, or sends an HTML page."""
