"""Read archives of `docker save` and skopeo's docker-archive, which lack the manifests of the registry.

manifest.json names the config and the layers of each image; the layers are tars, not compressed as in a registry. A
manifest is generated, always the same for the same image.
"""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ociregistry.archives.compression import GZIP, LONGEST_MAGIC, ZSTD, compression_of
from ociregistry.archives.contents import Contents, NamedImage, UnnamedImage, gather, parse_name
from ociregistry.archives.members import PIECE, Archive, Member, parse_json, reading
from ociregistry.manifests import OCI_MANIFEST, Descriptor, Manifest
from ociregistry.names import Digest

DOCKER_INDEX = "manifest.json"

_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_NOTE = "its digest is not the registry's, as docker save does not keep the registry's manifest"


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer in the archive; `diff_id` is the digest of its tar, uncompressed."""

    member: Member
    descriptor: Descriptor
    diff_id: Digest


@dataclass(frozen=True, slots=True)
class SavedImage:
    """One entry of manifest.json: the members of the config and the layers, and the names (tags) of the image."""

    config: str
    layers: tuple[str, ...]
    tags: tuple[str, ...]

    @property
    def config_hex(self) -> str:
        """The name of the config without folder and suffix; usually the hex of its digest."""
        return posixpath.basename(self.config).removesuffix(".json")


def read_docker_index(archive: Archive) -> list[SavedImage]:
    """Read manifest.json. Blocks.

    Raises:
        ArchiveInvalid: it cannot be read, or is not valid.
    """
    index = archive.members[DOCKER_INDEX]
    entries = archive.json(index)
    if not isinstance(entries, list | None):
        raise index.invalid("it is not a list of images")
    return [_saved(entry, index) for entry in entries or ()]


def _saved(entry: object, index: Member) -> SavedImage:
    match entry:
        case {"Config": str(config), "Layers": list() | None as layers, "RepoTags": list() | None as tags}:
            if all(isinstance(name, str) for name in (*(layers or ()), *(tags or ()))):
                return SavedImage(config, tuple(layers or ()), tuple(tags or ()))
    raise index.invalid("an image in it has no valid Config, Layers or RepoTags")


def read_docker_archive(archive: Archive) -> Contents:
    """Read the contents of the archive. Blocks; all layers are read once, for their digests.

    Raises:
        ArchiveInvalid: it cannot be read, or is damaged.
    """
    saved = read_docker_index(archive)
    layers = _layers({_member(archive, name) for one in saved for name in one.layers})
    named: list[NamedImage] = []
    unnamed: list[UnnamedImage] = []
    manifests: dict[Digest, Manifest] = {}
    blobs = {layer.descriptor.digest: member for member, layer in layers.items()}
    for one in saved:
        config = _member(archive, one.config)
        data = archive.read(config)
        digest = _config_digest(one, config, data)
        of_image = [layers[_member(archive, name)] for name in one.layers]
        _check_layers(of_image, config, data)
        manifest = _manifest(Descriptor(digest, len(data), _CONFIG), of_image)
        manifests[manifest.digest] = manifest
        blobs[digest] = config
        images = [image for tag in one.tags if (image := parse_name(tag)) is not None]
        named += [NamedImage(image, manifest.digest, notes=(_NOTE,)) for image in images]
        if not images:
            why = f"docker save was given its id, {digest}, not its name"
            unnamed.append(UnnamedImage(manifest.digest, why, notes=(_NOTE,)))
    return gather(archive, named, manifests, blobs, unnamed=unnamed)


def _member(archive: Archive, name: str) -> Member:
    member = archive.members.get(posixpath.normpath(name))
    if member is None:
        raise archive.members[DOCKER_INDEX].invalid(f"it names {name!r}, which is not there")
    return member


def _layers(members: Iterable[Member]) -> dict[Member, _Layer]:
    return {member: _layer(member) for member in sorted(members, key=lambda member: member.order)}


def _layer(member: Member) -> _Layer:
    raw = _HashedFile(member)
    file = io.BufferedReader(raw, PIECE)
    with reading(member.archive, member.name):
        compression = compression_of(file.peek(LONGEST_MAGIC))
        if compression not in (GZIP, ZSTD):
            # A plain tar: the specification has no other compression for layers.
            for _ in iter(partial(file.read, PIECE), b""):
                pass
            digest = raw.digest
            return _Layer(member, Descriptor(digest, member.size, _LAYER), digest)
        unpacked = hashlib.sha256()
        with compression.open(file) as tar:
            for piece in iter(partial(tar.read, PIECE), b""):
                unpacked.update(piece)
    descriptor = Descriptor(raw.digest, member.size, f"{_LAYER}+{compression.name}")
    return _Layer(member, descriptor, Digest(f"sha256:{unpacked.hexdigest()}"))


def _config_digest(saved: SavedImage, config: Member, data: bytes) -> Digest:
    digest = Digest.from_hex(saved.config_hex)
    if digest is not None and not digest.matches(data):
        raise config.invalid(f"it does not have the digest {digest}")
    return digest or Digest.of(data)


def _check_layers(layers: Sequence[_Layer], config: Member, data: bytes) -> None:
    """Check that the layers are those that the config names.

    Raises:
        ArchiveInvalid: they are not.
    """
    match parse_json(data, config):
        case {"rootfs": {"diff_ids": list() | None as diff_ids}}:
            named = diff_ids or ()
            if len(named) != len(layers):
                raise config.invalid(f"it names {len(named)} layers, but there are {len(layers)}")
            for layer, diff_id in zip(layers, named, strict=True):
                if layer.diff_id != diff_id:
                    raise layer.member.invalid(f"it does not have the digest {diff_id}")
        case _:
            raise config.invalid("it does not name its layers")


def _manifest(config: Descriptor, layers: Sequence[_Layer]) -> Manifest:
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": _render(config),
        "layers": [_render(layer.descriptor) for layer in layers],
    }
    return Manifest.parse(json.dumps(document, separators=(",", ":")).encode(), OCI_MANIFEST)


def _render(descriptor: Descriptor) -> dict[str, object]:
    return {"mediaType": descriptor.media_type, "digest": descriptor.digest, "size": descriptor.size}


class _HashedFile(io.RawIOBase):
    """A member as a file that is read once and hashed meanwhile."""

    def __init__(self, member: Member) -> None:
        self._pieces = member.pieces()
        self._rest = memoryview(b"")
        self._hasher = hashlib.sha256()

    @property
    def digest(self) -> Digest:
        """The sha256 digest of the bytes read so far."""
        return Digest(f"sha256:{self._hasher.hexdigest()}")

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read at least one byte into `buffer`, none at the end; return the number of bytes."""
        if not self._rest:
            self._rest = memoryview(next(self._pieces, b""))
            self._hasher.update(self._rest)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count
