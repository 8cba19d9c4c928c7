"""A store to export, and helpers to export it."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ociregistry.archives.exporting import Exported, export_images
from ociregistry.store.records import Dates
from ociregistry.store.snapshot import Snapshot
from tests.images import Image, Index, make_image, make_index
from tests.unit.support.archives import (
    NAME,
    hex_of,
    image_blobs,
    kept,
    write_folder,
)

IMAGE = make_image("export", layer_size=1_500_000)
UPPER = make_image("upper", layers=1, base=IMAGE)
INDEX = make_index("export")
DOCKER = make_image("docker", docker=True)
APP, UP = "quay.io/team/app:1", "registry/up:2"
DAY = datetime(2026, 1, 1, 12, 30, 0, 123456, tzinfo=UTC)
DATES = Dates(DAY, DAY + timedelta(days=1))
LATER = Dates(DAY + timedelta(hours=1), DAY + timedelta(days=2))
BLOBS = sorted(blob.digest for one in (INDEX.images[0], UPPER, IMAGE, DOCKER) for blob in one.blobs)


def store_with(root: Path, urls: Mapping[str, Dates], *images: Image | Index) -> Path:
    """Write these images into a store; the first one has the names, the others only digests."""
    for one in images:
        names = urls if one is images[0] else {f"docker.io/library/nginx@{one.manifest.digest}": DATES}
        folder = "fat" if isinstance(one, Index) else "img"
        blobs = {} if isinstance(one, Index) else image_blobs(one)
        write_folder(root, {f"{folder}/{hex_of(one.manifest.digest)}": kept(one, names), **blobs})
    return root


def export(source: Path, target: Path, pattern: str = "", **how: Any) -> Exported:
    """Export the rows whose image URL contains `pattern`."""
    snapshot = Snapshot.read(source)
    return export_images(snapshot, [row for row in snapshot.rows if pattern in row.url], target, **how)


def members(path: Path) -> list[str]:
    """Return the names of all members in order."""
    with tarfile.open(path) as tar:
        return tar.getnames()


def rows(root: Path) -> dict[str, tuple[str, Dates]]:
    """Return the digest and the dates of each image URL of a store."""
    return {row.url: (row.stored.manifest.digest, row.dates) for row in Snapshot.read(root).rows}


def make_source(root: Path) -> Path:
    """Write a store with an index of which one platform is cached, and two images with common layers."""
    store_with(root, {NAME: DATES}, INDEX, INDEX.images[0])
    store_with(root, {APP: LATER, "localhost:5000/a/b/c:x": DATES}, IMAGE)
    store_with(root, {UP: DATES}, UPPER)
    return store_with(root, {"quay.io/docker:1": DATES}, DOCKER)
