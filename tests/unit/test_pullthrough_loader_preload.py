"""Preloading images in the background, with retries; no failure is fatal."""

from __future__ import annotations

from pathlib import Path

import pytest
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.errors import Denied, ManifestUnknown, RegistryError, Unavailable
from ociregistry.imagelists.reading import ImageList, read_image_list
from ociregistry.pullthrough.loader import Preloader, PreloadProgress
from ociregistry.store.store import Store
from tests.images import make_image
from tests.unit.support.common import image, on_reactor, texts, turn, until
from tests.unit.support.loads import AMD64, Loads, MemoryFetcher, settle

URLS = [f"reg.example/app{number}:1" for number in range(3)]
ONE, TWO, THREE = URLS


@pytest.fixture
def fetcher(store: Store, root: Path) -> MemoryFetcher:
    """Return a fetcher with the images."""
    fetcher = MemoryFetcher(store, root)
    for url in URLS:
        fetcher.add(url, make_image(url))
    return fetcher


class PreloadHarness:
    """Preload lists of the test."""

    def __init__(self, store: Store, fetcher: MemoryFetcher, clock: Clock) -> None:
        self._loads = Loads(store, fetcher)
        self._clock = clock
        self._store = store
        self.preloader: Preloader

    def start(self, listed: ImageList | Deferred[ImageList], concurrent: int = 1) -> Preloader:
        """Start preloading these images."""
        given = succeed(listed) if isinstance(listed, ImageList) else listed
        loader = self._loads.loader(AMD64, concurrent=concurrent)
        self.preloader = Preloader(lambda: given, loader, self._clock)
        self.preloader.startService()
        return self.preloader

    async def advance(self, seconds: float) -> None:
        """Advance the clock."""
        await settle(self._store)
        self._clock.advance(seconds)
        await settle(self._store)


@pytest.fixture
def harness(store: Store, fetcher: MemoryFetcher, clock: Clock) -> PreloadHarness:
    """Return a preloader over the fetcher."""
    return PreloadHarness(store, fetcher, clock)


def listed(*urls: str, errors: tuple[str, ...] = ()) -> ImageList:
    """Return a list of these images."""
    return ImageList(tuple(map(image, urls)), errors)


def has_ended(events: list[LogEvent]) -> bool:
    """Return whether the last log line says that preloading has ended."""
    lines = texts(events, LogLevel.info)
    return bool(lines) and lines[-1].startswith("preloaded")


async def tried(fetcher: MemoryFetcher, url: str, times: int) -> None:
    """Wait until the image has been requested `times` times."""
    await until(lambda: fetcher.asked.count(f"manifest {url}") == times)


@on_reactor
async def test_all_images_are_loaded_and_logged(harness: PreloadHarness, events: list[LogEvent]) -> None:
    preloader = harness.start(listed(*URLS))
    assert preloader.progress == PreloadProgress(3, 0, 0)
    await until(lambda: preloader.progress == PreloadProgress(3, 3, 0))
    lines = texts(events, LogLevel.info)
    assert [line.partition(": ")[2].rpartition(": ")[0] for line in lines[:3]] == [f"loaded: {url}" for url in URLS]
    await until(lambda: has_ended(events))
    assert len(texts(events, LogLevel.info)) == 4
    assert texts(events, LogLevel.error) == []


@on_reactor
async def test_present_images_need_no_request(
    harness: PreloadHarness, fetcher: MemoryFetcher, events: list[LogEvent]
) -> None:
    first = harness.start(listed(*URLS))
    await until(lambda: first.progress.loaded == 3)
    fetcher.asked.clear()
    events.clear()
    second = harness.start(listed(*URLS))
    await until(lambda: second.progress.loaded == 3)
    assert fetcher.asked == []
    await until(lambda: has_ended(events))
    assert sum(text.startswith("preloading: already there: ") for text in texts(events)) == 3


@on_reactor
async def test_preloading_ends_once_all_are_present(
    harness: PreloadHarness, fetcher: MemoryFetcher, clock: Clock
) -> None:
    preloader = harness.start(listed(ONE))
    await until(lambda: preloader.progress.loaded == 1)
    asked = len(fetcher.asked)
    for _ in range(3):
        await harness.advance(30)
    assert len(fetcher.asked) == asked


@on_reactor
async def test_malformed_lines_are_logged_others_are_loaded(harness: PreloadHarness, events: list[LogEvent]) -> None:
    errors = ("images.txt:1: 'A' is not an image reference: so", "images.txt:7: 'B' is not an image reference: so")
    preloader = harness.start(listed(ONE, errors=errors))
    await until(lambda: preloader.progress == PreloadProgress(1, 1, 0))
    assert texts(events, LogLevel.error) == [f"not preloaded: {error}" for error in errors]


@on_reactor
async def test_empty_list(harness: PreloadHarness, events: list[LogEvent]) -> None:
    preloader = harness.start(listed(errors=("images.txt: names no image",)))
    await turn()
    assert preloader.progress == PreloadProgress(0, 0, 0)
    assert texts(events, LogLevel.error) == ["not preloaded: images.txt: names no image"]


@pytest.mark.parametrize(("name", "why"), [("missing.txt", "No such file or directory"), (".", "Is a directory")])
@on_reactor
async def test_unreadable_list_is_only_logged(
    harness: PreloadHarness, tmp_path: Path, events: list[LogEvent], name: str, why: str
) -> None:
    path = tmp_path / name
    try:
        given = succeed(read_image_list(path))
    except OSError as error:
        given = fail(error)
    preloader = harness.start(given)
    await turn()
    (line,) = texts(events)
    assert line == f"cannot preload: {path}: {why}"
    assert events[0]["log_level"] is LogLevel.error
    assert "log_failure" not in events[0]
    assert preloader.progress == PreloadProgress(0, 0, 0)
    preloader.stopService()


