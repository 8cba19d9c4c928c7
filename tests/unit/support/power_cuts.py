"""What the power is cut in: scenarios that a store goes through on a machine, one file operation after the other."""

from __future__ import annotations

import itertools
import json
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
from ociregistry.store.partials import DigestMismatch, Partial
from ociregistry.store.store import Store
from tests.lossy import Disk, LossyFiles, PowerCut
from tests.unit.support.doubles import REACTOR

P = ParamSpec("P")
T = TypeVar("T")

CHECKPOINT = 300
PIECE = 130
"""Bytes; three of them make a checkpoint."""
REPOSITORY = Repository(Upstream("registry.example"), "power")
BLOB = random.Random("blob").randbytes(1001).replace(b"\0", b"\1")
"""Without a zero: that is what lost bytes look like."""
DIGEST = Digest.of(BLOB)
NOW = "now"
"""The boot id of the machine that the power is cut of."""
EARLIER = b"a blob that was there before"


class AtOnce:
    """In place of the store's threads: runs what is given to them where it is given."""

    def __init__(self, reactor: object) -> None:
        pass

    def start(self) -> None:
        """Nothing is to be started."""

    def stop(self) -> None:
        """Nothing is to be stopped."""

    def read(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        """Has run `function` when it returns."""
        try:
            return succeed(function(*args, **kwargs))
        except Exception:
            return fail()

    write = write_in_turn = read


def result(work: Deferred[T] | Coroutine[Deferred[Any], Any, T]) -> T:
    """What `work`, which nothing delays here, gives or raises."""
    results: list[T | Failure] = []
    (work if isinstance(work, Deferred) else Deferred.fromCoroutine(work)).addBoth(results.append)
    (only,) = results
    if isinstance(only, Failure):
        only.raiseException()
    return only


_minutes = itertools.count()


def later() -> datetime:
    """A minute after the last time that it gave."""
    return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=next(_minutes))


def tagged(tag: str) -> ImageReference:
    """The image with this tag."""
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
    """What must hold when the power is cut now."""

    durable: set[int]
    """How many bytes of the partial may be found after a power cut; where 0 is none of them it must be there."""
    written: set[int]
    """The same after a kill."""
    spoiled: bool = False
    """Whether the partial may have wrong bytes."""
    blobs: set[bytes] = field(default_factory=set)
    """Those that must be there."""
    tags: dict[ImageReference, set[Digest | None]] = field(default_factory=dict)
    """What each may mean; None for nothing."""


class Machine:
    """A store on the disk of a machine, and what must hold by now."""

    def __init__(self, folder: Path, files: LossyFiles, expected: Expected) -> None:
        self.expected = expected
        self.files = files
        self.store = Store(folder, Clock(), REACTOR, files, later)

    def keep(self, manifest: Manifest, tag: str) -> None:
        """Writes a record."""
        self.expected.tags.setdefault(tagged(tag), {None}).add(manifest.digest)
        result(self.store.keep(manifest, tagged(tag)))
        self.expected.tags[tagged(tag)] = {manifest.digest}

    def begin(self) -> Partial:
        """A new partial."""
        partial = result(self.store.new_partial(DIGEST, len(BLOB), REPOSITORY))
        # One that was thrown away before may come back: its name was removed, and nobody had to wait for that.
        self.expected.durable.add(0)
        self.expected.written = {0}
        return partial

    def resume(self) -> Partial:
        """The partial that was left."""
        partial = result(self.store.old_partial(DIGEST))
        assert partial is not None
        self.expected.written = {partial.length}
        return partial

    def append(self, partial: Partial, data: bytes) -> None:
        """Appends piece by piece, with checkpoints."""
        expected, clock = self.expected, Clock()
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            expected.written = {partial.length, partial.length + len(piece)}
            result(partial.append(piece))
            expected.written = {partial.length}
            before, done = expected.durable, len(self.files.operations)
            expected.durable = {*before, partial.length}
            partial.checkpoint(clock)
            # It never fails, so it does not tell.
            if self.files.off:
                raise PowerCut("in a checkpoint")
            expected.durable = before
            if len(self.files.operations) > done:
                expected.durable, expected.spoiled = {partial.length}, False

    def commit(self, partial: Partial) -> None:
        """Makes the partial a blob."""
        result(partial.verify())
        result(self.store.commit(partial))
        self.expected.blobs.add(BLOB)


