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
from tests.real.caches import SOON, assert_error, blob_file, plain_image
from tests.real.completions import incomplete
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Reply

NAME = "registry.example"
READY = 10.0
"""Seconds within which the daemon starts, with or without a network."""
PROBED = 30.0 + 10.0
"""Seconds within which a restored link is used: from one probe to the next, and for the connection."""
CACHED, HALF, OTHER = (plain_image(f"cut off/{name}", 20_000) for name in ("cached", "half", "other"))


class RoutedDaemon:
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
def routed_daemon(tmp_path: Path) -> Iterator[RoutedDaemon]:
    """A daemon with a cached image."""
    with ExitStack() as stack:
        routed_daemon = RoutedDaemon(tmp_path, stack)
        routed_daemon.pull("cached", CACHED)
        wait_until(lambda: not routed_daemon.incomplete(), SOON, "the image is complete")
        yield routed_daemon


def test_hit_sends_no_packet_to_the_upstream(routed_daemon: RoutedDaemon) -> None:
    """The link is a black hole, and probes in the meantime change nothing."""
    with ExitStack() as outage, routed_daemon.network.sent() as packets:
        outage.enter_context(routed_daemon.network.outage())
        for _ in range(5):
            routed_daemon.pull("cached", CACHED)
        assert packets() == 0
        # A packet would be counted; hits work while other clients wait for the upstream.
        with ThreadPoolExecutor(1) as client:
            asked = client.submit(routed_daemon.ask, "other/manifests/1")
            wait_until(packets, SOON, "a packet for a miss")
            routed_daemon.pull("cached", CACHED)
            assert not asked.done()
            outage.close()
            assert asked.result().body == OTHER.manifest.data


def test_start_without_a_network(routed_daemon: RoutedDaemon) -> None:
    """With only loopback and no resolver: ready, cached content is served, and the rest when the link is up."""
    stop = routed_daemon.upstream.script("/v2/half/blobs/*", Reply(503))
    assert routed_daemon.ask("half/manifests/1").body == HALF.manifest.data
    wait_until(lambda: "is not complete yet" in routed_daemon.daemon.log, SOON, "completion was tried")
    routed_daemon.daemon.kill()
    stop()
    routed_daemon.network.near.ip("link", "set", "eth0", "down")
    routed_daemon.name_upstream(known=False)
    began = time.monotonic()
    routed_daemon.daemon.start()
    assert time.monotonic() - began < READY
    routed_daemon.pull("cached", CACHED)
    began = time.monotonic()
    assert_error(routed_daemon.ask("other/manifests/1"), 503, "UNAVAILABLE")
    assert_error(routed_daemon.ask(f"half/blobs/{HALF.layers[0].digest}"), 503, "UNAVAILABLE")
    assert time.monotonic() - began < READY
    assert routed_daemon.incomplete() == 1
    asked = len(routed_daemon.upstream.requests)

    routed_daemon.name_upstream(known=True)
    routed_daemon.network.near.ip("link", "set", "eth0", "up")
    routed_daemon.network.near.ip("route", "add", "default", "via", "10.77.1.1")
    wait_until(lambda: routed_daemon.ask("other/manifests/1").status == 200, PROBED, "the link is used")
    routed_daemon.pull("other", OTHER)
    # Downloads begun by the previous process are also completed.
    wait_until(lambda: not routed_daemon.incomplete(), PROBED, "all images are whole")
    assert all(blob_file(routed_daemon.daemon, blob.digest).exists() for blob in HALF.blobs)
    assert all(request.header("Host") == routed_daemon.ns for request in routed_daemon.upstream.requests[asked:])
    routed_daemon.pull("cached", CACHED)
