"""Scans of the folders of records find changes by other processes."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import pytest

import ociregistry.store.records
import ociregistry.store.scan
from ociregistry.manifests import Manifest
from ociregistry.names import ImageReference
from ociregistry.store.files import Files
from ociregistry.store.records import Confirmation, Dates, Record, RecordFiles, read_record
from ociregistry.store.scan import UNREAD, ForeignFiles, ScanResult, Signature, collection_paused, scan_changes
from ociregistry.store.workdir import PullsFolder
from tests.images import make_image, make_index
from tests.unit.support.common import image, manifest

IMAGE, OTHER = manifest(make_image("scanned")), manifest(make_image("other"))
INDEX = manifest(make_index("scanned"))
NGINX, APP = image("docker.io/library/nginx:1"), image("quay.io/app:1")
NOW = datetime(2026, 3, 1, tzinfo=UTC)


@pytest.fixture
def open_records() -> Iterator[Callable[[Path], RecordFiles]]:
    """Return a function that makes a store and opens its records."""
    taken: list[PullsFolder] = []

    def open_them(root: Path) -> RecordFiles:
        for folder in ("fat", "img"):
            (root / folder).mkdir(parents=True)
        taken.append(PullsFolder(root, Files()))
        return RecordFiles(root, taken[-1], Files(), lambda count: None)

    yield open_them
    for folder in taken:
        folder.close()


@pytest.fixture
def records(tmp_path: Path, open_records: Callable[[Path], RecordFiles]) -> RecordFiles:
    """Return the records of a store, initially none."""
    return open_records(tmp_path)


def confirmed(records: RecordFiles, manifest: Manifest, image: ImageReference, moment: datetime) -> Record:
    """Confirm a manifest and return the record, which must have been written."""
    (record,) = records.confirm(manifest, [Confirmation(image, moment)])
    return record


@cache
def foreign_files(root: Path) -> ForeignFiles:
    """Return the foreign files of a store."""
    return ForeignFiles()


def scanned(root: Path, known: ScanResult | None = None) -> ScanResult:
    """Return the changes since the last scan."""
    return scan_changes(root, known.seen if known else {}, foreign_files(root))


def test_empty_store(tmp_path: Path, records: RecordFiles) -> None:
    assert scanned(tmp_path) == ScanResult({})


def test_scan_reads_new_records_once(tmp_path: Path, records: RecordFiles) -> None:
    confirmed(records, IMAGE, NGINX, NOW)
    confirmed(records, INDEX, APP, NOW)
    first = scanned(tmp_path)
    paths = {str(records.path(IMAGE.digest, is_list=False)), str(records.path(INDEX.digest, is_list=True))}
    assert first.read.keys() == first.seen.keys() == paths
    assert (first.unreadable, first.gone) == ({}, frozenset())
    second = scanned(tmp_path, first)
    assert second.seen == first.seen
    assert (second.read, second.unreadable, second.gone) == ({}, {}, frozenset())


def rewritten(path: Path, content: bytes) -> None:
    """Overwrite the file in place."""
    path.write_bytes(content)


def renamed(path: Path, content: bytes) -> None:
    """Write a new file and rename it, with the old times, as rsync does."""
    times = path.stat()
    temporary = path.with_name("temporary")
    temporary.write_bytes(content)
    os.utime(temporary, ns=(times.st_atime_ns, times.st_mtime_ns))
    temporary.rename(path)


@pytest.mark.parametrize("write", [rewritten, renamed])
def test_scan_finds_changed_records(
    tmp_path: Path, records: RecordFiles, write: Callable[[Path, bytes], None]
) -> None:
    record = confirmed(records, IMAGE, NGINX, NOW)
    path = records.path(IMAGE.digest, is_list=False)
    known = scanned(tmp_path)
    # The length stays the same: one single-letter tag is replaced by another.
    write(path, Record(IMAGE, {"docker.io/library/nginx:2": record.images[str(NGINX)]}).render())
    changed = scanned(tmp_path, known)
    assert changed.read[str(path)][1].images == {"docker.io/library/nginx:2": Dates(NOW, NOW)}
    assert scanned(tmp_path, changed).read == {}


def test_scan_finds_removed_records(tmp_path: Path, records: RecordFiles) -> None:
    confirmed(records, IMAGE, NGINX, NOW)
    path = records.path(IMAGE.digest, is_list=False)
    known = scanned(tmp_path)
    path.unlink()
    gone = scanned(tmp_path, known)
    assert gone == ScanResult({}, gone=frozenset({str(path)}))
    assert scanned(tmp_path, gone) == ScanResult({})


def test_damaged_record_is_reported_once_and_hides_no_other(tmp_path: Path, records: RecordFiles) -> None:
    confirmed(records, IMAGE, NGINX, NOW)
    records.confirm(OTHER, [Confirmation(APP, NOW)])
    path = records.path(IMAGE.digest, is_list=False)
    whole = path.read_bytes()
    known = scanned(tmp_path)
    path.write_bytes(whole[:100])
    damaged = scanned(tmp_path, known)
    assert damaged.unreadable.keys() == {str(path)}
    assert (damaged.read, damaged.gone) == ({}, frozenset())
    assert scanned(tmp_path, damaged).unreadable == {}
    assert path.read_bytes() == whole[:100]
    path.write_bytes(whole)
    assert scanned(tmp_path, damaged).read.keys() == {str(path)}


def test_temporarily_unreadable_record_is_read_by_the_next_scan(
    tmp_path: Path, records: RecordFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example, too many open files or a stalled network file system: the file itself is good."""
    confirmed(records, IMAGE, NGINX, NOW)
    path = records.path(IMAGE.digest, is_list=False)

    def fail(path: str, largest: int) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(ociregistry.store.records, "read_regular", fail)
        first = scanned(tmp_path)
    assert first.read == {}
    assert scanned(tmp_path, first).read.keys() == {str(path)}


