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
from ociregistry.store.files import Threads, lock
from ociregistry.store.orphans import find_orphans, remove_orphans, remove_partials
from ociregistry.store.partials import Partial
from ociregistry.store.space import Space
from ociregistry.store.workdir import PendingFiles, PendingImage, PullsFolder
from tests.processes import wait_until
from tests.unit.support.doubles import REACTOR, image
from tests.unit.support.stores import Stock, Unsynced, image_of, list_of

ONE = (b"config", b"layer")
APP = image("reg.example/a:1").repository


@pytest.fixture
def stock(tmp_path: Path) -> Stock:
    """Return an empty store."""
    return Stock(tmp_path / "store")


@pytest.fixture
def living(stock: Stock) -> Iterator[Path]:
    """Return pulls/0/, the folder of a running process."""
    pulls = PullsFolder(stock.root, Unsynced())
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


def found(stock: Stock, since: datetime | None = None) -> dict[str, int]:
    """Return path and size of the orphans; check that removing them removes nothing else."""
    since = since or later()
    orphans = find_orphans(stock.root, since)
    before = files(stock)
    assert remove_orphans(stock.root, since, Unsynced()) == orphans
    gone = {path for orphan in orphans for path in (orphan, orphan.with_name(f"{orphan.name}.note"))}
    assert files(stock) == {path: data for path, data in before.items() if path not in gone}
    return {str(path.relative_to(stock.root)): size for path, size in orphans.items()}


def files(stock: Stock) -> Mapping[Path, bytes]:
    """Return all files."""
    paths = (path for path in stock.root.rglob("*") if path.is_file() and path.name != "lock")
    return {path: path.read_bytes() for path in paths}


def create(digest: Digest, path: Path) -> Partial:
    """Create a partial at `path`, as this process does for a download."""
    threads = Threads(REACTOR)
    space = Space(path.parent, USUAL_RESERVE, lambda missing: None, threads, Clock())
    return Partial.create(digest, path, None, str(APP), space, Unsynced(), threads)


def write(folder: Path, blob: bytes, *, resumes: bool) -> Partial | None:
    """Return the partial of `blob` as a writing process opens it; None if there is nothing to resume."""
    digest = Digest.of(blob)
    if not resumes:
        return create(digest, folder / digest.hex)
    threads = Threads(REACTOR)
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


def test_blob_without_record_is_an_orphan(stock: Stock) -> None:
    stock.put(list_of(stock.image(ONE, "a@")), "a:1")
    stock.blobs(b"nobody's", b"")
    hexes = sorted((Digest.of(b"nobody's").hex, Digest.of(b"").hex))
    assert list(found(stock)) == [f"blobs/{name}" for name in hexes]
    assert stock.has(*ONE, b"nobody's", b"") == [True, True, False, False]
    assert found(stock) == {}


def test_other_file_names_are_ignored(stock: Stock) -> None:
    for name in (".syncthing.x.tmp", f".{'ab' * 32}.Xy7Z", "ab" * 31, ("ab" * 32).upper()):
        (stock.root / "blobs" / name).write_bytes(b"x")
    assert found(stock) == {}


def test_blob_mentioned_by_unreadable_record_is_no_orphan(stock: Stock) -> None:
    record = stock.path(stock.image(ONE, "a:1"))
    record.write_bytes(record.read_bytes()[:-9])
    theirs = stock.root / "fat" / Digest.of(b"theirs").hex
    theirs.write_text(json.dumps({"v1.oci.manifest": {"layers": [{"digest": Digest.of(b"their layer")}]}}))
    stock.blobs(b"their layer", b"nobody's")
    assert list(found(stock)) == ["blobs/" + Digest.of(b"nobody's").hex]


def test_recently_changed_blob_is_no_orphan(stock: Stock) -> None:
    stock.blobs(b"nobody's")
    path = partial(stock.root / "pulls" / "3", b"left", 2)
    changed = datetime.fromtimestamp(path.stat().st_ctime, UTC)
    assert found(stock, changed - timedelta(seconds=10)) == {}
    assert len(found(stock)) == 2


def test_age_is_the_ctime(stock: Stock) -> None:
    """rsync and tar preserve the mtime of the original; the ctime is the time of the copy."""
    stock.blobs(b"nobody's")
    long_ago = time.time() - 10**7
    os.utime(stock.blob(b"nobody's"), (long_ago, long_ago))
    assert found(stock, datetime.now(UTC) - timedelta(days=1)) == {}
    in_the_future = time.time() + 10**7
    os.utime(stock.blob(b"nobody's"), (in_the_future, in_the_future))
    assert len(found(stock)) == 1


