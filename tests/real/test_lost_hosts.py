"""Hosts that are lost or slow: clients do not wait for them twice, and their return is found without clients."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.client import Response, fetch
from tests.images import make_image
from tests.lost_hosts import LostHosts, lost_hosts
from tests.namespaces import NamespacedDaemon, Routed
from tests.processes import Daemon, wait_until
from tests.real.caches import SOON, Cache, assert_error, cache_in, daemon_in, plain_image, scripted
from tests.real.completions import log_lines
from tests.upstream import ScriptedRegistry
from tests.upstream_process import upstream_in
from tests.upstream_rules import Hold, Reply

FIRST_WITHIN = 14.0
"""Seconds for the first miss: 10 s of silence, on a busy machine."""
LATER_WITHIN = 4.0
"""Seconds for each miss after it: at most 1.5 s, for a probe, on a busy machine."""
PROBED_WITHIN = 31.0
"""Seconds from the return of a link until that is noticed."""


@pytest.fixture
def lost(tmp_path: Path) -> Iterator[LostHosts]:
    """A daemon whose upstreams are lost, each kind in its way."""
    with lost_hosts(tmp_path) as lost:
        yield lost


def assert_quick(lost: LostHosts, count: int) -> None:
    """Assert that each client waits once at most."""
    for misses in lost.all_misses(count):
        assert set(misses.statuses) == {503}, misses
        assert misses.seconds[0] < FIRST_WITHIN, misses
        assert max(misses.seconds[1:]) < LATER_WITHIN, misses
    assert "Traceback" not in lost.daemon.log


def test_lost_host_is_waited_for_once(lost: LostHosts) -> None:
    """Silent, dropping or refusing connections, or with a name that is not resolved; for each way to ask again."""
    assert_quick(lost, 4)


@pytest.mark.long
def test_lost_host_is_waited_for_once_in_many_misses(lost: LostHosts) -> None:
    assert_quick(lost, 12)


@pytest.mark.parametrize("seconds", [5, pytest.param(75, marks=pytest.mark.long)])
def test_return_of_a_link_is_found_without_a_client(tmp_path: Path, seconds: int) -> None:
    """The client's own request goes on for 60 s, and is then repeated as the probe, so that its answer is kept."""
    with (
        Routed() as network,
        upstream_in(network.far, network.FAR, "returned", 1000, 1_000_000) as upstream,
        NamespacedDaemon(network.near, tmp_path, {upstream.host: "http"}, "--no-complete-images") as daemon,
    ):
        url = f"{daemon.url}/v2/returned/manifests/1?ns={quote(upstream.host, safe='')}"

        def ask() -> Response:
            return network.near.call(lambda: fetch(url))

        with network.outage():
            began = time.monotonic()
            assert_error(ask(), 503, "UNAVAILABLE")
            assert time.monotonic() - began < FIRST_WITHIN
            # The outage has a fixed length.
            time.sleep(seconds)
        wait_until(lambda: "can be reached again" in daemon.log, PROBED_WITHIN, daemon.log)
        assert ask().body == plain_image("returned", 1000).manifest.data
        asked = upstream.end()
    assert [one.path for one in asked].count("/v2/returned/manifests/1") == 1


@contextmanager
def slow(cache: Cache, repository: str, seconds: float) -> Iterator[None]:
    """Hold back the first byte of each response for an image for some time."""
    hold = Hold()
    timer = threading.Timer(seconds, hold.release.set)
    timer.start()
    with cache.scripted(f"/v2/{repository}/*", hold):
        yield
    timer.cancel()


def test_slow_upstream_is_not_taken_for_silent_twice(tmp_path: Path) -> None:
    """Its first late response is kept for the client's retry; the next is waited for."""
    with cache_in(tmp_path) as cache:
        for name in ("first", "second"):
            cache.upstream.add(name, plain_image(name, 1000), "1")
        with slow(cache, "first", 20):
            began = time.monotonic()
            assert_error(cache.ask("first/manifests/1"), 503, "UNAVAILABLE")
            assert 9 < time.monotonic() - began < FIRST_WITHIN
            wait_until(lambda: cache.ask("first/manifests/1").status == 200, 2 * SOON, "the late response")
        assert cache.sent("first/manifests/1") == 1
        with slow(cache, "second", 18):
            assert cache.ask("second/manifests/1").status == 200
        assert cache.sent("second/manifests/1") == 1


