"""The store: the only door to the disk. It knows files and digests, and nothing of networks or clients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorFromThreads, IReactorTime
from twisted.logger import Logger

from ociregistry.config.values import USUAL_RESERVE, Reserve
from ociregistry.manifests import LARGEST_CONFIG, Manifest
from ociregistry.names import Digest, ImageReference, Repository, Tag
from ociregistry.store.blobs import StoredBlob, missing_blobs, open_blob, size_of_blob
from ociregistry.store.files import Files, Threads, is_full
from ociregistry.store.index import View
from ociregistry.store.orphans import remove_partials
from ociregistry.store.partials import Partial
from ociregistry.store.paths import IMAGES_FOLDER, LISTS_FOLDER, STAGED_SUFFIX, blobs_folder, pulls_folder
from ociregistry.store.prune import Choose, Plan, prune
from ociregistry.store.records import Dates, Entry, Record, RecordFiles, RecordInvalid
from ociregistry.store.space import Room, Space
from ociregistry.store.verify import Findings, Found, Verifier, last_verified, note_verified
from ociregistry.store.workdir import ControlSocket, PendingFiles, PendingImage, PullsFolder, wanted_blobs


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
        self._blobs = blobs_folder(root)
        self._now = now
        self._files = files or Files()
        self._threads = Threads(reactor)
        self._clock = clock
        self._space = Space(root, reserve, self._remove_partials, self._threads, clock)
        self._committed: dict[Digest, int] = {}
        """Blobs that this process committed, for those that no record names (yet)."""
        self.pending: dict[Digest, Repository] = {}
        """The images that are to be completed, each with the repository that it comes from."""
        self.undecided: dict[Digest, Repository] = {}
        """The images of an index that were asked for, and may not be wanted."""

    def start(self, *, adopts: bool = True) -> None:
        """Makes the folders and reads all records, then keeps looking every second.

        Who `adopts` takes a pulls/<n>/ at once, with what ended processes left; on a disk without space for a new one
        it goes on without. Blocks until the records are read, so that whoever finds the port open finds the whole
        cache. Raises `OSError`.
        """
        for folder in (self._blobs, self._root / LISTS_FOLDER, self._root / IMAGES_FOLDER):
            folder.mkdir(parents=True, exist_ok=True)
        self._pulls = PullsFolder(self._root, self._files, adopts=adopts)
        self._records = RecordFiles(self._root, self._pulls, self._files, self._space.spend)
        if adopts:
            self._adopt()
        self._files.sync_folder(self._root)
        self._view = View(self._records, self._threads, self._clock)
        self._catalogue = self._view.catalogue
        self._view.read()
        self._threads.start()
        self._view.start()
        self._space.start()

    def _adopt(self) -> None:
        try:
            files = self._pending_files()
        except OSError as error:
            if not is_full(error):
                raise
            self.log.warn(
                "only what is in the store can be served until there is space for a folder in {pulls}: {why}",
                pulls=pulls_folder(self._root),
                why=error.strerror,
            )
        else:
            for pending in files.read():
                (self.undecided if pending.undecided else self.pending)[pending.image] = pending.repository

    def _pending_files(self) -> PendingFiles:
        """Blocks, as it may have to take the folder. Raises `OSError`."""
        return PendingFiles(self._pulls.path, self._files)

    def stop(self) -> None:
        """Ends the threads, after what they are at."""
        self._view.stop()
        self._space.stop()
        self._threads.stop()
        self._pulls.close()

    def control_socket(self) -> ControlSocket:
        """Where this process may listen for others on the same store; whoever gets it closes it. Raises `OSError`."""
        control_socket = ControlSocket(self._pulls.path)
        control_socket.clear()
        return control_socket

    @property
    def counts(self) -> Counts:
        """How many records there are."""
        return Counts(*self._catalogue.counts())

    @property
    def room(self) -> Room:
        """What is free on the disk."""
        return self._space.room

    def reconfigure(self, reserve: Reserve) -> None:
        """Leaves this much free from now on."""
        self._space.reconfigure(reserve)

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
            self._view.update(record)
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
        wanted: bool | None = None,
        whole: bool = False,
        known: bool = False,
    ) -> bool:
        """Writes that `image` means `manifest`, as of now or of these `dates`; whether it did. Raises `OSError`.

        `wanted` says whether the layers of the image belong into the store; a record that says so already keeps it.
        It does not where the image is to be `whole` and lacks a blob, or is to be `known` and has no record any more.
        """
        confirmed, created = (dates.confirmed, dates.created) if dates else (self._now(), None)
        args = manifest, image, confirmed, created
        record = await self._threads.write_in_turn(
            self._records.confirm, *args, wanted=wanted, whole=whole, known=known
        )
        if record is not None:
            self._view.wrote(record)
        return record is not None

    async def restore(
        self,
        manifest: Manifest,
        images: Mapping[ImageReference, Dates],
        fetched: ImageReference,
        wanted: bool | None = None,
    ) -> None:
        """Writes that `images` mean `manifest`, as a lost record had it; `fetched` is by what it was asked for since.

        `wanted` is what the lost record said. Raises `OSError`.
        """
        noted = {str(image): dates for image, dates in images.items()}
        record = await self._threads.write_in_turn(self._records.restore, manifest, noted, str(fetched), wanted)
        self._view.wrote(record)

    async def want(self, image: Digest, *, wanted: bool = True) -> None:
        """Note in its record that the layers of `image` belong into the store, or do not.

        An image that is wanted stays so. Raises `OSError`.
        """
        entry = self._catalogue.get(image)
        if entry is not None and entry.wanted:
            return
        record = await self._threads.write_in_turn(self._records.want, image, wanted)
        if record is not None:
            self._view.wrote(record)

    def entry(self, digest: Digest) -> Entry | None:
        """Return what memory keeps of the record `digest`."""
        return self._catalogue.get(digest)

    def indexes(self, child: Digest) -> Collection[Digest]:
        """Return the indexes that name the manifest `child`, directly or through others."""
        return self._catalogue.indexes(child)

    @property
    def digests(self) -> Collection[Digest]:
        """All records."""
        return self._catalogue.digests()

    def watch(self, changed: Callable[[Set[Digest]], object]) -> None:
        """Have `changed` called with the records that were written, changed, lost, or lost a blob."""
        self._view.on_change = changed

    def tags(self, repository: Repository) -> list[Tag]:
        """The tags of `repository` that the cache knows, sorted."""
        return self._catalogue.tags(repository)

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

    async def add_pending(self, manifest: Digest, repository: Repository, *, undecided: bool = False) -> None:
        """Notes that all blobs of the image `manifest` are, or perhaps are, to be fetched. Raises `OSError`."""
        pending = self.undecided if undecided else self.pending
        if manifest in pending or (undecided and manifest in self.pending):
            return
        self.undecided.pop(manifest, None)
        pending[manifest] = repository
        noted = PendingImage(manifest, repository, undecided)
        await self._threads.write_in_turn(lambda: self._pending_files().write(noted))

    async def remove_pending(self, manifest: Digest) -> None:
        """Notes that they are not, or are there. Raises `OSError`."""
        for pending in (self.undecided, self.pending):
            pending.pop(manifest, None)
        await self._threads.write_in_turn(lambda: self._pending_files().remove(manifest))

    async def missing(self, manifest: Digest) -> Mapping[Digest, int] | None:
        """The blobs that the image `manifest` lacks, and their sizes in bytes; None if it has no record."""
        entry = self._catalogue.get(manifest)
        if entry is None:
            return None
        return await self._threads.read(missing_blobs, self._blobs, entry.blobs)

    async def lacking_images(self, digests: Collection[Digest]) -> Mapping[Digest, Mapping[Digest, int]]:
        """Return the wanted images among `digests` that lack blobs, each with these and their sizes in bytes.

        Raises `OSError`.
        """
        entries = ((digest, self._catalogue.get(digest)) for digest in digests)
        images = {digest: entry.blobs for digest, entry in entries if entry is not None and entry.wanted}
        return await self._threads.read(_lacking_images, self._blobs, images)

    async def lacking_metadata(self, digests: Collection[Digest]) -> list[Digest]:
        """Return those of the manifests `digests` that have no record, or of which the config is missing.

        Raises `OSError`.
        """
        entries = {digest: self._catalogue.get(digest) for digest in digests}
        configs = {
            digest: {entry.config.digest: entry.config.size}
            for digest, entry in entries.items()
            if entry is not None and entry.config is not None and entry.config.size <= LARGEST_CONFIG
        }
        lacking = await self._threads.read(_lacking_images, self._blobs, configs)
        return [digest for digest, entry in entries.items() if entry is None or digest in lacking]

    def repositories(self, manifest: Digest) -> Set[Repository]:
        """Return the repositories that a manifest is known by."""
        entry = self._catalogue.get(manifest)
        return entry.repositories if entry is not None else set()

    def uses(self, blob: Digest) -> Mapping[Repository, int]:
        """The repositories that have an image with this blob, and the size in bytes that its manifest gives it."""
        return self._catalogue.uses(blob)

    def naming(self, blob: Digest) -> Mapping[Digest, int]:
        """Return the manifests that name this blob, and the size in bytes that they give it."""
        return self._catalogue.naming(blob)

    # Upkeep

    async def prune(self, choose: Choose) -> Plan:
        """Takes away what `choose` says, and gives what that was. Raises `OSError`."""
        return await self._threads.write(prune, self._root, choose, self._files)

    async def verify(self, max_rate: float | None, advance: Callable[[int, int], object], found: Found) -> Findings:
        """As `Verifier` has it. Raises `OSError`."""
        verifier = Verifier(self._root, self._pulls, self._files, self._threads, self._clock, found)
        findings = await verifier.verify(max_rate, advance)
        await self._threads.write(note_verified, self._root, self._now())
        return findings

    async def last_verified(self, now: datetime) -> datetime:
        """When that ended last; if it never did, `now` counts as that from now on. Raises `OSError`."""
        return await self._threads.write(last_verified, self._root, now)

    # Partials

    async def new_partial(
        self, digest: Digest, size: int | None, source: Repository, *, staged: bool = False
    ) -> Partial:
        """An empty partial that is to become the blob `digest` of `size` bytes. Raises `OSError`.

        A `staged` one lies beside a download of the same blob, which may be taken up again.
        """
        name = f"{digest.hex}{STAGED_SUFFIX}" if staged else digest.hex
        return await self._threads.write(
            lambda: Partial.create(
                digest, self._pulls.path / name, size, str(source), self._space, self._files, self._threads
            )
        )

    async def old_partial(self, digest: Digest) -> Partial | None:
        """What an earlier download left of the blob `digest`, or None. Raises `OSError`."""
        return await self._threads.write(
            lambda: Partial.resume(digest, self._pulls.path / digest.hex, self._space, self._files, self._threads)
        )

    async def check_room(self, size: int | None) -> None:
        """Raise `OSError` (ENOSPC) when `size` bytes, or any if that is None, do not fit beside the reserve."""
        await self._space.check(size)

    def _remove_partials(self, missing: int) -> None:
        remove_partials(self._root, wanted_blobs(self._root, self._blobs_of), missing, self._files)

    def _blobs_of(self, manifest: Digest) -> Iterable[Digest]:
        entry = self._catalogue.get(manifest)
        return entry.blobs if entry is not None else ()

    async def commit(self, partial: Partial) -> None:
        """Makes the verified `partial` a blob that counts as there. Raises `OSError`."""
        await partial.commit(self._blobs / partial.digest.hex)
        self._committed[partial.digest] = partial.length


def _lacking_images(
    folder: Path, images: Mapping[Digest, Mapping[Digest, int]]
) -> Mapping[Digest, Mapping[Digest, int]]:
    found = {digest: missing_blobs(folder, blobs) for digest, blobs in images.items()}
    return {digest: missing for digest, missing in found.items() if missing}
