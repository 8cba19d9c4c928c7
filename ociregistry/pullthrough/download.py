"""A download: one blob in flight from an upstream into the store, with any number of readers.

When it fails, or is cancelled at a shutdown, its partial is kept for the next download, unless the bytes are wrong.
"""

from __future__ import annotations

from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.logger import Logger

from ociregistry.concurrency import Event
from ociregistry.errors import RegistryError, Unavailable, cannot_store
from ociregistry.names import Digest, Repository
from ociregistry.pullthrough.transfer import Connections
from ociregistry.store.files import FileReplaced
from ociregistry.store.partials import DigestMismatch, known_size
from ociregistry.store.readers import MemoryReader, PartialReader
from ociregistry.store.smallblobs import AnyPartial, is_small
from ociregistry.store.store import Store
from ociregistry.upstream.breaker import LinkDown
from ociregistry.upstream.registry import BlobMismatch, BlobStream

_log = Logger(namespace="ociregistry.pullthrough")


class Download:
    """Fetches a blob into a partial, verifies it and commits it to the store.

    A download belongs to no client: it continues after all clients have gone where a manifest tells the size. It
    resumes the partial of an earlier download. `size` in bytes is None until it is known. No reader gets the last
    byte until the digest has been verified.
    """

    def __init__(
        self, connections: Connections, store: Store, repository: Repository, digest: Digest, expected: int | None
    ) -> None:
        """Prepare a download; `expected` is the size in bytes that a manifest of `repository` tells, or None."""
        self.repository = repository
        self.digest = digest
        self.size: int | None = None
        self.error: RegistryError | None = None
        self.spoiled = False
        """Whether another download may succeed: the bytes were wrong, and came over several connections or from a
        mirror, or another program has removed the partial."""
        self.expected = expected
        self.has_early_readers = False
        """Whether a client got a reader before the upstream had answered."""
        self._connections = connections
        self._store = store
        self._early: list[DownloadReader] = []
        self._done = False
        self._partial: AnyPartial | None = None
        self._resumed_at = 0
        self._verified = False
        self._changed = Event()
        self._stopping = False
        self._running: Deferred[None] = succeed(None)

    def start(self) -> Deferred[None]:
        """Start the download; fire when it has ended. Never fails: `error` tells whether the blob was stored."""
        self._running = Deferred.fromCoroutine(self._run())
        return self._running

    def cancel(self) -> Deferred[None]:
        """Cancel the download, unless its bytes are already verified; fire when it has ended.

        The readers of a cancelled download fail with `Unavailable`.
        """
        ended: Deferred[None] = Deferred()
        self._running.addCallback(lambda _: ended.callback(None))
        if not self._verified:
            self._stopping = True
            self._running.cancel()
        return ended

    @property
    def length(self) -> int:
        """The number of bytes that are here."""
        return 0 if self._partial is None else self._partial.length

    @property
    def received(self) -> int:
        """The number of bytes that came since this download began; an earlier one may have left others."""
        return max(0, self.length - self._resumed_at)

    @property
    def began(self) -> float:
        """When the download began, in seconds of the clock."""
        return self._connections.began

    @property
    def clients(self) -> int:
        """The number of clients that wait for the blob."""
        return self._connections.clients

    @property
    def has_size(self) -> bool:
        """Whether a reader can be had at once."""
        return self._partial is not None and self.size is not None

    @property
    def requested(self) -> bool:
        """Whether a client has requested the blob; else only the background needs it."""
        return self._connections.requested

    @property
    def down(self) -> LinkDown | None:
        """Why the upstream counts as down, while the first connection waits for it; None where it does not."""
        return self._connections.down if not self.has_size else None

    async def reader(self, *, patient: bool = False) -> DownloadReader:
        """Return a reader as soon as the size is known and the partial exists.

        Raises:
            LinkDown: the upstream counts as down, but the download goes on; not for a `patient` caller.
            RegistryError: the download failed.
        """
        self._connections.watch()
        try:
            # An empty blob has no last byte to hold back until the digest is verified.
            while (
                self._partial is None
                or self.size is None
                or (self.size == 0 and not self._verified)
                or self._connections.abandoned
            ):
                down = self.down
                if down is not None and not patient and self.error is None:
                    raise down
                await self._change()
            return reader_of(self, self.size, self._partial.reader())
        except BaseException:
            self._connections.unwatch()
            raise

    def early_reader(self, size: int) -> DownloadReader:
        """Return a reader before the upstream has answered, for a blob whose `size` in bytes a manifest tells.

        Raises:
            RegistryError: the download failed.
        """
        if self.error is not None:
            raise self.error
        self._connections.watch()
        self.has_early_readers = True
        reader = reader_of(self, size, self._partial.reader() if self._partial else None)
        if self._partial is None:
            self._early.append(reader)
        return reader

    async def finished(self) -> None:
        """Wait until the blob is in the store.

        Raises:
            RegistryError: the download failed.
        """
        self._connections.join()
        try:
            while not self._done:
                await self._change()
        finally:
            self._connections.leave()

    async def more_than(self, offset: int, size: int) -> int:
        """Return the number of readable bytes as soon as it exceeds `offset`; the blob should have `size` bytes.

        The last of them can be read once the digest has been verified.

        Raises:
            RegistryError: the download failed, or the blob has another size.
        """
        while not self._verified:
            # Not by the size of the download: it may be unknown where the reader has its own from a later manifest.
            available = min(self.length, size - 1)
            if available > offset:
                return available
            await self._change()
        if self.length != size:
            raise BlobMismatch(f"{self}: the blob has {self.length} bytes, expected {size}")
        return size

    async def _change(self) -> None:
        """Wait for the next change; raise `error` if the download failed."""
        if self.error is not None:
            raise self.error
        await self._changed.wait()

    def left(self) -> None:
        """Note that a reader was closed."""
        self._connections.unwatch()

    async def _run(self) -> None:
        try:
            await self._fetch()
        except RegistryError as error:
            self.error = error
        except OSError as error:
            self.spoiled = isinstance(error, FileReplaced)
            self.error = cannot_store(self, error)
        except CancelledError:
            self._stopping = True
        except Exception as error:
            _log.failure("the download of {blob} failed", blob=self)
            self.error = Unavailable(f"{self}: the download failed: {type(error).__name__}")
        if self._stopping:
            # One message for every cancelled download, whatever error the cancellation led to.
            self.error = Unavailable(f"{self}: the server is stopping")
        # A waiting request logs the error itself, unless all bytes have been served already.
        told = self._connections.awaited and not self._verified
        self._done = self.error is None
        self._changed.fire()
        if self.error is not None and not told and not self._stopping:
            if self._connections.abandoned:
                _log.warn("{why}", why=self.error, blob=self)
            else:
                _log.error("{why}", why=self.error, blob=self)

    async def _fetch(self) -> None:
        partial: AnyPartial | None = None
        stream: BlobStream | None = None
        try:
            # A blob that does not fit is refused before the upstream is asked.
            partial = await self._store.old_partial(self.digest, self.expected)
            start = partial.length if partial is not None else 0
            known = known_size(partial, self.expected)
            if partial is None or start != known:
                # The first answer tells whether the blob exists; without a size from a manifest, clients wait for it.
                stream = await self._first(start, known)
            size = known if stream is None or stream.size is None else stream.size
            if size != known:
                await self._store.check_room(None if size is None else max(0, size - start))
            if partial is None:
                partial = await self._new_partial(size, mirrored=stream is not None and stream.source.is_mirror)
            self._partial, self._resumed_at, self.size = partial, partial.length, size
            self._open_early(partial)
            self._changed.fire()
            if stream is not None:
                await self._connections.receive(stream, partial, size, self._changed.fire)
            await self._verify(partial)
            await self._store.commit(partial)
        except Exception as error:
            if partial is not None:
                await self._keep_or_discard(partial, error)
            raise
        finally:
            if stream is not None:
                stream.body.abort()
            if partial is not None:
                partial.close()

    async def _new_partial(self, size: int | None, *, mirrored: bool) -> AnyPartial:
        if is_small(size):
            return self._store.small_partial(self.digest, size, self.repository, mirrored=mirrored)
        return await self._store.new_partial(self.digest, size, self.repository, mirrored=mirrored)

    def _open_early(self, partial: AnyPartial) -> None:
        """Give the early readers their file."""
        for reader in self._early:
            if self.size not in (None, reader.size):
                raise BlobMismatch(f"{self}: the blob has {self.size} bytes, expected {reader.size}")
            reader.open(partial.reader())
        self._early.clear()

    async def _first(self, start: int, known: int | None) -> BlobStream:
        """Open the first connection of this download at byte `start`."""
        try:
            return await self._connections.open(start, known, self._changed.fire)
        except BlobMismatch:
            raise
        except Unavailable as error:
            if not self.has_early_readers:
                raise
            # A client has its headers already, so a late upstream is retried rather than the response ended.
            return await self._connections.reopen(start, known, error)

    async def _verify(self, partial: AnyPartial) -> None:
        try:
            await partial.verify()
        except DigestMismatch as mismatch:
            raise BlobMismatch(f"{self}: {mismatch}") from None
        self.size = partial.length
        self._verified = True
        self._changed.fire()

    async def _keep_or_discard(self, partial: AnyPartial, error: BaseException) -> None:
        """Keep the partial if a later download can resume it; discard it otherwise.

        Where the bytes are wrong, those that came before any byte of a mirror are kept.
        """
        keeps = partial.sound
        if isinstance(error, BlobMismatch):
            mirrored = self._connections.report_mismatch(error.message)
            self.spoiled = mirrored or partial.resumed or self._connections.count > 1
            keeps = await partial.cut_mirrored()
        elif keeps:
            await partial.sync()
        if not keeps or not partial.sound:
            await partial.discard()

    def __str__(self) -> str:
        return f"{self.repository}@{self.digest}"


