"""Manifests: from the bytes that a registry sends to a value that says what they name.

Follows the OCI Image specification v1.1 and Docker's schema 2. A manifest is kept and sent as the exact bytes
that its digest names; what is parsed here serves to find the children and blobs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ociregistry.errors import RegistryError
from ociregistry.names import Digest

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"

LISTS = frozenset({OCI_INDEX, DOCKER_LIST})
IMAGES = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
MEDIA_TYPES = (OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST)
"""What an upstream is asked for, always whole: registries convert or hide what is not named in Accept."""

LARGEST_MANIFEST = 8 * 1024 * 1024
"""Bytes; the largest manifest that is read from an upstream or from the store."""
LARGEST_CONFIG = 8 * 1024 * 1024
"""Bytes; the largest config that is kept as metadata of an index."""


class ManifestInvalid(ValueError):
    """The bytes are not a manifest that can be served; the message says why."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    """One thing that a manifest names."""

    digest: Digest
    size: int
    media_type: str
    platform: str = ""
    foreign: bool = False

    @classmethod
    def parse(cls, value: object) -> Descriptor:
        """The descriptor in a decoded JSON `value`; raises `ManifestInvalid`."""
        if not isinstance(value, dict):
            raise ManifestInvalid(f"a descriptor is not an object: {_short(value)}")
        size = value.get("size")
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ManifestInvalid(f"a descriptor has no valid size: {_short(value)}")
        try:
            digest = Digest.parse(str(value.get("digest"))[:200])
        except RegistryError as error:
            raise ManifestInvalid(error.message) from None
        return cls(
            digest=digest,
            size=size,
            media_type=str(value.get("mediaType", "")),
            platform=_platform(value.get("platform")),
            foreign=bool(value.get("urls")),
        )


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest or manifest list: its exact bytes and what they name.

    `children` are the manifests of a list, `blobs` the config and layers of an image (without those that
    clients fetch from foreign URLs), the config first.
    """

    digest: Digest
    media_type: str
    data: bytes
    children: tuple[Descriptor, ...]
    blobs: tuple[Descriptor, ...]

    @property
    def is_list(self) -> bool:
        """Whether it is a manifest list (an index), not an image."""
        return self.media_type in LISTS

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.data)

    @property
    def config(self) -> Descriptor | None:
        """The config of an image; None for an index."""
        return self.blobs[0] if self.blobs else None

    @property
    def layers(self) -> frozenset[Digest]:
        """The layers of an image, without one that is the same blob as the config."""
        return frozenset(blob.digest for blob in self.blobs[1:]) - {blob.digest for blob in self.blobs[:1]}

    @property
    def blob_sizes(self) -> Mapping[Digest, int]:
        """Its blobs, each once, and their sizes in bytes."""
        return {blob.digest: blob.size for blob in self.blobs}

    @classmethod
    def parse(cls, data: bytes, media_type: str, digest: Digest | None = None) -> Manifest:
        """The manifest in `data`, which came with the Content-Type `media_type` (without parameters).

        `digest` is what was asked for; without it the sha256 of `data` becomes its digest.
        Raises `ManifestInvalid` when the digest does not hold, when it is no manifest of a known type, or when
        it could be read as two things (CVE-2021-41190).
        """
        if digest is None:
            digest = Digest.of(data)
        elif not digest.matches(data):
            raise ManifestInvalid(f"the bytes do not have the digest {digest}")
        document = _document(data)
        declared = document.get("mediaType")
        if declared is not None and declared != media_type:
            raise ManifestInvalid(f"the Content-Type is {_short(media_type)} but mediaType says {_short(declared)}")
        if media_type not in MEDIA_TYPES:
            raise ManifestInvalid(f"{_short(media_type)} is not the media type of a manifest")
        if media_type in LISTS:
            if "layers" in document or "config" in document or "fsLayers" in document:
                raise ManifestInvalid("an index must not have layers or config")
            return cls(digest, media_type, data, tuple(_descriptors(document.get("manifests"))), ())
        if "manifests" in document or "fsLayers" in document:
            raise ManifestInvalid("an image manifest must not have manifests or fsLayers")
        config = Descriptor.parse(document.get("config"))
        layers = (layer for layer in _descriptors(document.get("layers")) if not layer.foreign)
        return cls(digest, media_type, data, (), (config, *layers))


def _short(value: object) -> str:
    """What an upstream sent, for a line of the log."""
    return repr(str(value)[:100])


def _document(data: bytes) -> dict[str, Any]:
    if len(data) > LARGEST_MANIFEST:
        raise ManifestInvalid(f"a manifest of {len(data)} bytes is larger than {LARGEST_MANIFEST}")
    try:
        document = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ManifestInvalid(f"not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ManifestInvalid("not a JSON object")
    if document.get("schemaVersion") != 2:
        raise ManifestInvalid(f"schemaVersion is {_short(document.get('schemaVersion'))}, only 2 is served")
    return document


def _descriptors(value: object) -> Iterator[Descriptor]:
    if not isinstance(value, list):
        raise ManifestInvalid("manifests or layers is missing, or not a list")
    return map(Descriptor.parse, value)


def _platform(value: object) -> str:
    if not isinstance(value, dict):
        return ""
    parts = (value.get("os"), value.get("architecture"), value.get("variant"))
    # Whoever made the list chose the words, and they are printed.
    return re.sub(r"[^!-~]", "?", "/".join(str(part)[:64] for part in parts if part))
