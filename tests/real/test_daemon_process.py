"""The daemon as a process: its log, its health, and its end."""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime

import pytest

from ociregistry import __version__
from tests.client import connect, fetch
from tests.images import MIB, Index, make_image, make_index
from tests.processes import Daemon, wait_until
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Hold

StartDaemon = Callable[..., Daemon]

_SOON = 10.0
_PATIENCE = 20
_BANNER = re.compile(
    r"ociregistry (?P<version>\S+) started at (?P<started>\S+), listening on (?P<address>\S+), "
    r"store (?P<store>\S+) with (?P<lists>\d+) lists? and (?P<images>\d+) images?$"
)
_ACCESS = re.compile(
    r"(?P<method>GET|HEAD) (?P<path>/v2/\S+) ns=\S+ 200 \d+ bytes \d+ ms 127\.0\.0\.1:\d+ hit$", re.MULTILINE
)


@pytest.fixture
def stored(upstream: ScriptedRegistry, start_daemon: StartDaemon) -> Index:
    """An index with its images, all pulled into the store."""
    index = make_index("process")
    upstream.add("team/app", index, "v1")
    daemon = start_daemon({upstream.host: "http"})
    for url in _urls(daemon, upstream, index):
        assert fetch(url).status == 200
    kept = daemon.image_path / "blobs"
    wait_until(lambda: len(list(kept.iterdir())) == len(index.blobs), _SOON, "all blobs in the store")
    daemon.terminate()
    return index


def _urls(daemon: Daemon, upstream: ScriptedRegistry, index: Index) -> list[str]:
    manifests = ("v1", *(image.manifest.digest for image in index.images))
    paths = [f"manifests/{reference}" for reference in manifests] + [f"blobs/{blob.digest}" for blob in index.blobs]
    return [f"{daemon.url}/v2/team/app/{path}?ns={upstream.host}" for path in paths]


def test_level_error_logs_the_banner_and_no_hits(
    upstream: ScriptedRegistry, start_daemon: StartDaemon, stored: Index
) -> None:
    """Version, start time, address, store and counts; then no more lines."""
    before = datetime.now(UTC).replace(microsecond=0)
    daemon = start_daemon({upstream.host: "http"}, "--log-level", "error")
    after = datetime.now(UTC)
    _get_and_head(_urls(daemon, upstream, stored))
    daemon.terminate()
    banner = _banner(daemon.log)
    assert banner["version"] == __version__
    assert before <= datetime.fromisoformat(banner["started"]) <= after
    assert banner["address"].endswith(f":{daemon.port}")
    assert banner["store"] == str(daemon.image_path)
    assert (banner["lists"], banner["images"]) == ("1", str(len(stored.images)))


def test_level_info_logs_one_line_per_request(
    upstream: ScriptedRegistry, start_daemon: StartDaemon, stored: Index
) -> None:
    """No line of level debug."""
    daemon = start_daemon({upstream.host: "http"}, "--log-level", "info")
    _get_and_head(_urls(daemon, upstream, stored))
    daemon.terminate()
    about = [line for line in daemon.log.splitlines() if "/team/app/" in line]
    found = [_ACCESS.search(line) for line in about]
    asked = [url.removeprefix(daemon.url).partition("?")[0] for url in _urls(daemon, upstream, stored)]
    assert [line and (line["method"], line["path"]) for line in found] == [
        (method, path) for path in asked for method in ("GET", "HEAD")
    ]
    assert "#debug]" not in daemon.log


def _get_and_head(urls: list[str]) -> None:
    for url in urls:
        assert fetch(url).status == 200
        assert fetch(url, method="HEAD").status == 200


def _banner(log: str) -> dict[str, str]:
    """Return the fields of the banner, which must be the whole log."""
    (line,) = log.splitlines()
    found = _BANNER.search(line)
    assert found is not None, line
    return found.groupdict()


def test_health_counts_indexes_and_images(
    upstream: ScriptedRegistry, start_daemon: StartDaemon, stored: Index
) -> None:
    """The version, and as many indexes and images as there are records, also after a record was removed."""
    daemon = start_daemon({upstream.host: "http"})
    image = make_image("process/health")
    upstream.add("team/app", image, "v2")

    def assert_told(lists: int, images: int) -> None:
        assert len(list((daemon.image_path / "fat").iterdir())) == lists
        assert len(list((daemon.image_path / "img").iterdir())) == images
        wait_until(lambda: _counts(daemon) == (lists, images), _SOON, f"{lists} lists and {images} images")

    assert _counts(daemon) == (1, 2)
    assert fetch(f"{daemon.url}/v2/team/app/manifests/v2?ns={upstream.host}").status == 200
    assert_told(1, 3)
    (daemon.image_path / "fat" / stored.manifest.digest.removeprefix("sha256:")).unlink()
    assert_told(0, 3)


def _counts(daemon: Daemon) -> tuple[int, int]:
    answer = fetch(f"{daemon.url}/health")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    told = json.loads(answer.body)
    assert told["version"] == __version__
    return told["lists"], told["images"]


# Shutdown


def test_sigterm_lets_a_download_finish(upstream: ScriptedRegistry, start_daemon: StartDaemon) -> None:
    """New connections are refused; active clients and the store receive everything; then it exits."""
    image = make_image("process/drained", layers=1, layer_size=32 * MIB)
    (layer,) = image.layers
    upstream.add("team/app", image, "v1")
    hold = Hold(after=MIB)
    upstream.script(f"/v2/team/app/blobs/{layer.digest}", hold)
    daemon = start_daemon({upstream.host: "http"})
    with closing(connect(daemon.url)) as idle, closing(connect(daemon.url)) as connection:
        idle.request("GET", "/v2/")
        assert idle.getresponse().read() == b"{}"
        connection.request("GET", f"/v2/team/app/blobs/{layer.digest}?ns={upstream.host}")
        answer = connection.getresponse()
        begin = answer.read(MIB // 2)
        daemon.process.terminate()
        wait_until(lambda: _refuses(daemon.port), _SOON, "connections are refused")
        assert daemon.running
        hold.release.set()
        assert begin + answer.read() == layer.data
        # Well before the 30 s for requests in flight.
        daemon.process.wait(_PATIENCE)
    assert daemon.process.returncode in (0, -signal.SIGTERM)
    kept = daemon.image_path / "blobs" / layer.digest.removeprefix("sha256:")
    assert kept.read_bytes() == layer.data


def _refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=_SOON).close()
    except ConnectionRefusedError:
        return True
    return False
