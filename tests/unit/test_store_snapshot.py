"""The snapshot: every image URL of the store, the name to pull it by, and its blobs."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

import ociregistry.store.scan
from ociregistry.names import Digest
from ociregistry.store.records import Record, read_record
from ociregistry.store.snapshot import Snapshot
from tests.images import make_image
from tests.unit.support.common import manifest
from tests.unit.support.stores import HOST, StoreDir, calls_of, day, image_of, in_memory, list_of, url_of

ONE, TWO = (b"config", b"layer"), (b"another config", b"layer")


@pytest.fixture
def store_dir(tmp_path: Path) -> StoreDir:
    """Return an empty store."""
    return StoreDir(tmp_path / "store")


def shown(snapshot: Snapshot) -> list[str]:
    """Return the image URLs, without the host."""
    return [row.url.removeprefix(f"{HOST}/") for row in snapshot.rows]


def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the records read from now on."""
    paths: list[Path] = []

    def read(path: str) -> Record:
        paths.append(Path(path))
        return read_record(path)

    monkeypatch.setattr(ociregistry.store.scan, "read_record", read)
    return paths


def test_rows_are_sorted_image_urls(store_dir: StoreDir) -> None:
    one = store_dir.image(ONE, "b:1", "a:2", "a@", created=day(3), confirmed=day(5), pulled=day(4))
    many = store_dir.put(list_of(one), "a:1", pulled=day(6))
    snapshot = store_dir.snapshot()
    assert shown(snapshot) == ["a:1", "a:2", f"a@{one.digest}", "b:1"]
    top, row, *_ = snapshot.rows
    assert (top.stored.manifest, top.stored.pulled, top.stored.path) == (many, day(6), store_dir.path(many))
    assert (row.stored.manifest, row.stored.pulled) == (one, day(4))
    assert (row.dates.created, row.dates.confirmed, row.notes) == (day(3), day(5), (row.url,))
    assert row.stored.size == store_dir.path(one).stat().st_size


def test_moved_tag_is_not_listed_for_the_old_image(store_dir: StoreDir) -> None:
    old = store_dir.image(ONE, "a:1", created=day(1), confirmed=day(2))
    new = store_dir.image(TWO, "a:1", created=day(1), confirmed=day(3))
    rows = {row.url: (row.stored.manifest, row.notes) for row in store_dir.snapshot().rows}
    assert rows == {url_of("a:1"): (new, (url_of("a:1"),)), url_of("a@", old): (old, (url_of("a:1"),))}
    assert store_dir.snapshot().index.claimants(url_of("a:1")) == {old.digest, new.digest}
    assert store_dir.snapshot().index.claimants(url_of("a:2")) == set()


@pytest.mark.parametrize("first", [ONE, TWO])
def test_tie_of_confirmations_is_resolved_as_in_the_daemon(store_dir: StoreDir, first: tuple[bytes, bytes]) -> None:
    """For equal times the greater digest wins, as in the daemon's index."""
    store_dir.image(first, "a:1")
    store_dir.image(ONE if first is TWO else TWO, "a:1")
    greater = max(image_of(*ONE).digest, image_of(*TWO).digest)
    assert [row.stored.manifest.digest for row in store_dir.snapshot().rows if row.url == url_of("a:1")] == [greater]


def test_old_image_with_several_moved_tags_is_one_row(store_dir: StoreDir) -> None:
    old = store_dir.image(ONE, "a:1", "a:2", "a@", "b:1", confirmed=day(1))
    store_dir.image(TWO, "a:1", "a:2", confirmed=day(2))
    rows = [row for row in store_dir.snapshot().rows if row.stored.manifest == old]
    assert [row.url for row in rows] == [url_of("a@", old), url_of("b:1")]
    assert set(rows[0].notes) == {url_of("a:1"), url_of("a:2"), url_of("a@", old)}


def test_pulled_date_includes_indexes_and_siblings(store_dir: StoreDir) -> None:
    left, right = store_dir.image(ONE, pulled=day(1)), store_dir.image(TWO, "a:1", pulled=day(2))
    both, one = (
        store_dir.put(list_of(left, right), "a:2", pulled=day(1)),
        store_dir.put(list_of(left), "a:3", pulled=day(3)),
    )
    snapshot = store_dir.snapshot()
    assert snapshot.pulled(left.digest) == day(3)
    assert snapshot.pulled(right.digest) == day(2)
    assert snapshot.pulled(both.digest) == day(2)
    assert snapshot.pulled(one.digest) == day(3)
    assert snapshot.index.parents(left.digest) == {both.digest, one.digest}
    assert snapshot.index.parents(right.digest) == {both.digest}
    assert not snapshot.index.parents(both.digest) | snapshot.index.parents(one.digest)


