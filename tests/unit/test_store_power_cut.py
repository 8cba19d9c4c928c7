"""Power cuts and kills at every file operation of writing blobs and records.

Each scenario runs once for each of its file operations and ends there. On every state that the disk may then have, a
store is started under another boot id: it serves nothing wrong, has lost nothing that was committed, and resumes the
download from what was durable. After a kill, no written byte is lost.
"""

from __future__ import annotations

import hashlib
import shutil
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from twisted.internet.task import Clock

import ociregistry.store.partials
import ociregistry.store.store
from ociregistry.names import Digest, ImageReference
from ociregistry.store.partials import DigestMismatch, Partial
from ociregistry.store.store import Store
from tests.lossy import Disk, LossyFiles
from tests.unit.support.common import REACTOR
from tests.unit.support.power_cuts import (
    BLOB,
    CHECKPOINT,
    DIGEST,
    MANIFESTS,
    NOW,
    REPOSITORY,
    SCENARIOS,
    Expected,
    InlineThreads,
    later,
    result,
)

SLICE = 70
AFTER = "after"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use blobs of a thousand bytes instead of gigabytes, and run thread functions inline."""
    monkeypatch.setattr(ociregistry.store.partials, "_SYNC_BYTES", CHECKPOINT)
    monkeypatch.setattr(ociregistry.store.partials, "_SLICE", SLICE)
    monkeypatch.setattr(ociregistry.store.store, "Threads", InlineThreads)


@pytest.mark.parametrize("name", SCENARIOS)
def test_power_cut_at_every_operation(name: str, tmp_path: Path) -> None:
    scenario = SCENARIOS[name]
    whole = scenario.run(emptied(tmp_path), None)
    assert not whole.files.off
    operations = [*whole.files.operations, "nothing"]
    assert len(operations) > 5
    checked: set[tuple[Disk, str]] = set()
    for number, operation in enumerate(operations):
        machine = scenario.run(emptied(tmp_path), number)
        assert machine.files.operations == operations[:number]
        expected, killed = machine.expected, machine.files.left_by_kill()
        cases = [(disk, AFTER, expected.durable) for disk in machine.files.left_by_power_cut()]
        cases.append((killed, NOW, expected.written))
        assert (killed, AFTER, expected.durable) in cases
        for disk, boot, lengths in cases:
            # States that were checked before are skipped.
            case = disk, f"{boot} {sorted(lengths)} {expected.spoiled} {expected.blobs} {expected.tags}"
            if case not in checked:
                check_disk(disk, boot, expected, lengths, emptied(tmp_path), operation)
                checked.add(case)
    assert len(checked) > len(operations)


def check_disk(disk: Disk, boot: str, expected: Expected, lengths: set[int], folder: Path, instead_of: str) -> None:
    """Start a store on `disk` and check `expected`; `lengths` are the possible lengths of the partial."""
    disk.write(folder)
    store = Store(folder, Clock(), REACTOR, LossyFiles(folder, boot), later)
    try:
        store.startService()
        check_records(store, expected)
        check_blobs(store, folder, expected, lengths)
        store.stopService()
    except Exception as error:
        raise AssertionError(f"cut in place of “{instead_of}”, on disk {disk}: {error}") from error


def emptied(folder: Path) -> Path:
    """Return an emptied folder; removing thousands of them would take long."""
    shutil.rmtree(folder)
    folder.mkdir()
    return folder


def check_records(store: Store, expected: Expected) -> None:
    """Check that every tag has one of its possible meanings and every manifest is right."""
    for image, allowed in expected.tags.items():
        found = result(store.manifest(image))
        digest = found.digest if found is not None else None
        assert digest in allowed, f"{image} means {digest}"
    assert {ImageReference(REPOSITORY, tag) for tag in store.tags(REPOSITORY)} <= expected.tags.keys()
    for digest, manifest in MANIFESTS.items():
        found = result(store.manifest(ImageReference(REPOSITORY, digest)))
        assert found in (None, manifest)


def check_blobs(store: Store, root: Path, expected: Expected, lengths: set[int]) -> None:
    """Check that the blobs are right and that the missing one can be completed from what is there."""
    assert all(read_blob(store, blob) == blob for blob in expected.blobs)
    found = read_blob(store, BLOB)
    assert found in (None, BLOB)
    with ExitStack() as stack:
        partial = result(store.old_partial(DIGEST))
        if partial is not None:
            stack.callback(partial.close)
        if found is None:
            length = partial.length if partial is not None else 0
            assert length in lengths, f"the partial has {length} bytes"
            complete(store, partial, expected, stack)
            assert read_blob(store, BLOB) == BLOB
        else:
            assert partial is None
    for path in (root / "blobs").iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    left = {str(path.relative_to(root)) for path in (root / "pulls").rglob("*") if path.is_file()}
    assert {path for path in left if not path.endswith("/lock") and "/bad/" not in path} == set()


def read_blob(store: Store, blob: bytes) -> bytes | None:
    """Return the bytes that the store serves as this blob."""
    opened = result(store.blob(Digest.of(blob)))
    if opened is None:
        return None
    with closing(opened):
        return result(opened.read(0, opened.size + 1))


def complete(store: Store, partial: Partial | None, expected: Expected, stack: ExitStack) -> None:
    """Download the missing part; if wrong bytes are expected, restart once."""
    if partial is not None and partial.length:
        with closing(partial.reader()) as reader:
            here = result(reader.read(0, partial.length + 1))
        assert len(here) == partial.length
        if not BLOB.startswith(here):
            assert expected.spoiled, "the partial has wrong bytes"
            result(partial.append(BLOB[partial.length :]))
            with pytest.raises(DigestMismatch):
                result(partial.verify())
            result(partial.discard())
            partial = None
    if partial is None:
        partial = result(store.new_partial(DIGEST, len(BLOB), REPOSITORY))
        stack.callback(partial.close)
    assert partial.size == len(BLOB)
    result(partial.append(BLOB[partial.length :]))
    result(partial.verify())
    result(store.commit(partial))