# Partials


def test_abandoned_partial_is_an_orphan_with_its_note(stock: Stock) -> None:
    partial(stock.root / "pulls" / "0", b"left", 2)
    path = partial(stock.root / "pulls" / "12", b"without a size", 3, None)
    path.with_name(f"{path.name}.note").unlink()
    assert found(stock) == {f"pulls/0/{Digest.of(b'left').hex}": 2, f"pulls/12/{path.name}": 3}


def test_partial_being_written_is_no_orphan(stock: Stock, living: Path) -> None:
    """Whether new or resumed, and with any other file beside it."""
    left = partial(living, b"left", 2)
    partial(living, b"under way", 2)
    partial(living, b"of unknown size", 2, None)
    with writing(living, b"under way"), writing(living, b"of unknown size"), writing(living, b"new", resumes=False):
        assert found(stock) == {f"pulls/0/{left.name}": 2}
    assert len(found(stock)) == 3


def test_reader_does_not_protect_a_partial(stock: Stock, living: Path) -> None:
    partial(living, b"left", 2)
    with writing(living, b"left") as written:
        reader = written.reader()
    assert len(found(stock)) == 1
    reader.close()


def test_abandoned_staged_blob_is_an_orphan(stock: Stock, living: Path) -> None:
    digest = Digest.of(b"staged")
    path = living / f"{digest.hex}.staged"
    with closing(create(digest, path)):
        assert found(stock) == {}
    assert found(stock) == {f"pulls/0/{path.name}": 0}


def test_partial_of_a_complete_blob_is_an_orphan(stock: Stock, living: Path) -> None:
    wanted = stock.put(image_of(b"whole", b"half"), "a:1")
    PendingFiles(living, Unsynced()).write(PendingImage(wanted.digest, APP))
    stock.blobs(b"whole")
    stock.blob(b"half").write_bytes(b"ha")
    whole = partial(living, b"whole", 3)
    half = partial(living, b"half", 3)
    assert found(stock) == {f"pulls/0/{whole.name}": 3}
    half.with_name(f"{half.name}.note").write_text("[]")
    assert found(stock) == {}


@pytest.mark.parametrize("note", ["", "{", "[]", "5", "null", "{}", '{"size": null}', '{"size": "5"}', "\udcff"])
def test_malformed_note_protects_the_partial(stock: Stock, living: Path, note: str) -> None:
    wanted = stock.put(image_of(b"whole"), "a:1")
    PendingFiles(living, Unsynced()).write(PendingImage(wanted.digest, APP))
    stock.blobs(b"whole")
    path = partial(living, b"whole", 3)
    path.with_name(f"{path.name}.note").write_bytes(note.encode("utf-8", "surrogateescape"))
    assert found(stock) == {}


def test_partial_of_a_pending_image_is_no_orphan(stock: Stock) -> None:
    """The pending file may be in another folder than the partial."""
    wanted = stock.put(image_of(b"config", b"layer"), "a:1")
    (stock.root / "pulls" / "4").mkdir()
    PendingFiles(stock.root / "pulls" / "4", Unsynced()).write(PendingImage(wanted.digest, APP))
    partial(stock.root / "pulls" / "2", b"layer", 3)
    other = partial(stock.root / "pulls" / "2", b"another's", 3)
    assert found(stock) == {f"pulls/2/{other.name}": 3}
    PendingFiles(stock.root / "pulls" / "4", Unsynced()).remove(wanted.digest)
    assert found(stock) == {f"pulls/2/{Digest.of(b'layer').hex}": 3}


def test_pending_image_without_record_protects_nothing(stock: Stock) -> None:
    wanted = image_of(b"config", b"layer")
    path = partial(stock.root / "pulls" / "2", b"layer", 3)
    PendingFiles(path.parent, Unsynced()).write(PendingImage(wanted.digest, APP))
    (path.parent / "nonsense.wish").write_text("{}")
    assert found(stock) == {f"pulls/2/{path.name}": 3}


