"""`load` fetches metadata of the loaded indexes after all images; metadata failures are only warnings."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred

import ociregistry.commands.load
from ociregistry.commands.load import _load
from ociregistry.errors import ManifestUnknown, Unavailable
from ociregistry.platforms import ALL
from ociregistry.pullthrough.loader import Loader, LoadStatus
from ociregistry.settings import Settings, load_settings
from ociregistry.store.snapshot import Snapshot
from ociregistry.store.store import Store
from tests.images import Image, Index, make_image, make_index
from tests.unit.support.common import REACTOR, image, manifest, on_reactor
from tests.unit.support.loads import AMD64, Loads, MemoryFetcher, index_of

PLATFORMS = ("linux/amd64", "linux/arm64", "linux/s390x")
FIRST, SECOND = make_index("first", platforms=PLATFORMS), make_index("second", platforms=PLATFORMS)
SINGLE = make_image("single")
APP, NEXT, ALONE = "reg.example/app:1", "reg.example/next:1", "reg.example/alone:1"
ELSEWHERE = "else.example/app:1"


@pytest.fixture
def fetcher(store: Store, root: Path) -> MemoryFetcher:
    """Return a fetcher with two indexes and an image."""
    fetcher = MemoryFetcher(store, root)
    fetcher.add(APP, FIRST)
    fetcher.add(NEXT, SECOND)
    fetcher.add(ELSEWHERE, SECOND)
    fetcher.add(ALONE, SINGLE)
    return fetcher


@pytest.fixture
def loader(store: Store, fetcher: MemoryFetcher) -> Loader:
    """Return a linux/amd64 loader over it."""
    return Loads(store, fetcher).loader(AMD64)


def metadata_of(index: Index, repository: str) -> set[str]:
    """Return the expected requests for metadata of the other platforms."""
    others = index.images[1:]
    manifests = {f"manifest {repository}@{one.manifest.digest}" for one in others}
    return manifests | {f"blob {repository}@{one.config.digest}" for one in others}


def wanted(root: Path, *images: Image) -> list[bool | None]:
    """Return `wanted` of the records."""
    records = Snapshot.read(root).records
    return [records[manifest(one).digest].record.wanted for one in images]


@on_reactor
async def test_metadata_of_other_platforms_is_fetched_after_all_images(
    loader: Loader, fetcher: MemoryFetcher, root: Path
) -> None:
    outcomes = await loader.load([image(url) for url in (APP, ALONE, NEXT)])
    assert [outcome.ended for outcome in outcomes] == [LoadStatus.LOADED] * 3
    expected = metadata_of(FIRST, "reg.example/app") | metadata_of(SECOND, "reg.example/next")
    assert not expected & set(fetcher.asked)
    before = len(fetcher.asked)
    assert await loader.load_metadata() == []
    assert set(fetcher.asked[before:]) == expected
    assert len(fetcher.asked[before:]) == len(expected) == 8
    assert wanted(root, *FIRST.images, *SECOND.images) == [True, False, False] * 2
    assert {row.url for row in Snapshot.read(root).rows if "@" not in row.url} == {APP, ALONE, NEXT}
    assert len(Snapshot.read(root).rows) == 5


@on_reactor
async def test_present_metadata_is_not_requested(loader: Loader, fetcher: MemoryFetcher) -> None:
    for _ in range(2):
        await loader.load([image(APP)])
        await loader.load_metadata()
    assert len(fetcher.asked) == len(set(fetcher.asked))


@on_reactor
async def test_present_config_without_manifest_is_not_requested(
    loader: Loader, fetcher: MemoryFetcher, root: Path
) -> None:
    config = FIRST.images[1].config
    await loader.load([image(APP)])
    (root / "blobs" / config.digest.removeprefix("sha256:")).write_bytes(config.data)
    await loader.load_metadata()
    assert f"blob reg.example/app@{config.digest}" not in fetcher.asked


@on_reactor
async def test_all_loaded_platforms_are_wanted(store: Store, fetcher: MemoryFetcher, root: Path) -> None:
    loader = Loads(store, fetcher).loader()
    await loader.load([image(APP)])
    before = list(fetcher.asked)
    assert await loader.load_metadata() == []
    assert (fetcher.asked, wanted(root, *FIRST.images)) == (before, [True] * 3)


@on_reactor
async def test_metadata_image_loaded_later_becomes_wanted(
    store: Store, loader: Loader, fetcher: MemoryFetcher, root: Path
) -> None:
    await loader.load([image(APP)])
    await loader.load_metadata()
    arm64 = FIRST.images[1]
    (outcome,) = await Loads(store, fetcher).load(f"reg.example/app@{arm64.manifest.digest}")
    assert outcome.ended is LoadStatus.LOADED
    assert wanted(root, *FIRST.images) == [True, True, False]


@on_reactor
async def test_platform_unknown_upstream_is_skipped(loader: Loader, fetcher: MemoryFetcher, root: Path) -> None:
    missing = f"reg.example/app@{FIRST.images[1].manifest.digest}"
    fetcher.errors[f"manifest {missing}"] = ManifestUnknown("404")
    await loader.load([image(APP)])
    assert await loader.load_metadata() == []
    assert wanted(root, FIRST.images[0], FIRST.images[2]) == [True, False]


@on_reactor
async def test_metadata_failure_is_one_line_per_upstream(loader: Loader, fetcher: MemoryFetcher, root: Path) -> None:
    for one in FIRST.images[1:]:
        fetcher.errors[f"manifest reg.example/app@{one.manifest.digest}"] = Unavailable("it answered 429", 60)
    await loader.load([image(APP), image(ELSEWHERE)])
    assert await loader.load_metadata() == ["reg.example: it answered 429"]
    # The failed upstream is not asked again; the other one returns everything.
    assert sum("manifest reg.example/app@" in words for words in fetcher.asked) == 2
    assert wanted(root, *SECOND.images) == [True, False, False]


@on_reactor
async def test_metadata_of_nested_index(store: Store, loader: Loader, fetcher: MemoryFetcher, root: Path) -> None:
    inner = index_of(*((manifest(one), one.platform) for one in FIRST.images))
    outer = index_of((inner, ""))
    fetcher.put("reg.example/nested:1", outer, inner, *map(manifest, FIRST.images))
    fetcher.put(APP, manifest(FIRST), *map(manifest, FIRST.images), blobs=[blob.data for blob in FIRST.blobs])
    await loader.load([image("reg.example/nested:1")])
    assert await loader.load_metadata() == []
    assert wanted(root, *FIRST.images) == [True, False, False]


# The command


class Loading:
    """Run `load` with upstreams of the test."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self._root = root
        self._capfd = capfd
        self.errors: dict[str, Exception] = {}
        self.asked: list[str] = []
        monkeypatch.setattr(ociregistry.commands.load, "open_fetcher", self._fetcher_for)

    @asynccontextmanager
    async def _fetcher_for(self, store: Store, settings: Settings, reactor: Any) -> AsyncIterator[MemoryFetcher]:
        fetcher = MemoryFetcher(store, self._root)
        fetcher.add(APP, FIRST)
        fetcher.errors, fetcher.asked = self.errors, self.asked
        yield fetcher

    async def __call__(self, **changed: Any) -> list[str]:
        """Return stderr of a successful run."""
        settings = replace(load_settings({"image_path": str(self._root)}, (), None), platform=(AMD64,), **changed)
        refused: list[str] = []
        loading = _load([], [image(APP)], ALL, refused, settings, REACTOR)
        (outcome,) = await Deferred.fromCoroutine(loading)
        assert (outcome.ended, refused) == (LoadStatus.LOADED, [])
        return self._capfd.readouterr().err.splitlines()


@pytest.fixture
def loading(root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Loading:
    """Return a runner of `load`."""
    return Loading(root, monkeypatch, capfd)


@on_reactor
async def test_command_fetches_metadata(loading: Loading, root: Path) -> None:
    assert await loading() == []
    assert wanted(root, *FIRST.images) == [True, False, False]


@on_reactor
async def test_rate_limit_is_a_warning(loading: Loading) -> None:
    for one in FIRST.images[1:]:
        words = f"manifest reg.example/app@{one.manifest.digest}"
        loading.errors[words] = Unavailable("reg.example answered 429", 60)
    (line,) = await loading()
    assert line.startswith("ociregistry: warning: manifests of other platforms are missing for now: ")
    assert line.endswith(" reg.example: reg.example answered 429")


@on_reactor
async def test_no_metadata_when_turned_off(loading: Loading, root: Path) -> None:
    assert await loading(complete_metadata=False) == []
    assert not metadata_of(FIRST, "reg.example/app") & set(loading.asked)
    assert len(Snapshot.read(root).records) == 2
