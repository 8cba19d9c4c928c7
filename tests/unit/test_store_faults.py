"""Why a store does not work as it should: told while it lasts, and no longer."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from twisted.internet.task import Clock

import ociregistry.store.blobs
from ociregistry.config.values import USUAL_RESERVE, Reserve
from ociregistry.names import Digest
from ociregistry.store.files import SharedFile
from ociregistry.store.store import Store
from ociregistry.store.verify import Damaged, DamagedOutcome
from tests.images import make_image
from tests.unit.support.common import image, manifest, on_reactor, record
from tests.unit.support.stores import keep_pulled, looked

BUILT = make_image("faults")
IMAGE = manifest(BUILT)
NGINX = image("docker.io/library/nginx:1")
DATA = BUILT.layers[0].data
LAYER = Digest(BUILT.layers[0].digest)


async def fetched(store: Store) -> None:
    """Keep the image, and its layer as a download does."""
    await keep_pulled(store, IMAGE, NGINX, DATA)


async def told(store: Store, clock: Clock, *sentences: str) -> None:
    """Let the store look at its files until it tells these faults."""
    await looked(clock, lambda: store.faults.sentences == list(sentences))


@on_reactor
async def test_damaged_record_is_told_until_it_is_mended(store: Store, root: Path, clock: Clock) -> None:
    await fetched(store)
    await told(store, clock)
    path = record(root, IMAGE.digest)
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    (root / "img" / ("0" * 64)).write_bytes(b"{}")
    await told(store, clock, f"1 record is damaged or unreadable: {path.name}")
    other = root / "img" / ("1" * 64)
    other.mkdir()
    await told(store, clock, f"2 records are damaged or unreadable: {min(path.name, other.name)}, …")
    other.rmdir()
    await told(store, clock, f"1 record is damaged or unreadable: {path.name}")
    # A pull brings it again.
    await store.keep(IMAGE, NGINX)
    await told(store, clock)


@on_reactor
async def test_foreign_file_among_the_records_is_no_fault(store: Store, root: Path, clock: Clock) -> None:
    (root / "img" / ("0" * 64)).write_bytes(b"{}")
    await looked(clock, lambda: store._refresh._unreadable)
    assert store.faults.sentences == []


@pytest.mark.parametrize("mend", ["fetched", "removed"])
@on_reactor
async def test_unreadable_blob_is_told_until_it_is_mended(
    store: Store, root: Path, clock: Clock, mend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fetched(store)
    await looked(clock, lambda: store._refresh._blobs._names)

    def fail(path: Path) -> SharedFile:
        raise OSError(5, os.strerror(5))

    with monkeypatch.context() as patch:
        patch.setattr(ociregistry.store.blobs, "open_regular", fail)
        assert await store.blob(LAYER) is None
    await told(store, clock, f"1 blob is unreadable: {LAYER.hex}")
    if mend == "fetched":
        await fetched(store)
    else:
        (root / "blobs" / LAYER.hex).unlink()
    await told(store, clock)


@pytest.mark.parametrize("is_blob", [True, False])
@on_reactor
async def test_damage_that_could_not_be_mended(store: Store, root: Path, clock: Clock, is_blob: bool) -> None:
    await fetched(store)
    path = root / "blobs" / LAYER.hex if is_blob else record(root, IMAGE.digest)
    path.unlink()
    if not is_blob:
        await looked(clock, lambda: store.counts.images == 0)
    store.faults.note_lost(Damaged(path, LAYER if is_blob else IMAGE.digest, "its bytes are wrong"))
    kind = "blob" if is_blob else "record"
    await told(store, clock, f"1 {kind} is damaged and could not be fetched again: {path.name}")
    await fetched(store)
    await told(store, clock)


@on_reactor
async def test_damaged_file_in_place_counts_until_the_next_verification(
    store: Store, root: Path, clock: Clock
) -> None:
    await fetched(store)
    path = root / "blobs" / LAYER.hex
    store.faults.note_lost(Damaged(path, LAYER, "its bytes are wrong", outcome=DamagedOutcome.IN_PLACE))
    blob = await store.blob(LAYER)
    assert blob is not None
    blob.close()
    await told(store, clock, f"1 file is damaged, and cannot be moved to bad/: {LAYER.hex}")
    store.faults.forget_lost()
    await told(store, clock)


@on_reactor
async def test_full_disk(store: Store, clock: Clock) -> None:
    store.reconfigure(Reserve(1.0, 1 << 62))
    await told(store, clock, "the disk is full: 0 B are free beside the reserve, so no larger download fits")
    store.reconfigure(USUAL_RESERVE)
    await told(store, clock)


@on_reactor
async def test_download_that_does_not_fit(store: Store, clock: Clock) -> None:
    """A disk is not full as long as smaller ones fit, but what does not fit will never be here."""
    assert not store.faults.has_no_room
    with pytest.raises(OSError, match="has no room"):
        await store.check_room(1 << 62)
    (sentence,) = store.faults.sentences
    assert re.fullmatch(
        r"the disk has no room for a download of [\d.]+ .B: [\d.]+ .B are free beside the reserve", sentence
    )
    assert store.faults.has_no_room
    clock.advance(300)
    await told(store, clock)
    assert not store.faults.has_no_room


@pytest.mark.parametrize("part", ["_folders", "_refresh", "_space"])
def test_what_the_parts_cannot_do(store: Store, part: str) -> None:
    getattr(store, part).why = "/store/\udcff: why"
    (sentence,) = store.faults.sentences
    assert sentence.endswith(r": /store/\udcff: why"), "a path that is not UTF-8"
    getattr(store, part).why = ""
    assert store.faults.sentences == []
