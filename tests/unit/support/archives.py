"""Archives: the files of each format in memory, and tars and folders of them."""

from __future__ import annotations

import base64
import bz2
import gzip
import hashlib
import io
import json
import lzma
import tarfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zstandard
from twisted.internet.threads import deferToThreadPool

from ociregistry.archives.contents import Contents
from ociregistry.archives.importing import Importer
from ociregistry.archives.members import Archive, ArchiveInvalid, GivenName
from ociregistry.archives.opening import open_archive, read_contents
from ociregistry.platforms import ALL, Platform
from ociregistry.pullthrough.loader import LoadResult, NullProgress, Progress
from ociregistry.store.records import Dates, Record
from ociregistry.store.store import Store
from tests.images import Image, Index, Manifest
from tests.unit.support.common import REACTOR, manifest

NAME = "docker.io/library/nginx:1.25"
IMAGE_NAME = "io.containerd.image.name"
REF_NAME = "org.opencontainers.image.ref.name"

Files = Mapping[str, bytes]
"""Name -> content of the files in an archive, in order."""

_COMPRESS: Mapping[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    "gz": lambda data: gzip.compress(data, mtime=0),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def to_json(value: object) -> bytes:
    """Return JSON with the default separators."""
    return json.dumps(value).encode()


# Formats


def blob_name(digest: str) -> str:
    """Return the path of a blob in an OCI layout."""
    return f"blobs/{digest.replace(':', '/')}"


def layout(*images: tuple[Image | Index, Mapping[str, str] | None], sparse: Sequence[str] = ()) -> dict[str, bytes]:
    """Return an OCI layout of the images with these annotations, without the digests in `sparse`."""
    blobs: dict[str, bytes] = {}
    descriptors = []
    for image, image_annotations in images:
        blobs |= parts(image)
        descriptors.append(
            {**descriptor(image.manifest), **({"annotations": image_annotations} if image_annotations else {})}
        )
    return {
        "oci-layout": to_json({"imageLayoutVersion": "1.0.0"}),
        "index.json": to_json({"schemaVersion": 2, "manifests": descriptors}),
        **{blob_name(digest): data for digest, data in sorted(blobs.items()) if digest not in sparse},
    }


def parts(image: Image | Index) -> dict[str, bytes]:
    """Return all manifests and blobs by digest."""
    manifests = {one.digest: one.data for one in image.manifests}
    return manifests | {blob.digest: blob.data for blob in image.blobs}


def descriptor(of: Manifest) -> dict[str, object]:
    """Return the descriptor of a manifest."""
    return {"mediaType": of.media_type, "digest": of.digest, "size": len(of.data)}


def named(image: Image | Index, name: str = NAME) -> dict[str, bytes]:
    """Return an OCI layout of one named image."""
    return layout((image, {IMAGE_NAME: name}))


def docker_saved(image: Image, *tags: str, packed: bool = False) -> dict[str, bytes]:
    """Return files as in `docker save` of older versions; with `packed`, layers stay compressed."""
    config = f"{image.config.digest.removeprefix('sha256:')}.json"
    layers = {
        f"{number:064x}/layer.tar": layer.data if packed else gzip.decompress(layer.data)
        for number, layer in enumerate(image.layers)
    }
    index = [{"Config": config, "RepoTags": list(tags) or None, "Layers": list(layers)}]
    return {config: image.config.data, **layers, "manifest.json": to_json(index)}


def go_record(of: Manifest, url: str, **changes: object) -> bytes:
    """Return the Go server's file of a manifest; `changes` to None remove a key."""
    empty: dict[str, object] = {"schemaVersion": 0, "mediaType": "", "layers": None}
    document: dict[str, Any] = {
        "type": 3,
        "digest": of.digest.removeprefix("sha256:"),
        "imageUrl": url,
        "bytes": base64.b64encode(of.data).decode(),
        "v1.oci.index": empty,
        "v1.oci.manifest": empty,
        "v2.docker.manifestList": empty,
        "v2.docker.manifest": empty,
        "created": "2024-03-01T22:17:30",
        "pulled": "",
        **changes,
    }
    return to_json({key: value for key, value in document.items() if value is not None})


def hex_of(digest: str) -> str:
    """Return the file name of this digest in image folders."""
    return digest.partition(":")[2]


def image_blobs(*images: Image | Index) -> dict[str, bytes]:
    """Return the blobs of the images in an image folder."""
    return {f"blobs/{hex_of(blob.digest)}": blob.data for image in images for blob in image.blobs}


def kept(image: Image | Index, urls: Mapping[str, Dates]) -> bytes:
    """Return a record of this program."""
    return Record(manifest(image), urls).render()


def skopeo_dir(image: Image | Index) -> dict[str, bytes]:
    """Return the files that `skopeo copy --all … dir:` writes."""
    children = {one.digest: one.data for one in image.manifests if one is not image.manifest}
    return {
        "version": b"Directory Transport Version: 1.1\n",
        "manifest.json": image.manifest.data,
        **{f"{hex_of(digest)}.manifest.json": data for digest, data in children.items()},
        **{hex_of(blob.digest): blob.data for blob in image.blobs},
    }


# Files


def write_tar(path: Path, files: Files, compression: str = "", links: Mapping[str, tuple[bytes, str]] = {}) -> Path:
    """Write a tar of the files and of `links`: name -> (type, target); `compression` is gz, bz2, xz or zst."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, (kind, target) in links.items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, target
            tar.addfile(entry)
        for name, data in files.items():
            add_file(tar, name, data)
    path.write_bytes(_COMPRESS[compression](made.getvalue()))
    return path


def add_file(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a member."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def write_folder(path: Path, files: Files) -> Path:
    """Write a folder of the files."""
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def opened(path: Path, name: str = "") -> Archive:
    """Return the archive opened, with `name` for images that have none."""
    archive = open_archive(path, GivenName.parse(name) if name else None)
    assert archive is not None
    return archive


def contents(path: Path, name: str = "") -> Contents:
    """Return the contents of the archive."""
    with opened(path, name) as archive:
        return read_contents(archive)


async def load(
    store: Store,
    path: Path,
    progress: Progress | None = None,
    name: str = "",
    platforms: Sequence[Platform] = ALL,
) -> list[LoadResult]:
    """Import the archive into the store, or its images for these platforms."""
    in_thread = partial(deferToThreadPool, REACTOR, REACTOR.getThreadPool())
    with opened(path, name) as archive:
        return await Importer(store, in_thread, progress or NullProgress(), platforms).bring(archive)


def files_below(root: Path) -> dict[str, str]:
    """Return every file below `root` with the digest of its content."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def everything(archive: Archive) -> dict[str, bytes]:
    """Return the content of all members, read in order."""
    in_order = sorted(archive.members.items(), key=lambda item: item[1].order)
    return {name: b"".join(member.pieces()) for name, member in in_order}


def refused(path: Path) -> str:
    """Return the error when opening or reading the archive."""
    with pytest.raises(ArchiveInvalid) as caught, opened(path) as archive:
        everything(archive)
    error = str(caught.value)
    assert error.startswith(f"{path}: ")
    assert "\n" not in error
    return error.removeprefix(f"{path}: ")


def meanings(path: Path) -> dict[str, str]:
    """Return the digest that each image name means."""
    return {str(one.image): one.manifest for one in contents(path).images}


def failures(path: Path) -> dict[str, str]:
    """Return the reason of each failure."""
    return {failure.name: failure.why for failure in contents(path).failed}


def invalid(path: Path) -> str:
    """Return the error that refuses the archive."""
    with pytest.raises(ArchiveInvalid) as caught:
        contents(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


class RecordedProgress:
    """Progress that records all reports."""

    def __init__(self) -> None:
        self.expected: list[tuple[str, int]] = []
        self.state: dict[str, int] = {}
        self.outcomes: list[LoadResult] = []

    def expect(self, name: str, size: int) -> None:
        """Record an expected size."""
        self.expected.append((name, size))

    def advance(self, name: str, count: int) -> None:
        """Add to the received size."""
        self.state[name] = self.state.get(name, 0) + count

    def ended(self, outcome: LoadResult) -> None:
        """Record an outcome."""
        self.outcomes.append(outcome)
