"""The records' files: rewritten without a loss, and every change of another process is found."""

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
    """Opens the records below a folder for a process of its own; gives its scratch folder too."""

    def __call__(self, root: Path, files: Files | None = None) -> tuple[RecordFiles, Path]: ...


@pytest.fixture
def open_records() -> Iterator[Open]:
    """Opens records; a lock is on an open file, so that two of them are as good as two processes."""
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
    """The record that was written."""
    record = records.confirm(manifest, image, moment)
    assert record is not None
    return record


@pytest.fixture
def records(tmp_path: Path, open_records: Open) -> RecordFiles:
    """The records of this process, none so far."""
    return open_records(tmp_path)[0]


def test_lists_and_images_have_their_own_folders(tmp_path: Path, records: RecordFiles) -> None:
    confirmed(records, IMAGE, NGINX, NOW)
    confirmed(records, INDEX, NGINX, NOW)
    assert records.path(IMAGE.digest, is_list=False) == tmp_path / "img" / IMAGE.digest.hex
    assert records.path(INDEX.digest, is_list=True) == tmp_path / "fat" / INDEX.digest.hex
    assert [path.name for path in (tmp_path / "img").iterdir()] == [IMAGE.digest.hex]
    assert [path.name for path in (tmp_path / "fat").iterdir()] == [INDEX.digest.hex]


def test_what_is_confirmed_can_be_read(records: RecordFiles) -> None:
    written = confirmed(records, IMAGE, NGINX, NOW)
    assert written.images == {str(NGINX): Dates(NOW, NOW)}
    assert read_record(records.path(IMAGE.digest, is_list=False)) == written


def test_what_another_process_wrote_is_kept(tmp_path: Path, records: RecordFiles, open_records: Open) -> None:
    confirmed(records, IMAGE, NGINX, NOW)
    other, _ = open_records(tmp_path)
    confirmed(other, IMAGE, APP, NOW)
    written = confirmed(records, IMAGE, NGINX, LATER)
    assert written.images == {str(NGINX): Dates(NOW, LATER), str(APP): Dates(NOW, NOW)}
    assert read_record(other.path(IMAGE.digest, is_list=False)) == written


