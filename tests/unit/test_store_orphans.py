"""Orphans: blobs without record and abandoned partials, once they have not changed for long."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from twisted.internet.task import Clock

from ociregistry.config.values import USUAL_RESERVE
from ociregistry.names import Digest
from ociregistry.store.files import lock
from ociregistry.store.orphans import find_orphans, remove_orphans, remove_partials
from ociregistry.store.partials import Partial
from ociregistry.store.space import Space
from ociregistry.store.threads import Threads
from ociregistry.store.workdir import PendingFiles, PendingImage, PullsFolder
from tests.processes import wait_until
from tests.unit.support.common import REACTOR, image
from tests.unit.support.stores import StoreDir, Unsynced, image_of, list_of

ONE = (b"config", b"layer")
APP = image("reg.example/a:1").repository


@pytest.fixture
def store_dir(tmp_path: Path) -> StoreDir:
    """Return an empty store."""
    return StoreDir(tmp_path / "store")


@pytest.fixture
def active(store_dir: StoreDir) -> Iterator[Path]:
    """Return pulls/0/, the folder of a running process."""
    pulls = PullsFolder(store_dir.root, Unsynced())
    yield pulls.path
    pulls.close()


def later() -> datetime:
    """Return a time after all writes so far; file system clocks lag by a few milliseconds."""
    return datetime.now(UTC) + timedelta(hours=1)


def partial(folder: Path, blob: bytes, advance: int, size: int | None = -1) -> Path:
    """Write a partial: the first bytes and the note of a download."""
    folder.mkdir(exist_ok=True)
    path = folder / Digest.of(blob).hex
    path.write_bytes(blob[:advance])
    note = {"durable": 0, "boot": "x", "size": len(blob) if size == -1 else size, "source": str(APP)}
    path.with_name(f"{path.name}.note").write_text(json.dumps(note))
    return path


def found(store_dir: StoreDir, since: datetime | None = None) -> dict[str, int]:
    """Return path and size of the orphans; check that removing them removes nothing else."""
    since = since or later()
    orphans = find_orphans(store_dir.root, since)
    before = files(store_dir)
    assert remove_orphans(store_dir.root, since, Unsynced()) == orphans
    gone = {path for orphan in orphans for path in (orphan, orphan.with_name(f"{orphan.name}.note"))}
    assert files(store_dir) == {path: data for path, data in before.items() if path not in gone}
    return {str(path.relative_to(store_dir.root)): size for path, size in orphans.items()}


def files(store_dir: StoreDir) -> Mapping[Path, bytes]:
    """Return all files."""
    paths = (path for path in store_dir.root.rglob("*") if path.is_file() and path.name != "lock")
    return {path: path.read_bytes() for path in paths}


def create(digest: Digest, path: Path) -> Partial:
    """Create a partial at `path`, as this process does for a download."""
    threads = Threads(REACTOR, Clock())
    space = Space(path.parent, USUAL_RESERVE, lambda missing: None, threads, Clock())
    return Partial.create(digest, path, None, str(APP), space, Unsynced(), threads)


def write(folder: Path, blob: bytes, *, resumes: bool) -> Partial | None:
    """Return the partial of `blob` as a writing process opens it; None if there is nothing to resume."""
    digest = Digest.of(blob)
    if not resumes:
        return create(digest, folder / digest.hex)
    threads = Threads(REACTOR, Clock())
    space = Space(folder, USUAL_RESERVE, lambda missing: None, threads, Clock())
    return Partial.resume(digest, folder / digest.hex, space, Unsynced(), threads)


@contextmanager
def writing(folder: Path, blob: bytes, *, resumes: bool = True) -> Iterator[Partial]:
    """Keep the partial of `blob` open for writing during the block."""
    partial = write(folder, blob, resumes=resumes)
    assert partial is not None
    with closing(partial):
        yield partial


def wait_for_lock(thread: threading.Thread) -> None:
    """Wait until the thread blocks on a file lock."""
    blocked = Path(f"/proc/self/task/{thread.native_id}/syscall")
    flock = {"x86_64": "73", "aarch64": "32"}[os.uname().machine]
    wait_until(lambda: blocked.read_text().split()[0] == flock, 10, "it waits for the lock")


# Blobs


def test_blob_without_record_is_an_orphan(store_dir: StoreDir) -> None:
    store_dir.put(list_of(store_dir.image(ONE, "a@")), "a:1")
    store_dir.blobs(b"nobody's", b"")
    hexes = sorted((Digest.of(b"nobody's").hex, Digest.of(b"").hex))
    assert list(found(store_dir)) == [f"blobs/{name}" for name in hexes]
    assert store_dir.has(*ONE, b"nobody's", b"") == [True, True, False, False]
    assert found(store_dir) == {}


def test_other_file_names_are_ignored(store_dir: StoreDir) -> None:
    for name in (".syncthing.x.tmp", f".{'ab' * 32}.Xy7Z", "ab" * 31, ("ab" * 32).upper()):
        (store_dir.root / "blobs" / name).write_bytes(b"x")
    assert found(store_dir) == {}


def test_blob_mentioned_by_unreadable_record_is_no_orphan(store_dir: StoreDir) -> None:
    record = store_dir.path(store_dir.image(ONE, "a:1"))
    record.write_bytes(record.read_bytes()[:-9])
    theirs = store_dir.root / "fat" / Digest.of(b"theirs").hex
    theirs.write_text(json.dumps({"v1.oci.manifest": {"layers": [{"digest": Digest.of(b"their layer")}]}}))
    store_dir.blobs(b"their layer", b"nobody's")
    assert list(found(store_dir)) == ["blobs/" + Digest.of(b"nobody's").hex]


def test_recently_changed_blob_is_no_orphan(store_dir: StoreDir) -> None:
    store_dir.blobs(b"nobody's")
    path = partial(store_dir.root / "pulls" / "3", b"left", 2)
    changed = datetime.fromtimestamp(path.stat().st_ctime, UTC)
    assert found(store_dir, changed - timedelta(seconds=10)) == {}
    assert len(found(store_dir)) == 2


def test_age_is_the_ctime(store_dir: StoreDir) -> None:
    """rsync and tar preserve the mtime of the original; the ctime is the time of the copy."""
    store_dir.blobs(b"nobody's")
    long_ago = time.time() - 10**7
    os.utime(store_dir.blob(b"nobody's"), (long_ago, long_ago))
    assert found(store_dir, datetime.now(UTC) - timedelta(days=1)) == {}
    in_the_future = time.time() + 10**7
    os.utime(store_dir.blob(b"nobody's"), (in_the_future, in_the_future))
    assert len(found(store_dir)) == 1


# Partials


def test_abandoned_partial_is_an_orphan_with_its_note(store_dir: StoreDir) -> None:
    partial(store_dir.root / "pulls" / "0", b"left", 2)
    path = partial(store_dir.root / "pulls" / "12", b"without a size", 3, None)
    path.with_name(f"{path.name}.note").unlink()
    assert found(store_dir) == {f"pulls/0/{Digest.of(b'left').hex}": 2, f"pulls/12/{path.name}": 3}


def test_partial_being_written_is_no_orphan(store_dir: StoreDir, active: Path) -> None:
    """Whether new or resumed, and with any other file beside it."""
    left = partial(active, b"left", 2)
    partial(active, b"under way", 2)
    partial(active, b"of unknown size", 2, None)
    with writing(active, b"under way"), writing(active, b"of unknown size"), writing(active, b"new", resumes=False):
        assert found(store_dir) == {f"pulls/0/{left.name}": 2}
    assert len(found(store_dir)) == 3


def test_reader_does_not_protect_a_partial(store_dir: StoreDir, active: Path) -> None:
    partial(active, b"left", 2)
    with writing(active, b"left") as written:
        reader = written.reader()
    assert len(found(store_dir)) == 1
    reader.close()


def test_abandoned_staged_blob_is_an_orphan(store_dir: StoreDir, active: Path) -> None:
    digest = Digest.of(b"staged")
    path = active / f"{digest.hex}.staged"
    with closing(create(digest, path)):
        assert found(store_dir) == {}
    assert found(store_dir) == {f"pulls/0/{path.name}": 0}


def test_partial_of_a_complete_blob_is_an_orphan(store_dir: StoreDir, active: Path) -> None:
    wanted = store_dir.put(image_of(b"whole", b"half"), "a:1")
    PendingFiles(active, Unsynced()).write(PendingImage(wanted.digest, APP))
    store_dir.blobs(b"whole")
    store_dir.blob(b"half").write_bytes(b"ha")
    whole = partial(active, b"whole", 3)
    half = partial(active, b"half", 3)
    assert found(store_dir) == {f"pulls/0/{whole.name}": 3}
    half.with_name(f"{half.name}.note").write_text("[]")
    assert found(store_dir) == {}


@pytest.mark.parametrize("note", ["", "{", "[]", "5", "null", "{}", '{"size": null}', '{"size": "5"}', "\udcff"])
def test_malformed_note_protects_the_partial(store_dir: StoreDir, active: Path, note: str) -> None:
    wanted = store_dir.put(image_of(b"whole"), "a:1")
    PendingFiles(active, Unsynced()).write(PendingImage(wanted.digest, APP))
    store_dir.blobs(b"whole")
    path = partial(active, b"whole", 3)
    path.with_name(f"{path.name}.note").write_bytes(note.encode("utf-8", "surrogateescape"))
    assert found(store_dir) == {}


def test_partial_of_a_pending_image_is_no_orphan(store_dir: StoreDir) -> None:
    """The pending file may be in another folder than the partial."""
    wanted = store_dir.put(image_of(b"config", b"layer"), "a:1")
    (store_dir.root / "pulls" / "4").mkdir()
    PendingFiles(store_dir.root / "pulls" / "4", Unsynced()).write(PendingImage(wanted.digest, APP))
    partial(store_dir.root / "pulls" / "2", b"layer", 3)
    other = partial(store_dir.root / "pulls" / "2", b"another's", 3)
    assert found(store_dir) == {f"pulls/2/{other.name}": 3}
    PendingFiles(store_dir.root / "pulls" / "4", Unsynced()).remove(wanted.digest)
    assert found(store_dir) == {f"pulls/2/{Digest.of(b'layer').hex}": 3}


def test_pending_image_without_record_protects_nothing(store_dir: StoreDir) -> None:
    wanted = image_of(b"config", b"layer")
    path = partial(store_dir.root / "pulls" / "2", b"layer", 3)
    PendingFiles(path.parent, Unsynced()).write(PendingImage(wanted.digest, APP))
    (path.parent / "nonsense.wish").write_text("{}")
    assert found(store_dir) == {f"pulls/2/{path.name}": 3}


def test_other_files_in_pulls_are_ignored(store_dir: StoreDir) -> None:
    folder = store_dir.root / "pulls" / "2"
    (folder / "bad" / Digest.of(b"folder").hex).mkdir(parents=True)
    (folder / Digest.of(b"folder").hex).mkdir()
    for name in ("socket", f"{'ab' * 32}.record", f"{'ab' * 32}.new", f"bad/{'ab' * 32}"):
        (folder / name).write_bytes(b"x")
    (store_dir.root / "pulls" / "x").mkdir()
    partial(store_dir.root / "pulls" / "x", b"not a process's", 3)
    (store_dir.root / "pulls" / "verified").touch()
    assert found(store_dir) == {}


# Concurrency


def test_removal_holds_the_lock(store_dir: StoreDir) -> None:
    store_dir.blobs(b"nobody's")
    held = []

    class Looking(Unsynced):
        def unlink(self, path: Path) -> None:
            held.append(lock(store_dir.root / "pulls" / "lock", wait=False))
            super().unlink(path)

    remove_orphans(store_dir.root, later(), Looking())
    assert held
    assert set(held) == {None}
    free = lock(store_dir.root / "pulls" / "lock", wait=False)
    assert free is not None
    os.close(free)


@pytest.mark.parametrize("begins", [True, False], ids=["create", "resume"])
def test_partial_opened_during_removal_is_created_anew(store_dir: StoreDir, begins: bool) -> None:
    """The process waits for the lock; it must neither resume the file being removed nor lose its new one."""
    folder = store_dir.root / "pulls" / "0"
    path = partial(folder, b"left", 2)
    got: list[Partial | None] = []
    taking = threading.Thread(target=lambda: got.append(write(folder, b"left", resumes=not begins)))

    class RemovesOrphans(Unsynced):
        def unlink(self, path: Path) -> None:
            if taking.ident is None:
                taking.start()
                wait_for_lock(taking)
            super().unlink(path)

    remove_orphans(store_dir.root, later(), RemovesOrphans())
    taking.join(10)
    (taken,) = got
    assert (taken is not None) == begins
    assert path.exists() == begins
    if taken is not None:
        assert taken.length == 0
        assert path.with_name(f"{path.name}.note").exists()
        taken.close()


def test_adopting_a_folder_during_removal(store_dir: StoreDir) -> None:
    """Files that it found there are gone when it renames them."""
    path = partial(store_dir.root / "pulls" / "3", b"left", 2)

    class RemovesOrphans(Unsynced):
        def rename(self, old: Path, target: Path) -> None:
            if path.exists():
                remove_orphans(store_dir.root, later(), Unsynced())
            super().rename(old, target)

    with closing(PullsFolder(store_dir.root, RemovesOrphans())) as pulls:
        assert [file.name for file in pulls.path.iterdir()] == ["lock"]


# Making room


def test_making_room_removes_least_recently_written_partials_first(store_dir: StoreDir, active: Path) -> None:
    blobs = (b"third", b"first", b"second")
    paths = {blob: partial(active, blob, 3) for blob in blobs}
    for hours, blob in enumerate((b"third", b"second", b"first")):
        moment = time.time() - 3600 * hours
        os.utime(paths[blob], (moment, moment))
    remove_partials(store_dir.root, set(), 4, Unsynced())
    assert [path.exists() for path in paths.values()] == [True, False, False]
    assert not paths[b"first"].with_name(f"{paths[b'first'].name}.note").exists()


def test_nothing_is_removed_if_all_partials_are_not_enough(store_dir: StoreDir, active: Path) -> None:
    path, wanted = partial(active, b"left", 3), partial(active, b"wanted", 3)
    partial(active, b"written", 3)
    with writing(active, b"written"):
        remove_partials(store_dir.root, {Digest.of(b"wanted")}, 4, Unsynced())
        assert path.exists()
        remove_partials(store_dir.root, {Digest.of(b"wanted")}, 3, Unsynced())
    assert (path.exists(), wanted.exists()) == (False, True)


def test_store_copy_without_pulls_folder_has_orphans(store_dir: StoreDir) -> None:
    store_dir.blobs(b"nobody's")
    (store_dir.root / "pulls").rmdir()
    assert len(find_orphans(store_dir.root, later())) == 1
    assert len(remove_orphans(store_dir.root, later(), Unsynced())) == 1


def test_finding_orphans_changes_nothing(store_dir: StoreDir) -> None:
    partial(store_dir.root / "pulls" / "5", b"left", 2)
    before = sorted(store_dir.root.rglob("*"))
    assert len(find_orphans(store_dir.root, later())) == 1
    assert sorted(store_dir.root.rglob("*")) == before


def test_store_without_blobs(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    assert find_orphans(tmp_path / "store", later()) == {}


def test_missing_store_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        find_orphans(tmp_path / "store", later())
