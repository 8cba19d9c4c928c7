"""The admin listener: the page, metrics and status by GET and HEAD, and nothing else; it stops last."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred, fail
from twisted.internet.protocol import Factory
from twisted.internet.task import Clock
from twisted.logger import LogEvent, Logger, LogLevel

from ociregistry import __version__
from ociregistry.admin.metrics import Metrics
from ociregistry.context import Context
from ociregistry.errors import TooManyRequests
from ociregistry.settings import AdminListen
from ociregistry.upstream.http import Response
from ociregistry.web.admin import AdminListener, AdminSite, ImageFacts
from ociregistry.web.resource import Answer
from tests.images import make_image
from tests.unit.support.common import REACTOR, failed, on_reactor, texts, turn, until
from tests.unit.support.daemons import Daemons, get, make
from tests.unit.support.statuses import STATUS, samples
from tests.unit.support.wire import Network
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Hold

BUILT = make_image("admin", layer_size=500_000)
LAYER = BUILT.layers[0]
ANYWHERE = ("--admin-listen", "tcp:0:interface=127.0.0.1")


def admin_url(events: list[LogEvent]) -> str:
    """Return the URL of the admin listener, by the log."""
    (address,) = [
        event["address"] for event in events if event.get("log_format", "").startswith("metrics and status")
    ]
    return f"http://{address}"


async def ask(network: Network, events: list[LogEvent], path: str, method: str = "GET") -> Response:
    """Send a request to the admin listener."""
    return await network.http("admin").send(method, f"{admin_url(events)}{path}", {})


async def status(network: Network, events: list[LogEvent]) -> dict[str, Any]:
    """Return the status as the daemon tells it."""
    document: dict[str, Any] = json.loads(await (await ask(network, events, "/status")).collect(100_000))
    return document


@on_reactor
async def test_metrics_and_status_are_served(
    root: Path, daemons: Daemons, network: Network, events: list[LogEvent]
) -> None:
    daemons.start(*ANYWHERE)
    metrics = await ask(network, events, "/metrics")
    assert (metrics.status, metrics.header("content-type")) == (200, Metrics.content_type)
    assert metrics.header("cache-control") == "no-store"
    found = samples(await metrics.collect(1_000_000))
    assert found["ociregistry_build_info", (("version", __version__),)] == 1
    told = await status(network, events)
    assert (told["status"], told["reasons"], told["version"]) == ("ok", [], __version__)
    assert told["store"].items() >= {"path": str(root), "lists": 0, "images": 0}.items()
    assert (told["stopping"], told["links"], told["downloads"], told["preload"]) == (False, [], [], None)
    assert len(told["listeners"]) == 1


PAGES = ["/", "/?search=a&sort=-size", "/live", "/images"]
FILES = ["/page.css", "/page.js", "/icon.svg"]


@pytest.mark.parametrize("path", PAGES)
@on_reactor
async def test_pages_have_a_strict_policy(
    daemons: Daemons, network: Network, events: list[LogEvent], path: str
) -> None:
    daemons.start(*ANYWHERE)
    answer = await ask(network, events, path)
    assert (answer.status, answer.header("content-type")) == (200, "text/html; charset=utf-8")
    assert answer.header("content-security-policy") == (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    )
    assert answer.header("referrer-policy") == "no-referrer"
    assert answer.header("x-content-type-options") == "nosniff"
    assert answer.header("cache-control") == "no-store"
    assert (await answer.collect(100_000)).startswith(b"<!DOCTYPE html><")


@on_reactor
async def test_page_names_its_files(daemons: Daemons, network: Network, events: list[LogEvent]) -> None:
    """With what tells another version, so that browsers may keep them."""
    daemons.start(*ANYWHERE)
    text = (await (await ask(network, events, "/")).collect(100_000)).decode()
    named = re.findall(r'(?:src|href)="([a-z.]+\?[0-9a-f]+)"', text)
    assert sorted(f"/{name.partition('?')[0]}" for name in named) == sorted(FILES)
    types = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8", "svg": "image/svg+xml"}
    for name in named:
        answer = await ask(network, events, f"/{name}")
        content = await answer.collect(100_000)
        assert (answer.status, answer.header("content-type")) == (
            200,
            types[name.partition("?")[0].rpartition(".")[2]],
        )
        assert answer.header("cache-control") == "max-age=31536000, immutable"
        assert hashlib.sha256(content).hexdigest().startswith(name.partition("?")[2])


@on_reactor
async def test_page_shows_what_is_pulled(
    daemons: Daemons, network: Network, events: list[LogEvent], upstream: ScriptedRegistry
) -> None:
    upstream.add("team/app", BUILT, "1")
    daemons.start("--default-ns", upstream.host, "--no-complete-images", *ANYWHERE)
    await (await get(network, events, "/v2/team/app/manifests/1")).collect(10_000)
    url = f"{upstream.host}/team/app:1".encode()
    for path, there in (
        ("/images", True),
        ("/", True),
        ("/images?search=app:1", True),
        ("/images?search=app:2", False),
    ):
        text = await (await ask(network, events, path)).collect(100_000)
        assert (url in text) == there
    # It lacks its layers.
    text = await (await ask(network, events, "/live")).collect(100_000)
    assert url in text
    assert b"1 image lacks" in text
    (image,) = (await status(network, events))["incomplete_images"]
    size = sum(len(blob.data) for blob in BUILT.blobs)
    assert image == {"image": url.decode(), "digest": BUILT.manifest.digest, "bytes": size}


@on_reactor
async def test_fault_of_the_store_is_counted(daemons: Daemons, network: Network, events: list[LogEvent]) -> None:
    daemons.start(*ANYWHERE, "--reserve", "100000TB")
    found = samples(await (await ask(network, events, "/metrics")).collect(1_000_000))
    assert (found["ociregistry_store_faults", ()], found["ociregistry_disk_full", ()]) == (1, 1)


@pytest.mark.parametrize("path", ["/status", *PAGES])
@on_reactor
async def test_store_whose_path_is_not_utf_8(
    daemons: Daemons, network: Network, events: list[LogEvent], path: str, tmp_path: Path
) -> None:
    root = tmp_path / "\udcff"
    daemons.start(*ANYWHERE, "--image-path", str(root))
    Logger(namespace="ociregistry.store").error("no {path}", path=root)
    answer = await ask(network, events, path)
    assert answer.status == 200
    text = (await answer.collect(100_000)).decode()
    if path == "/status":
        told = json.loads(text)
        assert (told["store"]["path"], told["errors"][0]["text"]) == (rf"{tmp_path}/\udcff", rf"no {tmp_path}/\udcff")


@pytest.mark.parametrize("path", ["/metrics", "/status", *PAGES, *FILES])
@on_reactor
async def test_head_is_get_without_content(
    daemons: Daemons, network: Network, events: list[LogEvent], path: str
) -> None:
    daemons.start(*ANYWHERE)
    answer = await ask(network, events, path, "HEAD")
    assert answer.status == 200
    assert int(answer.header("content-length")) > 100
    assert await answer.collect(100) == b""


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
@on_reactor
async def test_other_methods_are_refused(
    daemons: Daemons, network: Network, events: list[LogEvent], method: str
) -> None:
    daemons.start(*ANYWHERE)
    for path in ("/metrics", "/status", "/v2/", *PAGES, *FILES):
        assert (await ask(network, events, path, method)).status == 405


@pytest.mark.parametrize(
    "path",
    [
        "/v2/",
        "/v2/team/app/manifests/1",
        "/health",
        "/live/",
        "/page.html",
        "/metrics/",
        "/status/x",
        "/x/metrics",
        "//metrics",
        "/../page.css",
        "/%70age.css",
    ],
)
@on_reactor
async def test_other_paths_are_404(daemons: Daemons, network: Network, events: list[LogEvent], path: str) -> None:
    daemons.start(*ANYWHERE)
    answer = await ask(network, events, path)
    assert (answer.status, answer.header("content-type")) == (404, "application/json")


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
@on_reactor
async def test_probes_are_those_of_the_registry(
    daemons: Daemons, network: Network, events: list[LogEvent], path: str
) -> None:
    daemons.start(*ANYWHERE)
    for answer in (await ask(network, events, path), await get(network, events, path)):
        assert (answer.status, await answer.collect(100)) == (200, b"ok\n")


async def ask_as(events: list[LogEvent], host: str | None, path: str) -> int:
    """Send a request with this Host header, or by HTTP/1.0 with none; return the status of the answer."""
    where, _, port = admin_url(events).removeprefix("http://").rpartition(":")
    head = f"GET {path} HTTP/1.0\r\n\r\n" if host is None else f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n"
    received = b""
    with socket.create_connection((where, int(port))) as client:
        client.sendall(head.encode())
        client.setblocking(False)

        def answered() -> bool:
            nonlocal received
            with suppress(BlockingIOError):
                received += client.recv(65536)
            return b"\r\n" in received

        await until(answered)
    return int(received.split()[1])


@pytest.mark.parametrize("path", ["/", "/metrics", "/status", "/livez", "/nothing"])
@on_reactor
async def test_name_that_leads_to_loopback_is_refused(daemons: Daemons, events: list[LogEvent], path: str) -> None:
    daemons.start(*ANYWHERE)
    for name in ("rebound.example:8081", "rebound.example", "localhost.rebound.example", "127.0.0.1.rebound.example"):
        assert await ask_as(events, name, path) == 403
    for host in ("localhost:8081", "LOCALHOST", "127.0.0.1", "127.0.0.1:8081", "[::1]:8081", "10.0.0.7", None):
        assert await ask_as(events, host, path) in (200, 404)


@on_reactor
async def test_registry_has_no_admin_paths(daemons: Daemons, network: Network, events: list[LogEvent]) -> None:
    daemons.start(*ANYWHERE)
    for path in ("/metrics", "/status", *PAGES, *FILES):
        assert (await get(network, events, path)).status == 404


@on_reactor
async def test_scrapes_are_not_counted(daemons: Daemons, network: Network, events: list[LogEvent]) -> None:
    daemons.start(*ANYWHERE)
    await ask(network, events, "/metrics")
    await ask(network, events, "/nothing")
    assert all(row["answers"] == 0 for row in (await status(network, events))["requests"])
    assert not [line for line in texts(events, LogLevel.info) if "GET /metrics" in line]


@on_reactor
async def test_status_tells_of_a_download(
    daemons: Daemons, network: Network, events: list[LogEvent], upstream: ScriptedRegistry, clock: Clock
) -> None:
    upstream.add("team/app", BUILT, "1")
    hold = Hold(100_000)
    upstream.script("/v2/*/blobs/*", hold)
    daemons.start("--default-ns", upstream.host, "--no-complete-images", *ANYWHERE)
    manifest = await get(network, events, "/v2/team/app/manifests/1")
    await manifest.collect(10_000)
    blob = await get(network, events, f"/v2/team/app/blobs/{LAYER.digest}")
    reading = Deferred.fromCoroutine(blob.collect(1_000_000))
    await until(hold.reached.is_set)
    told = await status(network, events)
    (download,) = told["downloads"]
    assert (download["blob"], download["upstream"], download["clients"]) == (LAYER.digest, upstream.host, 1)
    assert (download["repository"], download["size"]) == (f"{upstream.host}/team/app", len(LAYER.data))
    assert 0 <= download["bytes"] <= 100_000
    assert download["image"] == f"{upstream.host}/team/app:1"
    began = datetime.fromisoformat(download["started"])
    assert abs((datetime.now(UTC) - began).total_seconds()) < 60
    assert (download["rate"], download["seconds_left"]) == (None, None)
    (link,) = told["links"]
    assert (link["host"], link["up"], link["why"], link["wanted"]) == (upstream.host, True, "", False)
    for _ in range(2):
        clock.advance(1)
    (download,) = (await status(network, events))["downloads"]
    assert (download["rate"], download["seconds_left"]) == (0, None)
    hold.release.set()
    assert await reading == LAYER.data
    received = (await status(network, events))["received_bytes"]
    assert received[upstream.host] == len(BUILT.manifest.data) + len(LAYER.data)


@on_reactor
async def test_lost_host_is_told(
    daemons: Daemons, network: Network, events: list[LogEvent], tmp_path: Path, clock: Clock
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        host = f"127.0.0.1:{listening.getsockname()[1]}"
    (tmp_path / "it.yaml").write_text(f"- name: {host}\n  scheme: http\n")
    daemons.start("--default-ns", host, "--config-path", str(tmp_path / "it.yaml"), *ANYWHERE)
    asked = Deferred.fromCoroutine(get(network, events, "/v2/team/app/manifests/1"))

    def lost() -> bool:
        clock.advance(0.1)
        return any("cannot be reached" in line for line in texts(events, LogLevel.warn))

    await until(lost)
    told = await status(network, events)
    (link,) = told["links"]
    assert (link["host"], link["up"], link["wanted"]) == (host, False, True)
    assert "refused" in link["why"]
    assert told["status"] == "degraded"
    assert told["reasons"] == [f"{host} cannot be reached, and something from it is wanted: {link['why']}"]
    assert 0 < link["next_probe_seconds"] <= 1
    found = samples(await (await ask(network, events, "/metrics")).collect(1_000_000))
    assert found["ociregistry_link_up", (("host", host),)] == 0
    while not asked.called:
        clock.advance(1)
        await turn()
    assert (await asked).status == 503
    (error,) = (await status(network, events))["errors"]
    assert error["text"].startswith("GET /v2/team/app/manifests/1: 503 UNAVAILABLE: ")
    assert error["namespace"] == "ociregistry.web"


@on_reactor
async def test_stop_can_be_watched(
    daemons: Daemons, network: Network, events: list[LogEvent], upstream: ScriptedRegistry
) -> None:
    upstream.add("team/app", BUILT, "1")
    hold = Hold()
    upstream.script("*", hold)
    daemons.start("--default-ns", upstream.host, *ANYWHERE)
    asked = Deferred.fromCoroutine(get(network, events, "/v2/team/app/manifests/1"))
    await until(hold.reached.is_set)
    stopped = daemons.stop()
    await turn()
    told = await status(network, events)
    assert (told["stopping"], told["requests_in_flight"]) == (True, 1)
    assert not stopped.called
    hold.release.set()
    assert await (await asked).collect(10_000) == BUILT.manifest.data
    await until(daemons.stopped)


@on_reactor
async def test_nothing_is_served_without_an_endpoint(daemons: Daemons, events: list[LogEvent]) -> None:
    daemons.start("--admin-listen", "")
    assert not [line for line in texts(events) if "metrics and status" in line]


@pytest.fixture
def taken() -> Iterator[str]:
    """Return an endpoint that another program listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"tcp:{listening.getsockname()[1]}:interface=127.0.0.1"


