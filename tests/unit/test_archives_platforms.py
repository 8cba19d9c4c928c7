"""Archives of several platforms, of which some are wanted."""

from __future__ import annotations

from pathlib import Path

import pytest

from ociregistry.names import Digest
from ociregistry.platforms import Platform, parse_platforms
from ociregistry.pullthrough.loader import LoadResult, LoadStatus
from ociregistry.store.snapshot import Snapshot
from ociregistry.store.store import Store
from tests.images import Image, Index, index_of, make_artifact, make_attestation, make_image, make_index
from tests.unit.support.archives import IMAGE_NAME, NAME, docker_saved, layout, load, named, write_tar
from tests.unit.support.common import REACTOR, image, manifest, on_reactor
from tests.unit.support.exports import export

INDEX = make_index("platforms", platforms=("linux/amd64", "linux/arm64", "linux/arm/v7"))
AMD64, ARM64, ARMV7 = INDEX.images


async def whole(store: Store, *images: Image) -> list[bool]:
    """Tell for each of the images whether it is in the store with all its blobs."""
    return [await store.missing(Digest(one.manifest.digest)) == {} for one in images]


async def loaded(store: Store, folder: Path, what: Image | Index, platforms: str) -> LoadResult:
    """Load an archive of `what` for these platforms; return the outcome."""
    path = write_tar(folder / "a.tar", named(what))
    (outcome,) = await load(store, path, platforms=parse_platforms(platforms))
    return outcome


@pytest.mark.parametrize("wanted", ["linux/arm64", "linux/aarch64", "linux/arm64/v8"])
@on_reactor
async def test_wanted_platform_of_an_index(store: Store, root: Path, tmp_path: Path, wanted: str) -> None:
    """Of the others come the manifests and configs, as with a pull, so that clients can read them all."""
    outcome = await loaded(store, tmp_path, INDEX, wanted)
    assert (outcome.ended, outcome.notes, outcome.blobs) == (LoadStatus.LOADED, (), 5)
    assert await store.manifest(image(NAME)) == manifest(INDEX)
    assert await whole(store, ARM64, AMD64, ARMV7) == [True, False, False]
    for one in (AMD64, ARMV7):
        assert await store.holds(Digest(one.config.digest), len(one.config.data))
        assert Snapshot.read(root).is_metadata(Digest(one.manifest.digest))
    assert (await loaded(store, tmp_path, INDEX, wanted)).ended is LoadStatus.PRESENT
    outcome = await loaded(store, tmp_path, INDEX, "linux/amd64,linux/arm64")
    assert (outcome.ended, outcome.blobs) == (LoadStatus.LOADED, 2)
    assert await whole(store, ARM64, AMD64, ARMV7) == [True, True, False]
    assert (await loaded(store, tmp_path, INDEX, "all")).blobs == 2


@on_reactor
async def test_index_without_one_of_the_platforms(store: Store, tmp_path: Path) -> None:
    outcome = await loaded(store, tmp_path, INDEX, "linux/arm64,linux/s390x")
    assert (outcome.ended, outcome.notes) == (LoadStatus.LOADED, ("the archive has no image for linux/s390x",))


@pytest.mark.parametrize("what", [INDEX, index_of([AMD64], {AMD64.manifest.digest: make_attestation("x")}), AMD64])
@on_reactor
async def test_archive_without_any_of_the_platforms_fails(store: Store, tmp_path: Path, what: Image | Index) -> None:
    outcome = await loaded(store, tmp_path, what, "linux/s390x,windows/amd64")
    there = "linux/amd64, linux/arm/v7, linux/arm64" if what is INDEX else "linux/amd64"
    assert outcome == LoadResult(
        NAME, LoadStatus.FAILED, f"no image for linux/s390x, windows/amd64; available: {there}"
    )
    assert store.counts.lists == store.counts.images == 0


@pytest.mark.parametrize("kind", ["layout", "docker save"])
@on_reactor
async def test_platform_of_an_image_is_in_its_config(store: Store, tmp_path: Path, kind: str) -> None:
    files = named(ARM64) if kind == "layout" else docker_saved(ARM64, NAME)
    path = write_tar(tmp_path / "a.tar", files)
    (failed,) = await load(store, path, platforms=parse_platforms("linux/amd64"))
    assert failed.why == "no image for linux/amd64; available: linux/arm64"
    (outcome,) = await load(store, path, platforms=parse_platforms("linux/amd64,linux/arm64"))
    assert outcome.ended is LoadStatus.LOADED
    assert not any("no image" in note for note in outcome.notes)


@on_reactor
async def test_versions_of_windows(store: Store, tmp_path: Path) -> None:
    server_2019, server_2022 = "windows(10.0.17763.6893)/amd64", "windows(10.0.20348.2849)/amd64"
    index = make_index("windows", platforms=("linux/amd64", server_2019, server_2022))
    path = write_tar(tmp_path / "a.tar", named(index))
    (failed,) = await load(store, path, platforms=[Platform("windows", "amd64", "", "10.0.1")])
    there = f"linux/amd64, {server_2019}, {server_2022}"
    assert failed.why == f"no image for windows(10.0.1)/amd64; available: {there}"
    (outcome,) = await load(store, path, platforms=[Platform("windows", "amd64", "", "10.0.20348")])
    assert outcome.ended is LoadStatus.LOADED
    assert await whole(store, *index.images) == [False, False, True]


@on_reactor
async def test_artifact_without_platform_is_loaded(store: Store, tmp_path: Path) -> None:
    chart = make_artifact("chart", AMD64.manifest)
    assert (await loaded(store, tmp_path, chart, "linux/s390x")).ended is LoadStatus.LOADED


@on_reactor
async def test_nested_index(store: Store, tmp_path: Path) -> None:
    """Docker wraps what it saves in one; it tells no platform."""
    outer = index_of([Image(INDEX.manifest, (), "")])
    files = {**named(INDEX), **layout((outer, {IMAGE_NAME: NAME}))}
    (outcome,) = await load(store, write_tar(tmp_path / "a.tar", files), platforms=parse_platforms("linux/arm64"))
    assert outcome.ended is LoadStatus.LOADED
    assert await whole(store, ARM64, AMD64) == [True, False]


@on_reactor
async def test_images_by_digest_come_with_their_index(store: Store, root: Path, tmp_path: Path) -> None:
    """An export may name them by their digests too; that is no reason to load or to report them."""
    await loaded(store, tmp_path, INDEX, "all")
    other = make_image("other", platform="linux/s390x")
    await load(store, write_tar(tmp_path / "other.tar", named(other, "quay.io/other:1")))
    export(root, tmp_path / "out.tar")
    fresh = Store(tmp_path / "fresh", store._clock, REACTOR)
    fresh.startService()
    try:
        outcomes = await load(fresh, tmp_path / "out.tar", platforms=parse_platforms("linux/arm64"))
        assert {outcome.name: outcome.ended for outcome in outcomes} == {
            NAME: LoadStatus.LOADED,
            f"docker.io/library/nginx@{ARM64.manifest.digest}": LoadStatus.LOADED,
            "quay.io/other:1": LoadStatus.FAILED,
        }
        assert await whole(fresh, ARM64, AMD64) == [True, False]
    finally:
        fresh.stopService()
