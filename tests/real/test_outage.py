"""A silent outage of the link: a router drops packets for a while."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.client import fetch
from tests.images import MIB
from tests.namespaces import NamespacedDaemon, Routed
from tests.processes import wait_until
from tests.real.caches import SOON, blob_file, plain_image
from tests.upstream_process import upstream_in

REPOSITORY = "outage"
SIZE = 30 * MIB
RATE = 4 * MIB

QUICK = 5.0
"""Seconds; an answer while the link is known to be down takes no time."""
RESUMED_WITHIN = 10.0
"""Seconds after the outage within which bytes flow again."""
PROBED = 30.0 + 10.0
"""Seconds after it within which a new request succeeds: from one probe to the next, and for its connection."""


@pytest.fixture
def network() -> Iterator[Routed]:
    """The daemon's side, a router, and the upstream's side."""
    with Routed() as network:
        yield network


class Client(threading.Thread):
    """Pulls one blob as containerd does: an answer that ends short is resumed with Range."""

    def __init__(self, network: Routed, daemon: NamespacedDaemon, target: str) -> None:
        super().__init__()
        self._network = network
        self._daemon = daemon
        self._target = target
        self._hasher = hashlib.sha256()
        self.received = 0
        self.requests = 0
        self.problem: BaseException | None = None

    @property
    def digest(self) -> str:
        """The digest of the received bytes."""
        return f"sha256:{self._hasher.hexdigest()}"

    def run(self) -> None:
        try:
            while self.received < SIZE:
                self._ask()
        except BaseException as problem:
            self.problem = problem

    def _ask(self) -> None:
        self.requests += 1
        address = "127.0.0.1", self._daemon.port
        with closing(HTTPConnection(*address)) as connection:
            connection.sock = self._network.near.call(lambda: socket.create_connection(address, timeout=120))
            headers = {"Range": f"bytes={self.received}-"} if self.received else {}
            connection.request("GET", self._target, headers=headers)
            with connection.getresponse() as answer:
                assert answer.status == (206 if self.received else 200), answer.read()
                assert answer.headers["Content-Length"] == str(SIZE - self.received)
                # The received bytes, without waiting for more; none at the end, also when that comes early.
                while data := answer.read1(64 * 1024):
                    self._hasher.update(data)
                    self.received += len(data)


def status(network: Routed, daemon: NamespacedDaemon, path: str) -> int:
    """Return the status of a new request."""
    return network.near.call(lambda: fetch(f"{daemon.url}{path}")).status


@pytest.mark.parametrize("seconds", [20, pytest.param(180, marks=pytest.mark.long)])
def test_download_survives_a_silent_outage(network: Routed, tmp_path: Path, seconds: int) -> None:
    """A download waits for the end of the outage, and resumes at once; then other requests work again."""
    layer = plain_image(REPOSITORY, SIZE).blobs[1]
    with (
        upstream_in(network.far, network.FAR, REPOSITORY, SIZE, RATE) as upstream,
        NamespacedDaemon(network.near, tmp_path, {upstream.host: "http"}) as daemon,
    ):
        ns = quote(upstream.host, safe="")
        client = Client(network, daemon, f"/v2/{REPOSITORY}/blobs/{layer.digest}?ns={ns}")
        fresh = f"/v2/{REPOSITORY}/manifests/1?ns={ns}"
        client.start()
        wait_until(lambda: client.received > SIZE // 4 or client.problem, SOON * 3, "a quarter is here")
        with network.outage():
            began, had = time.monotonic(), client.received
            # The outage has a fixed length; the daemon has noticed it well before its end.
            time.sleep(seconds - QUICK)
            assert status(network, daemon, fresh) == 503
            time.sleep(max(0.0, began + seconds - time.monotonic()))
            waiting = client.received
            assert client.is_alive(), client.problem
            assert waiting - had < SIZE // 4, "the link was not down"
        ended = time.monotonic()
        wait_until(lambda: client.received > waiting or client.problem, RESUMED_WITHIN, f"bytes again\n{daemon.log}")
        assert client.problem is None
        flowing = time.monotonic() - ended
        wait_until(lambda: status(network, daemon, fresh) == 200, ended + PROBED - time.monotonic(), "a fresh answer")
        served = time.monotonic() - ended
        client.join(SIZE / RATE * 10)
        assert not client.is_alive(), daemon.log
        assert client.problem is None
        assert (client.received, client.digest) == (SIZE, layer.digest)
        # By default an answer ends when nothing has come for a minute; then the client retries.
        assert client.requests <= 1 + (ended - began) // 55
        wait_until(lambda: blob_file(daemon, layer.digest).exists(), SOON, "the blob is in the store")
        asked = upstream.end()
    # Packets in transit are lost, and packets have headers.
    assert network.received() < 1.1 * SIZE
    gets = [request for request in asked if layer.digest in request.path]
    assert gets[0].range is None
    assert len({request.connection for request in gets}) == len(gets) > 1
    assert all(request.range and int(request.range[6:-1]) > SIZE // 5 for request in gets[1:])
    assert "Traceback" not in daemon.log
    found = f"bytes flowed within {flowing:.1f} s, and a fresh answer came within {served:.1f} s"
    print(f"after {seconds} s without a packet {found}")  # noqa: T201  # for pytest -s
