"""Stores filled before the test begins, as other processes would fill them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from twisted.internet.task import Clock

from ociregistry.manifests import OCI_INDEX, OCI_MANIFEST, Manifest
from ociregistry.names import Digest, ImageReference, Repository, Upstream, parse_reference
from ociregistry.store.files import Files, SharedFile
from ociregistry.store.paths import record_path
from ociregistry.store.prune import Choose, Criteria, Plan, planned, prune
from ociregistry.store.records import Dates, Record, read_record
from ociregistry.store.snapshot import Snapshot, StoredRecord
from ociregistry.store.store import Store
from tests.procfs import descriptors
from tests.unit.support.common import until

HOST = Upstream("reg.example")


def day(number: float) -> datetime:
    """Return a day of 2026, from 0 for January 1."""
    return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=number)


def image_of(*blobs: bytes) -> Manifest:
    """Return an image manifest of a config and layers."""
    described = [{"mediaType": "x", "digest": Digest.of(blob), "size": len(blob)} for blob in blobs]
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": described[0], "layers": described[1:]}
    return Manifest.parse(json.dumps(document).encode(), OCI_MANIFEST)


def list_of(*children: Manifest, seed: str = "") -> Manifest:
    """Return an index of images or indexes; `seed` makes it a different one."""
    described = [{"mediaType": one.media_type, "digest": one.digest, "size": one.size} for one in children]
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": described, "annotations": {"seed": seed}}
    return Manifest.parse(json.dumps(document).encode(), OCI_INDEX)


def url_of(short: str, manifest: Manifest | None = None) -> str:
    """Return the image URL for `a:1`, or for `a@` the one by the digest of `manifest`."""
    name, at, _ = short.partition("@")
    if at:
        assert manifest is not None
        reference = manifest.digest
        return str(ImageReference(Repository(HOST, name), reference))
    name, _, tag = short.partition(":")
    return str(ImageReference(Repository(HOST, name), parse_reference(tag)))


def named(*shorts: str) -> Callable[[str], bool]:
    """Return a predicate for these image URLs, or those of these repositories."""
    wanted = [f"{HOST}/{short}" for short in shorts]
    return lambda url: any(url == one or url.startswith((f"{one}:", f"{one}@")) for one in wanted)


def by_name(*shorts: str) -> Criteria:
    """Return a selection of these image URLs or repositories."""
    return Criteria(matches=named(*shorts))


class Unsynced(Files):
    """Files without waiting for the disk."""

    def sync_data(self, file: SharedFile) -> None:
        """Do nothing."""

    def sync(self, file: SharedFile) -> None:
        """Do nothing."""

    def sync_folder(self, folder: Path) -> None:
        """Only check that the folder exists."""
        assert folder.is_dir()


@dataclass(frozen=True)
class StoreDir:
    """The folder of a store, with its files."""

    root: Path

    def __post_init__(self) -> None:
        for folder in ("blobs", "fat", "img", "pulls"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)

    def put(
        self,
        manifest: Manifest,
        *shorts: str,
        created: datetime | None = None,
        confirmed: datetime | None = None,
        pulled: datetime | None = None,
        wanted: bool | None = None,
    ) -> Manifest:
        """Add these names to the record of `manifest`, and set its last pull and `wanted`."""
        path = self.path(manifest)
        record = read_record(path) if path.exists() else Record(manifest, {})
        dates = Dates(created or confirmed or day(0), confirmed or created or day(0))
        images = {**record.images, **{url_of(short, manifest): dates for short in shorts}}
        path.write_bytes(Record(manifest, images, record.wanted if wanted is None else wanted).render())
        at = (pulled or day(0)).timestamp()
        os.utime(path, (at, at))
        return manifest

    def blobs(self, *blobs: bytes) -> None:
        """Write complete blobs."""
        for blob in blobs:
            self.blob(blob).write_bytes(blob)

    def image(self, blobs: Collection[bytes], *shorts: str, **how: Any) -> Manifest:
        """Add an image with all its blobs; `how` are arguments of `put`."""
        self.blobs(*blobs)
        return self.put(image_of(*blobs), *shorts, **how)

    def blob(self, data: bytes) -> Path:
        """Return the path of a blob."""
        return self.root / "blobs" / Digest.of(data).hex

    def path(self, manifest: Manifest) -> Path:
        """Return the path of a record."""
        return record_path(self.root, manifest.digest, is_list=manifest.is_list)

    def snapshot(self) -> Snapshot:
        """Return the snapshot."""
        return Snapshot.read(self.root)

    def prune(self, choose: Choose, files: Files | None = None) -> Plan:
        """Prune in a separate process; check that a dry run gives the same plan, and the bytes freed."""
        dry_run, before = planned(self.root, choose), self.sizes()
        plan = self.prune_only(choose, files)
        assert plan == dry_run
        after = self.sizes()
        assert sum(size for path, size in before.items() if path not in after) == plan.bytes
        return plan

    def sizes(self) -> dict[Path, int]:
        """Return the sizes in bytes of all record and blob files."""
        paths = (path for folder in ("blobs", "fat", "img") for path in (self.root / folder).iterdir())
        return {path: path.stat().st_size for path in paths}

    def prune_only(self, choose: Choose, files: Files | None = None) -> Plan:
        """Prune in a separate process."""
        return prune(self.root, choose, files or Unsynced())

    def names(self, manifest: Manifest) -> set[str] | None:
        """Return the names in the record in short form; None if there is no record."""
        path = self.path(manifest)
        if not path.exists():
            return None
        urls = read_record(path).images
        return {url.removeprefix(f"{HOST}/").replace(f"@{manifest.digest}", "@") for url in urls}

    def has(self, *blobs: bytes) -> list[bool]:
        """Return for each blob whether it exists."""
        return [self.blob(blob).exists() for blob in blobs]

    def meaning(self, short: str) -> Digest | None:
        """Return the digest that a tag means: the one confirmed last."""
        url = url_of(short)
        claims = [
            (kept.record.images[url].confirmed, digest)
            for digest, kept in self.snapshot().records.items()
            if url in kept.record.images
        ]
        return max(claims)[1] if claims else None


def in_memory(root: Path, *records: tuple[Manifest, Iterable[str], datetime]) -> Snapshot:
    """Return a snapshot without files, of manifests with names and pull times."""
    snapshot = Snapshot(root)
    for manifest, shorts, pulled in records:
        stored = StoredRecord(
            Record(manifest, {url_of(short, manifest): Dates(day(0), day(0)) for short in shorts}, wanted=True),
            str(record_path(root, manifest.digest, is_list=manifest.is_list)),
            pulled,
            1000,
        )
        snapshot.put(stored)
    return snapshot


def calls_of(work: Callable[[], object]) -> int:
    """Return the number of function calls of `work`; unlike the duration, it does not depend on the machine."""
    count = 0

    def called(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(called)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


async def keep_pulled(store: Store, manifest: Manifest, image: ImageReference, layer: bytes) -> None:
    """Keep an image, and its `layer` as a download does."""
    await store.keep(manifest, image)
    partial = await store.new_partial(Digest.of(layer), len(layer), image.repository)
    try:
        await partial.append(layer)
        await partial.verify()
        await store.commit(partial)
    finally:
        partial.close()


def open_blobs(root: Path) -> list[str]:
    """Return the blobs that this process has open, also those that were deleted or renamed."""
    return [link for link in descriptors(os.getpid()) if link.startswith(f"{root}/blobs/")]


async def looked(clock: Clock, until_it: Callable[[], object]) -> None:
    """Let a store look at its files and folders until this holds."""
    advanced_at = float("-inf")

    def holds() -> object:
        nonlocal advanced_at
        # Not faster: to the store, a busy thread would have hung for seconds.
        if time.monotonic() - advanced_at >= 0.05:
            clock.advance(1)
            advanced_at = time.monotonic()
        return until_it()

    await until(holds)
