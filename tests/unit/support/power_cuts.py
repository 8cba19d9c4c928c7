"""Scenarios on a simulated disk whose power is cut at a given file operation."""

from __future__ import annotations

import itertools
import json
import os
import random
import tempfile
from collections.abc import Callable, Coroutine, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import pytest
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from ociregistry.manifests import OCI_INDEX, OCI_MANIFEST, Manifest
from ociregistry.names import Digest, ImageReference, Repository, Tag, Upstream
from ociregistry.store.files import SharedFile
from ociregistry.store.partials import DigestMismatch, Partial
from ociregistry.store.store import Store
from tests.lossy import Disk, LossyFiles, PowerCut
from tests.unit.support.common import REACTOR

P = ParamSpec("P")
T = TypeVar("T")

CHECKPOINT = 300
PIECE = 130
"""Bytes; three pieces make a checkpoint."""
REPOSITORY = Repository(Upstream("registry.example"), "power")
BLOB = random.Random("blob").randbytes(1001).replace(b"\0", b"\1")
"""Without zeros, which lost bytes read as."""
DIGEST = Digest.of(BLOB)
NOW = "now"
"""The boot id of the machine before the power cut."""
EARLIER = b"a blob that was there before"


class InlineThreads:
    """Replaces the store's threads; runs functions inline."""

    def __init__(self, reactor: object, clock: object) -> None:
        pass

    def start(self) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""

    def close(self, descriptor: int) -> None:
        """Close a file."""
        os.close(descriptor)

    def read(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        """Run `function` and return its result as a Deferred."""
        try:
            return succeed(function(*args, **kwargs))
        except Exception:
            return fail()

    write = write_in_turn = read

    def read_file(self, path: Path, function: Callable[[], T], **how: object) -> Deferred[T]:
        """Run `function` and return its result as a Deferred."""
        return self.read(function)

    def read_at(self, file: SharedFile, path: Path, offset: int, count: int) -> Deferred[bytes]:
        """Read the bytes and return them as a Deferred."""
        return self.read(os.pread, file.fileno(), count, offset)


def result(work: Deferred[T] | Coroutine[Deferred[Any], Any, T]) -> T:
    """Return what `work` returns or raises; it must not wait."""
    results: list[T | Failure] = []
    (work if isinstance(work, Deferred) else Deferred.fromCoroutine(work)).addBoth(results.append)
    (only,) = results
    if isinstance(only, Failure):
        only.raiseException()
    return only


_minutes = itertools.count()


def later() -> datetime:
    """Return a time one minute after the last one."""
    return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=next(_minutes))


def tagged(tag: str) -> ImageReference:
    """Return the reference with this tag."""
    return ImageReference(REPOSITORY, Tag(tag))


def _image(*blobs: bytes) -> Manifest:
    described = [{"mediaType": "x", "digest": Digest.of(blob), "size": len(blob)} for blob in blobs]
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": described[0], "layers": described[1:]}
    return Manifest.parse(json.dumps(document).encode(), OCI_MANIFEST)


IMAGE = _image(EARLIER, BLOB)
OTHER_IMAGE = _image(EARLIER)
INDEX = Manifest.parse(b'{"schemaVersion": 2, "manifests": []}', OCI_INDEX)
MANIFESTS = {manifest.digest: manifest for manifest in (IMAGE, OTHER_IMAGE, INDEX)}


@dataclass
class Expected:
    """What must hold after a power cut now."""

    durable: set[int]
    """Possible lengths of the partial after a power cut; without 0, it must exist."""
    written: set[int]
    """Possible lengths of the partial after a kill."""
    spoiled: bool = False
    """Whether the partial may contain wrong bytes."""
    blobs: set[bytes] = field(default_factory=set)
    """Blobs that must be complete."""
    tags: dict[ImageReference, set[Digest | None]] = field(default_factory=dict)
    """Possible meanings of each tag; None if it may be absent."""


