"""Import the images of an archive into the store, completely or not at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import ParamSpec, Protocol, TypeVar

from twisted.internet.defer import Deferred

from ociregistry.archives.contents import Contents, NamedImage, narrow
from ociregistry.archives.joining import Entry, describe, entries_of, is_for_one_platform, join
from ociregistry.archives.members import Archive, LoadFailed, Member
from ociregistry.archives.opening import read_contents
from ociregistry.config.values import count_text
from ociregistry.manifests import LARGEST_CONFIG, Descriptor, Manifest
from ociregistry.names import Digest, ImageReference
from ociregistry.platforms import ALL, Platform
from ociregistry.pullthrough.loader import LoadResult, LoadStatus, Progress, without_foreign_layers
from ociregistry.store.partials import DigestMismatch, Partial
from ociregistry.store.records import Dates
from ociregistry.store.store import Store

P = ParamSpec("P")
T = TypeVar("T")


class InThread(Protocol):
    """Runs blocking functions in a thread."""

    def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        """Call `function` in a thread; fire with its result."""


@dataclass(frozen=True, slots=True)
class _Load:
    """The work for one image name."""

    named: NamedImage
    metadata: tuple[Manifest, ...]
    """Images of an index that come as metadata, without their layers."""
    manifests: tuple[Manifest, ...]
    """Children come before the index that names them; the manifest of the image itself is the last."""
    missing: tuple[Descriptor, ...]
    """The blobs that the store lacks."""
    to_bring: tuple[Descriptor, ...]
    """The missing blobs that no earlier image of the archive brings."""
    was_there: bool = False
    """Whether the store had the complete image under this name."""

    @property
    def name(self) -> str:
        """The name of the image."""
        return str(self.named.image)

    def noting(self, *notes: str) -> _Load:
        """Return the same work with more remarks for the operator."""
        return replace(self, named=replace(self.named, notes=(*self.named.notes, *notes)))

    @property
    def joins(self) -> bool:
        """Whether this is an image, or an index, for one platform, which may join those that its tag means already.

        Where the archive tells dates, the name has the meaning that it had in a registry.
        """
        by_tag, root = not isinstance(self.named.image.reference, Digest), self.manifests[-1]
        return by_tag and self.named.dates is None and (not root.is_list or is_for_one_platform(root))

    @property
    def size(self) -> int:
        """The bytes of `to_bring`."""
        return sum(blob.size for blob in self.to_bring)


def _names(meant: Manifest, root: Manifest) -> bool:
    """Tell whether the index `meant` names an image, or all that another index names."""
    named = {child.digest for child in meant.children}
    return {child.digest for child in root.children} <= named if root.is_list else root.digest in named


class Importer:
    """Imports archives into the store.

    The process must not download at the same time, since a partial has one writer.
    """

    def __init__(
        self, store: Store, in_thread: InThread, progress: Progress, platforms: Sequence[Platform] = ALL
    ) -> None:
        """Import images for these `platforms`; of others in an index, as far as there are, the metadata."""
        self._store = store
        self._in_thread = in_thread
        self._progress = progress
        self._platforms = platforms
        self._read: dict[Digest, Manifest] = {}
        """Manifests that were read from the store."""

    async def bring(self, archive: Archive) -> list[LoadResult]:
        """Import all named images of `archive`; return the result for each name.

        Raises:
            ArchiveInvalid: the archive is damaged or contradicts itself; the store is then unchanged.
            LoadFailed: the disk is full or failed; no image name then refers to incomplete content.
        """
        contents = await self._in_thread(read_contents, archive)
        if self._platforms:
            contents = await self._in_thread(narrow, archive, contents, self._platforms)
        try:
            return await self._bring(contents)
        except OSError as error:
            raise LoadFailed(f"{archive.path}: cannot be stored: {error.strerror or error}") from error

    async def _bring(self, contents: Contents) -> list[LoadResult]:
        loads, failed = await self._plan(contents)
        outcomes = [*contents.failed, *failed]
        for outcome in outcomes:
            self._progress.ended(outcome)
        for load in loads:
            self._progress.expect(load.name, load.size)
        async with _staging() as staged:
            for load, blob in _in_order(loads, contents.blobs):
                await self._stage(blob.digest, blob.size, contents.blobs[blob.digest], load.named.image, staged)
            loads = [replace(load, was_there=await self._is_there(load)) for load in loads]
            while staged:
                await self._store.commit(staged[-1])
                staged.pop().close()
        dates = {load.named.image: load.named.dates for load in loads}
        for alike in _alike(loads):
            joined = [await self._joined(load, contents.blobs) for load in alike]
            for same in _grouped(joined, lambda load: tuple(one.digest for one in load.manifests)):
                for outcome in await self._keep(same, dates, contents.blobs):
                    outcomes.append(outcome)
                    self._progress.ended(outcome)
        return outcomes

    async def _plan(self, contents: Contents) -> tuple[list[_Load], list[LoadResult]]:
        """Return the work to do, and a failure for each image that lacks blobs."""
        loads: list[_Load] = []
        failed: list[LoadResult] = []
        taken: set[Digest] = set()
        for named in contents.images:
            tree = contents.tree(named.manifest)
            manifests = tuple(one for one in tree if one.digest not in contents.metadata)
            metadata = tuple([one for one in tree if await self._has_metadata(one, contents)])
            blobs = {blob.digest: blob for one in (*manifests, *metadata) for blob in contents.needed(one)}
            missing = [blob for blob in blobs.values() if not await self._store.holds(blob.digest, blob.size)]
            why = _lacks(manifests, missing, contents.blobs)
            if why:
                failed.append(LoadResult(str(named.image), LoadStatus.FAILED, why))
                continue
            to_bring = [blob for blob in missing if blob.digest not in taken]
            taken.update(blob.digest for blob in to_bring)
            loads.append(_Load(named, metadata, manifests, tuple(missing), tuple(to_bring)))
        return loads, failed

    async def _has_metadata(self, image: Manifest, contents: Contents) -> bool:
        """Tell whether an image comes as metadata, and its config is in the archive or the store."""
        config = image.config
        if image.digest not in contents.metadata or config is None:
            return False
        return config.digest in contents.blobs or await self._store.holds(config.digest, config.size)

    async def _stage(
        self, digest: Digest, size: int, member: Member, image: ImageReference, staged: list[Partial]
    ) -> None:
        """Copy a blob into a partial that is added to `staged`, and verify its digest.

        Raises:
            ArchiveInvalid: the blob does not have the digest, or cannot be read.
            OSError: the disk is full or failed.
        """
        await self._store.check_room(size)
        partial = await self._store.new_partial(digest, size, image.repository, staged=True)
        staged.append(partial)
        pieces = member.pieces()
        while piece := await self._in_thread(_next, pieces):
            await partial.append(piece)
            self._progress.advance(str(image), len(piece))
        try:
            await partial.verify()
        except DigestMismatch:
            raise member.invalid(f"it does not have the digest {digest}") from None

    async def _is_there(self, load: _Load) -> bool:
        """Tell whether the store has the complete image under this name."""
        *inner, root = load.manifests
        if load.missing:
            return False
        if self._store.meaning(load.named.image) != root.digest:
            meant = await self._meant(load.named.image) if load.joins else None
            if meant is None or not _names(meant, root):
                return False
            inner = [one for one in load.manifests if not one.is_list]
        return all([await self._store.missing(manifest.digest) is not None for manifest in inner])

    async def _joined(self, load: _Load, blobs: Mapping[Digest, Member]) -> _Load:
        """Join an image or index for one platform with what its tag means in the store.

        Images for several platforms become an index that is made here. An image of the same platform is replaced.
        """
        root = load.manifests[-1]
        if not load.joins or self._store.meaning(load.named.image) == root.digest:
            return load
        meant = await self._meant(load.named.image)
        if meant is None or meant.digest == root.digest:
            return load
        if _names(meant, root):
            return replace(load, manifests=(*load.manifests, meant))
        known, new = await self._entries(meant, blobs), await self._entries(root, blobs)
        if not known or not new:
            return load.noting(f"it takes the name from {meant.digest}")
        joined = join(known, new)
        notes = [f"it replaces {digest} for {platform}" for digest, platform in joined.replaced.items()]
        if len(joined.platforms) == 1:
            return load.noting(*notes)
        notes.append(f"the name means an index of {', '.join(joined.platforms)}, made here: it is not the registry's")
        return replace(load.noting(*notes), manifests=(*load.manifests, joined.index))

    async def _entries(self, meant: Manifest, blobs: Mapping[Digest, Member]) -> Sequence[Entry]:
        """Return the entries of an index, or the one for an image; none if that does not tell its platform."""
        if meant.is_list:
            return entries_of(meant)
        entry = describe(meant, await self._config(meant, blobs))
        return [] if entry is None else [entry]

    async def _config(self, image: Manifest, blobs: Mapping[Digest, Member]) -> bytes:
        """Read the config of an image from the archive or the store; empty if there is none, or it is too large."""
        config = image.config
        if config is None or config.size > LARGEST_CONFIG:
            return b""
        if config.digest in blobs:
            return await self._in_thread(b"".join, blobs[config.digest].pieces())
        stored = await self._store.blob(config.digest)
        if stored is None:
            return b""
        try:
            data = b""
            while len(data) < stored.size:
                data += await stored.read(len(data), stored.size)
            return data
        finally:
            stored.close()

    async def _meant(self, image: ImageReference) -> Manifest | None:
        """Return the manifest that `image` means in the store, or None; each is read once."""
        digest = self._store.meaning(image)
        if digest is None or digest in self._read:
            return self._read.get(digest) if digest is not None else None
        found = await self._store.manifest(image)
        if found is not None:
            self._read[found.digest] = found
        return found

    async def _keep(
        self,
        loads: Sequence[_Load],
        dates: Mapping[ImageReference, Dates | None],
        blobs: Mapping[Digest, Member],
    ) -> list[LoadResult]:
        """Write the records of the manifests that all `loads` have; the one with the names last.

        So a name never lacks content, and each record is written once however many names it gets. A child of an
        index gets the `dates` that the archive gives it, else those of the index.
        """
        *inner, root = loads[0].manifests
        for one in loads[0].metadata:
            (first, known), *others = _children(one, loads, {})
            await self._store.keep(one, first, known, also=others, wanted=False)
        named = [(load.named.image, dates.get(load.named.image, load.named.dates)) for load in loads]
        for manifest, names in [*((one, _children(one, loads, dates)) for one in inner), (root, named)]:
            if not await self._keep_whole(manifest, names, blobs):
                why = "blobs of it were pruned while it was loaded, and the archive does not have them"
                return [LoadResult(load.name, LoadStatus.FAILED, why) for load in loads]
        foreign = {digest: size for one in loads[0].manifests for digest, size in one.foreign_layers.items()}
        missing = await self._store.missing_foreign_layers(foreign)
        return [self._kept(load, missing) for load in loads]

    def _kept(self, load: _Load, missing_foreign: Mapping[Digest, int]) -> LoadResult:
        notes = load.named.notes
        if missing_foreign:
            notes += (without_foreign_layers(missing_foreign),)
        meant = self._store.meaning(load.named.image)
        if meant not in (None, load.manifests[-1].digest):
            why = "which was confirmed later, or the archive's date is in the future"
            notes += (f"the name still means {meant}, {why}",)
        ended = LoadStatus.PRESENT if load.was_there else LoadStatus.LOADED
        return LoadResult(load.name, ended, notes=notes, blobs=len(load.to_bring), bytes=load.size)

    async def _keep_whole(
        self,
        manifest: Manifest,
        names: Sequence[tuple[ImageReference, Dates | None]],
        blobs: Mapping[Digest, Member],
    ) -> bool:
        """Write a record with these names once all its blobs are stored; tell whether that succeeded.

        Blobs that were pruned meanwhile are copied from the archive again.
        """
        wanted = None if manifest.is_list else True
        (image, dates), *others = names
        while not await self._store.keep(manifest, image, dates, also=others, wanted=wanted, whole=True):
            missing = await self._store.missing_blobs(manifest)
            if not missing.keys() <= blobs.keys():
                return False
            async with _staging() as staged:
                for digest, size in missing.items():
                    await self._stage(digest, size, blobs[digest], image, staged)
                while staged:
                    await self._store.commit(staged[-1])
                    staged.pop().close()
        return True


def _children(
    manifest: Manifest, loads: Iterable[_Load], dates: Mapping[ImageReference, Dates | None]
) -> list[tuple[ImageReference, Dates | None]]:
    """Return the names by digest of a child of the index that all `loads` have, in the repositories of these."""
    images = ((ImageReference(load.named.image.repository, manifest.digest), load.named.dates) for load in loads)
    return list(dict.fromkeys((image, dates.get(image, of_index)) for image, of_index in images))


def _alike(loads: Sequence[_Load]) -> list[list[_Load]]:
    """Group the loads by manifest; those of a name that several manifests have stay alone, to be joined in turn."""
    often = Counter(load.name for load in loads)
    return _grouped(loads, lambda load: (load.named.manifest, load.name if often[load.name] > 1 else ""))


def _grouped(loads: Iterable[_Load], key: Callable[[_Load], Hashable]) -> list[list[_Load]]:
    groups: dict[Hashable, list[_Load]] = {}
    for load in loads:
        groups.setdefault(key(load), []).append(load)
    return list(groups.values())


def _lacks(manifests: Sequence[Manifest], missing: Sequence[Descriptor], blobs: Mapping[Digest, Member]) -> str:
    """Return why an image cannot be imported; the empty string if it can.

    Raises:
        ArchiveInvalid: a blob does not have the size that its manifest tells.
    """
    if all(manifest.is_list for manifest in manifests):
        return "the archive has none of the images that it lists"
    absent = []
    for blob in missing:
        member = blobs.get(blob.digest)
        if member is None:
            absent.append(blob)
        elif member.size != blob.size:
            raise member.invalid(f"it has {member.size} bytes, not {blob.size} as its manifest says")
    if not absent:
        return ""
    size = count_text(sum(blob.size for blob in absent), "byte")
    return (
        f"neither in the archive nor in the store: {count_text(len(absent), 'blob')}, {size}; "
        "if it was made with --since, load the earlier export first"
    )


def _in_order(loads: Sequence[_Load], blobs: Mapping[Digest, Member]) -> list[tuple[_Load, Descriptor]]:
    """Return the blobs to bring in the order of the archive, which is the fastest to read."""
    pairs = [(load, blob) for load in loads for blob in load.to_bring]
    return sorted(pairs, key=lambda pair: blobs[pair[1].digest].order)


def _next(pieces: Iterator[bytes]) -> bytes:
    return next(pieces, b"")


@asynccontextmanager
async def _staging() -> AsyncIterator[list[Partial]]:
    """Yield a list for partials; discard those that are still in it at the end."""
    staged: list[Partial] = []
    try:
        yield staged
    finally:
        for partial in staged:
            # Report the original error.
            with suppress(OSError):
                await partial.discard()
            partial.close()
