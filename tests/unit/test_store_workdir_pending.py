"""Pending images: small files that survive restarts and power cuts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from twisted.internet.task import Clock

from ociregistry.names import Digest, Repository, Upstream
from ociregistry.store.files import Files
from ociregistry.store.store import Store
from ociregistry.store.workdir import PendingFiles, PendingImage
from tests.lossy import LossyFiles, PowerCut
from tests.unit.support.common import REACTOR, image, on_reactor

IMAGE, OTHER = Digest.of(b"an image"), Digest.of(b"another")
APP, HUB = image("reg.example:5000/team/app:1").repository, image("docker.io/nginx:1").repository
GOOD = {"upstream": "reg.example:5000", "repository": "team/app"}


def put(root: Path, number: int, name: str, data: bytes = json.dumps(GOOD).encode()) -> Path:
    """Write a file into the folder of a process."""
    path = root / "pulls" / str(number) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def found(root: Path) -> set[str]:
    """Return the files below pulls/ except locks."""
    pulls = root / "pulls"
    return {str(path.relative_to(pulls)) for path in pulls.rglob("*") if path.is_file() and path.name != "lock"}


def test_pending_images_are_written_read_and_removed(tmp_path: Path) -> None:
    pending = PendingFiles(tmp_path, Files())
    assert list(pending.read()) == []
    pending.write(PendingImage(IMAGE, APP))
    pending.write(PendingImage(OTHER, HUB))
    assert {path.name for path in tmp_path.iterdir()} == {f"{IMAGE.hex}.wish", f"{OTHER.hex}.wish"}
    assert json.loads((tmp_path / f"{IMAGE.hex}.wish").read_bytes()) == GOOD
    assert {pending.image: pending.repository for pending in pending.read()} == {IMAGE: APP, OTHER: HUB}
    pending.write(PendingImage(IMAGE, HUB))
    pending.remove(OTHER)
    pending.remove(OTHER)
    assert list(PendingFiles(tmp_path, Files()).read()) == [PendingImage(IMAGE, HUB)]


@on_reactor
async def test_pending_images_survive_a_restart(root: Path, open_store: Callable[[], Store]) -> None:
    before = Store(root, Clock(), REACTOR)
    before.startService()
    await before.add_pending(IMAGE, APP)
    await before.add_pending(OTHER, HUB)
    await before.remove_pending(OTHER)
    assert before.pending == {IMAGE: APP}
    before.stopService()
    assert found(root) == {f"0/{IMAGE.hex}.wish"}
    store = open_store()
    assert store.pending == {IMAGE: APP}
    await store.remove_pending(IMAGE)
    assert (store.pending, found(root)) == ({}, set())


@on_reactor
async def test_pending_image_is_written_once(store: Store, root: Path) -> None:
    await store.add_pending(IMAGE, APP)
    path = root / "pulls" / "0" / f"{IMAGE.hex}.wish"
    before = path.stat().st_ino
    await store.add_pending(IMAGE, HUB)
    assert (store.pending, path.stat().st_ino) == ({IMAGE: APP}, before)


@on_reactor
async def test_pending_images_of_a_running_process_are_not_adopted(
    store: Store, open_store: Callable[[], Store]
) -> None:
    await store.add_pending(IMAGE, APP)
    assert open_store().pending == {}
    assert store.pending == {IMAGE: APP}


def test_pending_images_of_a_stopped_process_are_adopted(root: Path, open_store: Callable[[], Store]) -> None:
    put(root, 0, f"{OTHER.hex}.wish", b'{"upstream": "docker.io", "repository": "library/nginx"}')
    put(root, 3, f"{IMAGE.hex}.wish")
    put(root, 7, f"{IMAGE.hex}.wish")
    assert open_store().pending == {IMAGE: APP, OTHER: HUB}
    assert found(root) == {f"0/{IMAGE.hex}.wish", f"0/{OTHER.hex}.wish"}


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\xff", b"{", b"[]", b"5", b"null", b"{}", b"[" * 100_000, b"\0" * 70),
        json.dumps({"upstream": "reg.example"}).encode(),
        json.dumps({**GOOD, "upstream": 5}).encode(),
        json.dumps({**GOOD, "repository": None}).encode(),
        json.dumps({**GOOD, "repository": ["team/app"]}).encode(),
        json.dumps({**GOOD, "repository": "../../etc"}).encode(),
        json.dumps({**GOOD, "upstream": "http://reg.example"}).encode(),
    ],
)
def test_damaged_file_is_removed(root: Path, open_store: Callable[[], Store], data: bytes) -> None:
    put(root, 0, f"{IMAGE.hex}.wish", data)
    put(root, 5, f"{OTHER.hex}.wish")
    assert open_store().pending == {OTHER: APP}
    assert found(root) == {f"0/{OTHER.hex}.wish"}


@pytest.mark.parametrize(
    "name", ["x.wish", ".wish", f"{IMAGE.hex}.wish.wish", f"{IMAGE.hex[1:]}.wish", f"{IMAGE.hex.upper()}.wish"]
)
@pytest.mark.parametrize("number", [0, 5])
def test_foreign_file_is_removed(root: Path, open_store: Callable[[], Store], name: str, number: int) -> None:
    put(root, number, name)
    assert open_store().pending == {}
    assert found(root) == set()


@pytest.mark.parametrize("number", [0, 5])
def test_unfinished_file_is_removed(root: Path, open_store: Callable[[], Store], number: int) -> None:
    put(root, number, f"{IMAGE.hex}.new")
    assert open_store().pending == {}
    assert found(root) == set()


def test_unreadable_file_does_not_hide_others(tmp_path: Path) -> None:
    pending = PendingFiles(tmp_path, Files())
    pending.write(PendingImage(IMAGE, APP))
    (tmp_path / f"{OTHER.hex}.wish").mkdir()
    assert {pending.image: pending.repository for pending in pending.read()} == {IMAGE: APP}


@pytest.mark.parametrize("before", [None, HUB])
def test_power_cut_at_every_operation(tmp_path: Path, before: Repository | None) -> None:
    """The old file remains until the new one is complete; after the write the new one is durable."""
    number, done = 0, False
    while not done:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        if before is not None:
            PendingFiles(tmp_path, Files()).write(PendingImage(IMAGE, before))
        files = LossyFiles(tmp_path, "now", number)
        with suppress(PowerCut):
            PendingFiles(tmp_path, files).write(PendingImage(IMAGE, APP))
            done = True
        for disk in files.left_by_power_cut() | {files.left_by_kill()}:
            folder = tmp_path / "after"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            disk.write(folder)
            read = {one.image: one.repository for one in PendingFiles(folder, Files()).read()}.get(IMAGE)
            assert read == APP if done else read in (before, APP), f"operation {number}"
        number += 1
    assert number > 4


def test_repository_on_any_host_round_trips(tmp_path: Path) -> None:
    pending = PendingFiles(tmp_path, Files())
    for host in ("docker.io", "localhost", "10.0.0.1:5000", "[::1]:5000"):
        repository = Repository.at(Upstream.parse(host), "a/b/c")
        pending.write(PendingImage(IMAGE, repository))
        assert {pending.image: pending.repository for pending in pending.read()} == {IMAGE: repository}
