"""What cannot be read is a miss: one log line names file and reason, and what is fetched anew takes its place."""

from __future__ import annotations

import errno
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred, fail
from twisted.logger import LogEvent, LogLevel

import ociregistry.store.workdir
from ociregistry.names import Digest
from ociregistry.store.blobs import size_of_blob
from ociregistry.store.files import Files
from ociregistry.store.orphans import find_orphans, remove_orphans
from ociregistry.store.prune import Criteria, prune
from ociregistry.store.snapshot import Snapshot
from ociregistry.store.store import Store
from ociregistry.store.threads import Hung, Threads
from ociregistry.store.workdir import PendingFiles, PendingImage, undecided_images
from tests.images import make_image
from tests.unit.support.common import failed, image, manifest, on_reactor, open_descriptors, record, texts, until
from tests.unit.support.irregular import IRREGULAR, put_irregular
from tests.unit.support.stores import image_of, keep_pulled

BUILT = make_image("unreadable")
IMAGE, OTHER = manifest(BUILT), manifest(make_image("other"))
NGINX, APP = image("docker.io/library/nginx:1"), image("quay.io/app:1")
DATA = BUILT.layers[0].data
LARGE = bytes(100_000)
"""More than is read when a blob is opened."""
LAYER = Digest(BUILT.layers[0].digest)


def here(root: Path, digest: Digest = LAYER) -> Path:
    """Return the path of the blob."""
    return root / "blobs" / digest.hex


def unreadable(path: Path, patch: pytest.MonkeyPatch) -> None:
    """Make every read of this file fail, and no other file be read."""
    inode = path.stat().st_ino

    def fail(file: int, *args: object) -> int:
        assert os.fstat(file).st_ino == inode
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    patch.setattr(os, "preadv", fail)
    patch.setattr(os, "pread", fail)


def quarantined(root: Path) -> list[str]:
    """Return the names of the quarantined files."""
    return [path.name for path in (root / "pulls" / "0" / "bad").iterdir()]


async def stored(store: Store) -> None:
    """Keep the image, and its layer as a download does."""
    await keep_pulled(store, IMAGE, NGINX, DATA)


async def content(store: Store, digest: Digest = LAYER) -> bytes | None:
    """Return the bytes of the blob, or None on a miss."""
    blob = await store.blob(digest)
    if blob is None:
        return None
    try:
        return await blob.read(0, blob.size)
    finally:
        blob.close()


@pytest.mark.parametrize("kind", IRREGULAR)
@on_reactor
async def test_blob_that_is_no_regular_file_is_a_miss_and_replaced(
    store: Store, root: Path, events: list[LogEvent], kind: str
) -> None:
    before = open_descriptors()
    await stored(store)
    put_irregular(here(root), kind)
    for _ in range(3):
        assert await content(store) is None
    assert texts(events, LogLevel.error) == [f"cannot read the blob {here(root)}: {IRREGULAR[kind]}"]
    await until(lambda: open_descriptors() <= before)
    assert not await store.holds(LAYER, len(DATA))
    assert LAYER in (await store.missing(IMAGE.digest) or {})
    await stored(store)
    assert await content(store) == DATA
    assert quarantined(root) == [LAYER.hex]
    assert await store.holds(LAYER, len(DATA))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EUCLEAN, errno.ENOMEM])
