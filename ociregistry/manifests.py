"""Manifests: parses the bytes that a registry sends into the digests that they refer to.

Follows the OCI Image specification v1.1 and Docker's schema 2. A manifest is stored and sent as the exact bytes that
its digest is computed from; parsing only serves to find its children and blobs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from ociregistry.errors import RegistryError
from ociregistry.names import DIGEST, Digest
from ociregistry.strictjson import parse_json

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"

LISTS = frozenset({OCI_INDEX, DOCKER_LIST})
IMAGES = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
MEDIA_TYPES = (OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST)
"""Media types for the Accept header. All of them are always sent, because registries convert or hide manifests of
other types."""

LARGEST_MANIFEST = 8 * 1024 * 1024
"""Bytes. Larger manifests are not read, neither from an upstream nor from the store."""
LARGEST_CONFIG = 8 * 1024 * 1024
"""Bytes. Larger configs are not kept as metadata of an index."""


_USUAL = {
    one: one
    for one in (
        *MEDIA_TYPES,
        "application/vnd.oci.image.config.v1+json",
        "application/vnd.oci.image.layer.v1.tar+gzip",
        "application/vnd.oci.image.layer.v1.tar+zstd",
        "application/vnd.docker.container.image.v1+json",
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
    )
}
"""Media types that are canonical as they stand: most of all that are compared. One text serves all records."""


def canonical_media_type(value: object) -> str:
    """Return a media type in lower case and without parameters, as it is compared (RFC 9110, section 8.3.1).

    The empty string is returned for what is not text.
    """
    if not isinstance(value, str):
        return ""
    return _USUAL.get(value) or value.partition(";")[0].strip().lower()


_ARCHITECTURES = {
    "i386": ("386", ""),
    "x86_64": ("amd64", None),
    "x86-64": ("amd64", None),
    "aarch64": ("arm64", None),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
}
"""Other names of an architecture -> its name in Go, and the variant that they mean, if any."""
_VARIANTS = {
    ("amd64", "v1"): "",
    **dict.fromkeys((("arm64", "8"), ("arm64", "v8"), ("arm64", "v8.0")), ""),
    **dict.fromkeys((("arm64", "9"), ("arm64", "9.0"), ("arm64", "v9.0")), "v9"),
    **dict.fromkeys((("arm", ""), ("arm", "7")), "v7"),
    **{("arm", version): f"v{version}" for version in ("5", "6", "8")},
}


def normalized_platform(os: str, architecture: str, variant: str) -> tuple[str, str, str]:
    """Return the operating system, architecture and variant in the one spelling in which they are compared.

    That is containerd's (`Normalize` in github.com/containerd/platforms).
    """
    os, architecture, variant = os.lower(), architecture.lower(), variant.lower()
    architecture, meant = _ARCHITECTURES.get(architecture, (architecture, None))
    variant = variant if meant is None else meant
    return "darwin" if os == "macos" else os, architecture, _VARIANTS.get((architecture, variant), variant)


class ManifestInvalid(ValueError):
    """The bytes are not a valid manifest; the message says why."""


class Descriptor(NamedTuple):
    """A descriptor of the OCI Image specification: how a manifest refers to a blob or to another manifest.

    `media_type` is canonical. `platform` is `os/architecture[/variant]`, normalized, or empty if not given; `foreign`
    says whether the content has `urls`.
    """

    digest: Digest
    size: int
    media_type: str
    platform: str = ""
    foreign: bool = False
    os_version: str = ""
    """The version of the operating system, which images for Windows need to match."""

    @property
    def full_platform(self) -> str:
        """The platform with the version of its operating system."""
        return spell_platform(self.platform, self.os_version)

    @classmethod
    def parse(cls, value: Any) -> Descriptor:
        """Parse a descriptor from a decoded JSON `value`.

        Raises:
            ManifestInvalid: it is malformed.
        """
        try:
            text, size, media_type = value["digest"], value["size"], value["mediaType"]
            usual = _USUAL.get(media_type)
        except (KeyError, TypeError):
            return cls._parse_any(value)
        if len(value) == 3 and type(size) is int and size >= 0 and type(text) is str and DIGEST.fullmatch(text):
            # As most are, of a hundred thousand in a store: this takes a third less time.
            media_type = usual or canonical_media_type(media_type)
            return tuple.__new__(cls, (Digest(text), size, media_type, "", False, ""))
        return cls._parse_any(value)

    @classmethod
    def _parse_any(cls, value: object) -> Descriptor:
        if not isinstance(value, dict):
            raise ManifestInvalid(f"a descriptor is not an object: {_short(value)}")
        size = value.get("size")
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ManifestInvalid(f"a descriptor has no valid size: {_short(value)}")
        try:
            digest = Digest.parse(str(value.get("digest")))
        except RegistryError as error:
            raise ManifestInvalid(error.message) from None
        media_type, platform = canonical_media_type(value.get("mediaType")), value.get("platform")
        return cls(digest, size, media_type, _platform(platform), bool(value.get("urls")), _os_version(platform))


@dataclass(frozen=True, slots=True)
class Manifest:
    """An image manifest or an index: its exact bytes and what they refer to.

    `media_type` is canonical. `children` are the manifests of an index. `blobs` are the config and the layers of an
    image, the config first.
    """

    digest: Digest
    media_type: str
    data: bytes
    children: tuple[Descriptor, ...]
    blobs: tuple[Descriptor, ...]

    @property
    def is_list(self) -> bool:
        """Whether this is an index (or Docker manifest list), not an image manifest."""
        return self.media_type in LISTS

    @property
    def size(self) -> int:
        """Size in bytes."""
        return len(self.data)

    @property
    def config(self) -> Descriptor | None:
        """The config of an image; None for an index."""
        return self.blobs[0] if self.blobs else None

    @property
    def layers(self) -> Set[Digest]:
        """The layers of an image, without a layer that is the same blob as the config."""
        return {blob.digest for blob in self.blobs} - {blob.digest for blob in self.blobs[:1]}

    @property
    def required(self) -> Mapping[Digest, int]:
        """The size in bytes of each blob without which an image is incomplete: of all but foreign layers."""
        return {blob.digest: blob.size for blob in self.blobs if not blob.foreign}

    @property
    def foreign_layers(self) -> Mapping[Digest, int]:
        """The size in bytes of each layer that clients may fetch from other URLs, as registries may not have it."""
        foreign = {blob.digest: blob.size for blob in self.blobs if blob.foreign}
        required = self.required if foreign else {}
        return {digest: size for digest, size in foreign.items() if digest not in required}

    @property
    def blob_sizes(self) -> Mapping[Digest, int]:
        """The size in bytes of each distinct blob."""
        return {blob.digest: blob.size for blob in self.blobs}

    @classmethod
    def parse(cls, data: bytes, media_type: str, digest: Digest | None = None) -> Manifest:
        """Parse and check the manifest in `data`.

        `media_type` is the Content-Type that it came with, in any spelling. `digest` is the digest that was
        requested; without one, the sha256 of `data` is used.

        Raises:
            ManifestInvalid: the digest does not match, the type is not supported, or the manifest could be read
                both as an image and as an index (CVE-2021-41190).
        """
        if digest is None:
            digest = Digest.of(data)
        elif not digest.matches(data):
            raise ManifestInvalid(f"the bytes do not have the digest {digest}")
        document = _document(data)
        media_type, declared = canonical_media_type(media_type), document.get("mediaType")
        if declared not in (None, "") and canonical_media_type(declared) != media_type:
            raise ManifestInvalid(f"the Content-Type is {_short(media_type)} but mediaType says {_short(declared)}")
        if media_type not in MEDIA_TYPES:
            raise ManifestInvalid(f"{_short(media_type)} is not the media type of a manifest")
        if media_type in LISTS:
            if "layers" in document or "config" in document or "fsLayers" in document:
                raise ManifestInvalid("an index must not have layers or config")
            return cls(digest, media_type, data, tuple(_descriptors(document, "manifests")), ())
        if "manifests" in document or "fsLayers" in document:
            raise ManifestInvalid("an image manifest must not have manifests or fsLayers")
        config = Descriptor.parse(document.get("config"))
        if config.foreign:
            config = config._replace(foreign=False)
        return cls(digest, media_type, data, (), (config, *_descriptors(document, "layers")))


def _short(value: object) -> str:
    """Shorten a value from an upstream for an error message."""
    return repr(str(value)[:100])


def _document(data: bytes) -> dict[str, Any]:
    if len(data) > LARGEST_MANIFEST:
        raise ManifestInvalid(f"a manifest of {len(data)} bytes is larger than {LARGEST_MANIFEST}")
    try:
        document = parse_json(data)
    except ValueError as error:
        raise ManifestInvalid(f"not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ManifestInvalid("not a JSON object")
    if document.get("schemaVersion") != 2:
        raise ManifestInvalid(f"schemaVersion is {_short(document.get('schemaVersion'))}, only 2 is served")
    return document


def _descriptors(document: Mapping[str, Any], key: str) -> Iterator[Descriptor]:
    value = document.get(key)
    if value is None and key in document:
        # Programs in Go write an empty list as null, and read null as an empty list.
        value = []
    if not isinstance(value, list):
        raise ManifestInvalid(f"{key} is missing, or not a list")
    return map(Descriptor.parse, value)


def spell_platform(platform: str, os_version: str) -> str:
    """Return a platform with a version as containerd writes it, such as `windows(10.0.17763.6893)/amd64`."""
    os, slash, rest = platform.partition("/")
    return f"{os}({os_version}){slash}{rest}" if os_version else platform


def _os_version(value: object) -> str:
    version = value.get("os.version") if isinstance(value, dict) else None
    return re.sub(r"[^0-9A-Za-z._-]", "?", str(version)[:64]) if version else ""


def _platform(value: object) -> str:
    if not isinstance(value, dict):
        return ""
    return _spelled(*(str(value.get(key) or "")[:64] for key in ("os", "architecture", "variant")))


# All indexes of a store name few platforms.
@lru_cache(maxsize=128)
def _spelled(os: str, architecture: str, variant: str) -> str:
    if architecture and not os:
        # As containerd does, which takes the system that it runs on.
        os = "linux"
    parts = normalized_platform(os, architecture, variant)
    # These strings come from outside and are printed, so they must not contain control characters.
    return re.sub(r"[^!-~]", "?", "/".join(filter(None, parts)))