# Twisted 22.4 leaves the unbound socket to the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")
def test_given_address_in_use_ends_startup(
    root: Path, taken: str, capfd: pytest.CaptureFixture[str], events: list[LogEvent]
) -> None:
    daemon = make(root, "--admin-listen", taken)
    with pytest.raises(SystemExit) as ended:
        daemon.privilegedStartService()
    assert ended.value.code == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"ociregistry: cannot listen on {taken}: ")
    assert "in use" in line
    daemon._listeners.stopService()


# Twisted 22.4 leaves the unbound socket to the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")
def test_default_address_in_use_is_one_warning(taken: str, events: list[LogEvent]) -> None:
    listener = AdminListener(AdminListen(taken), Factory(), REACTOR)
    listener.privilegedStartService()
    (event,) = [event for event in events if event["log_level"] is LogLevel.warn]
    assert event["log_always"]
    assert texts([event])[0].startswith(f"cannot listen on {taken}: ")
    assert listener.addresses == []
    listener.stopService()


@on_reactor
async def test_socket_of_the_file_system(tmp_path: Path, daemons: Daemons) -> None:
    path = tmp_path / "admin.sock"
    daemons.start("--admin-listen", f"unix:{path}:mode=600")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.setblocking(False)
        client.sendall(b"GET /status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = b""

        def ended() -> bool:
            nonlocal received
            try:
                piece = client.recv(65536)
            except BlockingIOError:
                return False
            received += piece
            return not piece

        await until(ended)
    assert received.startswith(b"HTTP/1.1 200 ")
    assert path.stat().st_mode & 0o777 == 0o600


@on_reactor
async def test_failed_reload_is_told_until_one_succeeds(
    daemons: Daemons, network: Network, events: list[LogEvent], tmp_path: Path
) -> None:
    """By the status and the metrics; `/health` is for probes, and hits are served."""
    path = tmp_path / "ociregistry.yaml"
    path.write_text("")
    daemon = daemons.start("--config-path", str(path), *ANYWHERE)

    async def reloaded(text: str) -> tuple[str, str | None, float]:
        path.write_text(text)
        await daemon.reload()
        told = await status(network, events)
        found = samples(await (await ask(network, events, "/metrics")).collect(1_000_000))
        assert all(str(told["reload_failed"]) in reason for reason in told["reasons"])
        return told["status"], told["reload_failed"], found["ociregistry_config_last_reload_successful", ()]

    assert await reloaded("allow_upstreams: quay.io\n") == ("ok", None, 1)
    state, why, succeeded = await reloaded("\nprune: {unused_for: never}\n")
    assert (state, succeeded) == ("degraded", 0)
    assert why is not None
    assert why.startswith(f"{path}:2: prune.unused_for")
    assert await reloaded("allow_upstreams: quay.io\n") == ("ok", None, 1)


@pytest.mark.expect_logged_failures
@on_reactor
async def test_reload_that_ends_with_a_defect_has_failed(
    daemons: Daemons, network: Network, events: list[LogEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = daemons.start(*ANYWHERE)
    monkeypatch.setattr(daemon, "_reconfigure", lambda settings: 1 / 0)
    await daemon.reload()
    told = await status(network, events)
    why = "a defect in reloading the settings: ZeroDivisionError: division by zero"
    assert (told["status"], told["reload_failed"]) == ("degraded", why)
    monkeypatch.undo()
    await daemon.reload()
    assert (await status(network, events))["status"] == "ok"


@on_reactor
async def test_page_tells_a_failed_reload_of_a_file_whose_name_is_not_utf_8(
    daemons: Daemons, network: Network, events: list[LogEvent], tmp_path: Path
) -> None:
    path = tmp_path / "\udcff.yaml"
    path.write_text("")
    daemon = daemons.start("--config-path", str(path), *ANYWHERE)
    path.unlink()
    await daemon.reload()
    for page in ("/", "/live"):
        answer = await ask(network, events, page)
        assert answer.status == 200
        assert rf"{tmp_path}/\udcff.yaml: cannot be read" in (await answer.collect(100_000)).decode()


@on_reactor
async def test_pages_are_rendered_in_turn() -> None:
    """One in each turn of the reactor, and no more wait than are soon done."""
    site = AdminSite(lambda: STATUS, ImageFacts(lambda: fail(AssertionError()), dict), {}, REACTOR)

    def asked() -> Deferred[Answer]:
        return Deferred.fromCoroutine(site._answer("GET", b"/live", {}, Context()))

    pages = [asked() for _ in range(21)]
    # A status from 500 up would be logged as an error, and many of them would fill the list of the last errors.
    assert failed(asked(), TooManyRequests).status < 500
    done = [sum(page.called for page in pages)]
    while done[-1] < len(pages):
        await turn()
        done.append(sum(page.called for page in pages))
    assert done[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(done))
    assert {(await page).status for page in pages} == {200}
    await turn()
    # A lone one does not wait.
    assert asked().called
    await turn()