class DownloadReader:
    """Reads a download for one client; the open file stays valid when the partial becomes a blob."""

    def __init__(self, download: Download, size: int, file: PartialReader | MemoryReader | None) -> None:
        """Read from `file`, the open partial; if it is None, `open` brings it later."""
        self._download = download
        self._file = file
        self._closed = False
        self.size = size

    def open(self, file: PartialReader | MemoryReader) -> None:
        """Set the file, now that the partial exists."""
        if self._closed or self._file is not None:
            file.close()
        else:
            self._file = file

    def more_than(self, offset: int) -> Deferred[int]:
        """Fire with the number of readable bytes as soon as it exceeds `offset`; fail when no more will come."""
        return Deferred.fromCoroutine(self._download.more_than(offset, self.size))

    def read(self, offset: int, count: int) -> Deferred[bytes]:
        """Fire with at most `count` of the bytes at `offset`, which must be readable."""
        assert self._file is not None
        return self._file.read(offset, count)

    def close(self) -> None:
        """Close the file and leave the download."""
        self._closed = True
        if self._file is not None:
            self._file.close()
        self._download.left()

    def __str__(self) -> str:
        return str(self._download)


class LargeReader(DownloadReader):
    """Reads a download that is in a file."""

    def send(self, to: int, offset: int, count: int, *, in_thread: bool) -> Deferred[int]:
        """Send at most `count` of the bytes at `offset`, which must be readable, to a socket; give their number."""
        assert isinstance(self._file, PartialReader)
        return self._file.send(to, offset, count, in_thread=in_thread)


def reader_of(download: Download, size: int, file: PartialReader | MemoryReader | None) -> DownloadReader:
    """Return a reader for a blob of `size` bytes; of a large one, which is in a file, the kernel can send."""
    return (DownloadReader if is_small(size) else LargeReader)(download, size, file)
