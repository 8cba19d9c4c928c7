"""Preloading images in the background, with retries; no failure is fatal."""

from __future__ import annotations

from pathlib import Path

import pytest
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.errors import Denied, ManifestUnknown, RegistryError, Unavailable
from ociregistry.pullthrough.loader import ImageList, Preloader, PreloadProgress, read_image_list
from ociregistry.store.store import Store
from tests.images import make_image
from tests.unit.support.doubles import image, on_reactor, texts, turn, until
from tests.unit.support.loads import AMD64, Loads, Shelf, settle

URLS = [f"reg.example/app{number}:1" for number in range(3)]
ONE, TWO, THREE = URLS


@pytest.fixture
def shelf(store: Store, root: Path) -> Shelf:
    """Return a fetcher with the images."""
    shelf = Shelf(store, root)
    for url in URLS:
        shelf.add(url, make_image(url))
    return shelf


class Scene:
    """Preload lists of the test."""

    def __init__(self, store: Store, shelf: Shelf, clock: Clock) -> None:
        self._loads = Loads(store, shelf)
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

    async def passes(self, seconds: float) -> None:
        """Advance the clock."""
        await settle(self._store)
        self._clock.advance(seconds)
        await settle(self._store)


@pytest.fixture
def scene(store: Store, shelf: Shelf, clock: Clock) -> Scene:
    """Return a preloader over the fetcher."""
    return Scene(store, shelf, clock)


def listed(*urls: str, errors: tuple[str, ...] = ()) -> ImageList:
    """Return a list of these images."""
    return ImageList(tuple(map(image, urls)), errors)


def has_ended(events: list[LogEvent]) -> bool:
    """Return whether the last log line says that preloading has ended."""
    lines = texts(events, LogLevel.info)
    return bool(lines) and lines[-1].startswith("preloaded")


async def tried(shelf: Shelf, url: str, times: int) -> None:
    """Wait until the image has been requested `times` times."""
    await until(lambda: shelf.asked.count(f"manifest {url}") == times)


@on_reactor
async def test_all_images_are_loaded_and_logged(scene: Scene, events: list[LogEvent]) -> None:
    preloader = scene.start(listed(*URLS))
    assert preloader.progress == PreloadProgress(3, 0, 0)
    await until(lambda: preloader.progress == PreloadProgress(3, 3, 0))
    lines = texts(events, LogLevel.info)
    assert [line.partition(": ")[2].rpartition(": ")[0] for line in lines[:3]] == [f"loaded: {url}" for url in URLS]
    await until(lambda: has_ended(events))
    assert len(texts(events, LogLevel.info)) == 4
    assert texts(events, LogLevel.error) == []


@on_reactor
async def test_present_images_need_no_request(scene: Scene, shelf: Shelf, events: list[LogEvent]) -> None:
    first = scene.start(listed(*URLS))
    await until(lambda: first.progress.loaded == 3)
    shelf.asked.clear()
    events.clear()
    second = scene.start(listed(*URLS))
    await until(lambda: second.progress.loaded == 3)
    assert shelf.asked == []
    await until(lambda: has_ended(events))
    assert sum(text.startswith("preloading: already there: ") for text in texts(events)) == 3


@on_reactor
async def test_preloading_ends_once_all_are_present(scene: Scene, shelf: Shelf, clock: Clock) -> None:
    preloader = scene.start(listed(ONE))
    await until(lambda: preloader.progress.loaded == 1)
    asked = len(shelf.asked)
    for _ in range(3):
        await scene.passes(30)
    assert len(shelf.asked) == asked


@on_reactor
async def test_malformed_lines_are_logged_others_are_loaded(scene: Scene, events: list[LogEvent]) -> None:
    errors = ("images.txt:1: 'A' is not an image reference: so", "images.txt:7: 'B' is not an image reference: so")
    preloader = scene.start(listed(ONE, errors=errors))
    await until(lambda: preloader.progress == PreloadProgress(1, 1, 0))
    assert texts(events, LogLevel.error) == [f"not preloaded: {error}" for error in errors]


@on_reactor
async def test_empty_list(scene: Scene, events: list[LogEvent]) -> None:
    preloader = scene.start(listed(errors=("images.txt: names no image",)))
    await turn()
    assert preloader.progress == PreloadProgress(0, 0, 0)
    assert texts(events, LogLevel.error) == ["not preloaded: images.txt: names no image"]


@pytest.mark.parametrize("name", ["missing.txt", "."])
@on_reactor
async def test_unreadable_list_is_only_logged(
    scene: Scene, tmp_path: Path, events: list[LogEvent], name: str
) -> None:
    path = tmp_path / name
    try:
        given = succeed(read_image_list(path))
    except OSError as error:
        given = fail(error)
    preloader = scene.start(given)
    await turn()
    (line,) = texts(events)
    assert line.startswith("cannot preload: ")
    assert str(path) in line
    assert events[0]["log_level"] is LogLevel.error
    assert "log_failure" not in events[0]
    assert preloader.progress == PreloadProgress(0, 0, 0)
    preloader.stopService()