class Machine:
    """A store on a simulated disk, and what must hold now."""

    def __init__(self, folder: Path, files: LossyFiles, expected: Expected) -> None:
        self.expected = expected
        self.files = files
        self.store = Store(folder, Clock(), REACTOR, files, later)

    def keep(self, manifest: Manifest, tag: str) -> None:
        """Write a record."""
        self.expected.tags.setdefault(tagged(tag), {None}).add(manifest.digest)
        result(self.store.keep(manifest, tagged(tag)))
        self.expected.tags[tagged(tag)] = {manifest.digest}

    def begin(self) -> Partial:
        """Start a new partial."""
        partial = result(self.store.new_partial(DIGEST, len(BLOB), REPOSITORY))
        # A discarded partial may reappear: its removal is not synced.
        self.expected.durable.add(0)
        self.expected.written = {0}
        return partial

    def resume(self) -> Partial:
        """Open the partial that was left."""
        partial = result(self.store.old_partial(DIGEST))
        assert partial is not None
        self.expected.written = {partial.length}
        return partial

    def append(self, partial: Partial, data: bytes) -> None:
        """Append in pieces, with checkpoints."""
        expected, clock = self.expected, Clock()
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            expected.written = {partial.length, partial.length + len(piece)}
            result(partial.append(piece))
            expected.written = {partial.length}
            before, done = expected.durable, len(self.files.operations)
            expected.durable = {*before, partial.length}
            clock.advance(1)
            partial.checkpoint(clock)
            # An unexpected failure is not reported otherwise.
            if self.files.off:
                raise PowerCut("in a checkpoint")
            expected.durable = before
            if len(self.files.operations) > done:
                expected.durable, expected.spoiled = {partial.length}, False

    def commit(self, partial: Partial) -> None:
        """Commit the partial as a blob."""
        result(partial.verify())
        result(self.store.commit(partial))
        self.expected.blobs.add(BLOB)


# Scenarios


def commit_a_blob(machine: Machine) -> None:
    """Download a blob from the start."""
    with closing(machine.begin()) as partial:
        machine.append(partial, BLOB)
        machine.commit(partial)


def commit_a_resumed_blob(machine: Machine) -> None:
    """Resume a partial."""
    with closing(machine.resume()) as partial:
        machine.append(partial, BLOB[partial.length :])
        machine.commit(partial)


def replace_a_spoiled_partial(machine: Machine) -> None:
    """Discard a partial with wrong bytes and download the blob again."""
    with closing(machine.resume()) as partial:
        machine.expected.durable.add(0)
        machine.expected.written = {0, partial.length, len(BLOB)}
        result(partial.append(BLOB[partial.length :]))
        with pytest.raises(DigestMismatch):
            result(partial.verify())
        result(partial.discard())
    commit_a_blob(machine)


def commit_a_small_blob(machine: Machine) -> None:
    """Download a blob in memory."""
    partial = machine.store.small_partial(DIGEST, len(BLOB), REPOSITORY)
    result(partial.append(BLOB))
    result(partial.verify())
    result(machine.store.commit(partial))
    machine.expected.blobs.add(BLOB)


def leave_a_small_blob(machine: Machine) -> None:
    """End such a download before the blob is whole."""
    partial, expected = machine.store.small_partial(DIGEST, len(BLOB), REPOSITORY), machine.expected
    result(partial.append(BLOB[:300]))
    expected.durable = expected.written = {0, 300}
    result(partial.sync())
    expected.durable = expected.written = {300}


def write_a_record(machine: Machine) -> None:
    """Write a new record."""
    machine.keep(OTHER_IMAGE, "new")


def write_the_record_of_a_list(machine: Machine) -> None:
    """Write the record of an index, which has another folder than images."""
    machine.keep(INDEX, "new")


def rewrite_a_record(machine: Machine) -> None:
    """Add a tag to a record and confirm the existing one."""
    machine.keep(IMAGE, "new")
    machine.keep(IMAGE, "v1")


