"""Many clients request the same uncached content at once: it is fetched once, and all receive it."""

from __future__ import annotations

import hashlib
import http.client
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

from tests.client import ask, connect
from tests.images import MIB, Image, make_index
from tests.processes import Daemon, wait_until
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Hold

_CLIENTS = 20
_LATE = 2
_PIECE = MIB // 2
_MOST_MEMORY = 120_000_000
_SOON = 10.0


def test_twenty_clients_share_the_download_of_a_blob(
    upstream: ScriptedRegistry, start_daemon: Callable[..., Daemon], big_image: Image
) -> None:
    """All receive its 200 MiB, the upstream sends it once, and the daemon does not hold it in memory."""
    upstream.add("team/app", big_image, "v1")
    (layer,) = big_image.layers
    path = f"/v2/team/app/blobs/{layer.digest}"
    hold = Hold(after=MIB)
    upstream.script(path, hold)
    daemon = start_daemon({upstream.host: "http"})
    with ExitStack() as stack:
        connections = [stack.enter_context(closing(connect(daemon.url))) for _ in range(_CLIENTS)]
        for connection in connections:
            connection.request("GET", f"{path}?ns={upstream.host}")
        # All answers have begun before the upstream has sent most of the blob.
        answers = [stack.enter_context(connection.getresponse()) for connection in connections]
        hold.release.set()
        with ThreadPoolExecutor(_CLIENTS) as threads:
            read = list(threads.map(_digest_and_size, answers[_LATE:]))
            # Two clients read nothing until the others are done; the daemon must not buffer the blob for them.
            read += threads.map(_digest_and_size, answers[:_LATE])
    assert [answer.status for answer in answers] == [200] * _CLIENTS
    assert read == [(layer.digest, len(layer.data))] * _CLIENTS
    assert upstream.count(path=path) == 1
    assert upstream.bytes_sent(layer.digest) == len(layer.data)
    assert sorted(_outcomes(daemon, path)) == ["miss", *["shared"] * (_CLIENTS - 1)]
    assert daemon.peak_memory() < _MOST_MEMORY


def test_twenty_clients_share_the_request_for_a_tag(
    upstream: ScriptedRegistry, start_daemon: Callable[..., Daemon]
) -> None:
    """All receive the manifest, which was requested from the upstream once."""
    index = make_index("crowd")
    upstream.add("team/app", index, "v1")
    path = "/v2/team/app/manifests/v1"
    hold = Hold()
    upstream.script(path, hold)
    daemon = start_daemon({upstream.host: "http"})
    with ExitStack() as stack:
        connections = [stack.enter_context(closing(connect(daemon.url))) for _ in range(_CLIENTS)]
        for connection in connections:
            connection.request("GET", f"{path}?ns={upstream.host}")
        assert hold.reached.wait(_SOON)
        # The daemon reads all that has arrived before it waits again: when it has answered the last client twice, it
        # has read the requests of the others.
        last = stack.enter_context(closing(connect(daemon.url)))
        for _ in range(2):
            assert ask(last, f"{daemon.url}/health").status == 200
        hold.release.set()
        answers = [stack.enter_context(connection.getresponse()) for connection in connections]
        bodies = [answer.read() for answer in answers]
    assert [answer.status for answer in answers] == [200] * _CLIENTS
    assert [answer.headers["Docker-Content-Digest"] for answer in answers] == [index.manifest.digest] * _CLIENTS
    assert bodies == [index.manifest.data] * _CLIENTS
    assert upstream.count(path=path) == 1
    assert daemon.log.count(f"pulling manifest from upstream: {upstream.host}/team/app:v1") == 1
    assert sorted(_outcomes(daemon, path)) == ["miss", *["shared"] * (_CLIENTS - 1)]


def _digest_and_size(answer: http.client.HTTPResponse) -> tuple[str, int]:
    """Return digest and size of the body, without keeping it."""
    hasher, size, piece = hashlib.sha256(), 0, bytearray(_PIECE)
    while count := answer.readinto(piece):
        hasher.update(memoryview(piece)[:count])
        size += count
    return f"sha256:{hasher.hexdigest()}", size


def _outcomes(daemon: Daemon, path: str) -> list[str]:
    """Return the outcomes in the access lines of all clients, which are written at the end of each answer."""
    line = re.compile(rf"GET {re.escape(path)} ns=\S+ 200 .* (hit|shared|miss)$", re.MULTILINE)
    wait_until(lambda: len(line.findall(daemon.log)) >= _CLIENTS, _SOON, f"{_CLIENTS} access lines")
    return line.findall(daemon.log)
