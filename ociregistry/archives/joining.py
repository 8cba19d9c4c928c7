"""Indexes that are made here, of images for several platforms that archives bring under one name.

Archives often have one platform each, and the same name. Nodes of both platforms find theirs in the index. The same
images give the same bytes, in whichever order they come.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ociregistry.manifests import OCI_INDEX, Descriptor, Manifest
from ociregistry.names import Digest
from ociregistry.platforms import NO_PLATFORM
from ociregistry.strictjson import parse_json

Entry = Mapping[str, Any]
"""A descriptor in an index, as decoded JSON."""

_PLATFORM = ("architecture", "os", "os.version", "os.features", "variant")
"""Keys that the platform of a descriptor and the config of an image have in common (OCI Image specification)."""
_SUBJECT = "vnd.docker.reference.digest"
"""Annotation that BuildKit gives to an attestation in an index: the digest of the image that it is about."""


def describe(image: Manifest, config: bytes) -> Entry | None:
    """Return the descriptor of `image` for an index, with the platform in its `config`; None if that tells none."""
    try:
        document = parse_json(config)
    except ValueError:
        return None
    if not isinstance(document, dict) or not (document.get("os") and document.get("architecture")):
        return None
    platform = {key: document[key] for key in _PLATFORM if document.get(key)}
    return {"mediaType": image.media_type, "digest": image.digest, "size": image.size, "platform": platform}


def entries_of(index: Manifest) -> Sequence[Entry]:
    """Return the descriptors in `index` as they stand there."""
    return parse_json(index.data)["manifests"] or ()


def platform_of(entry: Entry) -> str:
    """Return the platform that an entry tells, in one spelling; of Windows with its version."""
    return Descriptor.parse(entry).full_platform


def is_for_one_platform(index: Manifest) -> bool:
    """Tell whether the images in `index` are for one platform, beside attestations."""
    platforms = {child.full_platform for child in index.children} - {NO_PLATFORM}
    return len(platforms) == 1 and "" not in platforms


def _subject(entry: Entry) -> str | None:
    """Return the image that an attestation is about; None for another entry."""
    annotations = entry.get("annotations")
    return annotations.get(_SUBJECT) if isinstance(annotations, dict) else None


@dataclass(frozen=True, slots=True)
class Joined:
    """The entries of an index, and the images whose places others have taken, with their platforms."""

    entries: tuple[Entry, ...]
    replaced: Mapping[Digest, str]

    @property
    def platforms(self) -> Sequence[str]:
        """The platforms of the images, sorted."""
        return sorted({platform_of(entry) for entry in self.entries if _subject(entry) is None})

    @property
    def index(self) -> Manifest:
        """The index."""
        document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": self.entries}
        return Manifest.parse(json.dumps(document, separators=(",", ":"), sort_keys=True).encode(), OCI_INDEX)


def join(entries: Sequence[Entry], new: Sequence[Entry]) -> Joined:
    """Put `new` among `entries`, in the place of images of the same platform and of what is about them."""
    platforms = {platform_of(one) for one in new if _subject(one) is None}
    taken = {one["digest"]: platform_of(one) for one in entries if platform_of(one) in platforms}
    kept = [one for one in entries if one["digest"] not in taken and _subject(one) not in taken]
    ordered = sorted([*kept, *new], key=lambda one: (platform_of(one), one["digest"]))
    replaced = taken.keys() - {one["digest"] for one in new}
    return Joined(tuple(ordered), {Digest(digest): taken[digest] for digest in sorted(replaced)})
