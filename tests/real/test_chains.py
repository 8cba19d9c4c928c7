"""Chains of caches: each asks the next, each object is requested once, and loops are detected."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.client import Response, fetch
from tests.images import Image, make_image
from tests.peers import Containerd, DockerRegistry, hosts_dir
from tests.processes import Daemon, free_port, wait_until
from tests.real.caches import SOON, assert_error, blob_file, error_lines, scripted
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Hold, Reply

StartDaemon = Callable[..., Daemon]

FOUND_WITHIN = 5.0
"""Seconds, less than the 8 s after which a cache answers another one in any case."""
AT_ONCE = 10.0
"""Seconds, less than the 25 s after which a time-out would end a loop."""


@pytest.fixture
def start_daemon(start_daemon: StartDaemon, tmp_path: Path) -> StartDaemon:
    """Start a `Daemon` with a store of its own."""
    numbers = count()
    return lambda *arguments, **keywords: start_daemon(
        *arguments, **{"image_path": tmp_path / f"store{next(numbers)}", **keywords}
    )


def ask(daemon: Daemon, ns: str, path: str, method: str = "GET") -> Response:
    """Send a request to the daemon."""
    return fetch(f"{daemon.url}/v2/{path}?ns={quote(ns, safe='')}", method=method)


@pytest.fixture
def image(upstream: ScriptedRegistry) -> Image:
    """An image at the upstream."""
    image = make_image("chain", layers=3)
    upstream.add("team/app", image, "1")
    return image


def pull_all(daemon: Daemon, ns: str, image: Image) -> None:
    """Pull by tag, as containerd does."""
    for method in ("HEAD", "GET"):
        assert ask(daemon, ns, "team/app/manifests/1", method).status == 200
    assert ask(daemon, ns, f"team/app/manifests/{image.manifest.digest}").body == image.manifest.data
    for blob in image.blobs:
        assert ask(daemon, ns, f"team/app/blobs/{blob.digest}").body == blob.data


def test_chain_sends_one_upstream_request_per_object(
    upstream: ScriptedRegistry, start_daemon: StartDaemon, image: Image
) -> None:
    region = start_daemon({upstream.host: "http"})
    edge = start_daemon({upstream.host: {"scheme": "http", "mirrors": [region.url]}})
    with ThreadPoolExecutor(4) as clients:
        list(clients.map(lambda _: pull_all(edge, upstream.host, image), range(4)))
    asked = [request.path for request in upstream.requests]
    assert sorted(asked) == sorted(
        ["/v2/team/app/manifests/1", *(f"/v2/team/app/blobs/{blob.digest}" for blob in image.blobs)]
    )
    upstream.close()
    region.kill()
    pull_all(edge, upstream.host, image)


def test_containerd_pulls_through_two_daemons(
    registry: DockerRegistry, start_daemon: StartDaemon, containerd: Containerd, tmp_path: Path
) -> None:
    image = make_image("chain for containerd", layers=3)
    registry.push("team/chained", image, "v1")
    before = len(registry.requests)
    region = start_daemon({registry.host: "http"})
    edge = start_daemon({registry.host: {"scheme": "http", "mirrors": [region.url]}})
    ref = f"{registry.host}/team/chained:v1"
    hosts = hosts_dir(tmp_path / "hosts", edge.url, registry.host)
    done = containerd.pull(ref, hosts)
    assert done.returncode == 0, done.stderr
    assert {blob.digest for blob in image.blobs} <= containerd.content
    asked = [line.path.partition("?")[0] for line in registry.requests[before:]]
    assert len(asked) == len(set(asked)) == 1 + len(image.blobs)


def test_daemon_as_its_own_upstream_detects_the_loop(start_daemon: StartDaemon) -> None:
    port = free_port()
    itself = f"127.0.0.1:{port}"
    daemon = start_daemon({itself: "http"}, port=port)
    began = time.monotonic()
    for path in ("team/app/manifests/1", f"team/app/blobs/sha256:{'0' * 64}", "team/app/tags/list"):
        assert_error(ask(daemon, itself, path), 403, "DENIED")
    assert_error(ask(daemon, itself, f"team/app/blobs/sha256:{'0' * 64}", "HEAD"), 403, "DENIED", "HEAD")
    assert time.monotonic() - began < AT_ONCE
    assert all("is its own upstream" in line or "leads back" in line for line in error_lines(daemon, 0))


def test_loop_of_three_daemons_is_detected(start_daemon: StartDaemon) -> None:
    """Each daemon has the next as its only upstream; the first one reports the loop."""
    ports = [free_port() for _ in range(3)]
    hosts = [f"127.0.0.1:{port}" for port in ports]
    upstream = "registry.invalid"
    daemons = [
        start_daemon({upstream: {"mirrors": [f"http://{following}"], "scheme": "https"}}, port=port)
        for port, following in zip(ports, [*hosts[1:], hosts[0]], strict=True)
    ]
    began = time.monotonic()
    answer = ask(daemons[0], upstream, "team/app/manifests/1")
    assert_error(answer, 503, "UNAVAILABLE")
    assert time.monotonic() - began < AT_ONCE


def test_mutual_mirrors_ask_the_upstream_once(
    upstream: ScriptedRegistry, start_daemon: StartDaemon, image: Image
) -> None:
    """A pair of peers: neither waits for the other to fetch what both lack."""
    ports = [free_port(), free_port()]
    daemons = [
        start_daemon({upstream.host: {"scheme": "http", "mirrors": [f"http://127.0.0.1:{other}"]}}, port=port)
        for port, other in zip(ports, reversed(ports), strict=True)
    ]
    began = time.monotonic()
    pull_all(daemons[0], upstream.host, image)
    assert time.monotonic() - began < AT_ONCE
    asked = [request.path for request in upstream.requests]
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_caches_in_a_ring_do_not_wait_for_each_other(
    upstream: ScriptedRegistry, start_daemon: StartDaemon, image: Image, size: int
) -> None:
    """All are asked for the same new content at once: one finds that the others wait for it."""
    tags = [str(number) for number in range(2, 12)]
    for tag in tags:
        upstream.add("team/app", make_image(f"chain {tag}"), tag)
    ports = [free_port() for _ in range(size)]
    daemons = [
        start_daemon({upstream.host: {"scheme": "http", "mirrors": [f"http://127.0.0.1:{other}"]}}, port=port)
        for port, other in zip(ports, [*ports[1:], ports[0]], strict=True)
    ]
    paths = [f"team/app/manifests/{tag}" for tag in tags] + [f"team/app/blobs/{blob.digest}" for blob in image.blobs]
    began = time.monotonic()
    with ThreadPoolExecutor(size * len(paths)) as clients:
        asked = [clients.submit(ask, daemon, upstream.host, path) for path in paths for daemon in daemons]
        assert [one.result().status for one in asked] == [200] * len(asked)
    assert time.monotonic() - began < FOUND_WITHIN


def test_mirrors_are_asked_in_order_before_the_registry(
    upstream: ScriptedRegistry, start_daemon: StartDaemon, image: Image
) -> None:
    """One mirror is down, one has nothing, one is broken; then the registry itself is asked."""
    with ScriptedRegistry() as down, ScriptedRegistry() as empty, ScriptedRegistry() as broken:
        down.close()
        broken.script("*", Reply(500))
        mirrors = [f"{down.url}", f"{empty.url}/prefix/v2/", f"{broken.url}"]
        daemon = start_daemon({upstream.host: {"scheme": "http", "mirrors": mirrors}})
        pull_all(daemon, upstream.host, image)
        ns = f"ns={upstream.host}"
        assert {request.query for one in (empty, broken) for request in one.requests} == {ns}
        assert next(request.path for request in empty.requests) == "/prefix/v2/team/app/manifests/1"
        assert len(empty.requests) == len(broken.requests) == len(upstream.requests) == 1 + len(image.blobs)
        assert {request.query for request in upstream.requests} == {""}


def test_mirror_hit_makes_no_request_to_the_registry(start_daemon: StartDaemon, upstream: ScriptedRegistry) -> None:
    """The mirror's credentials are in the entry of its own host."""
    image = make_image("mirrored")
    upstream.add("team/app", image, "1")
    daemon = start_daemon({"registry.invalid": {"mirrors": [upstream.url]}, upstream.host: "http"})
    pull_all(daemon, "registry.invalid", image)
    assert len(upstream.requests) == 1 + len(image.blobs)


def test_download_resumes_from_the_registry_after_a_mirror_failure(
    upstream: ScriptedRegistry, start_daemon: StartDaemon
) -> None:
    image = make_image("broken off", layers=1, layer_size=300_000)
    layer = image.layers[0]
    upstream.add("team/app", image, "1")
    with ScriptedRegistry() as mirror:
        mirror.add("team/app", image, "1")
        hold = Hold(100_000)
        daemon = start_daemon({upstream.host: {"scheme": "http", "mirrors": [mirror.url]}})
        with scripted(mirror, "*", hold), ThreadPoolExecutor(1) as client:
            asked = client.submit(ask, daemon, upstream.host, f"team/app/blobs/{layer.digest}")
            assert hold.reached.wait(SOON)
            mirror.close()
            assert asked.result(SOON).body == layer.data
    assert upstream.bytes_sent(layer.digest) + mirror.bytes_sent(layer.digest) <= len(layer.data) * 1.02 + 65536
    assert mirror.bytes_sent(layer.digest) >= 100_000
    wait_until(lambda: blob_file(daemon, layer.digest).exists(), SOON, "the blob")
