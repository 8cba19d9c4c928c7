"""The index: what the records say, with the lookups by tag, repository, blob and child, all in memory.

The daemon keeps one index fresh from the files (`scan`), the commands build theirs from the files (`snapshot`).
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from sys import intern

from ociregistry.manifests import Descriptor
from ociregistry.names import Digest, ImageReference, Repository, Tag
from ociregistry.store.records import Confirmation, Dates, Record

_REFERRERS_TAG = re.compile("sha(256|512)-[0-9a-f]{64}")


def is_referrers_tag(tag: str) -> bool:
    """Tell whether a tag is one of the referrers tag schema (OCI distribution-spec), so not the tag of an image."""
    return _REFERRERS_TAG.fullmatch(tag) is not None


@dataclass(frozen=True, slots=True)
class Entry:
    """The part of a record that is kept in memory."""

    is_list: bool
    images: Mapping[str, Dates]
    """Image URL -> when it was first and last confirmed."""
    blobs: Mapping[Digest, int]
    """Blob that the manifest names -> its size in bytes."""
    config: Descriptor | None = None
    children: tuple[Descriptor, ...] = ()
    """The manifests that an index names."""
    foreign_layers: Mapping[Digest, int] = field(default_factory=dict)
    """The layers that an image may lack, and their sizes in bytes."""
    wanted: bool | None = None
    """Whether the layers of the image belong in the store.

    None if the record does not say it, and it was not determined from the blobs either.
    """
    media_type: str = ""

    @classmethod
    def of(cls, record: Record, *, wanted: bool | None = None) -> Entry:
        """Make the entry for `record`; `wanted` applies where the record does not say."""
        manifest = record.manifest
        return cls(
            is_list=manifest.is_list,
            images=record.images,
            blobs=manifest.blob_sizes,
            config=manifest.config,
            children=manifest.children,
            foreign_layers=manifest.foreign_layers,
            wanted=wanted if record.wanted is None else record.wanted,
            media_type=intern(manifest.media_type),
        )

    @property
    def layers(self) -> Set[Digest]:
        """The layers of an image, without a layer that is the same blob as the config."""
        return self.blobs.keys() - {self.config.digest} if self.config is not None else frozenset()

    @property
    def required(self) -> Mapping[Digest, int]:
        """The blobs without which an image is incomplete, and their sizes in bytes."""
        foreign = self.foreign_layers
        return {blob: size for blob, size in self.blobs.items() if blob not in foreign} if foreign else self.blobs

    @property
    def is_referrers(self) -> bool:
        """Whether it is known only by referrers tags: its children are artifacts, not platforms."""
        return bool(self.images) and all(is_referrers_tag(url.rpartition(":")[2]) for url in self.images)

    @property
    def repositories(self) -> set[Repository]:
        """The repositories in which the manifest is known."""
        return {ImageReference.parse_whole(url).repository for url in self.images}

    def known_in(self, repository: Repository) -> bool:
        """Tell whether an image URL of `repository` means this manifest."""
        prefix = str(repository)
        return any(url.startswith((f"{prefix}:", f"{prefix}@")) for url in self.images)


Claim = tuple[datetime, Digest]
"""A record that has an image URL, after the time at which it was last confirmed to."""

_SKEW = timedelta(minutes=5)
"""Difference that is usual between the clocks of machines that share a store or have replicas of it."""


def newest(claims: Sequence[Claim], now: datetime) -> Digest:
    """Return which of the records in `claims`, which are sorted, an image URL means at the time `now`.

    The newest confirmation wins; of several at the same time, the greatest digest, so that replicas agree. But one
    that is later than now was noted while a clock was wrong, and loses to all others.
    """
    past = bisect_right(claims, now + _SKEW, key=itemgetter(0))
    return claims[past - 1 if past else -1][1]


class Index:
    """The entries of all records."""

    def __init__(self, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._now = now
        self._entries: dict[Digest, Entry] = {}
        self._claims: dict[str, list[Claim]] = {}
        """Image URL -> the records that have it, sorted."""
        self._naming: dict[Digest, Digest | dict[Digest, int]] = {}
        """Blob -> the manifest that names it; for several, a mapping of each to the size in bytes that it gives.

        Most blobs belong to one image, and a mapping for each of them would take a quarter of the index's memory.
        """
        self._parents: dict[Digest, set[Digest]] = {}
        """Manifest -> the indexes that name it."""

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, digest: Digest, entry: Entry) -> None:
        """Set the entry of the record `digest`, replacing an earlier one; an equal one changes nothing."""
        before = self._entries.get(digest)
        if before is not None:
            if before == entry:
                return
            self._remove(digest, before)
        self._entries[digest] = entry
        for url, dates in entry.images.items():
            insort(self._claims.setdefault(url, []), (dates.confirmed, digest))
        for blob, size in entry.blobs.items():
            naming = self._naming.setdefault(blob, digest)
            if isinstance(naming, dict):
                naming[digest] = size
            elif naming != digest:
                self._naming[blob] = {naming: self._entries[naming].blobs[blob], digest: size}
        for child in entry.children:
            self._parents.setdefault(child.digest, set()).add(digest)

    def drop(self, digest: Digest) -> None:
        """Remove the record `digest`, if it is there."""
        entry = self._entries.get(digest)
        if entry is not None:
            self._remove(digest, entry)

    def _remove(self, digest: Digest, entry: Entry) -> None:
        del self._entries[digest]
        for url, dates in entry.images.items():
            claims = self._claims[url]
            del claims[bisect_left(claims, (dates.confirmed, digest))]
            if not claims:
                del self._claims[url]
        for blob in entry.blobs:
            naming = self._naming[blob]
            if isinstance(naming, dict):
                del naming[digest]
            if not isinstance(naming, dict) or not naming:
                del self._naming[blob]
        for child in {child.digest for child in entry.children}:
            parents = self._parents[child]
            parents.discard(digest)
            if not parents:
                del self._parents[child]

    # Records

    def get(self, digest: Digest) -> Entry | None:
        """Return the entry of the record `digest`, or None."""
        return self._entries.get(digest)

    @property
    def digests(self) -> list[Digest]:
        """The digests of all records."""
        return list(self._entries)

    def entries(self) -> Mapping[Digest, Entry]:
        """Return the entries of all records at this time, for another thread."""
        return dict(self._entries)

    def counts(self) -> tuple[int, int]:
        """Return the number of indexes and the number of image manifests."""
        lists = sum(entry.is_list for entry in self._entries.values())
        return lists, len(self._entries) - lists

    # Image URLs

    def resolve(self, image: ImageReference) -> Digest | None:
        """Return the record that `image` means, or None: a digest in any repository, a tag as `meaning` says."""
        if isinstance(image.reference, Digest):
            return image.reference if image.reference in self._entries else None
        return self.meaning(str(image))

    def meaning(self, url: str) -> Digest | None:
        """Return the record that an image URL means, the one confirmed last of those that have it, or None."""
        claims = self.claims(url)
        if len(claims) == 1:
            return claims[0][1]
        return newest(claims, self._now()) if claims else None

    def claims(self, url: str) -> Sequence[Claim]:
        """Return the records that have this image URL, the one confirmed last at the end."""
        return self._claims.get(url, ())

    def claimants(self, url: str) -> Set[Digest]:
        """Return the records that have this image URL."""
        return {digest for _, digest in self.claims(url)}

    def rivals(self, digest: Digest, image: ImageReference) -> Mapping[Digest, bool]:
        """Return the other records from which `digest` takes the tag `image` when it is confirmed to mean that now.

        Returns:
            Record -> whether it is that of an index.
        """
        if is_referrers_tag(str(image.reference)):
            # Only such a tag tells a list of referrers from an index of images.
            return {}
        return {other: self._entries[other].is_list for other in self.claimants(str(image)) - {digest}}

    def confirmation(self, digest: Digest, image: ImageReference, dates: Dates | None) -> Confirmation:
        """Return what to note in the record `digest` when `image` means it, as of now or of the given `dates`."""
        if dates is not None:
            return Confirmation(image, dates.confirmed, dates.created)
        return Confirmation(image, self.next_confirmation(image), rivals=self.rivals(digest, image))

    def next_confirmation(self, image: ImageReference) -> datetime:
        """Return the time to note when `image` is confirmed now.

        It is later than every known one, unless that was noted while a clock was wrong.
        """
        now, claims = self._now(), self.claims(str(image))
        past = bisect_right(claims, now + _SKEW, key=itemgetter(0))
        return max(now, claims[past - 1][0] + timedelta(microseconds=1)) if past else now

    def tags(self, repository: Repository) -> list[Tag]:
        """Return the tags of `repository`, sorted, without referrers tags."""
        prefix = f"{repository}:"
        tags = (Tag(url.removeprefix(prefix)) for url in self._claims if url.startswith(prefix))
        return sorted(tag for tag in tags if not is_referrers_tag(tag))

    # Blobs

    @property
    def blobs(self) -> Set[Digest]:
        """All blobs that records name."""
        return self._naming.keys()

    def naming(self, blob: Digest) -> Mapping[Digest, int]:
        """Return the manifests that name `blob`, and the size in bytes that each gives it."""
        naming = self._naming.get(blob, {})
        return naming if isinstance(naming, dict) else {naming: self._entries[naming].blobs[blob]}

    def named_only_by(self, blob: Digest, manifests: Set[Digest]) -> bool:
        """Tell whether no other manifest than these names `blob`."""
        naming = self._naming.get(blob, {})
        return naming.keys() <= manifests if isinstance(naming, dict) else naming in manifests

    def gives(self, blob: Digest, size: int) -> bool:
        """Tell whether a manifest gives `blob` this size in bytes."""
        naming = self._naming.get(blob, {})
        return size in naming.values() if isinstance(naming, dict) else self._entries[naming].blobs[blob] == size

    def sizes(self, blob: Digest, repository: Repository | None = None) -> set[int]:
        """Return the sizes in bytes that manifests (of `repository`, if given) give `blob`."""
        return {
            size
            for manifest, size in self.naming(blob).items()
            if repository is None or self._entries[manifest].known_in(repository)
        }

    def uses(self, blob: Digest) -> Mapping[Repository, int]:
        """Return the repositories with a manifest that names `blob`, and the size in bytes that it gives the blob."""
        naming = self.naming(blob)
        return {at: size for manifest, size in naming.items() for at in self._entries[manifest].repositories}

    # Indexes and their children

    def parents(self, child: Digest) -> Set[Digest]:
        """Return the indexes that name the manifest `child`, which needs no record."""
        return self._parents.get(child, frozenset())

    def children(self, digest: Digest) -> list[Digest]:
        """Return the manifests that the record `digest` names, without those that have no record."""
        return [child.digest for child in self._entries[digest].children if child.digest in self._entries]

    def ancestors(self, child: Digest) -> Set[Digest]:
        """Return the indexes that name the manifest `child`, directly or through other indexes."""
        return _reached(child, self.parents)

    def descendants(self, digest: Digest) -> Set[Digest]:
        """Return the manifests with records that the record `digest` names, directly or through other indexes."""
        return _reached(digest, self.children)

    def shown_in(self, repository: Repository, digest: Digest) -> bool:
        """Tell whether the manifest `digest`, or an index that names it, is known in `repository`."""
        entries = map(self._entries.get, [digest, *self.ancestors(digest)])
        return any(entry is not None and entry.known_in(repository) for entry in entries)

    def indexes(self, child: Digest) -> Set[Digest]:
        """Return the ancestors of the manifest `child`, without lists of referrers and what is only above these."""
        return _reached(
            child, lambda one: [index for index in self.parents(one) if not self._entries[index].is_referrers]
        )


def _reached(start: Digest, following: Callable[[Digest], Iterable[Digest]]) -> Set[Digest]:
    found: set[Digest] = set()
    ahead = [start]
    while ahead:
        new = [one for one in following(ahead.pop()) if one not in found]
        found.update(new)
        ahead += new
    return found
