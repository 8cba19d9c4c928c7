"""What memory knows of the records in the store: each question is answered at once, without the disk."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import dataclass
from functools import partial

from ociregistry.names import Digest, ImageReference, Repository, Tag
from ociregistry.store.index import Entry, Index


@dataclass(frozen=True, slots=True)
class Counts:
    """The numbers of records in the store: indexes (`lists`) and image manifests (`images`)."""

    lists: int
    images: int


class Lookups:
    """The questions about records that the index answers."""

    def __init__(self, index: Index) -> None:
        self._index = index

    @property
    def counts(self) -> Counts:
        """The numbers of records."""
        return Counts(*self._index.counts())

    def meaning(self, image: ImageReference) -> Digest | None:
        """Return the manifest that `image` means according to memory, or None; its record may not be readable."""
        return self._index.resolve(image)

    def meanings(self, image: ImageReference) -> Callable[[], Digest | None]:
        """Return a function for many calls, each of which returns what `meaning` does at that time."""
        if isinstance(image.reference, Digest):
            return partial(self._index.resolve, image)
        # Spelling the image takes most of the time of a lookup.
        return partial(self._index.meaning, str(image))

    def entry(self, digest: Digest) -> Entry | None:
        """Return what memory keeps of the record `digest`, or None if there is no record."""
        return self._index.get(digest)

    @property
    def digests(self) -> Collection[Digest]:
        """The digests of all records."""
        return self._index.digests

    def indexes(self, child: Digest) -> Collection[Digest]:
        """Return the indexes that name the manifest `child`, directly or through other indexes."""
        return self._index.indexes(child)

    def tags(self, repository: Repository) -> list[Tag]:
        """Return the tags of `repository` that the cache knows, sorted."""
        return self._index.tags(repository)

    def disputed(self, image: ImageReference) -> bool:
        """Tell whether several records have the tag `image`: a copied one, or one with a wrong date."""
        return len(self._index.claims(str(image))) > 1

    def size_in(self, repository: Repository, digest: Digest) -> int | None:
        """Return the size in bytes that the manifests of `repository` give the blob.

        Returns:
            None when no manifest names the blob, or when manifests give it different sizes.
        """
        sizes = self._index.sizes(digest, repository)
        return sizes.pop() if len(sizes) == 1 else None

    def repositories(self, manifest: Digest) -> Set[Repository]:
        """Return the repositories in which a manifest is known."""
        entry = self._index.get(manifest)
        return entry.repositories if entry is not None else set()

    def shown_in(self, repository: Repository, manifest: Digest) -> bool:
        """Tell whether a manifest, or an index that names it, is known in `repository`."""
        return self._index.shown_in(repository, manifest)

    def uses(self, blob: Digest) -> Mapping[Repository, int]:
        """Return the repositories with an image that has this blob, and the size in bytes that it gives the blob."""
        return self._index.uses(blob)

    def naming(self, blob: Digest) -> Mapping[Digest, int]:
        """Return the manifests that name this blob, and the size in bytes that each gives it."""
        return self._index.naming(blob)
