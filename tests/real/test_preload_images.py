"""`--preload-images`: the daemon serves at once, and loads the images of a list in the background."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.client import fetch
from tests.images import MIB, Image, Index, make_image, make_index
from tests.processes import Daemon, wait_until
from tests.real.caches import error_lines, scripted
from tests.real.shells import blobs_in, digests, records_in
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Hold

StartDaemon = Callable[..., Daemon]

_SOON = 30.0
_SEEN = 5.0
_NEXT_ROUND = 120.0

LISTED: Mapping[str, Image | Index] = {"list": make_index("preload"), "image": make_image("preload/image")}
BIG = make_image("preload/big", layers=2, layer_size=4 * MIB)
OTHER = make_image("preload/other")


@pytest.fixture
def imagelist(upstream: ScriptedRegistry, tmp_path: Path) -> Path:
    """A list of three images."""
    for tag, image in {**LISTED, "big": BIG}.items():
        upstream.add("team/app", image, tag)
    path = tmp_path / "imagelist"
    path.write_text("".join(f"{upstream.host}/team/app:{tag}\n" for tag in (*LISTED, "big")))
    return path


@pytest.fixture
def preload(upstream: ScriptedRegistry, imagelist: Path, start_daemon: StartDaemon) -> StartDaemon:
    """A function that starts a daemon with that list and further options."""

    def start(*options: str, **more: Any) -> Daemon:
        chosen = ["--preload-images", str(imagelist), "--arch", "amd64", "--os", "linux"]
        return start_daemon({upstream.host: "http"}, "--no-complete-images", *chosen, *options, **more)

    return start


def progress(daemon: Daemon) -> dict[str, int]:
    """Return the progress in /health."""
    told: dict[str, int] = json.loads(fetch(f"{daemon.url}/health").body)["preload"]
    return told


def wait_loaded(daemon: Daemon, loaded: int, failed: int = 0) -> None:
    """Return when this many images of the list are loaded, and this many have failed for good."""
    wanted = {"images": loaded + failed, "loaded": loaded, "failed": failed}
    wait_until(lambda: progress(daemon) == wanted, _SOON, f"{wanted} in /health")


def assert_whole(daemon: Daemon, *images: Image | Index) -> None:
    """Assert that the store has the indexes with the images of this platform, and no more."""
    chosen = [image if isinstance(image, Image) else image.images[0] for image in images]
    assert blobs_in(daemon.image_path) == digests(*chosen)
    assert records_in(daemon.image_path) == {one.manifest.digest for one in (*images, *chosen)}


def test_daemon_serves_while_it_preloads(upstream: ScriptedRegistry, preload: StartDaemon) -> None:
    """The port is open, and clients are served, while a layer arrives; at the end /health and the log report."""
    upstream.add("team/other", OTHER, "v1")
    hold = Hold(MIB)
    with scripted(upstream, f"/v2/team/app/blobs/{BIG.layers[0].digest}", hold):
        daemon = preload("--concurrent", "3")
        assert hold.reached.wait(_SOON)
        assert progress(daemon)["images"] == 3
        assert progress(daemon)["loaded"] < 3
        answer = fetch(f"{daemon.url}/v2/team/other/manifests/v1?ns={upstream.host}")
        assert answer.body == OTHER.manifest.data
        hold.release.set()
        wait_loaded(daemon, 3)
    for tag in (*LISTED, "big"):
        assert f"preloading: loaded: {upstream.host}/team/app:{tag}: " in daemon.log
    wait_until(lambda: "preloaded: 3, failed: 0" in daemon.log, _SEEN, "the end in the log")
    assert error_lines(daemon, 0) == []


def test_each_image_is_reported_as_soon_as_it_is_loaded(upstream: ScriptedRegistry, preload: StartDaemon) -> None:
    """In /health and in the log, while another one is still loading."""
    hold = Hold(MIB)
    with scripted(upstream, f"/v2/team/app/blobs/{BIG.layers[0].digest}", hold):
        daemon = preload("--concurrent", "3")
        wait_until(lambda: len(blobs_in(daemon.image_path)) == 8, _SOON, "all other blobs are stored")
        wait_until(lambda: progress(daemon)["loaded"] == 2, _SEEN, "two in /health")
        for tag in LISTED:
            assert f"preloading: loaded: {upstream.host}/team/app:{tag}: " in daemon.log


def test_preloaded_images_are_complete_and_not_requested_again(
    upstream: ScriptedRegistry, preload: StartDaemon
) -> None:
    """Neither by clients nor at the next start, when the upstream may be gone."""
    daemon = preload()
    wait_loaded(daemon, 3)
    assert_whole(daemon, *LISTED.values(), BIG)
    asked = len(upstream.requests)
    for blob in BIG.blobs:
        assert fetch(f"{daemon.url}/v2/team/app/blobs/{blob.digest}?ns={upstream.host}").body == blob.data
    daemon.terminate()
    daemon.start()
    wait_loaded(daemon, 3)
    assert len(upstream.requests) == asked
    assert daemon.log.count("preloading: already there: ") == 3
    upstream.close()
    daemon.terminate()
    daemon.start()
    wait_loaded(daemon, 3)
    assert error_lines(daemon, 0) == []


def test_preload_failures_are_reported_and_stop_nothing(
    upstream: ScriptedRegistry, imagelist: Path, preload: StartDaemon
) -> None:
    """Malformed lines with file and line, images unknown to the upstream, and a missing platform."""
    upstream.add("team/arms", make_index("preload/arms", platforms=("linux/arm64",)), "v1")
    lines = ["# a comment", "UPPER/case:v1", f"{upstream.host}/team/app:missing", f"{upstream.host}/team/arms:v1"]
    imagelist.write_text("\n".join([*lines, "team/app:-", imagelist.read_text()]))
    daemon = preload()
    wait_loaded(daemon, 3, failed=2)
    errors = error_lines(daemon, 0)
    assert len([line for line in errors if f"not preloaded: {imagelist}:2: " in line]) == 1
    assert len([line for line in errors if f"not preloaded: {imagelist}:5: " in line]) == 1
    failed = [line for line in errors if "preloading: failed: " in line]
    assert len(failed) == 2
    assert f"{upstream.host}/team/app:missing: " in failed[0]
    assert f"{upstream.host}/team/arms:v1: no image for linux/amd64; available: linux/arm64" in failed[1]
    assert fetch(f"{daemon.url}/v2/").status == 200


@pytest.mark.parametrize("what", ["missing", "empty", "binary", "a folder"])
def test_unreadable_preload_list_is_an_error_line(imagelist: Path, preload: StartDaemon, what: str) -> None:
    imagelist.unlink()
    match what:
        case "empty":
            imagelist.touch()
        case "binary":
            imagelist.write_bytes(b"\xff\xfe")
        case "a folder":
            imagelist.mkdir()
    daemon = preload()
    wait_until(lambda: error_lines(daemon, 0), _SOON, "an error line")
    (line,) = error_lines(daemon, 0)
    assert str(imagelist) in line
    assert "not preloaded: " in line or "cannot preload: " in line
    assert progress(daemon) == {"images": 0, "loaded": 0, "failed": 0}
    assert fetch(f"{daemon.url}/v2/").status == 200


def test_preload_resumes_after_a_restart(upstream: ScriptedRegistry, preload: StartDaemon) -> None:
    """No byte of a layer is fetched twice."""
    layer = BIG.layers[0].digest
    hold = Hold(MIB)
    with scripted(upstream, f"/v2/team/app/blobs/{layer}", hold):
        daemon = preload("--concurrent", "3")
        kept = daemon.image_path / "pulls" / "0" / layer.removeprefix("sha256:")
        wait_until(lambda: kept.exists() and kept.stat().st_size == MIB, _SOON, "a MiB of the layer in the store")
        assert daemon.terminate() in (0, -15)
    daemon.start()
    wait_loaded(daemon, 3)
    assert upstream.bytes_sent(layer) == len(BIG.layers[0].data)
    assert_whole(daemon, *LISTED.values(), BIG)


@pytest.mark.long
def test_preload_retries_an_upstream_that_was_down_at_the_start(
    upstream: ScriptedRegistry, preload: StartDaemon
) -> None:
    """Each failure is logged once, and all is loaded when the upstream is back; a round takes half a minute."""
    upstream.close()
    daemon = preload()

    def failures() -> list[str]:
        return [line for line in error_lines(daemon, 0) if "preloading: failed: " in line]

    wait_until(lambda: len(failures()) == 3, _SOON, "a round without success")
    assert progress(daemon) == {"images": 3, "loaded": 0, "failed": 0}
    failed = failures()
    upstream.open()
    wait_until(lambda: progress(daemon)["loaded"] == 3, _NEXT_ROUND, "all are loaded")
    assert failures() == failed
    assert_whole(daemon, *LISTED.values(), BIG)