# The scenarios


def commit_a_blob(machine: Machine) -> None:
    """From the first byte on."""
    with closing(machine.begin()) as partial:
        machine.append(partial, BLOB)
        machine.commit(partial)


def commit_a_resumed_blob(machine: Machine) -> None:
    """What was left is taken up."""
    with closing(machine.resume()) as partial:
        machine.append(partial, BLOB[partial.length :])
        machine.commit(partial)


def replace_a_spoiled_partial(machine: Machine) -> None:
    """What was left is wrong: it is thrown away, and the blob fetched anew."""
    with closing(machine.resume()) as partial:
        machine.expected.durable.add(0)
        machine.expected.written = {0, partial.length, len(BLOB)}
        result(partial.append(BLOB[partial.length :]))
        with pytest.raises(DigestMismatch):
            result(partial.verify())
        result(partial.discard())
    commit_a_blob(machine)


def write_a_record(machine: Machine) -> None:
    """It is new."""
    machine.keep(OTHER_IMAGE, "new")


def write_the_record_of_a_list(machine: Machine) -> None:
    """It is in another folder than those of images."""
    machine.keep(INDEX, "new")


def rewrite_a_record(machine: Machine) -> None:
    """It gets one more tag; the one that it has is confirmed."""
    machine.keep(IMAGE, "new")
    machine.keep(IMAGE, "v1")


def move_a_tag(machine: Machine) -> None:
    """From one record to another, to one of another kind, and back."""
    for manifest in (OTHER_IMAGE, INDEX, IMAGE):
        machine.keep(manifest, "v1")


def fill_an_empty_store(machine: Machine) -> None:
    """All its folders are new."""
    machine.keep(IMAGE, "v1")
    machine.keep(INDEX, "new")
    commit_a_blob(machine)


@dataclass(frozen=True)
class Scenario:
    """What is done, and what is in the store before, beside an image and one of its blobs."""

    act: Callable[[Machine], None]
    left: Mapping[str, bytes] = field(default_factory=dict)
    durable: int = 0
    spoiled: bool = False
    empty: bool = False
    """Whether the image and the blob are not there either."""

    @classmethod
    def resuming(cls, act: Callable[[Machine], None], folder: str, data: bytes, *, spoiled: bool = False) -> Scenario:
        """A scenario in which `data` was left durable; another 200 bytes have not got to the disk before."""
        note = {"durable": len(data), "boot": "before", "size": len(BLOB), "source": str(REPOSITORY)}
        path = f"pulls/{folder}/{DIGEST.hex}"
        left = {path: data + bytes(200), f"{path}.note": json.dumps(note).encode()}
        return cls(act, left, len(data), spoiled)

    def before(self) -> Disk:
        """The disk before."""
        return Disk(frozenset()) if self.empty else _disk_with_an_image().having(self.left)

    def run(self, folder: Path, cut_at: int | None) -> Machine:
        """Does it in `folder` until the power is cut in place of the operation `cut_at`."""
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
        # A disk knows no folders without files.
        return Disk.of(Path(folder)).having({"fat/.stfolder": b""})


_LEFTOVERS = {f"pulls/0/{DIGEST.hex}.note": b"", "pulls/0/x.record": b"{"}

SCENARIOS = {
    "blob": Scenario(commit_a_blob),
    "blob_among_leftovers": Scenario(commit_a_blob, _LEFTOVERS),
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
