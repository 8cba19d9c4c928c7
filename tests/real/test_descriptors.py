"""Out of file descriptors: requests get 503, connections wait, the log stays short, and all goes on afterwards."""

from __future__ import annotations

import http.client
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests import procfs
from tests.certificates import Authority
from tests.client import ask, connect, fetch
from tests.images import MIB, Image
from tests.processes import Daemon, wait_until, without_free_descriptors
from tests.real.caches import SOON, Cache, assert_error, cache_in, plain_image
from tests.upstream import ScriptedRegistry

LIMIT = 400


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    """A cache for this test alone."""
    with cache_in(tmp_path) as cache:
        yield cache


@pytest.fixture
def image(cache: Cache) -> Image:
    """An image in the cache."""
    image = plain_image("descriptors", MIB)
    cache.upstream.add("team/app", image, "1")
    assert cache.ask("team/app/manifests/1").status == 200
    for blob in image.blobs:
        assert cache.ask(f"team/app/blobs/{blob.digest}").body == blob.data
        cache.wait_stored(blob.digest)
    return image


def lines(cache: Cache, since: int, part: str) -> list[str]:
    """Return the lines of the log with this part."""
    return [line for line in cache.daemon.log[since:].splitlines() if part in line]


def test_requests_without_a_descriptor_are_503(cache: Cache, image: Image) -> None:
    """A hit that opens its blob, a miss that opens a connection; what needs no descriptor is served."""
    other = plain_image("other", 1000)
    cache.upstream.add("team/other", other, "1")
    since = cache.log_size
    blob = f"team/app/blobs/{image.blobs[1].digest}"
    with ExitStack() as stack:
        connections = [stack.enter_context(closing(connect(cache.daemon.url))) for _ in range(4)]
        for connection in connections:
            assert ask(connection, f"{cache.daemon.url}/health").status == 200
        # The connections to the upstream that are kept must not be used.
        with without_free_descriptors(cache.daemon.process.pid):
            for connection in connections:
                answer = ask(connection, cache.url(blob))
                assert_error(answer, 503, "UNAVAILABLE")
                assert int(answer.headers["Retry-After"]) > 0
                assert ask(connection, f"{cache.daemon.url}/health").status == 200
            assert len(lines(cache, since, "out of file descriptors")) == 1
            cache.upstream.close()
            cache.upstream.open()
            answer = ask(connections[0], cache.url("team/other/manifests/1"))
            assert_error(answer, 503, "UNAVAILABLE")
        assert ask(connections[0], cache.url(blob)).body == image.blobs[1].data
        # The link did not count as down.
        assert ask(connections[1], cache.url("team/other/manifests/1")).body == other.manifest.data
        assert "cannot be reached" not in cache.daemon.log[since:]


def test_connection_without_a_descriptor_says_nothing_about_the_upstream(tmp_path: Path) -> None:
    """The system's trust store cannot be read for the first, and a name not be looked up for each; later both can."""
    authority = Authority(tmp_path / "authority", "authority")
    trust = {"SSL_CERT_FILE": str(authority.ca), "SSL_CERT_DIR": str(tmp_path / "none")}
    with ExitStack() as stack:
        upstream = stack.enter_context(ScriptedRegistry(tls=authority.server_context("localhost")))
        name = f"localhost:{upstream.port}"
        daemon = stack.enter_context(Daemon(tmp_path, {name: "https"}, environment=trust))
        connection = stack.enter_context(closing(connect(daemon.url)))
        assert ask(connection, f"{daemon.url}/health").status == 200
        for tag in ("first", "next"):
            image = plain_image(tag, 1000)
            upstream.add("team/app", image, tag)
            # No connection that is kept is used.
            upstream.close()
            upstream.open()
            with without_free_descriptors(daemon.process.pid):
                answer = ask(connection, f"{daemon.url}/v2/team/app/manifests/{tag}?ns={name}")
                assert_error(answer, 503, "UNAVAILABLE")
                assert b"this server has no file descriptor left" in answer.body
            answer = ask(connection, f"{daemon.url}/v2/team/app/manifests/{tag}?ns={name}")
            assert answer.body == image.manifest.data
        assert "cannot be reached" not in daemon.log


def test_connections_wait_while_descriptors_are_scarce(cache: Cache, image: Image) -> None:
    """They are neither closed nor answered until others are closed; waiting costs no processor time."""
    pid, since = cache.daemon.process.pid, cache.log_size
    url = cache.url(f"team/app/blobs/{image.blobs[1].digest}")
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE, (LIMIT, LIMIT))
    with ExitStack() as stack, ThreadPoolExecutor(10) as clients:
        idle = [
            stack.enter_context(closing(http.client.HTTPConnection("127.0.0.1", cache.daemon.port)))
            for _ in range(LIMIT)
        ]
        for connection in idle:
            connection.connect()
        wait_until(lambda: lines(cache, since, "file descriptors are scarce"), SOON, "the pause")
        waiting = [clients.submit(fetch, url) for _ in range(10)]
        used = procfs.processor_time(pid)
        time.sleep(3)
        assert procfs.processor_time(pid) - used < 0.5
        assert not any(one.done() for one in waiting)
        # Those that were accepted are served.
        for _ in range(3):
            idle[0].request("GET", url.removeprefix(cache.daemon.url))
            assert idle[0].getresponse().read() == image.blobs[1].data
        for connection in idle:
            connection.close()
        for one in waiting:
            assert one.result(SOON).body == image.blobs[1].data
    assert before[0] > LIMIT
    assert len(lines(cache, since, "file descriptors")) == 1
    assert lines(cache, since, "EMFILE") == []
