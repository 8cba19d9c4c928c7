"""An unreachable upstream is only probed now and then, and no client waits for it."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.client import Response
from tests.images import MIB, Image
from tests.processes import wait_until
from tests.real.caches import SOON, Cache, assert_error, cache_in, plain_image, pull
from tests.real.completions import log_lines
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Cut, Hold, Reply

UNAVAILABLE_WITHIN = 5.0
"""Seconds; the answer takes 100 ms, or 1.5 s while a probe is young, and this machine may be busy."""
LONGEST = 31.0
"""Seconds until the next probe has been answered."""


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    """A cache for this test alone, whose link to the upstream goes down."""
    with cache_in(tmp_path) as cache:
        yield cache


@pytest.fixture
def image(cache: Cache) -> Image:
    """A cached image."""
    image = plain_image("link", 5000)
    cache.upstream.add("team/app", image, "1")
    pull(cache, "team/app", image)
    return image


class SilentListener:
    """Listens on a port, answers nothing, and counts connections."""

    def __init__(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", port), backlog=128)
        self._listener.setblocking(False)
        self._accepted: list[socket.socket] = []

    @property
    def connections(self) -> int:
        """How many connections there were so far."""
        with suppress(BlockingIOError):
            while True:
                self._accepted.append(self._listener.accept()[0])
        return len(self._accepted)

    def close(self) -> None:
        """Refuse connections from now on; pending ones get no answer."""
        self._listener.close()
        for connection in self._accepted:
            connection.close()


def miss(cache: Cache, tag: str = "absent") -> Response:
    """Request uncached content while the link is down, and assert a quick error."""
    began = time.monotonic()
    answer = cache.ask(f"team/app/manifests/{tag}")
    assert time.monotonic() - began < UNAVAILABLE_WITHIN
    assert_error(answer, 503, "UNAVAILABLE")
    return answer


def lose(cache: Cache, distance: int = 1) -> None:
    """Make the upstream refuse until the daemon has noticed; the next probe may be `distance` seconds off."""
    cache.upstream.close()

    def known() -> bool:
        answer = miss(cache)
        # From a client's request, not from a probe.
        return b"a moment ago" in answer.body and int(answer.headers["Retry-After"]) >= distance

    wait_until(known, LONGEST, f"{distance} s until the next probe")


def changes(cache: Cache) -> list[str]:
    """Return the log lines about links."""
    return log_lines(cache.daemon, "warn", " reached")


def test_refused_connection_opens_the_circuit_breaker(cache: Cache, image: Image) -> None:
    """Hits are unaffected, misses are answered at once, and only probes are sent."""
    lose(cache, 4)
    nobody = SilentListener(cache.upstream.port)
    try:
        with ThreadPoolExecutor(20) as clients:
            answers = list(clients.map(lambda number: miss(cache, f"absent{number}"), range(40)))
            assert nobody.connections == 0
            assert all(1 <= int(answer.headers["Retry-After"]) <= LONGEST for answer in answers)
            assert all(b"a moment ago" in answer.body for answer in answers)
            pull(cache, "team/app", image)
            assert nobody.connections == 0

            # The daemon sends one probe, and clients do not wait long for its result.
            asked = [clients.submit(cache.ask, "team/app/manifests/probe")]
            while not nobody.connections:
                done = [one for one in asked if one.done()]
                assert all(one.result().status == 503 for one in done)
                asked = [one for one in asked if one not in done] or [
                    clients.submit(cache.ask, "team/app/manifests/probe")
                ]
                time.sleep(0.05)
            list(clients.map(lambda number: miss(cache, f"absent{number}"), range(20)))
            assert nobody.connections == 1
            nobody.close()
            assert all(one.result(SOON).status == 503 for one in asked)
    finally:
        nobody.close()
    cache.upstream.open()
    fresh = plain_image("fresh", 1000)
    cache.upstream.add("team/app", fresh, "2")
    # The probe was sent once more when its connection broke, and may have been refused.
    wait_until(
        lambda: cache.ask("team/app/manifests/2").body == fresh.manifest.data, LONGEST, "the upstream is asked again"
    )
    down, up = changes(cache)
    assert f"{cache.upstream.host} cannot be reached: the connection was refused" in down
    assert f"{cache.upstream.host} can be reached again" in up


def test_request_after_the_next_probe_is_served(cache: Cache, image: Image) -> None:
    """The probe has been answered at the time in `Retry-After`."""
    lose(cache, 2)
    fresh = plain_image("fresh", 1000)
    cache.upstream.add("team/app", fresh, "2")
    answer = miss(cache, "2")
    cache.upstream.open()
    time.sleep(int(answer.headers["Retry-After"]))
    assert cache.ask("team/app/manifests/2").body == fresh.manifest.data
    # From then on all requests pass.
    assert_error(cache.ask("team/app/manifests/absent"), 404, "MANIFEST_UNKNOWN")
    assert len(changes(cache)) == 2


@pytest.mark.parametrize("status", [500, 503, 404, 401])
def test_error_answers_keep_the_circuit_breaker_closed(cache: Cache, status: int) -> None:
    """Any answer, also an error, shows that the host is reachable: it is asked again."""
    cache.upstream.script("*", Reply(status, b"", (("Retry-After", "0"),)))
    for number in range(1, 4):
        assert cache.ask("team/app/manifests/1").status == (503 if status >= 500 else 404)
        assert cache.upstream.count("GET", "/v2/team/app/manifests/1") == number
    assert changes(cache) == []


def test_broken_connection_keeps_the_circuit_breaker_closed(cache: Cache) -> None:
    """An upstream that closes or resets a connection before its answer is reachable, as other requests show."""
    for reset in (False, True):
        with cache.scripted("*", Cut(None, reset=reset)):
            assert_error(cache.ask("team/app/manifests/1"), 503, "UNAVAILABLE")
    image = plain_image("cut", 1000)
    cache.upstream.add("team/app", image, "1")
    assert cache.ask("team/app/manifests/1").body == image.manifest.data
    assert changes(cache) == []


def test_circuit_breaker_of_one_upstream_does_not_affect_another(tmp_path: Path) -> None:
    image = plain_image("another", 5000)
    with ScriptedRegistry() as other, cache_in(tmp_path, other) as cache:
        other.add("team/app", image, "1")
        lose(cache)
        pull(Cache(cache.daemon, other), "team/app", image)
        miss(cache)
        assert [cache.upstream.host in line for line in changes(cache)] == [True]


def test_awaited_download_is_retried_every_five_seconds(cache: Cache) -> None:
    """It is retried every 5 s at most, however far apart the probes are, and ends the outage for others."""
    image = plain_image("waiting", 2 * MIB)
    (layer,) = image.layers
    cache.upstream.add("team/app", image, "1")
    with cache.scripted(f"*/{layer.digest}", Hold(MIB)):
        stack = ExitStack()
        answer = stack.enter_context(cache.opened(f"team/app/blobs/{layer.digest}"))
        assert answer.read(MIB // 2) == layer.data[: MIB // 2]
        lose(cache, 8)
    with stack:
        cache.upstream.open()
        began = time.monotonic()
        assert answer.read() == layer.data[MIB // 2 :]
        assert time.monotonic() - began < 5 + SOON / 2
    assert_error(cache.ask("team/app/manifests/absent"), 404, "MANIFEST_UNKNOWN")
    assert cache.upstream.bytes_sent(layer.digest) <= len(layer.data) * 1.02
