"""Completion of images with several upstreams, or several daemons."""

from __future__ import annotations

import time
from pathlib import Path

from tests.images import MIB, Image, make_image
from tests.processes import Daemon, free_port, wait_until
from tests.real.caches import SOON, Cache, blob_file, plain_image
from tests.real.completions import wait_complete
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Hold

AT_ONCE = 5.0
"""Seconds, less than the 8 for which the daemon waits for a mirror."""


def test_dead_upstream_does_not_delay_completion_from_another(upstream: ScriptedRegistry, tmp_path: Path) -> None:
    """Its broken download is resumed later; meanwhile images of other upstreams are completed."""
    dead, image = plain_image("dead", MIB), plain_image("alive", 5000)
    (layer,) = dead.layers
    upstream.add("team/app", dead, "1")
    with ScriptedRegistry() as other, Daemon(tmp_path, {upstream.host: "http", other.host: "http"}) as daemon:
        other.add("team/app", image, "1")
        cache = Cache(daemon, upstream)
        hold = Hold(MIB // 2)
        with cache.scripted(f"*/{layer.digest}", hold):
            assert cache.ask("team/app/manifests/1").status == 200
            assert hold.reached.wait(SOON)
            upstream.close()
        wait_until(lambda: "connection lost at byte" in daemon.log, SOON, "the upstream is gone")
        assert Cache(daemon, other).ask("team/app/manifests/1").status == 200
        stored = [blob_file(daemon, blob.digest) for blob in image.blobs]
        wait_until(lambda: all(path.exists() for path in stored), SOON, "the image of the other")


def test_chained_daemons_complete_an_image_once(upstream: ScriptedRegistry, tmp_path: Path) -> None:
    """The daemon at the edge requests everything from the one behind it; the upstream sees each request once."""
    image = make_image("chain of whole images", layers=3)
    upstream.add("team/app", image, "1")
    with (
        Daemon(tmp_path, {upstream.host: "http"}, image_path=tmp_path / "region") as region,
        Daemon(tmp_path, mirrored(upstream, region.url), image_path=tmp_path / "edge") as edge,
    ):
        assert Cache(edge, upstream).ask("team/app/manifests/1").status == 200
        wait_complete(edge, image.blobs)
        wait_complete(region, image.blobs)
    asked_once(upstream, image)


def test_mutual_mirrors_complete_an_image(upstream: ScriptedRegistry, tmp_path: Path) -> None:
    """The daemon that a client asked asks the other, which has nothing: neither waits for the other."""
    image = make_image("a pair and a whole image", layers=3)
    upstream.add("team/app", image, "1")
    ports = [free_port(), free_port()]
    here, there = (
        Daemon(tmp_path, mirrored(upstream, f"http://127.0.0.1:{other}"), image_path=tmp_path / str(port), port=port)
        for port, other in zip(ports, reversed(ports), strict=True)
    )
    with here, there:
        began = time.monotonic()
        assert Cache(here, upstream).ask("team/app/manifests/1").status == 200
        wait_complete(here, image.blobs, SOON * 2)
        assert time.monotonic() - began < AT_ONCE
        wait_complete(there, image.blobs, SOON * 2)
    asked_once(upstream, image)


def mirrored(upstream: ScriptedRegistry, mirror: str) -> dict[str, dict[str, object]]:
    """Return the upstream's entry with a mirror."""
    return {upstream.host: {"scheme": "http", "mirrors": [mirror]}}


def asked_once(upstream: ScriptedRegistry, image: Image) -> None:
    """Assert one request for the manifest and for each blob."""
    asked = [request.path.rpartition("/")[2] for request in upstream.requests]
    assert sorted(asked) == sorted(["1", *(blob.digest for blob in image.blobs)])
