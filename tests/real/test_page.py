"""The page of a real daemon in a real browser, with scripts and without."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import count, pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from ociregistry.manifests import OCI_MANIFEST, Manifest
from ociregistry.names import Digest
from ociregistry.store.paths import record_path, store_folders
from ociregistry.store.records import Dates, Record
from tests.browser import Browser
from tests.client import fetch
from tests.images import make_image
from tests.processes import Daemon, free_port, wait_until
from tests.real.caches import SOON, daemon_in, scripted
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Drip
from tools import screenshot

MANY = 2000
NOW = datetime.now(UTC)
SCRIPT = "<script>window.ran=true</script>"
LONG = "/".join(("registry.example", *("a-very-long-name-of-a-team" for _ in range(6)), "app"))


def put_image(root: Path, url: str, size: int, created: datetime, pulled: datetime) -> None:
    """Write the record of an image without its blobs, as it is after another cache was copied."""
    blobs = [{"mediaType": "x", "digest": Digest.of(f"{url} {at}".encode()), "size": at} for at in (1, size - 1)]
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": blobs[0], "layers": blobs[1:]}
    manifest = Manifest.parse(json.dumps(document).encode(), OCI_MANIFEST)
    path = record_path(root, manifest.digest, is_list=False)
    path.write_bytes(Record(manifest, {url: Dates(created, created)}, wanted=False).render())
    os.utime(path, (pulled.timestamp(), pulled.timestamp()))


def fill(root: Path, number_of: int) -> None:
    """Write images whose sizes and dates are in another order than their names."""
    for folder in store_folders(root):
        folder.mkdir(parents=True, exist_ok=True)
    order = list(range(number_of))
    random.Random(17).shuffle(order)
    for number, other in enumerate(order):
        created = NOW - timedelta(hours=other)
        pulled = created + timedelta(minutes=number % 60)
        put_image(root, f"r{number % 9}.example/team/app{number:04}:1.{number % 5}", 1000 + other, created, pulled)


class Watched:
    """A daemon with an operator, and an upstream."""

    def __init__(self, daemon: Daemon, upstream: ScriptedRegistry, port: int) -> None:
        self.daemon = daemon
        self.upstream = upstream
        self.url = f"http://127.0.0.1:{port}/"
        self._numbers = count(1)

    def ask(self, path: str, query: str = "") -> int:
        """Request a path below /v2/ of the upstream; return the status."""
        url = f"{self.daemon.url}/v2/{path}?ns={quote(self.upstream.host, safe='')}{query}"
        return fetch(url, timeout=60).status

    @property
    def status(self) -> dict[str, Any]:
        """The status that the page is made from."""
        document: dict[str, Any] = json.loads(fetch(f"{self.url}status").body)
        return document

    @property
    def is_up(self) -> bool:
        """Whether the daemon can reach the upstream, as far as it knows."""
        (link,) = self.status["links"]
        return bool(link["up"])

    @contextmanager
    def downloading(self, name: str) -> Iterator[None]:
        """Pull a layer of 6 MB at 200 kB a second until the block ends, as `name` with a number for each call."""
        name = f"{name}{next(self._numbers)}"
        image = make_image(name, layers=1, layer_size=6_000_000)
        self.upstream.add(name, image, "1")
        # The link may count as down since the last test.
        wait_until(lambda: self.ask(f"{name}/manifests/1") == 200, SOON, "the manifest")
        blob = f"{name}/blobs/{image.layers[0].digest}"
        client = threading.Thread(target=self.ask, args=(blob,))
        with scripted(self.upstream, f"*{image.layers[0].digest}", Drip(200_000)):
            client.start()
            try:
                wait_until(lambda: name in str(self.status["downloads"]), SOON, "the download")
                yield
            finally:
                self.upstream.disconnect()
        client.join(60)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A daemon with 2,000 images, for all tests."""
    folder, port = tmp_path_factory.mktemp("page"), free_port()
    fill(folder / "images", MANY)
    put_image(folder / "images", f"{LONG}:{'1' * 128}", 2000, NOW, NOW)
    with (
        ScriptedRegistry() as upstream,
        daemon_in(folder, upstream, "--admin-listen", f"tcp:{port}:interface=127.0.0.1") as daemon,
    ):
        yield Watched(daemon, upstream, port)


