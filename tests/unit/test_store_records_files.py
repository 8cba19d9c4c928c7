"""Record files: concurrent rewrites lose nothing."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

import pytest

from ociregistry.manifests import Manifest
from ociregistry.names import ImageReference
from ociregistry.store.files import Files, SharedFile
from ociregistry.store.records import Confirmation, Dates, Record, RecordFiles, RecordInvalid, note_pull, read_record
from ociregistry.store.workdir import PullsFolder
from tests.images import make_image, make_index
from tests.unit.support.common import image, manifest

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
        return RecordFiles(root, taken[-1], files or Files(), lambda count: None), taken[-1].path

    yield open_them
    for folder in taken:
        folder.close()


def confirmed(records: RecordFiles, manifest: Manifest, image: ImageReference, moment: datetime) -> Record:
    """Confirm a manifest and return the record, which must have been written."""
    (record,) = records.confirm(manifest, [Confirmation(image, moment)])
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
        note_pull(path, now)
        assert path.stat().st_mtime == noted


def test_pull_of_a_record_of_another_user_is_noted(records: RecordFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who may write a file may set its time to the present; only its owner may choose another time."""
    confirmed(records, IMAGE, NGINX, NOW)
    path = records.path(IMAGE.digest, is_list=False)
    os.utime(path, (1000, 1000))
    utime = os.utime

    def without_owning(path: Path, times: tuple[float, float] | None = None) -> None:
        if times is not None:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        utime(path)

    monkeypatch.setattr(os, "utime", without_owning)
    note_pull(path, 2000)
    assert path.stat().st_mtime > 2000


def test_tag_is_taken_from_a_record_of_another_user(records: RecordFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time cannot be restored then, but it was written, and the index has to know."""
    confirmed(records, IMAGE, NGINX, NOW)

    def without_owning(path: Path, *, ns: tuple[int, int]) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "utime", without_owning)
    written = records.confirm(OTHER, [Confirmation(NGINX, LATER, rivals={IMAGE.digest: False})])
    assert [record.manifest for record in written] == [OTHER, IMAGE]
    assert str(NGINX) not in written[1].images


def test_read_only_store_is_no_error(records: RecordFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    confirmed(records, IMAGE, NGINX, NOW)

    def fail(*args: object) -> None:
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "utime", fail)
    note_pull(records.path(IMAGE.digest, is_list=False), 1e11)


def test_concurrent_writers_lose_nothing(tmp_path: Path, open_records: Open) -> None:
    urls = [image(f"quay.io/app:{number}") for number in range(24)]
    processes = [open_records(tmp_path)[0] for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for number, url in enumerate(urls):
            pool.submit(processes[number % 4].confirm, IMAGE, [Confirmation(url, NOW)])
    (path,) = (tmp_path / "img").iterdir()
    assert read_record(path).images.keys() == {str(url) for url in urls}
