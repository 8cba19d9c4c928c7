"""`wanted` of records: stored value, default, changes, and the indexes that name an image."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from twisted.internet.task import Clock

from ociregistry.manifests import OCI_MANIFEST, Manifest
from ociregistry.names import Digest
from ociregistry.store.blobs import BlobFolder
from ociregistry.store.files import Files
from ociregistry.store.index import Entry, Index
from ociregistry.store.records import Confirmation, Dates, Record, RecordFiles, is_wanted, read_record
from ociregistry.store.store import Store
from ociregistry.store.workdir import PendingFiles, PendingImage, PullsFolder, undecided_images
from tests.images import make_image
from tests.unit.support.common import image, manifest, on_reactor, record
from tests.unit.support.demands import AMD64, ARM64, ATTESTATION, INDEX, S390X
from tests.unit.support.loads import image_of, index_of, settle
from tests.unit.support.stores import calls_of

IMAGE = manifest(make_image("wanted"))
TAG, BY_DIGEST = image("reg.example/app:1"), image(f"reg.example/app@{IMAGE.digest}")
NOW = datetime(2026, 3, 1, tzinfo=UTC)
DATES = Dates(NOW, NOW + timedelta(hours=1))
SAYS = [True, False, None]


@pytest.fixture
def records(root: Path) -> Iterator[RecordFiles]:
    """Return the records of an empty store."""
    for folder in ("fat", "img", "blobs"):
        (root / folder).mkdir(parents=True)
    pulls = PullsFolder(root, Files())
    yield RecordFiles(root, pulls, Files(), lambda count: None)
    pulls.close()


def on_disk(root: Path) -> bool | None:
    """Return `wanted` of the record on disk."""
    return read_record(record(root, IMAGE.digest)).wanted


# The file


@pytest.mark.parametrize("wanted", SAYS)
def test_wanted_round_trip(wanted: bool | None) -> None:
    rendered = Record(IMAGE, {str(TAG): DATES}, wanted).render()
    assert json.loads(rendered).get("wanted", "nothing") == ("nothing" if wanted is None else wanted)
    assert Record.parse(rendered, IMAGE.digest).wanted is wanted


@pytest.mark.parametrize("value", [0, 1, "true", "", [], {}, None, 1.5])
def test_malformed_wanted_is_ignored(value: object) -> None:
    document = json.loads(Record(IMAGE, {str(TAG): DATES}, True).render())
    parsed = Record.parse(json.dumps({**document, "wanted": value}).encode(), IMAGE.digest)
    assert (parsed.wanted, parsed.images) == (None, {str(TAG): DATES})


@pytest.mark.parametrize(
    ("before", "confirmed_as", "after"),
    [
        (None, None, None),
        (None, False, None),
        (None, True, True),
        (False, None, False),
        (False, False, False),
        (False, True, True),
        (True, None, True),
        (True, False, True),
        (True, True, True),
    ],
)
def test_confirm_changes_wanted_only_to_true(
    root: Path, records: RecordFiles, before: bool | None, confirmed_as: bool | None, after: bool | None
) -> None:
    records.confirm(IMAGE, [Confirmation(TAG, NOW)], wanted=before)
    assert on_disk(root) is before
    (confirmed,) = records.confirm(IMAGE, [Confirmation(BY_DIGEST, NOW)], wanted=confirmed_as)
    assert confirmed.wanted is on_disk(root) is after


@pytest.mark.parametrize(
    ("before", "wanted", "after"),
    [
        (None, False, False),
        (None, True, True),
        (False, False, False),
        (False, True, True),
        (True, False, True),
        (True, True, True),
    ],
)
def test_want_updates_an_existing_record(
    root: Path, records: RecordFiles, before: bool | None, wanted: bool, after: bool
) -> None:
    records.confirm(IMAGE, [Confirmation(TAG, NOW)], wanted=before)
    inode = record(root, IMAGE.digest).stat().st_ino
    noted = records.want(IMAGE.digest, wanted)
    assert noted is not None
    assert noted.wanted is on_disk(root) is after
    assert noted.images == {str(TAG): Dates(NOW, NOW)}
    # An unchanged record is not rewritten.
    assert (record(root, IMAGE.digest).stat().st_ino == inode) == (before is after)


def test_want_without_record_does_nothing(root: Path, records: RecordFiles) -> None:
    assert records.want(IMAGE.digest, True) is None
    assert list((root / "img").iterdir()) == []


@pytest.mark.parametrize("lost", SAYS)
@pytest.mark.parametrize("fetched", SAYS)
def test_restored_record_keeps_wanted(
    root: Path, records: RecordFiles, lost: bool | None, fetched: bool | None
) -> None:
    records.confirm(IMAGE, [Confirmation(BY_DIGEST, NOW)], wanted=fetched)
    records.restore(IMAGE, {str(TAG): DATES}, str(BY_DIGEST), lost)
    assert on_disk(root) is (True if fetched else lost)
    assert read_record(record(root, IMAGE.digest)).images == {str(TAG): DATES}


# The default


@pytest.mark.parametrize(
    ("says", "url", "here", "wanted"),
    [
        (True, BY_DIGEST, (), True),
        (False, TAG, (0, 1), False),
        (False, BY_DIGEST, (1, 2), True),
        (None, TAG, (), True),
        (None, BY_DIGEST, (), False),
        (None, BY_DIGEST, (0,), False),
        (None, BY_DIGEST, (2,), True),
        (None, BY_DIGEST, (0, 1, 2), True),
    ],
)
def test_record_without_wanted_is_wanted_with_a_tag_or_a_present_layer(
    tmp_path: Path, says: bool | None, url: object, here: tuple[int, ...], wanted: bool
) -> None:
    for number in here:
        (tmp_path / IMAGE.blobs[number].digest.hex).touch()
    assert is_wanted(Record(IMAGE, {str(url): DATES}, says), tmp_path) is wanted


def test_image_without_layers_is_wanted(tmp_path: Path) -> None:
    empty = image_of(b"config alone")
    assert is_wanted(Record(empty, {f"reg.example/app@{empty.digest}": DATES}), tmp_path)
    # A layer identical to the config does not count.
    same = image_of(b"config alone", b"config alone")
    assert same.layers == frozenset()


@pytest.mark.parametrize("says", [False, None])
def test_foreign_layers_do_not_make_an_image_wanted(tmp_path: Path, says: bool | None) -> None:
    """With them missing, an image that is otherwise whole is wanted; with them alone, it is not."""
    own, foreign = manifest(make_image("wanted", layers=2)).blobs[1:]
    document = json.loads(manifest(make_image("wanted", layers=2)).data)
    document["layers"][1]["urls"] = ["https://example.com/layer"]
    parsed = Manifest.parse(json.dumps(document).encode(), OCI_MANIFEST)
    one = Record(parsed, {f"reg.example/app@{parsed.digest}": DATES}, says)
    (tmp_path / foreign.digest.hex).touch()
    assert not is_wanted(one, tmp_path)
    (tmp_path / foreign.digest.hex).rename(tmp_path / own.digest.hex)
    assert is_wanted(one, tmp_path)


@pytest.mark.parametrize("layer", [False, True])
@on_reactor
async def test_memory_agrees_with_files(
    root: Path, store: Store, open_store: Callable[[], Store], clock: Clock, layer: bool
) -> None:
    if layer:
        (root / "blobs" / IMAGE.blobs[1].digest.hex).touch()
    await store.keep(IMAGE, BY_DIGEST)
    clock.advance(1)
    await settle(store)
    for one in (store, open_store()):
        entry = one.entry(IMAGE.digest)
        assert entry is not None
        assert entry.wanted is layer


@on_reactor
async def test_new_record_without_wanted_is_not_wanted_in_memory(store: Store) -> None:
    """Otherwise it would be completed before the next scan."""
    tagged, empty = manifest(make_image("tagged")), image_of(b"config alone")
    await store.keep(IMAGE, BY_DIGEST)
    await store.keep(tagged, TAG)
    await store.keep(empty, image(f"reg.example/app@{empty.digest}"))
    entries = [store.entry(one.digest) for one in (IMAGE, tagged, empty)]
    assert [entry.wanted for entry in entries if entry is not None] == [False, True, True]


# Changes


@on_reactor
async def test_watchers_get_images_that_may_be_incomplete(
    root: Path, store: Store, open_store: Callable[[], Store], clock: Clock
) -> None:
    confirmed_as: list[set[Digest]] = []
    store.watch(lambda changed: confirmed_as.append(set(changed)))
    other = open_store()

    async def changes(seconds: float = 10) -> set[Digest]:
        clock.advance(seconds)
        await settle(store)
        seen, confirmed_as[:] = set().union(*confirmed_as), []
        return seen

    await store.keep(IMAGE, BY_DIGEST, wanted=False)
    assert await changes() == {IMAGE.digest}
    # Another name does not change what is missing.
    await store.keep(IMAGE, TAG)
    await other.keep(AMD64, TAG, wanted=True)
    assert await changes() == {AMD64.digest}
    await store.want(IMAGE.digest)
    assert await changes() == {IMAGE.digest}
    blob = root / "blobs" / AMD64.blobs[1].digest.hex
    blob.touch()
    assert await changes() == set()
    blob.unlink()
    assert await changes() == {AMD64.digest}
    record(root, IMAGE.digest).unlink()
    assert await changes() == {IMAGE.digest}
    assert await changes() == set()


def test_removed_blobs_are_noticed(tmp_path: Path) -> None:
    one, two = Digest.of(b"one"), Digest.of(b"two")
    for name in (one.hex, two.hex, ".syncthing.tmp"):
        (tmp_path / name).touch()
    folder = BlobFolder(tmp_path)
    assert folder.gone() == folder.gone() == frozenset()
    (tmp_path / one.hex).unlink()
    (tmp_path / ".syncthing.tmp").unlink()
    assert folder.gone() == {one}
    assert folder.gone() == frozenset()
    (tmp_path / one.hex).touch()
    assert folder.gone() == frozenset()
    (tmp_path / one.hex).unlink()
    (tmp_path / two.hex).unlink()
    assert folder.gone() == {one, two}


def test_folder_with_an_mtime_in_the_future_is_read_once(tmp_path: Path) -> None:
    """It was changed before the clock was set back."""
    for number in range(100):
        (tmp_path / f".{number}").touch()
    (tmp_path / Digest.of(b"one").hex).touch()
    os.utime(tmp_path, (2e10, 2e10))
    folder = BlobFolder(tmp_path)
    assert folder.gone() == frozenset()
    assert calls_of(folder.gone) < 50
    (tmp_path / Digest.of(b"one").hex).unlink()
    assert folder.gone() == {Digest.of(b"one")}


def test_removed_blob_is_noticed_with_unchanged_folder_mtime(tmp_path: Path) -> None:
    """The mtime has the resolution of the kernel's timer tick, some milliseconds."""
    blob = tmp_path / Digest.of(b"one").hex
    blob.touch()
    folder = BlobFolder(tmp_path)
    assert folder.gone() == frozenset()
    status = tmp_path.stat()
    blob.unlink()
    os.utime(tmp_path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert folder.gone() == {Digest.of(b"one")}


# Indexes


def put(index: Index, *manifests: object, tag: str = "1") -> None:
    """Add manifests to the index."""
    for one in manifests:
        index.put(one.digest, Entry.of(Record(one, {f"reg.example/app:{tag}": DATES})))  # type: ignore[attr-defined,arg-type]  # Manifests


def test_indexes_of_an_image_include_outer_indexes() -> None:
    inner = index_of((AMD64, "linux/amd64"), (AMD64, "linux/amd64/v2"))
    outer = index_of((inner, ""), (ARM64, "linux/arm64"))
    index = Index()
    put(index, AMD64)
    assert not index.indexes(AMD64.digest)
    put(index, INDEX, inner, outer)
    assert set(index.indexes(AMD64.digest)) == {INDEX.digest, inner.digest, outer.digest}
    assert set(index.indexes(ARM64.digest)) == {INDEX.digest, outer.digest}
    assert set(index.indexes(inner.digest)) == {outer.digest}
    # The image itself need not be present.
    assert set(index.indexes(S390X.digest)) == {INDEX.digest}
    # An index is forgotten with its record, also after the record was replaced.
    put(index, inner)
    index.drop(inner.digest)
    assert set(index.indexes(AMD64.digest)) == {INDEX.digest}
    index.drop(INDEX.digest)
    index.drop(outer.digest)
    assert index.indexes(AMD64.digest) == index.indexes(ARM64.digest) == set()
    assert index._parents == {}


def test_referrers_list_is_no_index() -> None:
    index = Index()
    put(index, INDEX, tag=f"sha256-{AMD64.digest.hex}")
    assert not index.indexes(AMD64.digest)
    # With another name as well, it is an index.
    images = {f"reg.example/app:{tag}": DATES for tag in ("1", f"sha256-{AMD64.digest.hex}")}
    index.put(INDEX.digest, Entry.of(Record(INDEX, images)))
    assert index.indexes(AMD64.digest) == {INDEX.digest}
    # Without any name it counts as an index.
    index.put(INDEX.digest, Entry.of(Record(INDEX, {})))
    assert index.indexes(ATTESTATION.digest) == {INDEX.digest}


# Pending images


@on_reactor
async def test_undecided_image_until_it_is_pending(root: Path, store: Store) -> None:
    repository = TAG.repository
    await store.add_pending(IMAGE.digest, repository, undecided=True)
    assert (store.undecided, store.pending) == ({IMAGE.digest: repository}, {})
    assert undecided_images(root) == {IMAGE.digest}
    await store.add_pending(IMAGE.digest, repository)
    assert (store.undecided, store.pending) == ({}, {IMAGE.digest: repository})
    assert undecided_images(root) == frozenset()
    # It does not become undecided again.
    await store.add_pending(IMAGE.digest, repository, undecided=True)
    assert (store.undecided, store.pending) == ({}, {IMAGE.digest: repository})
    await store.remove_pending(IMAGE.digest)
    assert (store.undecided, store.pending, list(root.glob("pulls/*/*.wish"))) == ({}, {}, [])


@pytest.mark.parametrize("value", [True, False, None, "true", 1])
def test_undecided_flag_of_a_file(tmp_path: Path, value: object) -> None:
    document = {"upstream": "reg.example", "repository": "app", "undecided": value}
    (tmp_path / f"{IMAGE.digest.hex}.wish").write_text(json.dumps(document))
    assert list(PendingFiles(tmp_path, Files()).read()) == [PendingImage(IMAGE.digest, TAG.repository, value is True)]


def test_undecided_images_of_all_processes(tmp_path: Path) -> None:
    for number, one in enumerate((AMD64, ARM64, S390X)):
        folder = tmp_path / "pulls" / str(number)
        folder.mkdir(parents=True)
        PendingFiles(folder, Files()).write(PendingImage(one.digest, TAG.repository, one is not S390X))
    (tmp_path / "pulls" / "0" / f"{IMAGE.digest.hex}.wish").write_bytes(b"{")
    (tmp_path / "pulls" / "other").mkdir()
    assert undecided_images(tmp_path) == {AMD64.digest, ARM64.digest}
    # Reading removes no file.
    assert (tmp_path / "pulls" / "0" / f"{IMAGE.digest.hex}.wish").exists()