def test_a_foreign_file_is_moved_aside(tmp_path: Path, open_records: Open) -> None:
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
def test_a_full_disk_costs_no_record(
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
    # After the rename it is there, though not yet for sure.
    assert on_disk == (before.confirm(APP, LATER) if step == "sync_folder" else before)
    assert confirmed(records, IMAGE, APP, LATER).images.keys() == {str(NGINX), str(APP)}


def test_a_record_is_synced_before_it_has_its_name(tmp_path: Path, open_records: Open) -> None:
    done: list[str] = []

    class Recorded(Files):
        def commit(self, file: SharedFile, path: Path, target: Path) -> None:
            done.append(f"{path.relative_to(tmp_path)} {target.relative_to(tmp_path)}")
            assert json.loads(path.read_bytes())
            super().commit(file, path, target)

    records, _ = open_records(tmp_path, Recorded())
    confirmed(records, IMAGE, NGINX, NOW)
    assert done == [f"pulls/0/{IMAGE.digest.hex}.record img/{IMAGE.digest.hex}"]


def test_a_record_in_the_wrong_folder_is_refused(tmp_path: Path, records: RecordFiles) -> None:
    confirmed(records, IMAGE, NGINX, NOW)
    moved = tmp_path / "fat" / IMAGE.digest.hex
    records.path(IMAGE.digest, is_list=False).rename(moved)
    with pytest.raises(RecordInvalid, match="does not belong"):
        read_record(moved)


def test_a_pull_is_noted_by_the_minute(records: RecordFiles) -> None:
    confirmed(records, IMAGE, NGINX, NOW)
    path = records.path(IMAGE.digest, is_list=False)
    os.utime(path, (1000, 1000))
    for now, noted in ((1059.9, 1000), (1060.0, 1060), (1100.0, 1060), (1120.0, 1120), (1000.0, 1120)):
        records.note_pull(path, now)
        assert path.stat().st_mtime == noted


def test_a_store_that_can_only_be_read_still_serves(records: RecordFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    confirmed(records, IMAGE, NGINX, NOW)

    def fail(*args: object) -> None:
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "utime", fail)
    records.note_pull(records.path(IMAGE.digest, is_list=False), 1e11)


def look(records: RecordFiles, known: Changes | None = None) -> Changes:
    """What is new since the last look."""
    return records.look(known.seen if known else {})


def test_an_empty_store_has_no_records(records: RecordFiles) -> None:
    assert look(records) == Changes({})


def test_a_look_reads_what_is_new_and_nothing_twice(records: RecordFiles) -> None:
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
    """Written in place."""
    path.write_bytes(content)


def renamed(path: Path, content: bytes) -> None:
    """Written beside it and renamed, with the old times, as rsync does."""
    times = path.stat()
    temporary = path.with_name("temporary")
    temporary.write_bytes(content)
    os.utime(temporary, ns=(times.st_atime_ns, times.st_mtime_ns))
    temporary.rename(path)


@pytest.mark.parametrize("write", [rewritten, renamed])
def test_a_look_finds_what_has_changed(records: RecordFiles, write: Callable[[Path, bytes], None]) -> None:
    record = confirmed(records, IMAGE, NGINX, NOW)
    path = records.path(IMAGE.digest, is_list=False)
    known = look(records)
    # As long as before: a tag of one letter is another tag of one letter.
    write(path, Record(IMAGE, {"docker.io/library/nginx:2": record.images[str(NGINX)]}).render())
    changed = look(records, known)
    assert changed.read[path].images == {"docker.io/library/nginx:2": NOW}
    assert look(records, changed).read == {}


def test_a_look_finds_what_is_gone(records: RecordFiles) -> None:
    confirmed(records, IMAGE, NGINX, NOW)
    path = records.path(IMAGE.digest, is_list=False)
    known = look(records)
    path.unlink()
    gone = look(records, known)
    assert gone == Changes({}, gone=frozenset({path}))
    assert look(records, gone) == Changes({})


def test_a_damaged_record_is_told_of_once_and_hides_no_other(tmp_path: Path, records: RecordFiles) -> None:
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


def test_a_record_that_cannot_be_read_for_now_is_read_at_the_next_look(
    records: RecordFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many open files, a network file system that hangs: its bytes are good, and will not change."""
    confirmed(records, IMAGE, NGINX, NOW)
    path = records.path(IMAGE.digest, is_list=False)

    def fail(self: Path, *args: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        first = look(records)
    assert first.read == {}
    assert look(records, first).read.keys() == {path}


def test_files_with_other_names_are_ignored(tmp_path: Path, records: RecordFiles) -> None:
    for name in (".syncthing.x.tmp", f".{IMAGE.digest.hex}.Ab12", f"{IMAGE.digest.hex}.record", "README", "0" * 63):
        (tmp_path / "img" / name).write_text("{}")
    assert look(records) == Changes({})


def test_what_is_no_file_is_damaged(tmp_path: Path, records: RecordFiles) -> None:
    (tmp_path / "img" / IMAGE.digest.hex).mkdir()
    (tmp_path / "img" / OTHER.digest.hex).symlink_to("/nowhere")
    confirmed(records, INDEX, NGINX, NOW)
    found = look(records)
    assert found.read.keys() == {records.path(INDEX.digest, is_list=True)}
    assert (tmp_path / "img" / IMAGE.digest.hex) in found.damaged


def test_a_huge_file_is_not_read(tmp_path: Path, records: RecordFiles) -> None:
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


def test_many_processes_write_one_record_and_nothing_is_lost(tmp_path: Path, open_records: Open) -> None:
    urls = [image(f"quay.io/app:{number}") for number in range(24)]
    processes = [open_records(tmp_path)[0] for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for number, url in enumerate(urls):
            pool.submit(processes[number % 4].confirm, IMAGE, url, NOW)
    (path,) = (tmp_path / "img").iterdir()
    assert read_record(path).images.keys() == {str(url) for url in urls}