def test_children_are_those_present(store_dir: StoreDir) -> None:
    here, gone = store_dir.image(ONE), image_of(*TWO)
    both = store_dir.put(list_of(here, gone), "a:1")
    snapshot = store_dir.snapshot()
    assert snapshot.index.children(both.digest) == [here.digest]
    assert snapshot.index.children(here.digest) == []


def test_missing_and_partly_copied_blobs(store_dir: StoreDir) -> None:
    image = store_dir.put(image_of(b"whole", b"half", b"nothing"), "a:1")
    store_dir.blobs(b"whole", b"half")
    assert store_dir.snapshot().missing(image.digest) == {Digest.of(b"nothing"): 7}
    store_dir.blob(b"half").write_bytes(b"ha")
    assert store_dir.snapshot().missing(image.digest) == {Digest.of(b"half"): 4, Digest.of(b"nothing"): 7}
    assert [store_dir.snapshot().blob_size(Digest.of(data)) for data in (b"half", b"nothing")] == [2, None]


def test_blobs_are_the_files_that_are_named_after_digests(store_dir: StoreDir) -> None:
    store_dir.blobs(b"one")
    store_dir.blob(b"one").with_name(".syncthing.one").touch()
    snapshot = store_dir.snapshot()
    assert snapshot.blobs() == {Digest.of(b"one")}
    shutil.rmtree(store_dir.root / "blobs")
    assert snapshot.blobs() == frozenset()


FOREIGN = b'{"type": 3, "digest": "%s", "v1.oci.manifest": {"layers": [{"digest": "sha256:%s"}]}}'


@pytest.mark.parametrize("folder", ["fat", "img"])
@pytest.mark.parametrize("blob", [Digest.of(b"layer"), Digest.of(b"layer", "sha512")])
def test_unreadable_record_is_reported_with_mentioned_digests(store_dir: StoreDir, folder: str, blob: Digest) -> None:
    image = store_dir.image(ONE, "a:1")
    name = Digest.of(b"theirs").hex
    path = store_dir.root / folder / name
    path.write_bytes(FOREIGN % (name.encode(), blob.hex.encode()))
    snapshot = store_dir.snapshot()
    assert snapshot.records.keys() == {image.digest}
    assert "not a record of this program" in snapshot.unreadable[path]
    assert snapshot.mentioned == {name, blob.hex}


def test_hex_strings_of_other_lengths_are_no_digests(store_dir: StoreDir) -> None:
    half, other = "ab" * 16, "cd" * 40
    (store_dir.root / "img" / Digest.of(b"theirs").hex).write_text(f'{{"{half}": "{other}", "{"ef" * 32}0"')
    assert store_dir.snapshot().mentioned == frozenset()


def test_truncated_record_mentions_its_legible_digests(store_dir: StoreDir) -> None:
    image = store_dir.image(ONE, "a:1")
    path = store_dir.path(image)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(Digest.of(b"layer").hex.encode())])
    snapshot = store_dir.snapshot()
    assert (snapshot.records, list(snapshot.unreadable)) == ({}, [path])
    assert snapshot.mentioned == {image.digest.hex, Digest.of(b"config").hex}


def test_other_file_types_are_ignored(store_dir: StoreDir) -> None:
    (store_dir.root / "img" / Digest.of(b"folder").hex).mkdir()
    (store_dir.root / "img" / Digest.of(b"link").hex).symlink_to("nowhere")
    (store_dir.root / "img" / ".syncthing.x.tmp").write_bytes(b"{")
    snapshot = store_dir.snapshot()
    assert (snapshot.records, snapshot.mentioned) == ({}, frozenset())
    assert sorted(snapshot.unreadable.values()) == ["it is a symbolic link", "it is not a regular file"]
    assert len(snapshot.unknown) == 2


