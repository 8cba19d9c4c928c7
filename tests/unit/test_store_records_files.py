"""Record files: concurrent rewrites lose nothing, and scans find changes by other processes."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

import pytest

from ociregistry.manifests import Manifest
from ociregistry.names import ImageReference
from ociregistry.store.files import Files, SharedFile
from ociregistry.store.records import Changes, Dates, Record, RecordFiles, RecordInvalid, read_record
from ociregistry.store.workdir import PullsFolder
from tests.images import make_image, make_index
from tests.unit.support.doubles import image, manifest

IMAGE, OTHER = manifest(make_image("recordfiles")), manifest(make_image("other"))
INDEX = manifest(make_index("recordfiles"))
NGINX, APP = image("docker.io/library/nginx:1"), image("quay.io/app:1")
NOW = datetime(2026, 3, 1, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)


class Open(Protocol):
    """Open the records below a folder for a separate process; also return its scratch folder."""

    def __call__(self, root: Path, files: Files | None = None) -> tuple[RecordFiles, Path]: ...


@pytest.fixture
def open_records() -> Iterator[Open]:
    """Return a function that opens records; locks belong to open files, so two of them act like two processes."""
    taken: list[PullsFolder] = []

    def open_them(root: Path, files: Files | None = None) -> tuple[RecordFiles, Path]:
        for folder in ("fat", "img"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        taken.append(PullsFolder(root, files or Files()))
        return RecordFiles(root, taken[-1], files or Files()), taken[-1].path

    yield open_them
    for folder in taken:
        folder.close()


def confirmed(records: RecordFiles, manifest: Manifest, image: ImageReference, moment: datetime) -> Record:
    """Confirm a manifest and return the record, which must have been written."""
    record = records.confirm(manifest, image, moment)
    assert record is not None
    return record


@pytest.fixture
def records(tmp_path: Path, open_records: Open) -> RecordFiles:
    """Return the records of this process, initially none."""
    return open_records(tmp_path)[0]


def test_indexes_and_images_have_their_own_folders(tmp_path: Path, records: RecordFiles) -> None:
    confirmed(records, IMAGE, NGINX, NOW)
    confirmed(records, INDEX, NGINX, NOW)
    assert records.path(IMAGE.digest, is_list=False) == tmp_path / "img" / IMAGE.digest.hex
    assert records.path(INDEX.digest, is_list=True) == tmp_path / "fat" / INDEX.digest.hex
    assert [path.name for path in (tmp_path / "img").iterdir()] == [IMAGE.digest.hex]
    assert [path.name for path in (tmp_path / "fat").iterdir()] == [INDEX.digest.hex]


def test_confirmed_record_is_readable(records: RecordFiles) -> None:
    written = confirmed(records, IMAGE, NGINX, NOW)
    assert written.images == {str(NGINX): Dates(NOW, NOW)}
    assert read_record(records.path(IMAGE.digest, is_list=False)) == written


def test_images_written_by_another_process_are_kept(tmp_path: Path, records: RecordFiles, open_records: Open) -> None:
    confirmed(records, IMAGE, NGINX, NOW)
    other, _ = open_records(tmp_path)
    confirmed(other, IMAGE, APP, NOW)
    written = confirmed(records, IMAGE, NGINX, LATER)
    assert written.images == {str(NGINX): Dates(NOW, LATER), str(APP): Dates(NOW, NOW)}
    assert read_record(other.path(IMAGE.digest, is_list=False)) == written


def test_foreign_file_is_quarantined(tmp_path: Path, open_records: Open) -> None:
    records, scratch = open_records(tmp_path)
    path = records.path(IMAGE.digest, is_list=False)
    for content in (b"{}", b"another one"):
        path.write_bytes(content)
        with pytest.raises(RecordInvalid):
            read_record(path)
        assert confirmed(records, IMAGE, NGINX, NOW).images == {str(NGINX): Dates(NOW, NOW)}
        assert (scratch / "bad" / path.name).read_bytes() == content
        assert read_record(path).manifest == IMAGE


@pytest.mark.parametrize("step", ["write", "sync", "rename", "sync_folder"])
def test_full_disk_loses_no_record(
    tmp_path: Path, open_records: Open, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Files()
    records, scratch = open_records(tmp_path, files)
    before = confirmed(records, IMAGE, NGINX, NOW)

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files, step, fail)
        with pytest.raises(OSError, match="No space left"):
            confirmed(records, IMAGE, APP, LATER)
    assert [path.name for path in scratch.iterdir()] == ["lock"]
    on_disk = read_record(records.path(IMAGE.digest, is_list=False))
    # After the rename it exists, though not yet durably.
    assert on_disk == (before.confirm(APP, LATER) if step == "sync_folder" else before)
    assert confirmed(records, IMAGE, APP, LATER).images.keys() == {str(NGINX), str(APP)}


def test_record_is_synced_before_rename(tmp_path: Path, open_records: Open) -> None:
    done: list[str] = []

    class Recorded(Files):
        def commit(self, file: SharedFile, path: Path, target: Path) -> None:
            done.append(f"{path.relative_to(tmp_path)} {target.relative_to(tmp_path)}")
            assert json.loads(path.read_bytes())
            super().commit(file, path, target)

    records, _ = open_records(tmp_path, Recorded())
    confirmed(records, IMAGE, NGINX, NOW)
    assert done == [f"pulls/0/{IMAGE.digest.hex}.record img/{IMAGE.digest.hex}"]


def test_record_in_wrong_folder_is_refused(tmp_path: Path, records: RecordFiles) -> None:
    confirmed(records, IMAGE, NGINX, NOW)
    moved = tmp_path / "fat" / IMAGE.digest.hex
    records.path(IMAGE.digest, is_list=False).rename(moved)
    with pytest.raises(RecordInvalid, match="does not belong"):
        read_record(moved)


def test_pull_time_is_updated_once_a_minute(records: RecordFiles) -> None:
    confirmed(records, IMAGE, NGINX, NOW)
    path = records.path(IMAGE.digest, is_list=False)
    os.utime(path, (1000, 1000))
    for now, noted in ((1059.9, 1000), (1060.0, 1060), (1100.0, 1060), (1120.0, 1120), (1000.0, 1120)):
        records.note_pull(path, now)
        assert path.stat().st_mtime == noted


def test_read_only_store_is_no_error(records: RecordFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    confirmed(records, IMAGE, NGINX, NOW)

    def fail(*args: object) -> None:
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "utime", fail)
    records.note_pull(records.path(IMAGE.digest, is_list=False), 1e11)


def look(records: RecordFiles, known: Changes | None = None) -> Changes:
    """Return the changes since the last scan."""
    return records.look(known.seen if known else {})


def test_empty_store(records: RecordFiles) -> None:
    assert look(records) == Changes({})


def test_scan_reads_new_records_once(records: RecordFiles) -> None:
    confirmed(records, IMAGE, NGINX, NOW)
    confirmed(records, INDEX, APP, NOW)
    first = look(records)
    paths = {records.path(IMAGE.digest, is_list=False), records.path(INDEX.digest, is_list=True)}
    assert first.read.keys() == first.seen.keys() == paths
    assert (first.damaged, first.gone) == ({}, frozenset())
    second = look(records, first)
    assert second.seen == first.seen
    assert (second.read, second.damaged, second.gone) == ({}, {}, frozenset())


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
def test_scan_finds_changed_records(records: RecordFiles, write: Callable[[Path, bytes], None]) -> None:
    record = confirmed(records, IMAGE, NGINX, NOW)
    path = records.path(IMAGE.digest, is_list=False)
    known = look(records)
    # The length stays the same: one single-letter tag is replaced by another.
    write(path, Record(IMAGE, {"docker.io/library/nginx:2": record.images[str(NGINX)]}).render())
    changed = look(records, known)
    assert changed.read[path].images == {"docker.io/library/nginx:2": NOW}
    assert look(records, changed).read == {}


def test_scan_finds_removed_records(records: RecordFiles) -> None:
    confirmed(records, IMAGE, NGINX, NOW)
    path = records.path(IMAGE.digest, is_list=False)
    known = look(records)
    path.unlink()
    gone = look(records, known)
    assert gone == Changes({}, gone=frozenset({path}))
    assert look(records, gone) == Changes({})


def test_damaged_record_is_reported_once_and_hides_no_other(tmp_path: Path, records: RecordFiles) -> None:
    confirmed(records, IMAGE, NGINX, NOW)
    records.confirm(OTHER, APP, NOW)
    path = records.path(IMAGE.digest, is_list=False)
    whole = path.read_bytes()
    known = look(records)
    path.write_bytes(whole[:100])
    damaged = look(records, known)
    assert damaged.damaged.keys() == {path}
    assert (damaged.read, damaged.gone) == ({}, frozenset())
    assert look(records, damaged).damaged == {}
    assert path.read_bytes() == whole[:100]
    path.write_bytes(whole)
    assert look(records, damaged).read.keys() == {path}


def test_temporarily_unreadable_record_is_read_by_the_next_scan(
    records: RecordFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example, too many open files or a stalled network file system: the file itself is good."""
    confirmed(records, IMAGE, NGINX, NOW)
    path = records.path(IMAGE.digest, is_list=False)

    def fail(self: Path, *args: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        first = look(records)
    assert first.read == {}
    assert look(records, first).read.keys() == {path}


def test_other_file_names_are_ignored(tmp_path: Path, records: RecordFiles) -> None:
    for name in (".syncthing.x.tmp", f".{IMAGE.digest.hex}.Ab12", f"{IMAGE.digest.hex}.record", "README", "0" * 63):
        (tmp_path / "img" / name).write_text("{}")
    assert look(records) == Changes({})


def test_other_file_types_are_damaged_records(tmp_path: Path, records: RecordFiles) -> None:
    (tmp_path / "img" / IMAGE.digest.hex).mkdir()
    (tmp_path / "img" / OTHER.digest.hex).symlink_to("/nowhere")
    confirmed(records, INDEX, NGINX, NOW)
    found = look(records)
    assert found.read.keys() == {records.path(INDEX.digest, is_list=True)}
    assert (tmp_path / "img" / IMAGE.digest.hex) in found.damaged


def test_huge_file_is_not_read(tmp_path: Path, records: RecordFiles) -> None:
    path = tmp_path / "img" / IMAGE.digest.hex
    with path.open("wb") as file:
        file.truncate(10**12)
    assert "larger" in look(records).damaged[path]


def test_records_copied_from_another_store_are_found(
    tmp_path: Path, records: RecordFiles, open_records: Open
) -> None:
    replica, _ = open_records(tmp_path / "replica")
    confirmed(replica, IMAGE, NGINX, NOW)
    known = look(records)
    shutil.copy2(replica.path(IMAGE.digest, is_list=False), tmp_path / "img")
    assert look(records, known).read.keys() == {records.path(IMAGE.digest, is_list=False)}


def test_concurrent_writers_lose_nothing(tmp_path: Path, open_records: Open) -> None:
    urls = [image(f"quay.io/app:{number}") for number in range(24)]
    processes = [open_records(tmp_path)[0] for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for number, url in enumerate(urls):
            pool.submit(processes[number % 4].confirm, IMAGE, url, NOW)
    (path,) = (tmp_path / "img").iterdir()
    assert read_record(path).images.keys() == {str(url) for url in urls}
