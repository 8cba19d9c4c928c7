"""A silent upstream: the client has an answer before its time-out, and loses nothing."""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from tests.client import Response
from tests.images import Blob
from tests.processes import wait_until
from tests.real.caches import SOON, Cache, assert_error, cache_in, plain_image, short_body
from tests.upstream_rules import Cut, Hold, Reply

SIZE = 200_000
HEADERS_SENT = 9.0, 20.0
"""Seconds, from and to, in which headers are sent for a blob whose size a manifest states."""
ANSWERED = 20.0, 28.0
"""Seconds, from and to, in which other requests are answered if the upstream stays silent; containerd waits for 30.
"""
QUICK = 2.0


@dataclass(frozen=True)
class Begun:
    """An answer whose headers have arrived, and after how many seconds."""

    answer: http.client.HTTPResponse
    seconds: float


class Silence:
    """Requests sent at the same time to a silent upstream, each for a different image."""

    def __init__(self, cache: Cache, stack: ExitStack) -> None:
        self.cache = cache
        self._stack = stack
        self._clients = stack.enter_context(ThreadPoolExecutor(10))
        self.holds = {name: Hold(None) for name in ("known", "part", "gone", "cut", "unknown", "manifest")}
        for hold in self.holds.values():
            # Released before waiting for the clients.
            stack.callback(hold.release.set)
        self.images = {name: plain_image(f"silent/{name}", SIZE) for name in self.holds}
        for name, image in self.images.items():
            cache.upstream.add(name, image, "1")
            if name not in ("unknown", "manifest"):
                assert cache.ask(f"{name}/manifests/1").status == 200
        cache.upstream.script("/v2/gone/blobs/*", Reply(404))
        for name, hold in self.holds.items():
            cache.upstream.script(f"/v2/{name}/*", hold)
        # For the next request, after the held one.
        cache.upstream.script("/v2/cut/blobs/*", Cut(None), times=1)
        self._began = time.monotonic()
        part = {"Range": f"bytes={SIZE // 2}-"}
        self.begun = {
            name: self._clients.submit(self._begin, name, part if name == "part" else {})
            for name in ("known", "part", "gone", "cut")
        }
        self.answered = {
            "unknown": self._clients.submit(self._answer, f"unknown/blobs/{self.layer('unknown').digest}"),
            "manifest": self._clients.submit(self._answer, "manifest/manifests/1"),
        }
        for hold in self.holds.values():
            assert hold.reached.wait(SOON)

    def layer(self, name: str) -> Blob:
        """Return the requested blob."""
        return self.images[name].layers[0]

    def path(self, name: str) -> str:
        """Return its path."""
        return f"{name}/blobs/{self.layer(name).digest}"

    def _begin(self, name: str, headers: dict[str, str]) -> Begun:
        answer = self._stack.enter_context(self.cache.opened(self.path(name), headers))
        return Begun(answer, time.monotonic() - self._began)

    def _answer(self, path: str) -> tuple[Response, float]:
        answer = self.cache.ask(path)
        return answer, time.monotonic() - self._began

    def answer_in_time(self, name: str) -> http.client.HTTPResponse:
        """Assert that headers came in time and without an error, and release the upstream; return the answer."""
        begun = self.begun[name].result()
        assert HEADERS_SENT[0] < begun.seconds < HEADERS_SENT[1]
        assert not self.holds[name].release.is_set()
        assert begun.answer.headers["Docker-Content-Digest"] == self.layer(name).digest
        self.holds[name].release.set()
        return begun.answer


@pytest.fixture(scope="module")
def silence(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Silence]:
    """One for all tests, so that they wait together."""
    with cache_in(tmp_path_factory.mktemp("cache")) as cache, ExitStack() as stack:
        yield Silence(cache, stack)


def assert_stored(silence: Silence, name: str, requests: int) -> None:
    """Assert that the blob is stored, after this many requests."""
    silence.cache.wait_stored(silence.layer(name).digest)
    assert silence.cache.ask(silence.path(name)).body == silence.layer(name).data
    assert silence.cache.sent(silence.path(name)) == requests


def test_headers_of_a_blob_of_known_size_are_sent_before_the_upstream_answers(silence: Silence) -> None:
    """200 with its exact length after about 10 s, then the bytes."""
    answer = silence.answer_in_time("known")
    assert (answer.status, answer.headers["Content-Length"]) == (200, str(SIZE))
    assert answer.read() == silence.layer("known").data
    assert_stored(silence, "known", 1)


def test_headers_of_a_range_are_sent_before_the_upstream_answers(silence: Silence) -> None:
    answer = silence.answer_in_time("part")
    assert (answer.status, answer.headers["Content-Length"]) == (206, str(SIZE // 2))
    assert answer.headers["Content-Range"] == f"bytes {SIZE // 2}-{SIZE - 1}/{SIZE}"
    assert answer.read() == silence.layer("part").data[SIZE // 2 :]
    assert_stored(silence, "part", 1)


def test_upstream_failure_after_the_headers_is_retried(silence: Silence) -> None:
    """The client has the headers already, and receives the bytes."""
    answer = silence.answer_in_time("cut")
    assert (answer.status, answer.headers["Content-Length"]) == (200, str(SIZE))
    assert answer.read() == silence.layer("cut").data
    assert_stored(silence, "cut", 2)


def test_unknown_blob_after_the_headers_ends_short(silence: Silence) -> None:
    """The answer ends short; the next request gets the error at once, without a request to the upstream."""
    cache, since = silence.cache, silence.cache.log_size
    answer = silence.answer_in_time("gone")
    assert (answer.status, answer.headers["Content-Length"]) == (200, str(SIZE))
    assert short_body(answer) == b""
    path = silence.path("gone")
    # The line is written when the answer has ended.
    wait_until(lambda: [line for line in cache.errors(since) if path in line], SOON, "a line tells why")
    asked = len(cache.upstream.requests)
    began = time.monotonic()
    assert_error(cache.ask(path), 404, "BLOB_UNKNOWN")
    assert time.monotonic() - began < QUICK
    assert len(cache.upstream.requests) == asked


def assert_503_in_time(asked: Future[tuple[Response, float]]) -> None:
    """Assert a 503 before the client's time-out."""
    answer, seconds = asked.result()
    assert_error(answer, 503, "UNAVAILABLE")
    assert ANSWERED[0] < seconds < ANSWERED[1]


@pytest.mark.parametrize("name", ["unknown", "manifest"])
def test_silent_upstream_is_answered_by_503_for_unknown_content(silence: Silence, name: str) -> None:
    """The fetch continues: the client's retry is a hit, and the upstream was asked once."""
    assert_503_in_time(silence.answered[name])
    path = silence.path(name) if name == "unknown" else "manifest/manifests/1"
    data = silence.layer(name).data if name == "unknown" else silence.images[name].manifest.data
    silence.holds[name].release.set()
    again = silence.cache.ask(path)
    assert (again.status, again.body) == (200, data)
    assert silence.cache.sent(path) == 1