def test_clients_behind_the_connection_limit_learn_of_the_silence(tmp_path: Path) -> None:
    """More clients than connections: those that wait for one are answered when the host counts as down."""
    with cache_in(tmp_path, "--max-connections", "1") as cache, cache.scripted("*", Hold()):
        with ThreadPoolExecutor(10) as clients:
            began = time.monotonic()
            answers = list(clients.map(lambda number: cache.ask(f"team/app/manifests/{number}"), range(10)))
            assert time.monotonic() - began < FIRST_WITHIN
        for answer in answers:
            assert_error(answer, 503, "UNAVAILABLE")
        began = time.monotonic()
        assert_error(cache.ask("team/app/manifests/next"), 503, "UNAVAILABLE")
        assert time.monotonic() - began < LATER_WITHIN


def ask_of(daemon: Daemon, upstream: ScriptedRegistry, path: str) -> tuple[Response, float]:
    """Return the answer of a daemon, and after how many seconds it came."""
    began = time.monotonic()
    answer = fetch(f"{daemon.url}/v2/{path}?ns={quote(upstream.host, safe='')}")
    return answer, time.monotonic() - began


def test_inner_cache_answers_first(tmp_path: Path) -> None:
    """It is not taken for silent when its upstream is: each answers before the one that asks it gives up."""
    with ScriptedRegistry() as upstream, daemon_in(tmp_path, upstream) as region:
        entry = {"scheme": "http", "mirrors": [region.url]}
        with (
            Daemon(tmp_path, {upstream.host: entry}, image_path=tmp_path / "edge") as edge,
            scripted(upstream, "*", Hold()),
        ):
            answer, seconds = ask_of(edge, upstream, "team/app/manifests/1")
            assert_error(answer, 503, "UNAVAILABLE")
            assert seconds < 25
            assert b"it answered 503" in answer.body
            (down,) = log_lines(edge, "warn", "cannot be reached")
            assert upstream.host in down


def test_silent_mirror_leaves_time_for_the_registry(tmp_path: Path) -> None:
    """It is waited for once, and then passed over at once."""
    images = [make_image(f"mirrored {number}") for number in range(2)]
    with ScriptedRegistry() as upstream, ScriptedRegistry() as mirror, scripted(mirror, "*", Hold()):
        for number, image in enumerate(images):
            upstream.add("team/app", image, str(number))
        entry = {"scheme": "http", "mirrors": [mirror.url]}
        with Daemon(tmp_path, {upstream.host: entry}) as daemon:
            for number, within in ((0, FIRST_WITHIN), (1, LATER_WITHIN)):
                answer, seconds = ask_of(daemon, upstream, f"team/app/manifests/{number}")
                assert answer.body == images[number].manifest.data
                assert seconds < within


def test_clients_that_wait_for_one_token_learn_of_the_silence(tmp_path: Path) -> None:
    """The registry answers, its token service does not: the first clients wait once, the next ones not at all."""
    with ScriptedRegistry() as tokens, cache_in(tmp_path, tokens) as cache, scripted(tokens, "*", Hold()):
        challenge = f'Bearer realm="{tokens.url}/token",service="registry"'
        cache.upstream.script("*", Reply(401, b"", (("WWW-Authenticate", challenge),)))
        with ThreadPoolExecutor(5) as clients:
            for within in (FIRST_WITHIN, LATER_WITHIN):
                began = time.monotonic()
                answers = list(clients.map(lambda number: cache.ask(f"team/app/manifests/{number}"), range(5)))
                assert time.monotonic() - began < within
                for answer in answers:
                    assert_error(answer, 503, "UNAVAILABLE")
