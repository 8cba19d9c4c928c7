"""A store that other programs empty, replace or take away while it is in use."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.names import Digest
from ociregistry.store import files
from ociregistry.store.files import FileReplaced, locked
from ociregistry.store.lookups import Counts
from ociregistry.store.store import Store
from ociregistry.store.workdir import PendingFiles, PendingImage, find_daemon
from tests.images import make_image
from tests.unit.support.common import image, manifest, on_reactor, texts, until
from tests.unit.support.stores import keep_pulled, looked

BUILT = make_image("folders")
IMAGE = manifest(BUILT)
NGINX = image("docker.io/library/nginx:1")
DATA = BUILT.layers[0].data
LAYER = Digest(BUILT.layers[0].digest)


def emptied(root: Path) -> None:
    """Remove everything in the store."""
    for path in root.iterdir():
        shutil.rmtree(path)


def removed(root: Path) -> None:
    """Remove the store and its folder."""
    shutil.rmtree(root)


def without_pulls(root: Path) -> None:
    """Remove pulls/, as a copy with `--delete` from a store without it does."""
    shutil.rmtree(root / "pulls")


def without_lock(root: Path) -> None:
    """Remove the files in pulls/0 alone."""
    for path in (root / "pulls" / "0").iterdir():
        path.unlink()


def moved_away(root: Path) -> None:
    """Put an empty folder in the place of the store."""
    root.rename(root.with_name("old"))
    root.mkdir()


def swapped(root: Path) -> None:
    """Put a copy of the store, without work in progress, in its place."""
    root.rename(root.with_name("old"))
    shutil.copytree(root.with_name("old"), root, ignore=shutil.ignore_patterns("pulls"))


LOSSES = (emptied, removed, without_pulls, without_lock, moved_away, swapped)


async def kept(store: Store) -> None:
    """Keep the image, and its layer as a download does."""
    await keep_pulled(store, IMAGE, NGINX, DATA)


@pytest.mark.parametrize("lose", LOSSES)
@on_reactor
async def test_store_is_used_again_after_it_was_lost(
    store: Store, root: Path, clock: Clock, events: list[LogEvent], lose: Callable[[Path], None]
) -> None:
    await kept(store)
    await store.add_pending(IMAGE.digest, NGINX.repository)
    taken: list[bool] = []
    store.on_new_pulls_folder = lambda: taken.append(True)
    lose(root)
    await looked(clock, lambda: taken)
    assert (root / "pulls" / "0" / "lock").exists()
    gone = lose in (emptied, removed, moved_away)
    await looked(clock, lambda: store.counts == Counts(0, 0 if gone else 1))
    if gone:
        assert await store.manifest(NGINX) is None
        assert await store.blob(LAYER) is None
    assert store.pending == {IMAGE.digest: NGINX.repository}
    notes = PendingFiles(root / "pulls" / "0", store._files)
    await until(lambda: list(notes.scan()) == [PendingImage(IMAGE.digest, NGINX.repository)])
    await kept(store)
    assert await store.manifest(NGINX) == IMAGE
    found = await store.blob(LAYER)
    assert found is not None
    found.close()
    await looked(clock, lambda: store.counts == Counts(0, 1))
    assert texts(events, LogLevel.error) == []
    (line,) = texts(events, LogLevel.warn)
    assert line.startswith(f"another program has removed or replaced {root}, or folders in it: ")
    assert find_daemon(root) is None


@on_reactor
async def test_pending_images_of_a_store_that_takes_the_place_are_taken_over(
    store: Store, root: Path, clock: Clock
) -> None:
    old = root.with_name("old")
    root.rename(old)
    left = root / "pulls" / "0"
    left.mkdir(parents=True)
    PendingFiles(left, store._files).write(PendingImage(IMAGE.digest, NGINX.repository, undecided=True))
    await looked(clock, lambda: store.undecided == {IMAGE.digest: NGINX.repository})


@on_reactor
async def test_store_that_cannot_be_made_is_told_once(
    store: Store, root: Path, clock: Clock, events: list[LogEvent]
) -> None:
    root.rename(root.with_name("old"))
    root.write_bytes(b"no folder")
    await looked(clock, lambda: store._folders.why)
    for _ in range(5):
        await looked(clock, lambda: True)
    root.unlink()
    await looked(clock, lambda: not store._folders.why)
    await kept(store)
    about_folders = [line for line in texts(events, LogLevel.error) if line.startswith("the store cannot be written")]
    assert about_folders == [
        f"the store cannot be written, nothing new is kept in it: {root / 'blobs'}: Not a directory"
    ]
    assert f"the store can be written again: {root}" in texts(events, LogLevel.warn)
    assert sum(line.startswith("cannot scan the store") for line in texts(events, LogLevel.error)) <= 1
    assert sum(line.startswith("cannot read the free disk") for line in texts(events, LogLevel.error)) <= 1


@pytest.mark.parametrize("lose", LOSSES)
@on_reactor
async def test_download_into_a_lost_partial_ends(store: Store, root: Path, lose: Callable[[Path], None]) -> None:
    partial = await store.new_partial(LAYER, len(DATA), NGINX.repository)
    await partial.append(DATA[:10])
    lose(root)
    with pytest.raises(FileReplaced):
        await partial.append(DATA[10:20])
    await partial.discard()
    partial.close()


@on_reactor
async def test_another_file_in_the_place_of_a_partial_is_neither_committed_nor_removed(
    store: Store, root: Path
) -> None:
    """In a store that was replaced by a copy, another download of the same blob may have that name."""
    partial = await store.new_partial(LAYER, len(DATA), NGINX.repository)
    await partial.append(DATA)
    await partial.verify()
    path = root / "pulls" / "0" / LAYER.hex
    path.unlink()
    path.write_bytes(b"x" * len(DATA))
    with pytest.raises(FileReplaced):
        await store.commit(partial)
    await partial.discard()
    partial.close()
    assert path.read_bytes() == b"x" * len(DATA)
    assert not (root / "blobs" / LAYER.hex).exists()


def test_lock_that_was_removed_while_it_was_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    removals = [path, path]
    really_lock = files.lock

    def lock(path: Path) -> int | None:
        held = really_lock(path)
        if removals:
            removals.pop().unlink()
        return held

    monkeypatch.setattr(files, "lock", lock)
    with locked(path):
        assert really_lock(path, wait=False) is None


@on_reactor
async def test_removed_blob_is_told(store: Store, root: Path, clock: Clock) -> None:
    """The store then closes the file, so that answers which hold it are out of date."""
    await kept(store)
    await looked(clock, lambda: store._refresh._blobs._names)
    gone: list[Digest] = []
    store._refresh.on_blobs_gone = gone.extend
    (root / "blobs" / LAYER.hex).unlink()
    await looked(clock, lambda: gone)
    assert gone == [LAYER]