@pytest.fixture(params=["browser", "scriptless"])
def any_browser(request: pytest.FixtureRequest) -> Browser:
    """A browser that runs scripts, or one that does not."""
    browser: Browser = request.getfixturevalue(request.param)
    browser.resize(1200, 900)
    return browser


@pytest.fixture(autouse=True)
def complaints(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail for what the browser's console says of a page: no script fails, and nothing breaks the policy."""
    yield
    for name in {"browser", "scriptless"} & set(request.fixturenames):
        browser: Browser = request.getfixturevalue(name)
        browser.open("about:blank")
        said = [line for line in browser.complaints if "ERR_CONNECTION_REFUSED" not in line]
        assert said == []


def stays(browser: Browser) -> Callable[[], bool]:
    """Return a function that tells whether the page is still the same one, not loaded again."""
    browser.evaluate("window.stays = true")
    return lambda: browser.evaluate("window.stays === true")


def test_thousands_of_images_make_a_light_page(
    watched: Watched, any_browser: Browser, request: pytest.FixtureRequest
) -> None:
    answer = fetch(watched.url)
    assert answer.status == 200
    assert len(answer.body) < 100_000
    any_browser.open(watched.url)
    took = any_browser.evaluate("performance.timing.loadEventEnd - performance.timing.navigationStart")
    request.node.user_properties.append(("milliseconds until it was loaded", took))
    # Two seconds on a machine that does nothing else.
    assert took < 15_000
    # Other tests may have pulled some more.
    assert re.fullmatch(r"Image URLs: 20\d\d, page 1 of 21", any_browser.text("#found"))
    assert len(any_browser.find("#table tbody tr")) == 100


def test_search_and_sort(watched: Watched, any_browser: Browser, request: pytest.FixtureRequest) -> None:
    """By the field and the heads of the columns; without scripts these are a form and links."""
    any_browser.open(f"{watched.url}?sort=url")
    same = stays(any_browser)
    (field,) = any_browser.find("#search")
    field.send_keys("R3 app00")
    field.submit()
    any_browser.wait_for("#found", ": 11 of 20")
    numbers = range(3, 100, 9)
    assert any_browser.texts("#table tbody th") == [f"r3.example/team/app{n:04}:1.{n % 5}" for n in numbers]

    found = any_browser.texts("#table tbody th")

    def sort(column: str, name: str, direction: str) -> list[str]:
        any_browser.find(f"#by-{column}")[0].click()
        any_browser.wait_for(f"#table th[aria-sort={direction}] a", name)
        rows = any_browser.texts("#table tbody th")
        assert sorted(rows) == found
        return rows

    largest = sort("size", "Size", "descending")
    sizes = [float(text.split()[0]) for text in any_browser.texts("#table td[data-name=Size]")]
    assert sizes == sorted(sizes, reverse=True)
    # The larger, the older.
    assert sort("created", "Created", "descending") == largest[::-1]
    newest = sort("pulled", "Last pulled", "descending")
    assert sort("pulled", "Last pulled", "ascending") == newest[::-1]
    assert sort("url", "Image", "ascending") == found
    assert any_browser.find("#search")[0].get_attribute("value") == "R3 app00"
    # With scripts nothing is loaded but the list.
    assert same() == (request.node.callspec.params["any_browser"] == "browser")
    # Another search keeps the order.
    sort("size", "Size", "descending")
    (field,) = any_browser.find("#search")
    field.send_keys("0")
    field.submit()
    any_browser.wait_for("#found", ": 1 of 20")
    assert any_browser.find("#table th[aria-sort=descending] #by-size")


def test_pages_of_images(watched: Watched, any_browser: Browser) -> None:
    any_browser.open(f"{watched.url}?sort=url&page=20")
    assert [one.text for one in any_browser.find("#pages a")] == ["Previous", "Next"]
    first = any_browser.texts("#table tbody th")
    any_browser.find("#next")[0].click()
    any_browser.wait_for("#found", "page 21 of 21")
    assert len(any_browser.texts("#table tbody th")) < 100
    any_browser.find("#previous")[0].click()
    any_browser.wait_for("#found", "page 20 of 21")
    assert any_browser.texts("#table tbody th") == first


def test_bar_of_a_download_moves(watched: Watched, browser: Browser) -> None:
    browser.open(watched.url)
    same = stays(browser)
    with watched.downloading("bar/app"):
        browser.wait_for("#downloads tbody", "bar/app")
        seen: list[int] = []

        def grown() -> bool:
            value = int(browser.evaluate("document.querySelector('#downloads progress')?.value ?? 0"))
            if value not in seen[-1:]:
                seen.append(value)
            return len(seen) > 3

        wait_until(grown, 30, "the bar moves")
        assert seen == sorted(seen)
        # Its own rate: what the link gives.
        browser.wait_for("#downloads td[data-name=Rate]", "kB/s")
        browser.wait_for("#downloads td[data-name=Left]", "s")
        assert browser.text("#downloads td[data-name=For]") == "1 client"
    browser.wait_for("#links", watched.upstream.host)
    assert same()


def test_bar_is_there_without_scripts(watched: Watched, scriptless: Browser) -> None:
    scriptless.open(watched.url)
    with watched.downloading("bar/scriptless"):
        scriptless.wait_for("#downloads tbody", "bar/scriptless")
        assert scriptless.find("#downloads progress")


def test_link_that_goes_down_and_comes_back_is_shown(
    watched: Watched, any_browser: Browser, request: pytest.FixtureRequest
) -> None:
    watched.upstream.add("link/app", make_image("link"), "1")
    assert watched.ask("link/app/manifests/1") == 200
    wait_until(lambda: watched.is_up, SOON, "the link is up")
    any_browser.open(watched.url)
    assert any_browser.text("#links .up") == "up"
    for state in ("down", "up"):
        if state == "down":
            watched.upstream.close()
            assert watched.ask("link/app/manifests/2") == 503
            wait_until(lambda: not watched.is_up, 60, "the link is down")
        else:
            watched.upstream.open()
            wait_until(lambda: watched.is_up, 60, "the link is up")
        known = time.monotonic()
        # Three seconds on a machine that does nothing else.
        any_browser.wait_for("#links tbody", state, 3 * SOON)
        request.node.user_properties.append((f"seconds until {state} was shown", time.monotonic() - known))
        assert any_browser.find(f"#links .{state}")


POLLS = "performance.getEntriesByType('resource').filter(one => one.name.endsWith('/live'))"


def pauses(browser: Browser) -> list[float]:
    """Return the milliseconds from one poll to the next."""
    starts = browser.evaluate(f"{POLLS}.map(one => one.startTime)")
    return [later - earlier for earlier, later in pairwise(starts)]


def test_polls_are_one_a_second(watched: Watched, browser: Browser) -> None:
    """And no more after the tab was hidden and is looked at again."""
    browser.open(watched.url)
    # A busy machine may take longer, but not each time.
    wait_until(lambda: any(pause < 2000 for pause in pauses(browser)), 30, "a second poll soon after the first")
    seen = len(pauses(browser))
    browser.evaluate("[1, 2].map(() => document.dispatchEvent(new Event('visibilitychange')))")
    wait_until(lambda: len(pauses(browser)) >= seen + 4, 30, "polls")
    # The one that comes at once with the look at the tab.
    assert sum(pause < 990 for pause in pauses(browser)) <= 1


def test_what_is_typed_and_chosen_stays(watched: Watched, browser: Browser) -> None:
    browser.open(watched.url)
    same = stays(browser)
    (field,) = browser.find("#search")
    field.send_keys("r3 app00")
    browser.wait_for("#found", ": 11 of 20")
    assert browser.evaluate("location.search") == "?search=r3+app00&sort=url"
    updated = browser.text("#figures")
    wait_until(lambda: browser.text("#figures") != updated, 30, "an update")
    assert browser.evaluate("document.activeElement.id") == "search"
    assert field.get_attribute("value") == "r3 app00"
    browser.find("#by-size")[0].click()
    browser.wait_for("#table th[aria-sort]", "Size")
    assert browser.evaluate("document.activeElement.id") == "by-size"
    assert same()
    # The address leads to the same page again.
    found = browser.texts("#table tbody th")
    browser.open(browser.evaluate("location.href"))
    assert browser.texts("#table tbody th") == found


def test_what_is_selected_or_open_stays(watched: Watched, browser: Browser) -> None:
    """Although the part of the page around it has changed."""

    def fail(number: int) -> None:
        assert watched.ask(f"open/app/manifests/{number}") == 503

    watched.upstream.add("open/app", make_image("open"), "stored")
    assert watched.ask("open/app/manifests/stored") == 200
    watched.upstream.close()
    try:
        for number in range(11):
            fail(number)
        browser.open(watched.url)
        same = stays(browser)
        browser.find("#older summary")[0].click()
        browser.evaluate("getSelection().selectAllChildren(document.getElementById('figures'))")
        selected = browser.evaluate("getSelection().toString()")
        shown = browser.text("#figures")
        assert "Pulls" in selected
        assert watched.ask("open/app/manifests/stored") == 200
        fail(99)
        browser.wait_for("#errors li", "open/app/manifests/99")
        assert browser.evaluate("document.getElementById('older').open")
        assert browser.evaluate("getSelection().toString()") == selected
        assert browser.text("#figures") == shown
        browser.evaluate("getSelection().removeAllRanges()")
        wait_until(lambda: browser.text("#figures") != shown, 30, "an update")
        assert same()
    finally:
        watched.upstream.open()


def test_page_of_another_version_is_loaded_again(watched: Watched, browser: Browser) -> None:
    browser.open(watched.url)
    same = stays(browser)
    browser.evaluate("document.getElementById('links').remove()")
    wait_until(lambda: browser.find("#links"), 30, "the page is whole again")
    assert not same()


def test_text_of_a_search_does_nothing(watched: Watched, any_browser: Browser) -> None:
    text = f'{SCRIPT}">{SCRIPT}'
    any_browser.open(f"{watched.url}?search={quote(text)}")
    assert any_browser.find("#search")[0].get_attribute("value") == text
    assert any_browser.text("#table") == "No image URL contains this."
    assert not any_browser.evaluate("window.ran")


def test_text_of_an_error_does_nothing(watched: Watched, any_browser: Browser) -> None:
    watched.upstream.close()
    try:
        with socket.create_connection(("127.0.0.1", watched.daemon.port)) as client:
            # As it is, not percent-encoded.
            target = f"/v2/hostile/app/manifests/1?ns={watched.upstream.host}&x={SCRIPT}"
            client.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            assert b" 503 " in client.makefile("rb").readline()
    finally:
        watched.upstream.open()
    any_browser.open(watched.url)
    any_browser.wait_for("#errors", SCRIPT)
    assert len(any_browser.find("script")) == 1
    assert not any_browser.evaluate("window.ran")


@pytest.mark.parametrize("width", [360, 768, 1920])
def test_nothing_overflows(watched: Watched, any_browser: Browser, width: int) -> None:
    any_browser.resize(width, 800)
    with watched.downloading(f"{'/'.join('long-name-of-a-team' for _ in range(7))}/app"):
        for address in (watched.url, f"{watched.url}?search=registry.example"):
            any_browser.open(address)
            any_browser.wait_for("#downloads tbody", "long-name")
            assert any_browser.overflow == 0
        assert LONG in any_browser.text("#table")


def test_daemon_that_cannot_be_reached_is_told(tmp_path: Path, browser: Browser) -> None:
    port = free_port()
    with Daemon(tmp_path, None, "--admin-listen", f"tcp:{port}:interface=127.0.0.1") as daemon:
        browser.open(f"http://127.0.0.1:{port}/")
        same = stays(browser)
        (lost,) = browser.find("#lost")
        assert not lost.is_displayed()
        daemon.terminate()
        wait_until(lost.is_displayed, 30, "it is told")
        assert re.match(r"The daemon has not answered since \d", lost.text)
        daemon.start()
        wait_until(lambda: not lost.is_displayed(), 30, "it has answered again")
        assert same()


def test_picture_of_the_documentation(tmp_path: Path, browser: Browser) -> None:
    """`python -m tools.screenshot` makes it; it looks a little different with each version of the browser."""
    taken = tmp_path / "page.png"
    screenshot.take(taken)
    for path in (taken, screenshot.PICTURE):
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) == screenshot.SIZE
        assert 20_000 < len(data) < 150_000
