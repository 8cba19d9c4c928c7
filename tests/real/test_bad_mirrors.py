"""Mirrors that answer 200 with wrong content: images are pulled all the same, once over the registry's link."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.images import make_image
from tests.processes import Daemon, wait_until
from tests.real.caches import SOON, blob_file, open_answer
from tests.upstream import ScriptedRegistry
from tests.upstream_http import Answer, Handler, Request, Rule
from tests.upstream_rules import Cut, Flip, NoLength, Reply, Resize

StartDaemon = Callable[..., Daemon]

PATIENCE = 10
"""Attempts of a client; the kubelet never stops."""
PAGE = b"<html><body>Please log in.</body></html>"
IMAGE = make_image("bad mirrors", layers=3, layer_size=400_000)


@dataclass(frozen=True)
class PageInstead(Rule):
    """An HTML page in place of the content, with the headers of the content or with its own."""

    disguised: bool

    def __call__(self, request: Request, handler: Handler) -> Answer:
        """Answer as a captive portal does."""
        if not self.disguised:
            return Answer(200, (("Content-Type", "text/html"),), PAGE)
        return Answer(200, handler(request).headers, PAGE)


WRONG: dict[str, tuple[Rule, ...]] = {
    # containerd/containerd#9552, distribution/distribution#4191: 200 with the right length, and no byte.
    "no_byte": (Cut(0),),
    "no_byte_reset": (Cut(0, reset=True),),
    "empty": (Reply(200),),
    "wrong": (Flip(100),),
    "wrong_at_the_end": (Flip(399_999), Flip(10)),
    "sends_short": (Resize(-1),),
    "sends_short_chunked": (Resize(-1), NoLength("chunked")),
    "sends_more": (Resize(1), NoLength("chunked")),
    # containerd/containerd#7400: a login page takes the place of a manifest.
    "html": (PageInstead(disguised=False),),
    "html_disguised": (PageInstead(disguised=True),),
}


@pytest.fixture
def bad() -> Iterator[ScriptedRegistry]:
    """Return the first mirror, which has the image."""
    with ScriptedRegistry() as bad:
        bad.add("team/app", IMAGE, "1")
        yield bad


@pytest.fixture
def chain(upstream: ScriptedRegistry, bad: ScriptedRegistry, start_daemon: StartDaemon, tmp_path: Path) -> Daemon:
    """Return a daemon with two mirrors: the bad one, and a second daemon in front of the registry."""
    upstream.add("team/app", IMAGE, "1")
    region = start_daemon({upstream.host: "http"}, image_path=tmp_path / "region")
    return start_daemon({upstream.host: {"scheme": "http", "mirrors": [bad.url, region.url]}})


def pull(daemon: Daemon, upstream: ScriptedRegistry, path: str) -> bytes:
    """Request content until it arrives whole, as clients repeat a request whose response was truncated."""
    for _ in range(PATIENCE):
        with open_answer(f"{daemon.url}/v2/team/app/{path}?ns={upstream.host}") as answer:
            if answer.status == 200:
                with suppress(http.client.IncompleteRead):
                    return answer.read()
    raise AssertionError(f"{path} did not come in {PATIENCE} attempts")


def pull_image(daemon: Daemon, upstream: ScriptedRegistry) -> None:
    """Pull as containerd does: the manifest by tag, then its blobs, several at a time."""
    assert pull(daemon, upstream, "manifests/1") == IMAGE.manifest.data
    with ThreadPoolExecutor(4) as clients:
        got = clients.map(lambda blob: pull(daemon, upstream, f"blobs/{blob.digest}"), IMAGE.blobs)
        assert list(got) == [blob.data for blob in IMAGE.blobs]


def wait_stored(daemon: Daemon) -> None:
    """Wait until all blobs are in the daemon's store."""
    wait_until(lambda: all(blob_file(daemon, blob.digest).exists() for blob in IMAGE.blobs), SOON, "all blobs")


def over_the_link(upstream: ScriptedRegistry) -> float:
    """Return the bytes of all bodies that the registry sent, divided by the size of the image."""
    size = len(IMAGE.manifest.data) + sum(len(blob.data) for blob in IMAGE.blobs)
    return sum(request.sent for request in upstream.requests) / size


@pytest.mark.parametrize("of", ["*/manifests/*", "*/blobs/*"], ids=["manifests", "blobs"])
@pytest.mark.parametrize("rules", WRONG.values(), ids=WRONG.keys())
def test_image_crosses_the_link_of_the_registry_once(
    chain: Daemon, bad: ScriptedRegistry, upstream: ScriptedRegistry, rules: tuple[Rule, ...], of: str
) -> None:
    for rule in rules:
        bad.script(of, rule, method="GET")
    pull_image(chain, upstream)
    assert over_the_link(upstream) <= 1.05
    wait_stored(chain)
    told = [line for line in chain.log.splitlines() if "#warn]" in line and "is not asked for" in line]
    assert told
    assert all(f"mirror {bad.url} is not asked for" in line for line in told)
    # It is asked for nothing more, except for what is asked for at the same time, and again after 10 s.
    assert len(told) <= 3
    assert len(bad.requests) <= 2 * (1 + len(IMAGE.blobs)) * len(told)


def test_daemon_with_damaged_blobs_as_mirror(
    upstream: ScriptedRegistry, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """The nearer of two daemons serves its damaged blobs: only `verify` reads them again."""
    upstream.add("team/app", IMAGE, "1")
    region = start_daemon({upstream.host: "http"}, image_path=tmp_path / "region")
    edge = start_daemon({upstream.host: {"scheme": "http", "mirrors": [region.url]}})
    pull_image(region, upstream)
    wait_stored(region)
    before = over_the_link(upstream)
    for blob in IMAGE.blobs:
        with blob_file(region, blob.digest).open("r+b") as file:
            file.seek(10)
            file.write(b"damaged")
    pull_image(edge, upstream)
    assert over_the_link(upstream) - before <= 1.05
    assert f"mirror {region.url} is not asked for" in edge.log
