"""The memory's view of the records: which tag means which digest, and which blobs are named with which size.

It is never more than the files: whoever finds an entry here still opens the file, and no file means a miss.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from ociregistry.manifests import Descriptor
from ociregistry.names import Digest, ImageReference, Repository, Tag
from ociregistry.store.records import Record

_FOR_REFERRERS = re.compile("sha(256|512)-[0-9a-f]{64}")


def is_referrers_tag(tag: str) -> bool:
    """Tell whether the specification sets this tag aside for a list of referrers; nobody pushed it."""
    return _FOR_REFERRERS.fullmatch(tag) is not None


@dataclass(frozen=True, slots=True)
class Entry:
    """What memory keeps of a record."""

    is_list: bool
    images: Mapping[str, datetime]
    """Image URL -> last confirmed."""
    blobs: Mapping[Digest, int]
    """What the manifest names, and its size in bytes."""
    config: Descriptor | None = None
    layers: frozenset[Digest] = frozenset()
    """The layers of an image."""
    children: tuple[Descriptor, ...] = ()
    """The manifests that an index names."""
    wanted: bool = True
    """Whether the layers of the image belong into the store."""

    @classmethod
    def of(cls, record: Record, *, wanted: bool = True) -> Entry:
        """Make the entry for `record`; `wanted` holds where the record does not say."""
        manifest = record.manifest
        return cls(
            is_list=manifest.is_list,
            images={url: dates.confirmed for url, dates in record.images.items()},
            blobs=manifest.blob_sizes,
            config=manifest.config,
            layers=manifest.layers,
            children=manifest.children,
            wanted=wanted if record.wanted is None else record.wanted,
        )

    @property
    def is_referrers(self) -> bool:
        """Whether it is known only as a list of referrers: its children are artifacts, not platforms."""
        return bool(self.images) and all(is_referrers_tag(url.rpartition(":")[2]) for url in self.images)

    @property
    def repositories(self) -> set[Repository]:
        """Where it is known."""
        return {ImageReference.parse_whole(url).repository for url in self.images}

    def known_in(self, repository: Repository) -> bool:
        """Whether some image URL of `repository` means this manifest."""
        prefix = str(repository)
        return any(url.startswith((f"{prefix}:", f"{prefix}@")) for url in self.images)


class Catalogue:
    """All entries, with the ways to find them."""

    def __init__(self) -> None:
        self._entries: dict[Digest, Entry] = {}
        self._claims: dict[str, dict[Digest, datetime]] = {}
        self._naming: dict[Digest, dict[Digest, int]] = {}
        self._indexes: dict[Digest, set[Digest]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, digest: Digest, entry: Entry) -> None:
        """Takes `entry` for the record `digest`, in place of the one it had."""
        self.drop(digest)
        self._entries[digest] = entry
        for url, confirmed in entry.images.items():
            self._claims.setdefault(url, {})[digest] = confirmed
        for blob, size in entry.blobs.items():
            self._naming.setdefault(blob, {})[digest] = size
        for child in entry.children:
            self._indexes.setdefault(child.digest, set()).add(digest)

    def drop(self, digest: Digest) -> None:
        """Forgets the record `digest`."""
        entry = self._entries.pop(digest, None)
        if entry is None:
            return
        for url in entry.images:
            claims = self._claims[url]
            del claims[digest]
            if not claims:
                del self._claims[url]
        for blob in entry.blobs:
            naming = self._naming[blob]
            del naming[digest]
            if not naming:
                del self._naming[blob]
        for child in {child.digest for child in entry.children}:
            self._indexes[child].discard(digest)
            if not self._indexes[child]:
                del self._indexes[child]

    def get(self, digest: Digest) -> Entry | None:
        """The entry of the record `digest`."""
        return self._entries.get(digest)

    def resolve(self, image: ImageReference) -> Digest | None:
        """The digest that `image` means: of several records that claim a tag, the last confirmed."""
        if isinstance(image.reference, Digest):
            return image.reference if image.reference in self._entries else None
        claims = self._claims.get(str(image))
        return max(claims, key=lambda digest: (claims[digest], digest)) if claims else None

    def tags(self, repository: Repository) -> list[Tag]:
        """The tags of `repository`, sorted."""
        prefix = f"{repository}:"
        tags = (Tag(url.removeprefix(prefix)) for url in self._claims if url.startswith(prefix))
        return sorted(tag for tag in tags if not is_referrers_tag(tag))

    def sizes(self, blob: Digest, repository: Repository | None = None) -> set[int]:
        """The sizes in bytes that manifests (of `repository`, if given) give `blob`."""
        return {
            size
            for manifest, size in self.naming(blob).items()
            if repository is None or self._entries[manifest].known_in(repository)
        }

    def uses(self, blob: Digest) -> Mapping[Repository, int]:
        """The repositories with a manifest that names `blob`, and the size in bytes that it gives it."""
        naming = self.naming(blob)
        return {at: size for manifest, size in naming.items() for at in self._entries[manifest].repositories}

    def naming(self, blob: Digest) -> Mapping[Digest, int]:
        """The manifests that name `blob`, and the size in bytes that they give it."""
        return self._naming.get(blob, {})

    def digests(self) -> list[Digest]:
        """All records."""
        return list(self._entries)

    def indexes(self, child: Digest) -> list[Digest]:
        """The indexes that name the manifest `child`, and those that name these, without lists of referrers."""
        found: dict[Digest, None] = {}
        ahead = [child]
        while ahead:
            for index in self._indexes.get(ahead.pop(), ()):
                if index not in found and not self._entries[index].is_referrers:
                    found[index] = None
                    ahead.append(index)
        return list(found)

    def counts(self) -> tuple[int, int]:
        """How many manifest lists and how many image manifests there are."""
        lists = sum(entry.is_list for entry in self._entries.values())
        return lists, len(self._entries) - lists