@on_reactor
async def test_temporary_failure_is_retried_every_30_seconds_and_logged_once(
    harness: PreloadHarness, fetcher: MemoryFetcher, events: list[LogEvent]
) -> None:
    fetcher.errors[f"manifest {TWO}"] = Unavailable("reg.example: down")
    preloader = harness.start(listed(*URLS))
    await until(lambda: preloader.progress == PreloadProgress(3, 2, 0))
    for tries in (1, 2, 3):
        await tried(fetcher, TWO, tries)
        await harness.advance(29.9)
        assert fetcher.asked.count(f"manifest {TWO}") == tries
        await harness.advance(0.1)
    assert texts(events, LogLevel.error) == [f"preloading: failed: {TWO}: reg.example: down"]
    assert preloader.progress == PreloadProgress(3, 2, 0)
    # Loaded images are not requested again.
    assert (fetcher.asked.count(f"manifest {ONE}"), fetcher.asked.count(f"manifest {THREE}")) == (1, 1)
    fetcher.errors.clear()
    await harness.advance(30)
    await until(lambda: preloader.progress == PreloadProgress(3, 3, 0))
    await until(lambda: has_ended(events))
    asked = len(fetcher.asked)
    await harness.advance(30)
    assert len(fetcher.asked) == asked


@on_reactor
async def test_retry_does_not_wait_for_other_images(harness: PreloadHarness, fetcher: MemoryFetcher) -> None:
    fetcher.errors[f"manifest {ONE}"] = Unavailable("reg.example: down")
    fetcher.held.add(f"manifest {TWO}")
    preloader = harness.start(listed(*URLS), concurrent=2)
    await until(lambda: preloader.progress == PreloadProgress(3, 1, 0))
    # While another image is still being loaded.
    await harness.advance(30)
    await tried(fetcher, ONE, 2)
    assert list(fetcher.waiting) == [f"manifest {TWO}"]
    preloader.stopService()


@pytest.mark.parametrize("error", [ManifestUnknown("reg.example: it answered 404"), Denied("not allowed")])
@on_reactor
async def test_permanent_failure_is_given_up(
    harness: PreloadHarness, fetcher: MemoryFetcher, events: list[LogEvent], error: RegistryError
) -> None:
    fetcher.errors[f"manifest {TWO}"] = error
    preloader = harness.start(listed(*URLS))
    await until(lambda: preloader.progress == PreloadProgress(3, 2, 1))
    for _ in range(3):
        await harness.advance(30)
    assert fetcher.asked.count(f"manifest {TWO}") == 1
    assert texts(events, LogLevel.error) == [f"preloading: failed: {TWO}: {error.message}"]


@on_reactor
async def test_error_of_giving_up_is_logged(
    harness: PreloadHarness, fetcher: MemoryFetcher, events: list[LogEvent]
) -> None:
    fetcher.errors[f"manifest {ONE}"] = Unavailable("reg.example: down")
    preloader = harness.start(listed(ONE))
    await until(lambda: fetcher.asked)
    fetcher.errors[f"manifest {ONE}"] = ManifestUnknown("reg.example: it answered 404")
    await harness.advance(30)
    await until(lambda: preloader.progress == PreloadProgress(1, 0, 1))
    assert texts(events, LogLevel.error) == [
        f"preloading: failed: {ONE}: reg.example: down",
        f"preloading: failed: {ONE}: reg.example: it answered 404",
    ]


@pytest.mark.parametrize("when", ["reading", "loading", "waiting"])
@pytest.mark.parametrize("concurrent", [1, 3])
@on_reactor
async def test_stop_during_preloading_is_no_failure(
    harness: PreloadHarness, fetcher: MemoryFetcher, events: list[LogEvent], when: str, concurrent: int
) -> None:
    if when == "waiting":
        fetcher.errors |= {f"manifest {url}": Unavailable("down") for url in URLS}
    else:
        fetcher.held.add("manifest")
    reading: Deferred[ImageList] = Deferred()
    preloader = harness.start(reading if when == "reading" else listed(*URLS), concurrent)
    if when == "loading":
        await until(lambda: len(fetcher.waiting) == concurrent)
    elif when == "waiting":
        await until(lambda: len(texts(events, LogLevel.error)) == 3)
    preloader.stopService()
    asked, logged = len(fetcher.asked), len(events)
    await harness.advance(100)
    assert (fetcher.running.total(), len(fetcher.asked), len(events)) == (0, asked, logged)
    assert texts(events, LogLevel.critical) == []
    # A second stop has no effect.
    preloader.stopService()


@on_reactor
async def test_stop_before_start(store: Store, fetcher: MemoryFetcher, clock: Clock) -> None:
    preloader = Preloader(lambda: succeed(listed(ONE)), Loads(store, fetcher).loader(AMD64), clock)
    preloader.stopService()
    assert (preloader.progress, fetcher.asked) == (PreloadProgress(0, 0, 0), [])


@pytest.mark.expect_logged_failures
@on_reactor
async def test_defect_is_logged_and_ends_preloading(
    harness: PreloadHarness, fetcher: MemoryFetcher, events: list[LogEvent]
) -> None:
    fetcher.errors[f"manifest {ONE}"] = ZeroDivisionError("a defect")
    harness.start(listed(ONE))
    await until(lambda: texts(events, LogLevel.critical))
    assert texts(events, LogLevel.critical)[0].startswith("a defect in preloading")
