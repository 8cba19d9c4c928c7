"""The store: the only access to the disk. It handles files and digests, not networks or clients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Set
from datetime import UTC, datetime
from functools import partial as bind
from pathlib import Path

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorFromThreads, IReactorTime
from twisted.logger import Logger

from ociregistry.config.values import USUAL_RESERVE, Reserve
from ociregistry.errors import Unavailable, is_out_of_descriptors
from ociregistry.manifests import LARGEST_CONFIG, Manifest
from ociregistry.names import Digest, ImageReference, Repository
from ociregistry.store.blobs import Blobs, StoredBlob
from ociregistry.store.faults import Faults
from ociregistry.store.files import Files, is_full, reason
from ociregistry.store.folders import Folders
from ociregistry.store.index import Entry, Index
from ociregistry.store.listing import ListingCache
from ociregistry.store.lookups import Lookups
from ociregistry.store.orphans import remove_partials
from ociregistry.store.partials import Partial, known_size
from ociregistry.store.paths import STAGED_SUFFIX, pulls_folder
from ociregistry.store.pending import PendingImages
from ociregistry.store.prune import Choose, Plan, prune
from ociregistry.store.records import Dates, PullTimes, Record, RecordFiles, RecordInvalid
from ociregistry.store.scan import IndexRefresh
from ociregistry.store.smallblobs import AnyPartial, PartialInMemory
from ociregistry.store.space import Room, Space
from ociregistry.store.threads import Hung, Threads
from ociregistry.store.usage import UsageMeter
from ociregistry.store.verify import Damaged, Findings, Found, Verifier, last_verified, note_verified
from ociregistry.store.workdir import ControlSocket, PendingImage, PullsFolder, wanted_blobs

_log = Logger(namespace="ociregistry.store")


class Store(Lookups, Service):
    """Records, blobs and partials below one folder; the questions that need no disk are those of `Lookups`."""

    def __init__(
        self,
        root: Path,
        clock: IReactorTime,
        reactor: IReactorFromThreads,
        files: Files | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        reserve: Reserve = USUAL_RESERVE,
        *,
        adopts: bool = True,
    ) -> None:
        """Set up the store in the folder `root`.

        `reserve` is how much of the disk is always kept free. With `adopts`, the start takes a pulls/<n>/ folder at
        once, together with what ended processes left.
        """
        super().__init__(Index(now))
        self._adopts = adopts
        self._root = root
        self._now = now
        self._files = files or Files()
        self._threads = Threads(reactor, clock)
        self._clock = clock
        self._pulls = PullsFolder(root, self._files, adopts=adopts)
        self._pending = PendingImages(self._pulls, self._files, self._threads)
        self._folders = Folders(root, self._pulls, self._files, self._threads, clock, self._pulls_renewed)
        self._space = Space(root, reserve, self._remove_partials, self._threads, clock)
        self.usage = UsageMeter(root, self._threads, clock)
        self._records = RecordFiles(root, self._pulls, self._files, self._space.spend)
        self._pull_times = PullTimes(self._threads)
        self._blobs = Blobs(root, self._threads, clock, self._index.gives)
        self._refresh = IndexRefresh(root, self._index, self._threads, clock)
        self._refresh.on_blobs_gone = self._blobs.removed
        self.faults = Faults(self._threads, self._folders, self._space, self._refresh, self._index, self._blobs)
        self.listing = ListingCache(self._index, self._refresh, self._threads, clock, now)
        self.on_new_pulls_folder: Callable[[], object] = lambda: None
        """Called when pulls/<n>/ is another folder than before, where another program has removed or replaced it."""

    def startService(self) -> None:
        """Make the folders, read all records, and then look for changes every second.

        Blocks until the records are read, so that a client that finds the port open finds the whole cache.

        On a disk without space for a new pulls/<n>/ folder the store starts without one.

        Raises:
            OSError: a folder cannot be made or read.
        """
        self._folders.make()
        if self._adopts:
            self._adopt()
        self._files.sync_folder(self._root)
        self._refresh.read()
        self._threads.start()
        self._blobs.start()
        self._refresh.start()
        self._space.start()
        self.usage.start()
        self._folders.start()
        super().startService()

    def _adopt(self) -> None:
        try:
            self._pending.read()
        except OSError as error:
            if not is_full(error):
                raise
            _log.warn(
                "downloads disabled until there is space for a folder in {folder}: {why}",
                folder=pulls_folder(self._root),
                why=error.strerror,
            )

    def _pulls_renewed(self) -> None:
        self._pending.write_again()
        self.on_new_pulls_folder()

    def stopService(self) -> None:
        """End the threads after their current work, and release the pulls/<n>/ folder."""
        super().stopService()
        self._folders.stop()
        self._refresh.stop()
        self._blobs.stop()
        self._space.stop()
        self.usage.stop()
        self._threads.stop()
        self._pulls.close()

    def control_socket(self) -> ControlSocket:
        """Return where this process may listen for other processes on the same store. The caller closes it.

        Raises:
            OSError: the pulls/<n>/ folder cannot be taken or opened.
        """
        control_socket = ControlSocket(self._pulls.path)
        control_socket.clear()
        return control_socket

    @property
    def writes_slowly(self) -> bool:
        """Whether a write to the disk takes long."""
        return self._threads.writes_slowly

    @property
    def room(self) -> Room:
        """How much of the disk is free."""
        return self._space.room

    def reconfigure(self, reserve: Reserve) -> None:
        """Apply a new `reserve`."""
        self._space.reconfigure(reserve)

    # Manifests

    async def manifest(self, image: ImageReference) -> Manifest | None:
        """Return the manifest that `image` means, read from its record, or None on a miss.

        A digest is found whichever repository it came from. It is noted as known in the requested repository too only
        if an index of that repository names it, as clients may invent repositories.

        Raises:
            Unavailable: the disk does not answer.
        """
        while True:
            digest = self._index.resolve(image)
            if digest is None:
                return None
            record = await self._read(digest)
            if record is None:
                continue
            if record.means(image):
                break
            self._refresh.record_read(record)
        if not Entry.of(record).known_in(image.repository) and self.shown_in(image.repository, digest):
            noted = Deferred.fromCoroutine(self.keep(record.manifest, image, known=True))
            noted.addErrback(
                lambda failure: _log.warn("cannot record the pull of {image}: {why}", image=image, why=failure.value)
            )
        return record.manifest

    async def _read(self, digest: Digest) -> Record | None:
        """Read the record `digest` from the disk as it is now.

        Returns:
            None when the record cannot be read; it is then dropped from memory.

        Raises:
            Unavailable: the disk does not answer.
        """
        entry = self._index.get(digest)
        assert entry is not None
        path = self._records.path(digest, is_list=entry.is_list)
        now = self._now().timestamp()
        try:
            record, to_note = await self._threads.read_file(path, bind(self._records.read_for_pull, path, now))
        except Hung as error:
            raise Unavailable(f"{digest}: cannot be read: {reason(error)}") from error
        except (RecordInvalid, OSError) as error:
            if is_out_of_descriptors(error):
                raise
            if not isinstance(error, FileNotFoundError):
                _log.error("cannot read the record {file}: {why}", file=path, why=reason(error))
            self._refresh.record_unreadable(path, reason(error))
            return None
        if to_note:
            self._pull_times.note(path, now)
        return record

    def pulled(self, digest: Digest) -> None:
        """Note that the manifest `digest` was pulled now, unless the last pull was less than a minute ago."""
        entry = self._index.get(digest)
        if entry is not None:
            path = self._records.path(digest, is_list=entry.is_list)
            self._pull_times.note(path, self._now().timestamp())

    async def keep(
        self,
        manifest: Manifest,
        image: ImageReference,
        dates: Dates | None = None,
        *,
        also: Iterable[tuple[ImageReference, Dates | None]] = (),
        wanted: bool | None = None,
        whole: bool = False,
        known: bool = False,
    ) -> bool:
        """Write a record that says that `image` means `manifest`, as of now or of the given `dates`.

        `also` are more names of the manifest with their dates: many names are noted by one write. `wanted` says
        whether the layers of the image belong in the store; a record that says so already keeps saying so. With
        `whole`, nothing is written when a blob is missing; with `known`, nothing is written when there is no record.

        Returns:
            Whether the record was written.

        Raises:
            OSError: the record cannot be written.
        """
        names = [self._index.confirmation(manifest.digest, *one) for one in ((image, dates), *also)]
        records = await self._threads.write_in_turn(
            self._records.confirm, manifest, names, wanted=wanted, whole=whole, known=known
        )
        for record in records:
            self._refresh.record_written(record)
        return bool(records)

    async def restore(
        self,
        manifest: Manifest,
        images: Mapping[ImageReference, Dates],
        fetched: ImageReference,
        wanted: bool | None = None,
    ) -> None:
        """Write a record that says that `images` mean `manifest`, as a lost record did.

        `fetched` is the reference by which the manifest was fetched since then; `wanted` is what the lost record
        said.

        Raises:
            OSError: the record cannot be written.
        """
        noted = {str(image): dates for image, dates in images.items()}
        record = await self._threads.write_in_turn(self._records.restore, manifest, noted, str(fetched), wanted)
        self._refresh.record_written(record)

    async def want(self, image: Digest, *, wanted: bool = True) -> None:
        """Note in the record of `image` whether its layers belong in the store; an image that is wanted stays wanted.

        Raises:
            OSError: the record cannot be written.
        """
        entry = self._index.get(image)
        if entry is not None and entry.wanted:
            return
        record = await self._threads.write_in_turn(self._records.want, image, wanted)
        if record is not None:
            self._refresh.record_written(record)

    def watch(self, changed: Callable[[Set[Digest]], object]) -> None:
        """Call `changed` with the digests of records each time they were written, changed or lost, or lost a blob."""
        self._refresh.on_change = changed

    # Blobs

    async def blob(self, digest: Digest) -> StoredBlob | None:
        """Open a whole blob for reading, or return None on a miss, as `Blobs.open` does.

        Raises:
            Unavailable: the disk does not answer.
        """
        return await self._blobs.open(digest)

    def opened(self, digest: Digest) -> StoredBlob | None:
        """Return a whole blob for reading at once, or None if it is not open already."""
        return self._blobs.opened(digest)

    async def missing_blobs(self, manifest: Manifest) -> Mapping[Digest, int]:
        """Return the missing required blobs of `manifest`, which needs no record, with their sizes in bytes."""
        return await self._blobs.missing(manifest.required)

    async def missing_foreign_layers(self, foreign_layers: Mapping[Digest, int]) -> Mapping[Digest, int]:
        """Return those of the foreign layers of an image that are missing, with their sizes in bytes."""
        return await self._blobs.missing(foreign_layers)

    async def holds(self, digest: Digest, size: int) -> bool:
        """Tell whether a blob is in the store with this size in bytes."""
        return await self._blobs.holds(digest, size)

    # Images

    @property
    def pending(self) -> Mapping[Digest, Repository]:
        """Image that is to be completed -> the repository to fetch it from."""
        return self._pending.wanted

    @property
    def undecided(self) -> Mapping[Digest, Repository]:
        """Image of a requested index that may turn out not to be wanted -> the repository to fetch it from."""
        return self._pending.undecided

    async def add_pending(self, manifest: Digest, repository: Repository, *, undecided: bool = False) -> None:
        """Note that all blobs of the image `manifest` are to be fetched, or with `undecided`, that they perhaps are.

        Raises:
            OSError: the note cannot be written.
        """
        await self._pending.add(PendingImage(manifest, repository, undecided))

    async def remove_pending(self, manifest: Digest) -> None:
        """Note that the blobs of an image need not be fetched, because they are there or not wanted.

        Raises:
            OSError: the note cannot be removed.
        """
        await self._pending.remove(manifest)

    async def missing(self, manifest: Digest) -> Mapping[Digest, int] | None:
        """Return the missing required blobs of the image `manifest` with their sizes in bytes.

        Returns:
            None if it has no record.
        """
        entry = self._index.get(manifest)
        if entry is None:
            return None
        return await self._blobs.missing(entry.required)

    async def missing_of_images(self, digests: Collection[Digest]) -> Mapping[Digest, Mapping[Digest, int]]:
        """Return the wanted images among `digests` that lack required blobs, each with the sizes of these in bytes.

        Raises:
            OSError: the folder of blobs cannot be read.
        """
        entries = ((digest, self._index.get(digest)) for digest in digests)
        images = {digest: entry.required for digest, entry in entries if entry is not None and entry.wanted}
        return await self._blobs.missing_each(images)

    async def missing_metadata(self, digests: Collection[Digest]) -> list[Digest]:
        """Return those of the manifests `digests` that have no record, or whose config is missing.

        Configs larger than `LARGEST_CONFIG` bytes are not metadata and do not count.

        Raises:
            OSError: the folder of blobs cannot be read.
        """
        entries = {digest: self._index.get(digest) for digest in digests}
        configs = {
            digest: {entry.config.digest: entry.config.size}
            for digest, entry in entries.items()
            if entry is not None and entry.config is not None and entry.config.size <= LARGEST_CONFIG
        }
        missing = await self._blobs.missing_each(configs)
        return [digest for digest, entry in entries.items() if entry is None or digest in missing]

    # Maintenance

    async def prune(self, choose: Choose) -> Plan:
        """Prune what `choose` selects; return the plan that was carried out.

        Raises:
            OSError: the store cannot be read or changed.
        """
        plan = await self._threads.write(prune, self._root, choose, self._files, self._now())
        # The disk gets the space of a blob back when its file is closed.
        self._blobs.removed([*plan.blobs, *plan.metadata_blobs])
        await self._refresh.scan()
        return plan

    async def verify(self, max_rate: float | None, advance: Callable[[int, int], object], found: Found) -> Findings:
        """Verify the whole store as `Verifier.verify` does, and note when it was verified.

        Raises:
            OSError: the store cannot be read, or damaged files cannot be moved.
        """
        self.faults.forget_lost()

        async def note(damaged: Damaged) -> None:
            if damaged.is_blob:
                self._blobs.removed([damaged.digest])
            else:
                self._refresh.record_unreadable(damaged.path, damaged.why)
            await found(damaged)

        verifier = Verifier(self._root, self._pulls, self._files, self._threads, self._clock, note)
        findings = await verifier.verify(max_rate, advance)
        await self._threads.write(note_verified, self._root, self._now())
        return findings

    async def last_verified(self, now: datetime) -> datetime:
        """Return when the store was verified last. If never, or later than `now`, that is noted as the time.

        Raises:
            OSError: the time cannot be read or noted.
        """
        return await self._threads.write(last_verified, self._root, now)

    # Partials

    async def new_partial(
        self, digest: Digest, size: int | None, source: Repository, *, staged: bool = False, mirrored: bool = False
    ) -> Partial:
        """Create an empty partial that is to become the blob `digest` of `size` bytes.

        A `staged` partial has a file name of its own, beside a download of the same blob that may still be resumed.
        `mirrored` if a mirror of `source` sends its first bytes.

        Raises:
            OSError: the files cannot be made.
        """
        name = f"{digest.hex}{STAGED_SUFFIX}" if staged else digest.hex
        return await self._threads.write(
            lambda: Partial.create(
                digest,
                self._pulls.path / name,
                size,
                str(source),
                self._space,
                self._files,
                self._threads,
                mirrored=mirrored,
            )
        )

    def small_partial(
        self, digest: Digest, size: int, source: Repository, *, mirrored: bool = False
    ) -> PartialInMemory:
        """Begin a small blob of `size` bytes; `mirrored` if a mirror of `source` sends its first bytes."""
        return PartialInMemory(
            digest, size, str(source), self._pulls, self._space, self._files, self._threads, mirrored=mirrored
        )

    async def old_partial(self, digest: Digest, size: int | None = None) -> Partial | None:
        """Return the partial of the blob `digest` that an earlier download left, or None, when the rest has room.

        A partial of another size than `size`, which a manifest tells, is discarded.

        Raises:
            OSError: the partial cannot be opened, or ENOSPC: the rest of the blob does not fit beside the reserve.
        """
        return await self._threads.write(self._old_partial, digest, size)

    def _old_partial(self, digest: Digest, size: int | None) -> Partial | None:
        partial = Partial.resume(digest, self._pulls.path / digest.hex, self._space, self._files, self._threads)
        try:
            if partial is not None and None not in (size, partial.size) and size != partial.size:
                partial.remove()
                partial.close()
                partial = None
            here, known = partial.length if partial is not None else 0, known_size(partial, size)
            if partial is None or here != known:
                self._space.check_now(None if known is None else max(0, known - here))
        except BaseException:
            if partial is not None:
                partial.close()
            raise
        return partial

    async def check_room(self, size: int | None) -> None:
        """Check that `size` bytes fit beside the reserve; with None, that any byte does.

        Raises:
            OSError: ENOSPC, they do not fit.
        """
        await self._space.check(size)

    def _remove_partials(self, missing: int) -> None:
        remove_partials(self._root, wanted_blobs(self._root, self._blobs_of), missing, self._files)

    def _blobs_of(self, manifest: Digest) -> Iterable[Digest]:
        entry = self._index.get(manifest)
        return entry.blobs if entry is not None else ()

    async def commit(self, partial: AnyPartial) -> None:
        """Make the verified `partial` a blob, which counts as present from then on.

        Raises:
            OSError: the blob cannot be written.
        """
        await self._blobs.commit(partial, self._pulls.quarantine)
        self._refresh.blob_stored(partial.digest)