@on_reactor
async def test_blob_that_cannot_be_opened_is_a_miss(
    store: Store, root: Path, events: list[LogEvent], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    await stored(store)
    path, opened = here(root), os.open

    def fail(file: str | Path, *args: int) -> int:
        if file == path:
            raise OSError(number, os.strerror(number), str(file))
        return opened(file, *args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        assert await content(store) is None
        assert texts(events, LogLevel.error) == [f"cannot read the blob {path}: {os.strerror(number)}"]
        await stored(store)
    assert await content(store) == DATA
    # A lack of memory is no fault of the file.
    assert (root / "pulls" / "0" / "bad").exists() == (number != errno.ENOMEM)


@on_reactor
async def test_new_blob_wins_over_a_file_that_cannot_be_moved(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stored(store)
    put_irregular(here(root), "link to itself")
    rename = Files.rename

    def fail(self: Files, path: Path, target: Path) -> None:
        if target.parent.name == "bad":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(self, path, target)

    monkeypatch.setattr(Files, "rename", fail)
    await stored(store)
    assert await content(store) == DATA


@on_reactor
async def test_blob_is_a_miss_after_a_read_failed_until_it_succeeds(
    store: Store, root: Path, events: list[LogEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = Digest.of(LARGE)
    await keep_pulled(store, image_of(b"config", LARGE), NGINX, LARGE)
    path = here(root, digest)
    with monkeypatch.context() as patch:
        unreadable(path, patch)
        blob = await store.blob(digest)
        assert blob is not None
        with pytest.raises(OSError, match="Input/output error") as raised:
            await blob.read(100, 10)
        blob.close()
        # It is this error that is logged, with the truncated answer.
        assert str(path) in str(raised.value)
        assert await content(store, digest) is None
        assert texts(events, LogLevel.error) == []
    assert await content(store, digest) == LARGE


FAILURES = {
    "the disk": (OSError(errno.EIO, "Input/output error"), True),
    "a disk that hangs": (Hung(Path("file")), False),
    "the connection": (BrokenPipeError(errno.EPIPE, "Broken pipe"), False),
    "no descriptor": (OSError(errno.EMFILE, "Too many open files"), False),
}
"""What failed, and whether the file is at fault."""


@pytest.mark.parametrize(("why", "at_fault"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("call", ["read_at", "send_at"])
@on_reactor
async def test_only_a_file_at_fault_is_closed(
    store: Store, monkeypatch: pytest.MonkeyPatch, why: OSError, at_fault: bool, call: str
) -> None:
    """The next request opens it again then; for any other failure, it is served as before."""
    digest = Digest.of(LARGE)
    await keep_pulled(store, image_of(b"config", LARGE), NGINX, LARGE)
    blob = await store.blob(digest)
    assert blob is not None
    with monkeypatch.context() as patch:
        patch.setattr(Threads, call, lambda *_, **__: fail(why))
        reads = call == "read_at"
        trying: Deferred[Any] = blob.read(0, 10) if reads else blob.send(-1, 0, 10, in_thread=False)
        failed(trying, OSError)
    blob.close()
    kept = store.opened(digest)
    assert (kept is None) == at_fault
    if kept is not None:
        kept.close()


@on_reactor
async def test_small_blob_that_cannot_be_read_is_a_miss_at_once(
    store: Store, root: Path, events: list[LogEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read when it is opened, before the client is told that it is there."""
    before = open_descriptors()
    await stored(store)
    with monkeypatch.context() as patch:
        unreadable(here(root), patch)
        for _ in range(2):
            assert await store.blob(LAYER) is None
    assert texts(events, LogLevel.error) == [f"cannot read the blob {here(root)}: Input/output error"]
    await until(lambda: open_descriptors() <= before)
    assert await content(store) == DATA


def test_blob_without_permission_to_read_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "blob"
    path.write_bytes(DATA)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert size_of_blob(path) == len(DATA)
    path.chmod(0)
    assert size_of_blob(path) is None


@pytest.mark.parametrize("kind", IRREGULAR)
@on_reactor
async def test_record_that_is_no_regular_file_is_a_miss_and_replaced(
    store: Store, root: Path, events: list[LogEvent], kind: str
) -> None:
    await store.keep(IMAGE, NGINX)
    await store.keep(OTHER, APP)
    path = record(root, IMAGE.digest)
    put_irregular(path, kind)
    assert await store.manifest(NGINX) is None
    assert texts(events, LogLevel.error) == [f"cannot read the record {path}: {IRREGULAR[kind]}"]
    assert await store.manifest(APP) == OTHER
    await store.keep(IMAGE, NGINX)
    assert await store.manifest(NGINX) == IMAGE
    assert quarantined(root) == [IMAGE.digest.hex]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EUCLEAN])
@on_reactor
async def test_record_that_cannot_be_read_is_replaced(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    await store.keep(IMAGE, NGINX)
    path, opened = record(root, IMAGE.digest), os.open
    inode = path.stat().st_ino

    def fail(file: str | Path, *args: int) -> int:
        if file == path and path.stat().st_ino == inode:
            raise OSError(number, os.strerror(number), str(file))
        return opened(file, *args)

    monkeypatch.setattr(os, "open", fail)
    assert await store.manifest(NGINX) is None
    await store.keep(IMAGE, NGINX)
    assert await store.manifest(NGINX) == IMAGE
    assert quarantined(root) == [IMAGE.digest.hex]


@pytest.mark.parametrize("kind", IRREGULAR)
@on_reactor
async def test_partial_that_is_no_regular_file_is_not_resumed(store: Store, root: Path, kind: str) -> None:
    """Opening a FIFO would wait for a writer."""
    partial = await store.new_partial(LAYER, len(DATA), NGINX.repository)
    await partial.append(DATA[:100])
    partial.close()
    note = root / "pulls" / "0" / f"{LAYER.hex}.note"
    put_irregular(note, kind)
    assert await store.old_partial(LAYER) is None
    put_irregular(root / "pulls" / "0" / LAYER.hex, kind)
    assert await store.old_partial(LAYER) is None


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_pending_image_that_cannot_be_read_is_removed(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    folder = root / "pulls" / "0"
    folder.mkdir(parents=True)
    PendingFiles(folder, Files()).write(PendingImage(IMAGE.digest, NGINX.repository, undecided=True))

    def fail(path: Path) -> bytes:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(ociregistry.store.workdir, "read_regular", fail)
    assert undecided_images(root) == frozenset()
    assert list(PendingFiles(folder, Files()).read()) == []
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("kind", IRREGULAR)
@on_reactor
async def test_prune_goes_on_and_orphans_wait_for_verify(store: Store, root: Path, kind: str) -> None:
    await stored(store)
    await store.keep(OTHER, APP)
    put_irregular(record(root, OTHER.digest), kind)
    put_irregular(here(root), kind)
    later = datetime.now(UTC) + timedelta(days=1)
    with pytest.raises(OSError, match=f"{IRREGULAR[kind]}; verify moves it away"):
        find_orphans(root, later)
    plan = prune(root, Criteria(matches=lambda url: "nginx" in url), Files())
    assert [row.url for row in plan.rows] == [str(NGINX)]
    assert not Snapshot.read(root).records


@on_reactor
async def test_folder_among_the_blobs_is_no_orphan(store: Store, root: Path) -> None:
    (root / "blobs" / LAYER.hex).mkdir()
    (root / "blobs" / IMAGE.digest.hex).symlink_to(root / "blobs" / IMAGE.digest.hex)
    later = datetime.now(UTC) + timedelta(days=1)
    assert list(remove_orphans(root, later, Files())) == [root / "blobs" / IMAGE.digest.hex]
    assert [path.name for path in (root / "blobs").iterdir()] == [LAYER.hex]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
@on_reactor
async def test_lack_of_descriptors_is_no_miss(
    store: Store, root: Path, events: list[LogEvent], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """What is here would be fetched again."""
    await stored(store)
    opened = os.open

    def fail(file: str | Path, *args: int) -> int:
        if Path(file).is_relative_to(root):
            raise OSError(number, os.strerror(number), str(file))
        return opened(file, *args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        with pytest.raises(OSError, match=os.strerror(number)):
            await store.blob(LAYER)
        with pytest.raises(OSError, match=os.strerror(number)):
            await store.manifest(NGINX)
    assert await content(store) == DATA
    assert await store.manifest(NGINX) == IMAGE
    assert texts(events, LogLevel.error) == []