def test_only_changed_records_are_read_again(store_dir: StoreDir, monkeypatch: pytest.MonkeyPatch) -> None:
    same, changed = store_dir.image(ONE, "a:1", pulled=day(1)), store_dir.image(TWO, "b:1", pulled=day(1))
    bad = store_dir.root / "img" / Digest.of(b"bad").hex
    bad.write_bytes(b"{" + Digest.of(b"layer").hex.encode())
    snapshot = store_dir.snapshot()
    read = reads(monkeypatch)
    store_dir.put(changed, "b:2", pulled=day(2))
    os.utime(store_dir.path(same), (day(3).timestamp(), day(3).timestamp()))
    snapshot.refresh()
    assert store_dir.path(same) in read  # Changes are detected by mtime, among others.
    read.clear()
    before = dict(snapshot.records), snapshot.unreadable, snapshot.mentioned
    snapshot.refresh()
    assert not read
    assert (snapshot.records, snapshot.unreadable, snapshot.mentioned) == before
    assert snapshot.records[same.digest].pulled == day(3)
    assert shown(snapshot) == ["a:1", "b:1", "b:2"]
    store_dir.path(same).unlink()
    snapshot.refresh()
    assert shown(snapshot) == ["b:1", "b:2"]
    bad.unlink()
    store_dir.path(changed).write_bytes(b"{")
    snapshot.refresh()
    assert (snapshot.records, list(snapshot.unreadable), snapshot.rows) == ({}, [store_dir.path(changed)], ())


def test_record_in_wrong_folder_does_not_hide_the_right_one(store_dir: StoreDir) -> None:
    many = store_dir.put(list_of(), "a:1")
    wrong = store_dir.root / "img" / many.digest.hex
    shutil.copy(store_dir.path(many), wrong)
    snapshot = store_dir.snapshot()
    for _ in range(2):
        assert snapshot.records[many.digest].path == store_dir.path(many)
        assert list(snapshot.unreadable) == [wrong]
        snapshot.refresh()


def test_missing_folder_has_no_records(tmp_path: Path) -> None:
    store_dir = StoreDir(tmp_path / "store")
    store_dir.image(ONE, "a:1")
    (store_dir.root / "fat").rmdir()
    assert shown(store_dir.snapshot()) == ["a:1"]
    shutil.rmtree(store_dir.root / "img")
    assert store_dir.snapshot().rows == ()


def test_missing_store_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Snapshot.read(tmp_path / "store")


def test_record_removed_while_reading_is_skipped(store_dir: StoreDir, monkeypatch: pytest.MonkeyPatch) -> None:
    store_dir.image(ONE, "a:1")

    def gone(path: str) -> Record:
        os.unlink(path)
        return read_record(path)

    monkeypatch.setattr(ociregistry.store.scan, "read_record", gone)
    assert store_dir.snapshot().records == {}


@pytest.mark.parametrize("number", [errno.EIO, errno.EUCLEAN, errno.EACCES])
def test_unreadable_file_hides_no_other(store_dir: StoreDir, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    bad, good = store_dir.image(ONE, "a:1"), store_dir.image(TWO, "b:1")

    def fails(path: str) -> Record:
        if path == str(store_dir.path(bad)):
            raise OSError(number, os.strerror(number), path)
        return read_record(path)

    monkeypatch.setattr(ociregistry.store.scan, "read_record", fails)
    snapshot = store_dir.snapshot()
    assert snapshot.records.keys() == {good.digest}
    assert snapshot.unreadable == {store_dir.path(bad): os.strerror(number)}
    assert [error.filename for error in snapshot.unknown] == [str(store_dir.path(bad))]


def test_error_of_the_process_ends_the_reading(store_dir: StoreDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deciding what may be pruned requires all records that can be read."""
    store_dir.image(ONE, "a:1")

    def fails(path: str) -> Record:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(ociregistry.store.scan, "read_record", fails)
    with pytest.raises(OSError, match="Too many open files"):
        store_dir.snapshot()


def test_snapshot_is_linear_in_records(tmp_path: Path) -> None:
    image = manifest(make_image("many"))

    def look(count: int) -> int:
        images = [(image_of(image.data, b"%d" % number), [f"a{number}:1"], day(1)) for number in range(count)]
        lists = [(list_of(one[0]), [f"a{number}:2"], day(1)) for number, one in enumerate(images)]
        snapshot = in_memory(tmp_path, *images, *lists)

        def all_of_it() -> None:
            assert len(snapshot.rows) == 2 * count
            assert sum(bool(snapshot.index.parents(digest)) for digest in snapshot.records) == count
            assert all(snapshot.pulled(digest) == day(1) for digest in snapshot.records)
            assert all(len(snapshot.index.claims(row.notes[0])) == 1 for row in snapshot.rows)

        return calls_of(all_of_it)

    assert look(2000) < 12 * look(200)