def test_other_file_names_are_ignored(tmp_path: Path, records: RecordFiles) -> None:
    for name in (".syncthing.x.tmp", f".{IMAGE.digest.hex}.Ab12", f"{IMAGE.digest.hex}.record", "README", "0" * 63):
        (tmp_path / "img" / name).write_text("{}")
    assert scanned(tmp_path) == ScanResult({})


def test_other_file_types_are_unreadable(tmp_path: Path, records: RecordFiles) -> None:
    (tmp_path / "img" / IMAGE.digest.hex).mkdir()
    (tmp_path / "img" / OTHER.digest.hex).symlink_to("/nowhere")
    confirmed(records, INDEX, NGINX, NOW)
    found = scanned(tmp_path)
    assert found.read.keys() == {str(records.path(INDEX.digest, is_list=True))}
    assert found.unreadable == {
        f"{tmp_path}/img/{IMAGE.digest.hex}": "it is not a regular file",
        f"{tmp_path}/img/{OTHER.digest.hex}": "it is a symbolic link",
    }


def test_file_without_a_status_hides_no_other(
    tmp_path: Path, records: RecordFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged inode: each of its system calls fails."""
    confirmed(records, IMAGE, NGINX, NOW)
    confirmed(records, OTHER, NGINX, NOW)
    bad, good = (records.path(one.digest, is_list=False) for one in (IMAGE, OTHER))
    scandir, read = os.scandir, read_record

    class Entry:
        def __init__(self, entry: os.DirEntry[str]) -> None:
            self.name = entry.name
            self._entry = entry

        def stat(self, *, follow_symlinks: bool) -> os.stat_result:
            if self.name == bad.name:
                raise OSError(errno.EUCLEAN, os.strerror(errno.EUCLEAN))
            return self._entry.stat(follow_symlinks=follow_symlinks)

    @contextmanager
    def entries(folder: Path) -> Iterator[Iterator[Entry]]:
        with scandir(folder) as found:
            yield map(Entry, found)

    def failing(path: str) -> Record:
        if path == str(bad):
            raise OSError(errno.EUCLEAN, os.strerror(errno.EUCLEAN))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", entries)
        patch.setattr(ociregistry.store.scan, "read_record", failing)
        first = scanned(tmp_path)
        second = scanned(tmp_path, first)
    assert (set(first.read), list(first.unreadable), list(second.unreadable)) == (
        {str(good)},
        [str(bad)],
        [str(bad)],
    )
    assert scanned(tmp_path, second).read.keys() == {str(bad)}


def test_huge_file_is_not_read(tmp_path: Path, records: RecordFiles) -> None:
    path = tmp_path / "img" / IMAGE.digest.hex
    with path.open("wb") as file:
        file.truncate(10**12)
    assert "larger" in scanned(tmp_path).unreadable[str(path)]


def test_records_copied_from_another_store_are_found(
    tmp_path: Path, records: RecordFiles, open_records: Callable[[Path], RecordFiles]
) -> None:
    replica = open_records(tmp_path / "replica")
    confirmed(replica, IMAGE, NGINX, NOW)
    known = scanned(tmp_path)
    shutil.copy2(replica.path(IMAGE.digest, is_list=False), tmp_path / "img")
    assert scanned(tmp_path, known).read.keys() == {str(records.path(IMAGE.digest, is_list=False))}


def test_garbage_collection_is_paused_and_then_restored() -> None:
    assert gc.isenabled()
    with collection_paused():
        assert not gc.isenabled()
        with collection_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(OSError, match="fails"), collection_paused():
        raise OSError("fails")
    assert gc.isenabled()


# Many foreign files


def put_foreign(root: Path, count: int) -> list[Path]:
    """Write files that are named like records, and are none."""
    paths = [root / "fat" / f"{number:064x}" for number in range(count)]
    for path in paths:
        path.write_text("not ours")
    return paths


def test_folder_of_many_foreign_files_is_looked_through_when_it_changes_and_once_a_minute(
    tmp_path: Path, records: RecordFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_look = ociregistry.store.scan.signatures
    looked: list[str] = []

    def look(folder: Path) -> dict[str, Signature]:
        looked.append(folder.name)
        return really_look(folder)

    monkeypatch.setattr(ociregistry.store.scan, "signatures", look)
    monkeypatch.setattr(ociregistry.store.scan, "_MANY", 20)
    now = [1000.0]
    foreign = ForeignFiles(lambda: now[0])
    confirmed(records, INDEX, APP, NOW)
    paths = put_foreign(tmp_path, 20)

    def settle() -> None:
        os.utime(tmp_path / "fat", ns=(0, time.time_ns() - 10**10))

    def scan_again(known: ScanResult) -> ScanResult:
        looked.clear()
        return scan_changes(tmp_path, known.seen, foreign)

    settle()
    known = scan_again(ScanResult({}))
    assert (set(known.unreadable), set(known.seen), looked) == (
        set(map(str, paths)),
        {str(records.path(INDEX.digest, is_list=True))},
        ["fat", "img"],
    )
    known = scan_again(known)
    assert (known.unreadable, known.read, known.gone, looked) == ({}, {}, frozenset(), ["img"])
    # Records are looked at all the same.
    path = records.path(INDEX.digest, is_list=True)
    os.utime(path, (0, 0))
    assert (set(scan_again(known).read.keys()), looked) == ({str(path)}, ["img"])
    # Also one that could not be read for a moment.
    assert (set(scan_again(replace(known, seen={str(path): UNREAD})).read), looked) == ({str(path)}, ["img"])
    paths[0].unlink()
    assert (set(scan_again(known).gone), looked) == ({str(paths[0])}, ["fat", "img"])
    paths[0].write_text("not ours")
    settle()
    known = scan_again(known)
    # Overwritten in place.
    paths[1].write_text("not ours either")
    assert (scan_again(known).unreadable, looked) == ({}, ["img"])
    now[0] += 60
    assert (set(scan_again(known).unreadable.keys()), looked) == ({str(paths[1])}, ["fat", "img"])


def test_store_that_was_missing_for_a_moment_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may make it anew between the look at a folder and the look at the store."""
    looked = Path.stat

    def stat(path: Path, **arguments: bool) -> os.stat_result:
        if path == tmp_path and not (tmp_path / "fat").exists():
            (tmp_path / "fat").mkdir()
            raise FileNotFoundError(2, "", str(path))
        return looked(path, **arguments)

    monkeypatch.setattr(Path, "stat", stat)
    assert scan_changes(tmp_path, {}, ForeignFiles()).seen == {}