@on_reactor
async def test_temporary_failure_is_retried_every_30_seconds_and_logged_once(
    scene: Scene, shelf: Shelf, events: list[LogEvent]
) -> None:
    shelf.errors[f"manifest {TWO}"] = Unavailable("reg.example: down")
    preloader = scene.start(listed(*URLS))
    await until(lambda: preloader.progress == PreloadProgress(3, 2, 0))
    for tries in (1, 2, 3):
        await tried(shelf, TWO, tries)
        await scene.passes(29.9)
        assert shelf.asked.count(f"manifest {TWO}") == tries
        await scene.passes(0.1)
    assert texts(events, LogLevel.error) == [f"preloading: failed: {TWO}: reg.example: down"]
    assert preloader.progress == PreloadProgress(3, 2, 0)
    # Loaded images are not requested again.
    assert (shelf.asked.count(f"manifest {ONE}"), shelf.asked.count(f"manifest {THREE}")) == (1, 1)
    shelf.errors.clear()
    await scene.passes(30)
    await until(lambda: preloader.progress == PreloadProgress(3, 3, 0))
    await until(lambda: has_ended(events))
    asked = len(shelf.asked)
    await scene.passes(30)
    assert len(shelf.asked) == asked


@on_reactor
async def test_retry_does_not_wait_for_other_images(scene: Scene, shelf: Shelf) -> None:
    shelf.errors[f"manifest {ONE}"] = Unavailable("reg.example: down")
    shelf.held.add(f"manifest {TWO}")
    preloader = scene.start(listed(*URLS), concurrent=2)
    await until(lambda: preloader.progress == PreloadProgress(3, 1, 0))
    # While another image is still being loaded.
    await scene.passes(30)
    await tried(shelf, ONE, 2)
    assert list(shelf.waiting) == [f"manifest {TWO}"]
    preloader.stopService()


@pytest.mark.parametrize("error", [ManifestUnknown("reg.example: it answered 404"), Denied("not allowed")])
@on_reactor
async def test_permanent_failure_is_given_up(
    scene: Scene, shelf: Shelf, events: list[LogEvent], error: RegistryError
) -> None:
    shelf.errors[f"manifest {TWO}"] = error
    preloader = scene.start(listed(*URLS))
    await until(lambda: preloader.progress == PreloadProgress(3, 2, 1))
    for _ in range(3):
        await scene.passes(30)
    assert shelf.asked.count(f"manifest {TWO}") == 1
    assert texts(events, LogLevel.error) == [f"preloading: failed: {TWO}: {error.message}"]


@on_reactor
async def test_error_of_giving_up_is_logged(scene: Scene, shelf: Shelf, events: list[LogEvent]) -> None:
    shelf.errors[f"manifest {ONE}"] = Unavailable("reg.example: down")
    preloader = scene.start(listed(ONE))
    await until(lambda: shelf.asked)
    shelf.errors[f"manifest {ONE}"] = ManifestUnknown("reg.example: it answered 404")
    await scene.passes(30)
    await until(lambda: preloader.progress == PreloadProgress(1, 0, 1))
    assert texts(events, LogLevel.error) == [
        f"preloading: failed: {ONE}: reg.example: down",
        f"preloading: failed: {ONE}: reg.example: it answered 404",
    ]


@pytest.mark.parametrize("when", ["reading", "loading", "waiting"])
@pytest.mark.parametrize("concurrent", [1, 3])
@on_reactor
async def test_stop_during_preloading_is_no_failure(
    scene: Scene, shelf: Shelf, events: list[LogEvent], when: str, concurrent: int
) -> None:
    if when == "waiting":
        shelf.errors |= {f"manifest {url}": Unavailable("down") for url in URLS}
    else:
        shelf.held.add("manifest")
    reading: Deferred[ImageList] = Deferred()
    preloader = scene.start(reading if when == "reading" else listed(*URLS), concurrent)
    if when == "loading":
        await until(lambda: len(shelf.waiting) == concurrent)
    elif when == "waiting":
        await until(lambda: len(texts(events, LogLevel.error)) == 3)
    preloader.stopService()
    asked, told = len(shelf.asked), len(events)
    await scene.passes(100)
    assert (shelf.running.total(), len(shelf.asked), len(events)) == (0, asked, told)
    assert texts(events, LogLevel.critical) == []
    # A second stop has no effect.
    preloader.stopService()


@on_reactor
async def test_stop_before_start(store: Store, shelf: Shelf, clock: Clock) -> None:
    preloader = Preloader(lambda: succeed(listed(ONE)), Loads(store, shelf).loader(AMD64), clock)
    preloader.stopService()
    assert (preloader.progress, shelf.asked) == (PreloadProgress(0, 0, 0), [])


@pytest.mark.expect_logged_failures
@on_reactor
async def test_defect_is_logged_and_ends_preloading(scene: Scene, shelf: Shelf, events: list[LogEvent]) -> None:
    shelf.errors[f"manifest {ONE}"] = ZeroDivisionError("a defect")
    scene.start(listed(ONE))
    await until(lambda: texts(events, LogLevel.critical))
    assert texts(events, LogLevel.critical)[0].startswith("a defect in preloading")
