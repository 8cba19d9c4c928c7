"""Without a link: cached content is served without a packet, and the daemon starts normally."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.client import Response, fetch
from tests.images import Image
from tests.namespaces import NamespacedDaemon, Routed
from tests.processes import wait_until
from tests.real.completing import incomplete
from tests.real.scripted import SOON, assert_error, blob_file, plain_image
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Reply

NAME = "registry.example"
READY = 10.0
"""Seconds within which the daemon starts, with or without a network."""
PROBED = 30.0 + 10.0
"""Seconds within which a restored link is used: from one probe to the next, and for the connection."""
CACHED, HALF, OTHER = (plain_image(f"cut off/{name}", 20_000) for name in ("cached", "half", "other"))


class Place:
    """A daemon on one side of a router, and on the other its upstream, with a name in /etc/hosts alone."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self.network = stack.enter_context(Routed())
        self.upstream = self.network.far.call(lambda: ScriptedRegistry(address=Routed.FAR))
        stack.enter_context(self.upstream)
        for repository, image in {"cached": CACHED, "half": HALF, "other": OTHER}.items():
            self.upstream.add(repository, image, "1")
        self.ns = f"{NAME}:{self.upstream.port}"
        (folder / "resolv.conf").write_text("")
        self.name_upstream(known=True)
        self.daemon = NamespacedDaemon(self.network.near, folder, {self.ns: "http"})
        mounts = "; ".join(f"mount --bind {folder}/{name} /etc/{name}" for name in ("resolv.conf", "hosts"))
        # `ip netns exec` makes a mount namespace for its process.
        start = len(self.network.near.argv([]))
        self.daemon.argv[start:start] = ["sh", "-euc", f'{mounts}; exec "$@"', "sh"]
        stack.enter_context(self.daemon)

    def name_upstream(self, *, known: bool) -> None:
        """Set whether the upstream's name can be looked up."""
        hosts = "127.0.0.1 localhost\n" + (f"{Routed.FAR} {NAME}\n" if known else "")
        # Written in place: the file is mounted.
        (self._folder / "hosts").write_text(hosts)

    def ask(self, path: str) -> Response:
        """Send a request to the daemon."""
        return self.network.near.call(lambda: fetch(f"{self.daemon.url}/v2/{path}?ns={self.ns}"))

    def pull(self, repository: str, image: Image) -> None:
        """Pull as a client does, and expect everything."""
        for reference in ("1", image.manifest.digest):
            assert self.ask(f"{repository}/manifests/{reference}").body == image.manifest.data
        for blob in image.blobs:
            assert self.ask(f"{repository}/blobs/{blob.digest}").body == blob.data

    def incomplete(self) -> int:
        """Return how many images are incomplete."""
        return self.network.near.call(lambda: incomplete(self.daemon))[0]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A daemon with a cached image."""
    with ExitStack() as stack:
        place = Place(tmp_path, stack)
        place.pull("cached", CACHED)
        wait_until(lambda: not place.incomplete(), SOON, "it is whole")
        yield place


def test_not_a_packet_leaves_for_a_hit(place: Place) -> None:
    """The link is a black hole, and probes in the meantime change nothing."""
    with ExitStack() as outage, place.network.sent() as packets:
        outage.enter_context(place.network.outage())
        for _ in range(5):
            place.pull("cached", CACHED)
        assert packets() == 0
        # A packet would be counted; hits work while other clients wait for the upstream.
        with ThreadPoolExecutor(1) as client:
            asked = client.submit(place.ask, "other/manifests/1")
            wait_until(packets, SOON, "a packet for a miss")
            place.pull("cached", CACHED)
            assert not asked.done()
            outage.close()
            assert asked.result().body == OTHER.manifest.data


def test_a_cold_start_without_a_network(place: Place) -> None:
    """With only loopback and no resolver: ready, cached content is served, and the rest when the link is up."""
    stop = place.upstream.script("/v2/half/blobs/*", Reply(503))
    assert place.ask("half/manifests/1").body == HALF.manifest.data
    wait_until(lambda: "is not complete yet" in place.daemon.log, SOON, "it was tried")
    place.daemon.kill()
    stop()
    place.network.near.ip("link", "set", "eth0", "down")
    place.name_upstream(known=False)
    began = time.monotonic()
    place.daemon.start()
    assert time.monotonic() - began < READY
    place.pull("cached", CACHED)
    began = time.monotonic()
    assert_error(place.ask("other/manifests/1"), 503, "UNAVAILABLE")
    assert_error(place.ask(f"half/blobs/{HALF.layers[0].digest}"), 503, "UNAVAILABLE")
    assert time.monotonic() - began < READY
    assert place.incomplete() == 1
    asked = len(place.upstream.requests)

    place.name_upstream(known=True)
    place.network.near.ip("link", "set", "eth0", "up")
    place.network.near.ip("route", "add", "default", "via", "10.77.1.1")
    wait_until(lambda: place.ask("other/manifests/1").status == 200, PROBED, "the link is used")
    place.pull("other", OTHER)
    # Downloads begun by the previous process are also completed.
    wait_until(lambda: not place.incomplete(), PROBED, "all images are whole")
    assert all(blob_file(place.daemon, blob.digest).exists() for blob in HALF.blobs)
    assert all(request.header("Host") == place.ns for request in place.upstream.requests[asked:])
    place.pull("cached", CACHED)
