"""Limits towards upstreams: rate limiting, the number of connections, and look-ups that hang."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.client import Response, fetch
from tests.images import make_image
from tests.namespaces import Namespace, NamespacedDaemon
from tests.processes import wait_until
from tests.procfs import connections_to
from tests.real.caches import SOON, Cache, assert_error, cache_in, plain_image
from tests.upstream import ScriptedRegistry
from tests.upstream_auth import Tokens
from tests.upstream_rules import Hold, Reply

MOST = 3


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    """A daemon with few connections."""
    with cache_in(tmp_path, "--max-connections", str(MOST)) as cache:
        yield cache


@pytest.mark.parametrize("path", ["manifests/1", "tags/list"])
def test_rate_limited_upstream_gets_no_request_until_retry_after(cache: Cache, path: str) -> None:
    image = plain_image("429", 1000)
    cache.upstream.add("team/app", image, "1")
    cache.upstream.script("*", Reply(429, b"", (("Retry-After", "3"),)), times=1)
    began = time.monotonic()
    answer = cache.ask(f"team/app/{path}")
    assert_error(answer, 503, "UNAVAILABLE")
    assert answer.headers["Retry-After"] == "3"
    asked = 0
    while (answer := cache.ask(f"team/app/{path}")).status == 503:
        asked = len(cache.upstream.requests)
        assert 1 <= int(answer.headers["Retry-After"]) <= 3
        time.sleep(0.1)
    # No request was sent for the whole requested time.
    assert time.monotonic() - began >= 3
    assert (answer.status, asked, len(cache.upstream.requests)) == (200, 1, 2)


def test_rate_limit_of_one_upstream_does_not_affect_another(tmp_path: Path) -> None:
    image = plain_image("the other", 1000)
    with ScriptedRegistry() as other, cache_in(tmp_path, other) as cache:
        other.add("team/app", image, "1")
        cache.upstream.script("*", Reply(429, b"", (("Retry-After", "3600"),)))
        assert cache.ask("team/app/manifests/1").status == 503
        assert Cache(cache.daemon, other).ask("team/app/manifests/1").status == 200


def test_blobs_leave_two_connections_for_manifests_and_tokens(cache: Cache) -> None:
    """With more blobs in demand than connections, manifests and tokens are still fetched at once."""
    image = make_image("many layers", layers=MOST + 3, layer_size=50_000)
    cache.upstream.add("team/app", image, "1")
    hold = Hold(1000)
    with cache.scripted("*/blobs/*", hold), ThreadPoolExecutor(len(image.layers)) as clients:
        paths = [f"team/app/blobs/{layer.digest}" for layer in image.layers]
        asked = [clients.submit(cache.ask, path) for path in paths]
        sent = [f"/v2/{path}" for path in paths]
        wait_until(lambda: sum(cache.upstream.count("GET", path) for path in sent) == MOST, SOON, "all connections")
        cache.upstream.script("/v2/team/other/*", Tokens(f"{cache.upstream.url}/token"))
        cache.upstream.script("/token", Tokens(f"{cache.upstream.url}/token"))
        assert cache.ask("team/app/manifests/1").body == image.manifest.data
        assert cache.ask("team/app/tags/list").status == 200
        assert cache.ask(f"team/app/blobs/{image.config.digest}", "HEAD").status == 200
        # The others still wait.
        assert sum(cache.upstream.count("GET", path) for path in sent) == MOST
        assert connections_to(cache.daemon.process.pid, cache.upstream.port) <= MOST + 2
        hold.release.set()
        assert [one.result(SOON).body for one in asked] == [layer.data for layer in image.layers]


class DeadResolver:
    """A name server that receives every question and answers none."""

    def __init__(self, namespace: Namespace) -> None:
        self._socket = namespace.call(self._open)

    @staticmethod
    def _open() -> socket.socket:
        opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        opened.bind(("127.0.0.1", 53))
        opened.setblocking(False)
        return opened

    def asked_for(self) -> list[bytes]:
        """The questions so far."""
        questions = []
        while True:
            try:
                questions.append(self._socket.recv(4096))
            except BlockingIOError:
                return questions

    def close(self) -> None:
        """Close it."""
        self._socket.close()


def test_hanging_lookups_do_not_delay_other_names(tmp_path: Path) -> None:
    """Each name is looked up once at a time, for all clients, and the daemon can stop while look-ups hang."""
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:30 attempts:2\n")
    (tmp_path / "hosts").write_text("127.0.0.1 localhost live.example\n")
    image = plain_image("live", 1000)
    with ExitStack() as stack:
        namespace = stack.enter_context(Namespace("dns"))
        resolver = DeadResolver(namespace)
        stack.callback(resolver.close)
        upstream = namespace.call(ScriptedRegistry)
        stack.enter_context(upstream)
        upstream.add("team/app", image, "1")
        live = f"live.example:{upstream.port}"
        daemon = NamespacedDaemon(namespace, tmp_path, {live: "http"})
        mounts = "; ".join(f"mount --bind {tmp_path}/{name} /etc/{name}" for name in ("resolv.conf", "hosts"))
        start = len(namespace.argv([]))
        daemon.argv[start:start] = ["sh", "-euc", f'{mounts}; exec "$@"', "sh"]
        stack.enter_context(daemon)

        def ask(ns: str) -> Response:
            return namespace.call(lambda: fetch(f"{daemon.url}/v2/team/app/manifests/1?ns={ns}"))

        with ThreadPoolExecutor(40) as clients:
            dead = [clients.submit(ask, f"dead{number % 20}.example") for number in range(40)]
            questions: list[bytes] = []

            def all_asked() -> bool:
                questions.extend(resolver.asked_for())
                return len({question[12:26] for question in questions}) == 20

            wait_until(all_asked, SOON, "twenty look-ups that hang")
            began = time.monotonic()
            assert ask(live).body == image.manifest.data
            assert time.monotonic() - began < 5
            answers = [one.result() for one in dead]
        assert {answer.status for answer in answers} == {503}
        assert all(b"cannot be resolved" in answer.body for answer in answers)
        # One question for each kind of address, although two clients requested each name.
        questions.extend(resolver.asked_for())
        assert len(questions) <= 2 * 20
        assert ask("dead99.example").status == 503
        # Its look-up would hang for 50 s more.
        daemon.terminate(timeout=20)
