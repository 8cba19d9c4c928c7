"""Read image folders: the store of this program, and that of the Go server of the same name.

Both have a JSON file for each manifest in fat/, img/ or lts/, and blobs/<hex>. One folder may have files of both.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ociregistry.archives.contents import Contents, NamedImage, gather, parse_manifest, parse_whole_name
from ociregistry.archives.members import Archive, Member, one_line, parse_json
from ociregistry.manifests import DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, Manifest
from ociregistry.names import Digest, ImageReference
from ociregistry.pullthrough.loader import LoadResult, LoadStatus
from ociregistry.store.paths import BLOBS_FOLDER, IMAGES_FOLDER, LISTS_FOLDER
from ociregistry.store.records import Dates, Record, RecordInvalid

MANIFEST_FOLDERS = frozenset({LISTS_FOLDER, IMAGES_FOLDER, "lts"})
"""Folders of manifests; the last is the Go server's alone."""


def is_image_folder(archive: Archive) -> bool:
    """Tell whether `archive` has manifests at the paths of an image folder."""
    return any(_digest(name, MANIFEST_FOLDERS) for name in archive.members)


def read_image_folder(archive: Archive) -> Contents:
    """Read the contents of an image folder. Blocks.

    Raises:
        ArchiveInvalid: it cannot be read, or is damaged.
    """
    found = [_read(archive, member, digest) for member, digest in _files(archive, MANIFEST_FOLDERS)]
    children = {child.digest for one in found if one.manifest for child in one.manifest.children}
    metadata = {one.manifest.digest for one in found if one.manifest and not one.wanted} & children
    return gather(
        archive,
        # A child of an index that comes as metadata is not an image to load by its digest.
        named=(
            image
            for one in found
            for image in one.images
            if image.manifest not in metadata or not isinstance(image.image.reference, Digest)
        ),
        manifests={one.manifest.digest: one.manifest for one in found if one.manifest},
        blobs={digest: member for member, digest in _files(archive, {BLOBS_FOLDER})},
        failed=(failure for one in found for failure in one.failed),
        metadata=metadata,
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """The content of one file."""

    manifest: Manifest | None = None
    images: tuple[NamedImage, ...] = ()
    failed: tuple[LoadResult, ...] = ()
    wanted: bool = True
    """False if the record says that the layers of the image are not wanted."""


def _files(archive: Archive, folders: Collection[str]) -> list[tuple[Member, Digest]]:
    """Return the members of these folders whose name is the hex of a digest, in the order of the archive."""
    files = [
        (member, digest) for name, member in archive.members.items() if (digest := _digest(name, folders)) is not None
    ]
    return sorted(files, key=lambda file: file[0].order)


def _digest(name: str, folders: Collection[str]) -> Digest | None:
    folder, _, file = name.partition("/")
    return Digest.from_hex(file) if folder in folders else None


def _read(archive: Archive, member: Member, digest: Digest) -> _Found:
    data = archive.read(member)
    document = parse_json(data, member)
    match document:
        case {"imageUrl": str(url)}:
            return _read_holder(document, url, digest, member)
        case {"images": dict(), "manifest": str()}:
            return _read_record(data, digest, member)
    raise member.invalid("not a manifest of an image folder")


def _read_record(data: bytes, digest: Digest, member: Member) -> _Found:
    try:
        record = Record.parse(data, digest)
    except RecordInvalid as error:
        raise member.invalid(str(error)) from None
    images = (NamedImage(ImageReference.parse_whole(url), digest, dates) for url, dates in record.images.items())
    return _Found(record.manifest, tuple(images), wanted=record.wanted is not False)


def _read_holder(document: Mapping[str, Any], url: str, digest: Digest, member: Member) -> _Found:
    """Read the JSON file of a manifest that the Go server wrote."""
    encoded = document.get("bytes")
    if not isinstance(encoded, str) or not encoded:
        return _failed(url, "written by an old version of the Go server, which did not keep the manifest's bytes")
    try:
        data = base64.b64decode(encoded)
    except binascii.Error as error:
        raise member.invalid(f"its bytes are not base64: {error}") from None
    declared = document.get("digest")
    if declared and declared not in (digest, digest.hex):
        raise member.invalid(f"its digest {declared} does not match the file name")
    manifest = parse_manifest(data, _media_type(document, data, member), digest, member)
    image = parse_whole_name(url)
    if image is None:
        return _failed(url, "its name is not that of an image")
    return _Found(manifest, (NamedImage(image, digest, _dates(document.get("created"))),))


def _failed(url: str, why: str) -> _Found:
    return _Found(failed=(LoadResult(one_line(url), LoadStatus.FAILED, why),))


def _media_type(holder: Mapping[str, Any], data: bytes, member: Member) -> str:
    """Return the media type of the manifest in `data`.

    The number for it in the Go server's file is not used, since its meaning has changed between versions.
    """
    manifest = parse_json(data, member)
    if not isinstance(manifest, dict):
        raise member.invalid("its bytes are no manifest")
    for document in (manifest, holder):
        declared = document.get("mediaType")
        if isinstance(declared, str) and declared:
            return declared
    is_docker = any(name.startswith("v2.docker") and _is_filled(value) for name, value in holder.items())
    if "manifests" in manifest:
        return DOCKER_LIST if is_docker else OCI_INDEX
    return DOCKER_MANIFEST if is_docker else OCI_MANIFEST


def _is_filled(value: object) -> bool:
    """Tell whether `value` is a manifest, not the empty one that stands for none."""
    return isinstance(value, dict) and bool(value.get("schemaVersion"))


def _dates(created: object) -> Dates | None:
    """Return the creation time, which is local, for both dates: a pull is no confirmation by the upstream."""
    try:
        time = datetime.fromisoformat(str(created)).astimezone()
    except (ValueError, OverflowError):
        return None
    return Dates(time, time)
