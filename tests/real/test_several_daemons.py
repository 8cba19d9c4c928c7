"""Two daemons on one store behind one address, as docs/debian.md sets them up for several cores."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client import fetch
from tests.images import Image, make_image
from tests.processes import Daemon, free_port, wait_until
from tests.upstream import ScriptedRegistry

SOON = 30
"""Seconds."""

REQUESTS = 20

# What systemd does for a socket unit with ReusePort=yes.
_SYSTEMD = """
import os, socket, sys
listening = socket.socket(socket.AF_INET6)
listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
listening.bind(("::", int(sys.argv[1])))
listening.listen(1024)
os.dup2(listening.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="ociregistry@1.socket")
os.execv(sys.argv[2], sys.argv[2:])
"""


class ActivatedDaemon(Daemon):
    """A daemon that is given a socket, to whose port other daemons listen too."""

    def __init__(self, folder: Path, registry: ScriptedRegistry, store: Path, port: int) -> None:
        folder.mkdir()
        settings = {"listen": ["systemd:domain=INET6:index=0"]}
        super().__init__(folder, {registry.host: "http"}, settings=settings, image_path=store, port=port)
        option = self.argv.index("--port")
        self.argv[option : option + 2] = []
        self.argv[:0] = [sys.executable, "-c", _SYSTEMD, str(port)]

    def ready(self) -> bool:
        """Whether it has begun to serve; a request might be answered by another daemon."""
        return " started at " in self.log

    @property
    def hits(self) -> int:
        """How many requests it answered from the store."""
        return self.log.count(" hit")


@pytest.fixture
def daemons(tmp_path: Path, upstream: ScriptedRegistry) -> Iterator[tuple[ActivatedDaemon, ActivatedDaemon]]:
    """Two that serve."""
    port = free_port()
    one, two = (ActivatedDaemon(tmp_path / name, upstream, tmp_path / "store", port) for name in ("one", "two"))
    with one, two:
        yield one, two


def test_each_serves_what_either_pulled_and_one_suffices(
    upstream: ScriptedRegistry, daemons: tuple[ActivatedDaemon, ActivatedDaemon]
) -> None:
    image: Image = make_image("several daemons", layer_size=300_000)
    upstream.add("team/app", image, "1")
    one, two = daemons
    paths = {"manifests/1": image.manifest.data, **{f"blobs/{blob.digest}": blob.data for blob in image.blobs}}

    def pulls() -> bool:
        answers = {path: fetch(f"{one.url}/v2/team/app/{path}?ns={upstream.host}") for path in paths}
        assert all(answer.body == paths[path] for path, answer in answers.items() if answer.status == 200)
        return all(answer.status == 200 for answer in answers.values())

    assert pulls()
    upstream.close()
    # The kernel chooses a daemon for each connection.
    wait_until(lambda: all(pulls() for _ in range(REQUESTS)), SOON, "both have all")
    wait_until(lambda: pulls() and one.hits > REQUESTS and two.hits > REQUESTS, SOON, "both answer")
    for killed in (one, two):
        killed.kill()
        assert all(pulls() for _ in range(REQUESTS))
        killed.log_path.unlink()
        killed.start()
