"""Imports: images enter the store with their names and dates."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from twisted.internet.task import Clock

from ociregistry.names import Digest
from ociregistry.pullthrough.loader import LoadResult, LoadStatus
from ociregistry.store.records import Dates
from ociregistry.store.store import Store
from tests.images import Image, Index, make_image, make_index
from tests.unit.support.archives import (
    IMAGE_NAME,
    NAME,
    RecordedProgress,
    docker_saved,
    files_below,
    go_record,
    hex_of,
    image_blobs,
    kept,
    layout,
    load,
    named,
    write_folder,
    write_tar,
)
from tests.unit.support.common import image, manifest, on_reactor, open_descriptors, record, until

IMAGE = make_image("image", layer_size=300_000)
UPPER = make_image("upper", layers=1, base=IMAGE)
OTHER = make_image("other", layer_size=2_500_000)
INDEX = make_index("index")
APP = "quay.io/team/app:1"
DAY = datetime(2026, 1, 1, tzinfo=UTC)
DATES = Dates(DAY, DAY + timedelta(days=1))
SIZE = sum(len(blob.data) for blob in IMAGE.blobs)


async def holds(store: Store, *images: Image | Index) -> bool:
    """Return whether the store has all manifests and blobs of the images."""
    for one in images:
        for blob in one.blobs:
            if not await store.holds(Digest(blob.digest), len(blob.data)):
                return False
            found = await store.blob(Digest(blob.digest))
            assert found is not None
            found.close()
        for part in one.manifests:
            found_manifest = await store.manifest(image(f"any.example/x@{part.digest}"))
            if found_manifest is None or found_manifest.data != part.data:
                return False
    return True


@pytest.mark.parametrize("compression", ["", "gz", "xz", "zst"])
@pytest.mark.parametrize("what", [IMAGE, INDEX, make_image("docker", docker=True)])
@on_reactor
async def test_second_import_reports_present(
    root: Path, store: Store, clock: Clock, tmp_path: Path, what: Image | Index, compression: str
) -> None:
    path = write_tar(tmp_path / "a.tar", named(what), compression)
    size = sum(len(blob.data) for blob in what.blobs)
    descriptors = open_descriptors()
    assert await load(store, path) == [LoadResult(NAME, LoadStatus.LOADED, blobs=len(what.blobs), bytes=size)]
    assert await store.manifest(image(NAME)) == manifest(what)
    assert await holds(store, what)
    assert await load(store, path) == [LoadResult(NAME, LoadStatus.PRESENT)]
    # The store keeps blobs open until their files are removed.
    for path in (root / "blobs").iterdir():
        path.unlink()
    clock.advance(1)
    await until(lambda: open_descriptors() <= descriptors)


@on_reactor
async def test_every_archive_format(store: Store, tmp_path: Path) -> None:
    ours = {
        f"img/{hex_of(IMAGE.manifest.digest)}": kept(IMAGE, {NAME: DATES}),
        **image_blobs(IMAGE),
    }
    gos = {
        f"fat/{hex_of(INDEX.manifest.digest)}": go_record(INDEX.manifest, APP),
        **{f"img/{hex_of(one.manifest.digest)}": go_record(one.manifest, f"quay.io/x@{one.manifest.digest}")
           for one in INDEX.images},
        **image_blobs(INDEX),
    }  # fmt: skip
    for files in (ours, gos, docker_saved(OTHER, "saved:1"), named(UPPER, "upper:1")):
        for outcome in await load(store, write_folder(tmp_path / str(len(files)), files)):
            assert outcome.ended is LoadStatus.LOADED, outcome
    assert await holds(store, IMAGE, INDEX, UPPER)
    assert await store.manifest(image(NAME)) == manifest(IMAGE)
    assert await store.manifest(image(APP)) == manifest(INDEX)
    saved = await store.manifest(image("saved:1"))
    assert saved is not None
    assert await store.missing(saved.digest) == {}
    assert saved.blobs[1].digest == Digest.of(gzip.decompress(OTHER.layers[0].data))


@on_reactor
async def test_import_survives_restart(store: Store, open_store: Callable[[], Store], tmp_path: Path) -> None:
    await load(store, write_tar(tmp_path / "a.tar", named(INDEX)))
    again = open_store()
    assert await again.manifest(image(NAME)) == manifest(INDEX)
    for one in INDEX.images:
        assert await again.missing(Digest(one.manifest.digest)) == {}


@on_reactor
async def test_present_blobs_are_not_imported_again(store: Store, root: Path, tmp_path: Path) -> None:
    progress = RecordedProgress()
    files = layout((UPPER, {IMAGE_NAME: APP}), (IMAGE, {IMAGE_NAME: NAME}))
    await load(store, write_tar(tmp_path / "a.tar", named(IMAGE)))
    before = {name: (root / name).stat().st_ino for name in files_below(root) if name.startswith("blobs/")}
    outcomes = await load(store, write_tar(tmp_path / "b.tar", files), progress)
    size = len(UPPER.config.data) + len(UPPER.layers[-1].data)
    assert outcomes == [LoadResult(APP, LoadStatus.LOADED, blobs=2, bytes=size), LoadResult(NAME, LoadStatus.PRESENT)]
    assert (progress.expected, progress.state, progress.outcomes) == ([(APP, size), (NAME, 0)], {APP: size}, outcomes)
    assert {name: (root / name).stat().st_ino for name in before} == before


@on_reactor
async def test_shared_blob_is_imported_once(store: Store, tmp_path: Path) -> None:
    progress = RecordedProgress()
    files = layout((IMAGE, {IMAGE_NAME: NAME}), (UPPER, {IMAGE_NAME: APP}), (IMAGE, {IMAGE_NAME: "x:2"}))
    await load(store, write_tar(tmp_path / "a.tar", files), progress)
    assert progress.state == dict(progress.expected[:2])
    # By image: the third name is of the first.
    assert [outcome.blobs for outcome in progress.outcomes] == [3, 0, 2]
    assert [outcome.ended for outcome in progress.outcomes] == [LoadStatus.LOADED] * 3
    assert await holds(store, IMAGE, UPPER)


@on_reactor
async def test_import_moves_tag(store: Store, tmp_path: Path) -> None:
    await load(store, write_tar(tmp_path / "a.tar", named(OTHER)))
    (outcome,) = await load(store, write_tar(tmp_path / "b.tar", named(IMAGE)))
    assert outcome.ended is LoadStatus.LOADED
    assert await store.manifest(image(NAME)) == manifest(IMAGE)
    (outcome,) = await load(store, write_tar(tmp_path / "a.tar", named(OTHER)))
    assert outcome == LoadResult(
        NAME, LoadStatus.LOADED, notes=(f"it replaces {IMAGE.manifest.digest} for linux/amd64",)
    )
    assert await store.manifest(image(NAME)) == manifest(OTHER)


@on_reactor
async def test_old_export_does_not_move_tag_back(store: Store, tmp_path: Path) -> None:
    await store.keep(manifest(OTHER), image(NAME), Dates(DAY, DAY + timedelta(days=5)))
    annotations = {IMAGE_NAME: NAME, "ociregistry.created": "2025-01-01T00:00:00Z",
                   "ociregistry.confirmed": "2026-01-03T00:00:00Z"}  # fmt: skip
    (outcome,) = await load(store, write_tar(tmp_path / "a.tar", layout((IMAGE, annotations))))
    assert outcome.ended is LoadStatus.LOADED
    (note,) = outcome.notes
    assert note.startswith(f"the name still means {OTHER.manifest.digest}, which was confirmed later")
    assert await store.manifest(image(NAME)) == manifest(OTHER)
    assert await holds(store, IMAGE)


@on_reactor
async def test_dates_are_merged(store: Store, root: Path, tmp_path: Path) -> None:
    await store.keep(manifest(IMAGE), image(NAME), DATES)
    annotations = {IMAGE_NAME: NAME, "ociregistry.created": "2025-01-01T00:00:00Z",
                   "ociregistry.confirmed": "2026-01-03T00:00:00Z"}  # fmt: skip
    await load(store, write_tar(tmp_path / "a.tar", layout((IMAGE, annotations))))
    text = record(root, manifest(IMAGE).digest).read_text()
    assert '"created": "2025-01-01T00:00:00.000000Z"' in text
    assert '"confirmed": "2026-01-03T00:00:00.000000Z"' in text


@on_reactor
async def test_images_take_dates_of_their_index(store: Store, root: Path, tmp_path: Path) -> None:
    annotations = {IMAGE_NAME: NAME, "ociregistry.created": "2025-01-01T00:00:00Z",
                   "ociregistry.confirmed": "2025-01-03T00:00:00Z"}  # fmt: skip
    await load(store, write_tar(tmp_path / "a.tar", layout((INDEX, annotations))))
    for one in INDEX.images:
        text = record(root, manifest(one).digest).read_text()
        assert f'"docker.io/library/nginx@{one.manifest.digest}"' in text
        assert '"confirmed": "2025-01-03T00:00:00.000000Z"' in text


@on_reactor
async def test_incomplete_image_fails_others_are_imported(store: Store, tmp_path: Path) -> None:
    progress = RecordedProgress()
    sparse = [UPPER.layers[-1].digest]
    path = write_tar(
        tmp_path / "a.tar", layout((UPPER, {IMAGE_NAME: APP}), (IMAGE, {IMAGE_NAME: NAME}), sparse=sparse)
    )
    failed, loaded = await load(store, path, progress)
    assert (failed.name, failed.ended) == (APP, LoadStatus.FAILED)
    assert failed.why.startswith(
        f"neither in the archive nor in the store: 1 blob, {len(UPPER.layers[-1].data)} bytes; "
    )
    assert "--since" in failed.why
    assert loaded == LoadResult(NAME, LoadStatus.LOADED, blobs=3, bytes=SIZE)
    assert progress.outcomes == [failed, loaded]
    assert await store.manifest(image(APP)) is None
    assert not await store.holds(Digest(UPPER.config.digest), len(UPPER.config.data))


@on_reactor
async def test_index_with_incomplete_image_fails(store: Store, root: Path, tmp_path: Path) -> None:
    before = files_below(root)
    sparse = [INDEX.images[1].layers[0].digest]
    (failed,) = await load(store, write_tar(tmp_path / "a.tar", layout((INDEX, {IMAGE_NAME: NAME}), sparse=sparse)))
    assert failed.ended is LoadStatus.FAILED
    assert files_below(root) == before


@on_reactor
async def test_index_without_any_image_fails(store: Store, root: Path, tmp_path: Path) -> None:
    before = files_below(root)
    sparse = [one.manifest.digest for one in INDEX.images]
    (failed,) = await load(store, write_tar(tmp_path / "a.tar", layout((INDEX, {IMAGE_NAME: NAME}), sparse=sparse)))
    assert failed == LoadResult(NAME, LoadStatus.FAILED, "the archive has none of the images that it lists")
    assert files_below(root) == before


@on_reactor
async def test_index_with_one_platform_is_imported(store: Store, tmp_path: Path) -> None:
    one, other = INDEX.images
    sparse = [other.manifest.digest, *(blob.digest for blob in other.blobs)]
    path = write_tar(tmp_path / "a.tar", layout((INDEX, {IMAGE_NAME: NAME}), sparse=sparse))
    (loaded,) = await load(store, path)
    assert loaded.ended is LoadStatus.LOADED
    assert await store.manifest(image(NAME)) == manifest(INDEX)
    assert await holds(store, one)
    assert await load(store, path) == [LoadResult(NAME, LoadStatus.PRESENT)]


@on_reactor
async def test_index_whose_image_record_is_gone_is_loaded_again(
    store: Store, open_store: Callable[[], Store], root: Path, tmp_path: Path
) -> None:
    path = write_tar(tmp_path / "a.tar", named(INDEX))
    await load(store, path)
    record(root, manifest(INDEX.images[0]).digest).unlink()
    assert await load(open_store(), path) == [LoadResult(NAME, LoadStatus.LOADED)]
    assert await load(open_store(), path) == [LoadResult(NAME, LoadStatus.PRESENT)]


@on_reactor
async def test_known_image_under_new_name_is_loaded(store: Store, tmp_path: Path) -> None:
    await load(store, write_tar(tmp_path / "a.tar", named(IMAGE)))
    path = write_tar(tmp_path / "b.tar", named(IMAGE, APP))
    assert await load(store, path) == [LoadResult(APP, LoadStatus.LOADED)]
    assert await load(store, path) == [LoadResult(APP, LoadStatus.PRESENT)]


@on_reactor
async def test_records_without_blobs_are_loaded_not_present(store: Store, tmp_path: Path) -> None:
    for name in (NAME, APP):
        await store.keep(manifest(IMAGE), image(name))
    files = layout((IMAGE, {IMAGE_NAME: NAME}), (IMAGE, {IMAGE_NAME: APP}))
    outcomes = await load(store, write_tar(tmp_path / "a.tar", files))
    assert [outcome.ended for outcome in outcomes] == [LoadStatus.LOADED, LoadStatus.LOADED]