def move_a_tag(machine: Machine) -> None:
    """Move a tag to another record, to one of another kind, and back."""
    for manifest in (OTHER_IMAGE, INDEX, IMAGE):
        machine.keep(manifest, "v1")


def fill_an_empty_store(machine: Machine) -> None:
    """Create all folders."""
    machine.keep(IMAGE, "v1")
    machine.keep(INDEX, "new")
    commit_a_blob(machine)


@dataclass(frozen=True)
class Scenario:
    """The operations, and the content before them besides an image and one of its blobs."""

    act: Callable[[Machine], None]
    left: Mapping[str, bytes] = field(default_factory=dict)
    durable: int = 0
    spoiled: bool = False
    empty: bool = False
    """Whether that image and blob are absent, too."""

    @classmethod
    def resuming(cls, act: Callable[[Machine], None], folder: str, data: bytes, *, spoiled: bool = False) -> Scenario:
        """Return a scenario with durable `data`, followed by 200 bytes that have not reached the disk."""
        note = {"durable": len(data), "boot": "before", "size": len(BLOB), "source": str(REPOSITORY)}
        path = f"pulls/{folder}/{DIGEST.hex}"
        left = {path: data + bytes(200), f"{path}.note": json.dumps(note).encode()}
        return cls(act, left, len(data), spoiled)

    def before(self) -> Disk:
        """Return the disk at the start."""
        return Disk(frozenset()) if self.empty else _disk_with_an_image().having(self.left)

    def run(self, folder: Path, cut_at: int | None) -> Machine:
        """Run the operations in `folder` until the power is cut instead of operation `cut_at`."""
        self.before().write(folder)
        expected = Expected({self.durable}, {self.durable}, self.spoiled)
        if not self.empty:
            expected.tags[tagged("v1")] = {IMAGE.digest}
            expected.blobs.add(EARLIER)
        machine = Machine(folder, LossyFiles(folder, NOW, cut_at), expected)
        with suppress(PowerCut):
            machine.store.startService()
            try:
                self.act(machine)
            finally:
                machine.store.stopService()
        return machine


@cache
def _disk_with_an_image() -> Disk:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder), Clock(), REACTOR, now=later)
        store.startService()
        result(store.keep(IMAGE, tagged("v1")))
        with closing(result(store.new_partial(Digest.of(EARLIER), len(EARLIER), REPOSITORY))) as partial:
            result(partial.append(EARLIER))
            result(partial.verify())
            result(store.commit(partial))
        store.stopService()
        # The simulated disk has no folders without files.
        return Disk.of(Path(folder)).having({"fat/.stfolder": b""})


_LEFTOVERS = {f"pulls/0/{DIGEST.hex}.note": b"", "pulls/0/x.record": b"{"}

SCENARIOS = {
    "blob": Scenario(commit_a_blob),
    "blob_among_leftovers": Scenario(commit_a_blob, _LEFTOVERS),
    "small_blob": Scenario(commit_a_small_blob),
    "small_blob_among_leftovers": Scenario(commit_a_small_blob, _LEFTOVERS | {f"pulls/0/{DIGEST.hex}.blob": b"{"}),
    "left_small_blob": Scenario(leave_a_small_blob),
    "resumed_blob": Scenario.resuming(commit_a_resumed_blob, "0", BLOB[:250]),
    "adopted_blob": Scenario.resuming(commit_a_resumed_blob, "7", BLOB[:250]),
    "spoiled_blob": Scenario.resuming(replace_a_spoiled_partial, "0", bytes(250), spoiled=True),
    "record": Scenario(write_a_record),
    "record_of_a_list": Scenario(write_the_record_of_a_list),
    "rewritten_record": Scenario(rewrite_a_record),
    "damaged_record": Scenario(write_a_record, {f"img/{OTHER_IMAGE.digest.hex}": bytes(300)}),
    "moved_tag": Scenario(move_a_tag),
    "empty_store": Scenario(fill_an_empty_store, empty=True),
}