def test_other_files_in_pulls_are_ignored(stock: Stock) -> None:
    folder = stock.root / "pulls" / "2"
    (folder / "bad" / Digest.of(b"folder").hex).mkdir(parents=True)
    (folder / Digest.of(b"folder").hex).mkdir()
    for name in ("socket", f"{'ab' * 32}.record", f"{'ab' * 32}.new", f"bad/{'ab' * 32}"):
        (folder / name).write_bytes(b"x")
    (stock.root / "pulls" / "x").mkdir()
    partial(stock.root / "pulls" / "x", b"not a process's", 3)
    (stock.root / "pulls" / "verified").touch()
    assert found(stock) == {}


# Concurrency


def test_removal_holds_the_lock(stock: Stock) -> None:
    stock.blobs(b"nobody's")
    held = []

    class Looking(Unsynced):
        def unlink(self, path: Path) -> None:
            held.append(lock(stock.root / "pulls" / "lock", wait=False))
            super().unlink(path)

    remove_orphans(stock.root, later(), Looking())
    assert held
    assert set(held) == {None}
    free = lock(stock.root / "pulls" / "lock", wait=False)
    assert free is not None
    os.close(free)


@pytest.mark.parametrize("begins", [True, False], ids=["create", "resume"])
def test_partial_opened_during_removal_is_created_anew(stock: Stock, begins: bool) -> None:
    """The process waits for the lock; it must neither resume the file being removed nor lose its new one."""
    folder = stock.root / "pulls" / "0"
    path = partial(folder, b"left", 2)
    got: list[Partial | None] = []
    taking = threading.Thread(target=lambda: got.append(write(folder, b"left", resumes=not begins)))

    class Meanwhile(Unsynced):
        def unlink(self, path: Path) -> None:
            if taking.ident is None:
                taking.start()
                wait_for_lock(taking)
            super().unlink(path)

    remove_orphans(stock.root, later(), Meanwhile())
    taking.join(10)
    (taken,) = got
    assert (taken is not None) == begins
    assert path.exists() == begins
    if taken is not None:
        assert taken.length == 0
        assert path.with_name(f"{path.name}.note").exists()
        taken.close()


def test_adopting_a_folder_during_removal(stock: Stock) -> None:
    """Files that it found there are gone when it renames them."""
    path = partial(stock.root / "pulls" / "3", b"left", 2)

    class Meanwhile(Unsynced):
        def rename(self, old: Path, target: Path) -> None:
            if path.exists():
                remove_orphans(stock.root, later(), Unsynced())
            super().rename(old, target)

    with closing(PullsFolder(stock.root, Meanwhile())) as pulls:
        assert [file.name for file in pulls.path.iterdir()] == ["lock"]


# Making room


def test_making_room_removes_least_recently_written_partials_first(stock: Stock, living: Path) -> None:
    blobs = (b"third", b"first", b"second")
    paths = {blob: partial(living, blob, 3) for blob in blobs}
    for hours, blob in enumerate((b"third", b"second", b"first")):
        moment = time.time() - 3600 * hours
        os.utime(paths[blob], (moment, moment))
    remove_partials(stock.root, set(), 4, Unsynced())
    assert [path.exists() for path in paths.values()] == [True, False, False]
    assert not paths[b"first"].with_name(f"{paths[b'first'].name}.note").exists()


def test_nothing_is_removed_if_all_partials_are_not_enough(stock: Stock, living: Path) -> None:
    path, wanted = partial(living, b"left", 3), partial(living, b"wanted", 3)
    partial(living, b"written", 3)
    with writing(living, b"written"):
        remove_partials(stock.root, {Digest.of(b"wanted")}, 4, Unsynced())
        assert path.exists()
        remove_partials(stock.root, {Digest.of(b"wanted")}, 3, Unsynced())
    assert (path.exists(), wanted.exists()) == (False, True)


def test_store_copy_without_pulls_folder_has_orphans(stock: Stock) -> None:
    stock.blobs(b"nobody's")
    (stock.root / "pulls").rmdir()
    assert len(find_orphans(stock.root, later())) == 1
    assert len(remove_orphans(stock.root, later(), Unsynced())) == 1


def test_finding_orphans_changes_nothing(stock: Stock) -> None:
    partial(stock.root / "pulls" / "5", b"left", 2)
    before = sorted(stock.root.rglob("*"))
    assert len(find_orphans(stock.root, later())) == 1
    assert sorted(stock.root.rglob("*")) == before


def test_store_without_blobs(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    assert find_orphans(tmp_path / "store", later()) == {}


def test_missing_store_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        find_orphans(tmp_path / "store", later())
