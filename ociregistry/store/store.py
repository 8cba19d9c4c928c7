"""The store: the only door to the disk. It knows files and digests, and nothing of networks or clients."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorFromThreads, IReactorTime
from twisted.logger import Logger

from ociregistry.config.quantities import USUAL_RESERVE, Reserve
from ociregistry.manifests import Manifest
from ociregistry.names import Digest, ImageReference, Repository, Tag
from ociregistry.store.blobs import StoredBlob, missing_blobs, open_blob, size_of_blob
from ociregistry.store.catalogue import Entry
from ociregistry.store.door import Door
from ociregistry.store.files import Files
from ociregistry.store.orphans import remove_partials
from ociregistry.store.partials import Partial
from ociregistry.store.pruning import Choose, Plan, prune
from ociregistry.store.pulls import STAGED_SUFFIX, PullsFolder
from ociregistry.store.recordfiles import IMAGES_FOLDER, LISTS_FOLDER, RecordFiles
from ociregistry.store.records import Dates, Record, RecordInvalid
from ociregistry.store.space import Claim, Room, Space
from ociregistry.store.threads import Threads
from ociregistry.store.verifying import Findings, Found, Verifier
from ociregistry.store.view import View
from ociregistry.store.wishes import WishFiles, wanted_blobs

_FOR_REFERRERS = re.compile("sha(256|512)-[0-9a-f]{64}")
"""Tags that the specification sets aside for lists of referrers; nobody pushed them."""


@dataclass(frozen=True, slots=True)
class Counts:
    """How much the store holds."""

    lists: int
    images: int


class Store:
    """Records, blobs and partials below one folder, and the view of them in memory."""

    log = Logger(namespace="ociregistry.store")

    def __init__(
        self,
        root: Path,
        clock: IReactorTime,
        reactor: IReactorFromThreads,
        files: Files | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        reserve: Reserve = USUAL_RESERVE,
    ) -> None:
        """`reserve` is the room on the disk that is left free whatever is being written."""
        self._root = root
        self._blobs = root / "blobs"
        self._verified = root / "pulls" / "verified"
        self._now = now
        self._files = files or Files()
        self._threads = Threads(reactor)
        self._clock = clock
        self._space = Space(root, reserve, self._remove_partials, self._threads, clock)
        self._committed: dict[Digest, int] = {}
        """Blobs that this process committed, for those that no record names (yet)."""
        self.wishes: dict[Digest, Repository] = {}
        """The images that are to be completed, each with the repository that it comes from."""

    def start(self, *, adopts: bool = True) -> None:
        """Makes the folders, takes a pulls/<n>/ and reads all records, then keeps looking every second.

        Who `adopts` nothing leaves what ended processes left to the next one. Blocks until the records are read, so
        that whoever finds the port open finds the whole cache. Raises `OSError`.
        """
        for folder in (self._blobs, self._root / LISTS_FOLDER, self._root / IMAGES_FOLDER):
            folder.mkdir(parents=True, exist_ok=True)
        self._pulls = PullsFolder(self._root, self._files, adopts=adopts)
        self._files.sync_folder(self._root)
        self._records = RecordFiles(self._root, self._pulls, self._files)
        self._wishes = WishFiles(self._pulls.path, self._files)
        self.wishes = dict(self._wishes.read())
        self._view = View(self._records, self._threads, self._clock)
        self._catalogue = self._view.catalogue
        self._view.read()
        self._threads.start()
        self._view.start()
        self._space.start()

    def stop(self) -> None:
        """Ends the threads, after what they are at."""
        self._view.stop()
        self._space.stop()
        self._threads.stop()
        self._pulls.close()

    def door(self) -> Door:
        """Where this process may listen for others on the same store; whoever gets it closes it. Raises `OSError`."""
        door = Door(self._pulls.path)
        door.clear()
        return door

    @property
    def counts(self) -> Counts:
        """How many records there are."""
        return Counts(*self._catalogue.counts())

    @property
    def room(self) -> Room:
        """What is free on the disk."""
        return self._space.room

    def use(self, reserve: Reserve) -> None:
        """Leaves this much free from now on."""
        self._space.use(reserve)

    # Manifests

    async def manifest(self, image: ImageReference) -> Manifest | None:
        """The manifest that `image` means, read from its record; None is a miss.

        A digest is found whichever repository it came from, and is then known by this one too.
        """
        while True:
            digest = self._catalogue.resolve(image)
            if digest is None:
                return None
            record = await self._read(digest)
            if record is None:
                continue
            if record.means(image):
                break
            self._catalogue.put(digest, Entry.of(record))
        if not Entry.of(record).known_in(image.repository):
            noted = Deferred.fromCoroutine(self.keep(record.manifest, image, known=True))
            noted.addErrback(
                lambda failure: self.log.warn(
                    "cannot note the pull of {image}: {why}", image=image, why=failure.value
                )
            )
        return record.manifest

    async def _read(self, digest: Digest) -> Record | None:
        """The record as it is on disk now; None, and forgotten, when there is none."""
        entry = self._catalogue.get(digest)
        assert entry is not None
        path = self._records.path(digest, is_list=entry.is_list)
        now = self._now().timestamp()
        try:
            record, to_note = await self._threads.read(self._records.read_for_pull, path, now)
        except (RecordInvalid, OSError) as error:
            if not isinstance(error, FileNotFoundError):
                self.log.error("cannot read the record {path}: {why}", path=path, why=error)
            self._view.lost(path)
            return None
        if to_note:
            # Not where hits are read: it may wait for the disk.
            self._threads.write(self._records.note_pull, path, now)
        return record

    async def keep(
        self,
        manifest: Manifest,
        image: ImageReference,
        dates: Dates | None = None,
        *,
        whole: bool = False,
        known: bool = False,
    ) -> bool:
        """Writes that `image` means `manifest`, as of now or of these `dates`; whether it did. Raises `OSError`.

        It does not where the image is to be `whole` and lacks a blob, or is to be `known` and has no record any more.
        """
        confirmed, created = (dates.confirmed, dates.created) if dates else (self._now(), None)
        args = manifest, image, confirmed, created
        record = await self._threads.write_in_turn(self._records.confirm, *args, whole=whole, known=known)
        if record is not None:
            self._view.wrote(record)
        return record is not None

    async def restore(
        self, manifest: Manifest, images: Mapping[ImageReference, Dates], fetched: ImageReference
    ) -> None:
        """Writes that `images` mean `manifest`, as a lost record had it; `fetched` is by what it was asked for since.

        Raises `OSError`.
        """
        noted = {str(image): dates for image, dates in images.items()}
        self._view.wrote(await self._threads.write_in_turn(self._records.restore, manifest, noted, str(fetched)))

    def tags(self, repository: Repository) -> list[Tag]:
        """The tags of `repository` that the cache knows, sorted."""
        return [tag for tag in self._catalogue.tags(repository) if not _FOR_REFERRERS.fullmatch(tag)]

    # Blobs

    def size_in(self, repository: Repository, digest: Digest) -> int | None:
        """The size in bytes that the manifests of `repository` give the blob, or None if none (or two) do."""
        sizes = self._catalogue.sizes(digest, repository)
        return sizes.pop() if len(sizes) == 1 else None

    async def blob(self, digest: Digest) -> StoredBlob | None:
        """The whole blob, open for reading; None is a miss.

        It counts as there when its size is one that a manifest gives it: a half-copied one is a miss.
        """
        opened = await self._threads.read(open_blob, self._blobs / digest.hex)
        if opened is None:
            return None
        file, size = opened
        if size not in self._catalogue.sizes(digest) and self._committed.get(digest) != size:
            file.release()
            return None
        return StoredBlob(digest, file, size, self._threads)

    async def lacking(self, manifest: Manifest) -> Mapping[Digest, int]:
        """The blobs that `manifest` names and that are not there, and their sizes in bytes, record or not."""
        return await self._threads.read(missing_blobs, self._blobs, manifest.blob_sizes)

    async def holds(self, digest: Digest, size: int) -> bool:
        """Whether a blob is there, and has this size in bytes."""
        return await self._threads.read(size_of_blob, self._blobs / digest.hex) == size

    # Images

    async def wish(self, manifest: Digest, repository: Repository) -> None:
        """Notes that all blobs of the image `manifest` are to be fetched. Raises `OSError`."""
        if manifest not in self.wishes:
            self.wishes[manifest] = repository
            await self._threads.write_in_turn(self._wishes.write, manifest, repository)

    async def unwish(self, manifest: Digest) -> None:
        """Notes that they are not, or are there. Raises `OSError`."""
        del self.wishes[manifest]
        await self._threads.write_in_turn(self._wishes.remove, manifest)

    async def missing(self, manifest: Digest) -> Mapping[Digest, int] | None:
        """The blobs that the image `manifest` lacks, and their sizes in bytes; None if it has no record."""
        entry = self._catalogue.get(manifest)
        if entry is None:
            return None
        return await self._threads.read(missing_blobs, self._blobs, entry.blobs)

    def uses(self, blob: Digest) -> Mapping[Repository, int]:
        """The repositories that have an image with this blob, and the size in bytes that its manifest gives it."""
        return self._catalogue.uses(blob)

    def naming(self, blob: Digest) -> Collection[Digest]:
        """The manifests that name this blob."""
        return self._catalogue.naming(blob)

    # Upkeep

    async def prune(self, choose: Choose) -> Plan:
        """Takes away what `choose` says, and gives what that was. Raises `OSError`."""
        return await self._threads.write(prune, self._root, choose, self._pulls, self._files)

    async def verify(self, max_rate: float | None, came: Callable[[int, int], object], found: Found) -> Findings:
        """As `Verifier` has it. Raises `OSError`."""
        verifier = Verifier(self._root, self._pulls, self._files, self._threads, self._clock, found)
        findings = await verifier.verify(max_rate, came)
        await self._threads.write(self._verified.touch)
        return findings

    async def last_verified(self, now: datetime) -> datetime:
        """When that ended last; if it never did, `now` counts as that from now on. Raises `OSError`."""
        return await self._threads.write(_stamp, self._verified, now)

    # Partials

    async def new_partial(
        self, digest: Digest, size: int | None, source: Repository, claim: Claim, *, staged: bool = False
    ) -> Partial:
        """An empty partial that is to become the blob `digest` of `size` bytes. Raises `OSError`.

        A `staged` one lies beside a download of the same blob, which may be taken up again.
        """
        path = self._pulls.path / (f"{digest.hex}{STAGED_SUFFIX}" if staged else digest.hex)
        args = digest, path, size, str(source), claim, self._files, self._threads
        return await self._threads.write(Partial.create, *args)

    async def old_partial(self, digest: Digest, claim: Claim) -> Partial | None:
        """What an earlier download left of the blob `digest`, or None. Raises `OSError`."""
        path = self._pulls.path / digest.hex
        return await self._threads.write(Partial.resume, digest, path, claim, self._files, self._threads)

    def claim(self) -> Claim:
        """Return a claim on room for a blob, which is for no bytes yet; it is released with its partial."""
        return self._space.claim()

    def _remove_partials(self, missing: int) -> None:
        remove_partials(self._root, wanted_blobs(self._root, self._blobs_of), missing, self._files)

    def _blobs_of(self, manifest: Digest) -> Iterable[Digest]:
        entry = self._catalogue.get(manifest)
        return entry.blobs if entry is not None else ()

    async def commit(self, partial: Partial) -> None:
        """Makes the verified `partial` a blob that counts as there. Raises `OSError`."""
        await partial.commit(self._blobs / partial.digest.hex)
        self._committed[partial.digest] = partial.length


def _stamp(path: Path, now: datetime) -> datetime:
    """When the file changed last; it is made as of `now`, if it is not there."""
    if not path.exists():
        path.touch()
        os.utime(path, (now.timestamp(), now.timestamp()))
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)
