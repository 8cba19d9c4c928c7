"""Repair: damaged content is fetched again from repositories that use it, and moved tags stay moved."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ociregistry.errors import BlobUnknown, Denied, ManifestUnknown, RegistryError, Unavailable
from ociregistry.manifests import Manifest
from ociregistry.names import Digest, ImageReference
from ociregistry.pullthrough.maintenance import Repairer
from ociregistry.store.records import Dates, Record
from ociregistry.store.store import Store
from ociregistry.store.verify import Damaged, DamagedOutcome
from tests.images import make_image, make_index
from tests.unit.support.common import image, manifest, on_reactor
from tests.unit.support.loads import MemoryFetcher, image_of

BUILT, NEWER, MULTI = make_image("repaired"), make_image("newer"), make_index("repaired list")
IMAGE = manifest(BUILT)
LAYER = Digest(BUILT.layers[0].digest)
APP, ELSEWHERE, THIRD = "reg.example/app:1", "else.example/app:1", "third.example/app:1"
BEFORE = Dates(created=datetime(2026, 1, 1, tzinfo=UTC), confirmed=datetime(2026, 2, 1, tzinfo=UTC))


@pytest.fixture
def fetcher(store: Store, root: Path) -> MemoryFetcher:
    """Return a fetcher without content."""
    return MemoryFetcher(store, root)


@pytest.fixture
def repairer(store: Store, fetcher: MemoryFetcher) -> Repairer:
    """Return a repairer over it."""
    return Repairer(store, fetcher)


def blob(root: Path, digest: Digest = LAYER) -> Damaged:
    """Return a finding about a quarantined blob."""
    return Damaged(root / "blobs" / digest.hex, digest, "its bytes do not have the digest")


def record(root: Path, *urls: str, digest: Digest = IMAGE.digest, dates: Dates = BEFORE) -> Damaged:
    """Return a finding about a quarantined record with these legible image URLs."""
    images = tuple((image(url), dates) for url in urls)
    return Damaged(root / "img" / digest.hex, digest, "is not JSON", images)


@on_reactor
async def test_damaged_blob_in_place_is_not_taken_for_a_repaired_one(
    repairer: Repairer, fetcher: MemoryFetcher, root: Path
) -> None:
    damaged = replace(blob(root), outcome=DamagedOutcome.IN_PLACE)
    assert await repairer.repair(damaged) == "it is still in its place: remove it, and repeat this"


def kept(root: Path, what: Manifest = IMAGE) -> Record:
    """Return the record on disk."""
    folder = "fat" if what.is_list else "img"
    return Record.parse((root / folder / what.digest.hex).read_bytes(), what.digest)


@on_reactor
async def test_blob_is_fetched_from_a_repository_that_uses_it(
    repairer: Repairer, fetcher: MemoryFetcher, store: Store, root: Path
) -> None:
    fetcher.add(APP, BUILT)
    await store.keep(IMAGE, image(APP))
    assert await repairer.repair(blob(root)) == ""
    assert fetcher.asked == [f"blob reg.example/app@{LAYER}"]
    assert await store.holds(LAYER, len(BUILT.layers[0].data))


@pytest.mark.parametrize("error", [BlobUnknown("gone"), Denied("not allowed"), Unavailable("down")])
@on_reactor
async def test_blob_is_fetched_from_another_repository(
    repairer: Repairer, fetcher: MemoryFetcher, store: Store, root: Path, error: RegistryError
) -> None:
    for url in (APP, ELSEWHERE, THIRD):
        fetcher.add(url, BUILT)
        await store.keep(IMAGE, image(url))
    first, second, _ = store.uses(LAYER)
    fetcher.errors[f"blob {first}@{LAYER}"] = error
    assert await repairer.repair(blob(root)) == ""
    assert fetcher.asked == [f"blob {first}@{LAYER}", f"blob {second}@{LAYER}"]


@on_reactor
async def test_last_error_is_returned_when_all_repositories_fail(
    repairer: Repairer, fetcher: MemoryFetcher, store: Store, root: Path
) -> None:
    for number, url in enumerate((APP, ELSEWHERE)):
        await store.keep(IMAGE, image(url))
        fetcher.errors[f"blob {image(url).repository}@{LAYER}"] = Unavailable(f"down {number}")
    last = list(store.uses(LAYER))[-1]
    error = fetcher.errors[f"blob {last}@{LAYER}"]
    assert isinstance(error, RegistryError)
    assert await repairer.repair(blob(root)) == error.message
    assert len(fetcher.asked) == 2


@on_reactor
async def test_blob_without_image_is_not_repaired(repairer: Repairer, fetcher: MemoryFetcher, root: Path) -> None:
    assert await repairer.repair(blob(root)) == "no image needs it"
    assert fetcher.asked == []


@on_reactor
async def test_full_disk_is_an_error(repairer: Repairer, fetcher: MemoryFetcher, store: Store, root: Path) -> None:
    await store.keep(IMAGE, image(APP))
    fetcher.errors[f"blob reg.example/app@{LAYER}"] = OSError(28, "No space left on device")
    assert await repairer.repair(blob(root)) == "cannot be stored: No space left on device"


@on_reactor
async def test_record_is_restored_with_its_dates(
    repairer: Repairer, fetcher: MemoryFetcher, store: Store, root: Path
) -> None:
    fetcher.add(APP, BUILT)
    assert await repairer.repair(record(root, APP, "reg.example/app:stable")) == ""
    # Requested by digest, because the tag may have moved upstream.
    assert fetcher.asked == [f"manifest reg.example/app@{IMAGE.digest}"]
    found = kept(root)
    assert found.manifest == IMAGE
    assert found.images[APP] == found.images["reg.example/app:stable"] == BEFORE
    assert await store.manifest(image(APP)) == IMAGE


@on_reactor
async def test_moved_tag_stays(repairer: Repairer, fetcher: MemoryFetcher, store: Store, root: Path) -> None:
    fetcher.add(APP, BUILT)
    await store.keep(manifest(NEWER), image(APP))
    assert await repairer.repair(record(root, APP)) == ""
    assert await store.manifest(image(APP)) == manifest(NEWER)
    assert await store.manifest(image(f"reg.example/app@{IMAGE.digest}")) == IMAGE


@on_reactor
async def test_index_is_repaired(repairer: Repairer, fetcher: MemoryFetcher, store: Store, root: Path) -> None:
    fetcher.add(APP, MULTI)
    what = manifest(MULTI)
    damaged = Damaged(root / "fat" / what.digest.hex, what.digest, "is not JSON", ((image(APP), BEFORE),))
    assert await repairer.repair(damaged) == ""
    assert kept(root, what).images[APP] == BEFORE


@on_reactor
async def test_record_of_several_repositories_is_fetched_from_any(
    repairer: Repairer, fetcher: MemoryFetcher, store: Store, root: Path
) -> None:
    fetcher.add(ELSEWHERE, BUILT)
    fetcher.errors[f"manifest third.example/app@{IMAGE.digest}"] = Unavailable("down")
    assert await repairer.repair(record(root, APP, "reg.example/app:2", THIRD, ELSEWHERE)) == ""
    # Each repository is asked once.
    assert fetcher.asked == [
        f"manifest {ImageReference(image(url).repository, IMAGE.digest)}" for url in (APP, THIRD, ELSEWHERE)
    ]
    images = kept(root).images
    for url in (APP, "reg.example/app:2", THIRD, ELSEWHERE):
        assert images[url] == BEFORE


@on_reactor
async def test_record_unknown_to_all_upstreams(
    repairer: Repairer, fetcher: MemoryFetcher, store: Store, root: Path
) -> None:
    fetcher.errors[f"manifest else.example/app@{IMAGE.digest}"] = ManifestUnknown("the upstream answered 404")
    assert await repairer.repair(record(root, APP, ELSEWHERE)) == "the upstream answered 404"
    assert not (root / "img" / IMAGE.digest.hex).exists()


@on_reactor
async def test_illegible_record(repairer: Repairer, fetcher: MemoryFetcher, root: Path) -> None:
    assert await repairer.repair(record(root)) == "the image that it belonged to is unknown: pull or load it again"
    assert fetcher.asked == []


@on_reactor
async def test_illegible_record_is_fetched_from_the_repository_of_its_index(
    repairer: Repairer, fetcher: MemoryFetcher, store: Store, root: Path
) -> None:
    fetcher.add(APP, MULTI)
    child = manifest(MULTI.images[0])
    await store.keep(manifest(MULTI), image(APP))
    assert await repairer.repair(record(root, digest=child.digest)) == ""
    assert fetcher.asked == [f"manifest reg.example/app@{child.digest}"]
    assert kept(root, child).images.keys() == {f"reg.example/app@{child.digest}"}


@on_reactor
async def test_record_that_cannot_be_written(repairer: Repairer, fetcher: MemoryFetcher, root: Path) -> None:
    fetcher.add(APP, BUILT)
    (root / "img").rmdir()
    why = await repairer.repair(record(root, APP))
    assert why == "cannot be stored: No such file or directory"
    (root / "img").mkdir()


@on_reactor
async def test_record_written_meanwhile_gets_the_lost_names(
    repairer: Repairer, fetcher: MemoryFetcher, store: Store, root: Path
) -> None:
    await store.keep(IMAGE, image(ELSEWHERE))
    assert await repairer.repair(record(root, APP)) == ""
    assert fetcher.asked == []
    assert kept(root).images[APP] == BEFORE


@on_reactor
async def test_rest_of_an_image_is_not_requested_after_three_absent_blobs(
    repairer: Repairer, fetcher: MemoryFetcher, store: Store
) -> None:
    hostile = image_of(*(b"blob %d" % number for number in range(2000)))
    await store.keep(hostile, image(APP))
    why = await repairer.complete(hostile.required)
    assert why == f"reg.example/app@{hostile.blobs[0].digest}: the upstream answered 404"
    assert len(fetcher.asked) == 3
