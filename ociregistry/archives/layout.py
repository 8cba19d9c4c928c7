"""Read OCI image layouts, as skopeo, containerd, newer versions of docker and this program write them.

Follows the OCI Image specification v1.1, "Image Layout". The names of the images are in annotations of index.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ociregistry.archives.contents import (
    Contents,
    NamedImage,
    UnnamedImage,
    gather,
    parse_manifest,
    parse_name,
    parse_whole_name,
)
from ociregistry.archives.dockersave import DOCKER_INDEX, SavedImage, read_docker_index
from ociregistry.archives.members import Archive, Member
from ociregistry.errors import DigestInvalid, ManifestUnknown
from ociregistry.manifests import MEDIA_TYPES, Descriptor, Manifest, ManifestInvalid
from ociregistry.names import Digest, ImageReference, Tag
from ociregistry.pullthrough.loader import LoadResult, LoadStatus
from ociregistry.store.records import Dates

MARK = "oci-layout"
INDEX = "index.json"

IMAGE_NAME = "io.containerd.image.name"
REF_NAME = "org.opencontainers.image.ref.name"
CREATED = "ociregistry.created"
CONFIRMED = "ociregistry.confirmed"
METADATA = "ociregistry.metadata"
"""Annotation of an index: the digests of its images that come without their layers, separated by spaces."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One descriptor of index.json."""

    descriptor: Descriptor
    annotations: Mapping[str, object]


def read_layout(archive: Archive) -> Contents:
    """Read the contents of an OCI image layout. Blocks.

    Raises:
        ArchiveInvalid: it cannot be read, or is damaged.
    """
    index = archive.members[INDEX]
    entries = list(_entries(archive, index))
    blobs = {digest: member for name, member in archive.members.items() if (digest := _digest(name)) is not None}
    manifests = _manifests(archive, blobs, (entry.descriptor for entry in entries))
    saved = read_docker_index(archive) if DOCKER_INDEX in archive.members else []
    named: list[NamedImage] = []
    unnamed: list[UnnamedImage] = []
    failed: list[LoadResult] = []
    for entry in entries:
        root = manifests.get(entry.descriptor.digest)
        if root is None:
            why = _why_not(entry.descriptor)
            failed.append(LoadResult(f"{archive.path}: {entry.descriptor.digest}", LoadStatus.FAILED, why))
            continue
        images = _images(entry, root, manifests, saved)
        if not images:
            unnamed.append(_unnamed(entry))
        dates = _dates(entry.annotations, index)
        named += [NamedImage(image, entry.descriptor.digest, dates) for image in images]
    metadata = frozenset(digest for entry in entries for digest in _metadata(entry))
    return gather(archive, named, manifests, blobs, failed, metadata, unnamed)


def blob_name(digest: Digest) -> str:
    """Return the name of the file with this digest in a layout."""
    return f"blobs/{digest.algorithm}/{digest.hex}"


def _digest(name: str) -> Digest | None:
    """Return the digest in the name of a blob's file; None for other files."""
    match name.split("/"):
        case ["blobs", algorithm, text]:
            digest = Digest.from_hex(text)
            return digest if digest is not None and digest.algorithm == algorithm else None
    return None


def _entries(archive: Archive, index: Member) -> Iterator[_Entry]:
    match archive.json(index):
        case {"manifests": list() | None as descriptors}:
            for descriptor in descriptors or ():
                try:
                    parsed = Descriptor.parse(descriptor)
                except ManifestInvalid as error:
                    raise index.invalid(str(error)) from None
                annotations = descriptor.get("annotations")
                yield _Entry(parsed, annotations if isinstance(annotations, dict) else {})
        case _:
            raise index.invalid("it has no list of manifests")


def _manifests(
    archive: Archive, blobs: Mapping[Digest, Member], roots: Iterable[Descriptor]
) -> dict[Digest, Manifest]:
    """Return the manifests of `roots` and their descendants that are in the archive."""
    found: dict[Digest, Manifest] = {}
    wanted = list(roots)
    while wanted:
        there = {
            descriptor.digest: (blobs[descriptor.digest], descriptor)
            for descriptor in wanted
            if descriptor.media_type in MEDIA_TYPES and descriptor.digest in blobs and descriptor.digest not in found
        }
        wanted = []
        for member, descriptor in sorted(there.values(), key=lambda one: one[0].order):
            if member.size != descriptor.size:
                raise member.invalid(f"it has {member.size} bytes, expected {descriptor.size}")
            manifest = parse_manifest(archive.read(member), descriptor.media_type, descriptor.digest, member)
            found[manifest.digest] = manifest
            wanted += manifest.children
    return found


def _images(
    entry: _Entry,
    root: Manifest,
    manifests: Mapping[Digest, Manifest],
    saved: Sequence[SavedImage],
) -> list[ImageReference]:
    """Return the names of an image: from its annotations, else from the entries of manifest.json with its config."""
    # In a name that this program wrote, the first component is the upstream even if it does not look like a host.
    parse = parse_whole_name if CREATED in entry.annotations else parse_name
    for key in (IMAGE_NAME, REF_NAME):
        image = parse(entry.annotations.get(key))
        if image is not None:
            return [image]
    children = [manifests[child.digest] for child in root.children if child.digest in manifests]
    configs = {blob.digest.hex for manifest in (root, *children) if (blob := manifest.config)}
    tags = dict.fromkeys(tag for one in saved if one.config_hex in configs for tag in one.tags)
    return [image for tag in tags if (image := parse_name(tag)) is not None]


def _dates(annotations: Mapping[str, object], index: Member) -> Dates | None:
    created, confirmed = annotations.get(CREATED), annotations.get(CONFIRMED)
    if not isinstance(created, str) or not isinstance(confirmed, str):
        return None
    try:
        return Dates.parse(created, confirmed)
    except ValueError as error:
        raise index.invalid(f"an image has invalid dates: {error}") from None


def _metadata(entry: _Entry) -> Iterator[Digest]:
    told = entry.annotations.get(METADATA)
    for word in told.split() if isinstance(told, str) else ():
        with suppress(DigestInvalid):
            yield Digest.parse(word)


def _why_not(descriptor: Descriptor) -> str:
    if descriptor.media_type in MEDIA_TYPES:
        return "its manifest is not in the archive"
    return f"not an image but {descriptor.media_type[:100]!r}"


def _unnamed(entry: _Entry) -> UnnamedImage:
    told = entry.annotations.get(REF_NAME)
    try:
        tag = Tag.parse(told) if isinstance(told, str) else None
    except ManifestUnknown:
        tag = None
    why = f"the archive tells its tag, {tag}, alone" if tag else "the archive does not say what image this is"
    return UnnamedImage(entry.descriptor.digest, why, tag)
