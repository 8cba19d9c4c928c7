"""A download: one blob in flight from an upstream into the store, watched by any number of readers."""

from __future__ import annotations

from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.logger import Logger

from ociregistry.concurrency import Event
from ociregistry.errors import RegistryError, Unavailable
from ociregistry.names import Digest, Repository
from ociregistry.pullthrough.transfer import Connections
from ociregistry.store.partials import DigestMismatch, Partial, PartialReader
from ociregistry.store.store import Store
from ociregistry.upstream.registry import BlobMismatch, BlobStream


class Download:
    """Fetches a blob into a partial and makes it a blob of the store.

    It belongs to no client: where a manifest tells its size it goes on when all have gone, and it takes up what an
    earlier one left. `size` is None until it is known; what can be read, `available`, leaves out the last byte until
    the digest holds.
    """

    log = Logger(namespace="ociregistry.pullthrough")

    def __init__(
        self, connections: Connections, store: Store, repository: Repository, digest: Digest, expected: int | None
    ) -> None:
        """`expected` is the size in bytes that a manifest of `repository` gives the blob, if one does."""
        self.repository = repository
        self.digest = digest
        self.size: int | None = None
        self.error: RegistryError | None = None
        self.spoiled = False
        """Whether it failed for bytes that came over several connections: with new ones it may succeed."""
        self.expected = expected
        self.promised = False
        """Whether a client was given a reader before the upstream had answered."""
        self._connections = connections
        self._store = store
        self._early: list[DownloadReader] = []
        self._done = False
        self._partial: Partial | None = None
        self._verified = False
        self._changed = Event()
        self._stopping = False
        self._running: Deferred[None] = succeed(None)

    def start(self) -> Deferred[None]:
        """Begins; fires, never fails, when the download has ended and its blob is in the store, or is not."""
        self._running = Deferred.fromCoroutine(self._run())
        return self._running

    def cancel(self) -> Deferred[None]:
        """Ends it, unless all is here already; readers are told that no more will come. Fires when it has ended."""
        ended: Deferred[None] = Deferred()
        self._running.addCallback(lambda _: ended.callback(None))
        if not self._verified:
            self._stopping = True
            self._running.cancel()
        return ended

    @property
    def available(self) -> int:
        """How many bytes can be read."""
        if self._partial is None:
            return 0
        if self._verified or self.size is None:
            return self._partial.length
        return max(0, min(self._partial.length, self.size - 1))

    async def reader(self) -> DownloadReader:
        """A reader, as soon as the size is known and the file there. Raises what the download failed with."""
        self._connections.watch()
        try:
            # An empty blob has no last byte to hold back until the digest holds.
            while (
                self._partial is None
                or self.size is None
                or (self.size == 0 and not self._verified)
                or self._connections.abandoned
            ):
                await self._change()
            return DownloadReader(self, self.size, self._partial.reader())
        except BaseException:
            self._connections.unwatch()
            raise

    def early_reader(self, size: int) -> DownloadReader:
        """A reader before the upstream has answered, for who knows the size. Raises what the download failed with."""
        if self.error is not None:
            raise self.error
        self._connections.watch()
        self.promised = True
        reader = DownloadReader(self, size, self._partial.reader() if self._partial else None)
        if self._partial is None:
            self._early.append(reader)
        return reader

    async def finished(self) -> None:
        """Returns when the blob is in the store. Raises what the download failed with."""
        self._connections.join()
        try:
            while not self._done:
                await self._change()
        finally:
            self._connections.leave()

    async def more_than(self, offset: int) -> int:
        """`available`, as soon as it is more than `offset`. Raises what the download failed with."""
        while self.available <= offset:
            await self._change()
        return self.available

    async def _change(self) -> None:
        if self.error is not None:
            raise self.error
        await self._changed.wait()

    def left(self) -> None:
        """A reader has gone."""
        self._connections.unwatch()

    async def _run(self) -> None:
        try:
            await self._fetch()
        except RegistryError as error:
            self.error = error
        except OSError as error:
            self.error = Unavailable(f"{self}: cannot be stored: {error.strerror or error}")
        except CancelledError:
            self._stopping = True
        except Exception as error:
            self.log.failure("the download of {download} failed", download=self)
            self.error = Unavailable(f"{self}: the download failed: {type(error).__name__}")
        if self._stopping:
            # Whatever words those found for it whose work was cancelled.
            self.error = Unavailable(f"{self}: the server is stopping")
        # Whoever watches tells of it, unless all bytes have been given out already.
        told = self._connections.awaited and not self._verified
        self._done = self.error is None
        self._changed.fire()
        if self.error is not None and not told and not self._stopping:
            if self._connections.abandoned:
                self.log.warn("{why}", why=self.error)
            else:
                self.log.error("{why}", why=self.error)

    async def _fetch(self) -> None:
        partial = stream = None
        try:
            partial = await self._left_behind()
            start = partial.length if partial is not None else 0
            known = self.expected if self.expected is not None or partial is None else partial.size
            if partial is None or start != known:
                # What has no room is refused before anybody is asked.
                await self._check_room(known, start)
                # The first answer decides whether there is such a blob; clients are told nothing before it.
                stream = await self._first(start, known)
                self._check(stream, known)
            size = known if stream is None or stream.size is None else stream.size
            if size != known:
                await self._check_room(size, start)
            if partial is None:
                partial = await self._store.new_partial(self.digest, size, self.repository)
            self._partial, self.size = partial, size
            self._open_early(partial)
            self._changed.fire()
            if stream is not None:
                await self._connections.pour(stream, partial, size, self._changed.fire)
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

    async def _check_room(self, size: int | None, start: int) -> None:
        await self._store.check_room(None if size is None else max(0, size - start))

    def _open_early(self, partial: Partial) -> None:
        for reader in self._early:
            if self.size not in (None, reader.size):
                raise BlobMismatch(f"{self}: it has {self.size} bytes, {reader.size} were promised")
            reader.open(partial.reader())
        self._early.clear()

    async def _first(self, start: int, known: int | None) -> BlobStream:
        try:
            return await self._connections.open(start)
        except BlobMismatch:
            raise
        except Unavailable as error:
            if not self.promised:
                raise
            # A client has its headers, and waits for bytes: that they are late is no reason to end its answer.
            return await self._connections.reopen(start, known, error)

    async def _left_behind(self) -> Partial | None:
        partial = await self._store.old_partial(self.digest)
        if partial is None or partial.size is None or self.expected in (None, partial.size):
            return partial
        await partial.discard()
        partial.close()
        return None

    def _check(self, stream: BlobStream, known: int | None) -> None:
        told = stream.size
        if told is not None and known is not None and told != known:
            raise BlobMismatch(f"{self}: the upstream has {told} bytes, {known} are expected")

    async def _verify(self, partial: Partial) -> None:
        try:
            await partial.verify()
        except DigestMismatch as mismatch:
            raise BlobMismatch(f"{self}: {mismatch}") from None
        self.size = partial.length
        self._verified = True
        self._changed.fire()

    async def _keep_or_discard(self, partial: Partial, error: BaseException) -> None:
        """Keeps for the next download what can be continued."""
        if isinstance(error, BlobMismatch):
            self.spoiled = partial.resumed or self._connections.count > 1
        elif partial.sound:
            await partial.sync()
        if isinstance(error, BlobMismatch) or not partial.sound:
            await partial.discard()

    def __str__(self) -> str:
        return f"{self.repository}@{self.digest}"


class DownloadReader:
    """A client's view of a download; it never learns when the partial becomes a blob."""

    def __init__(self, download: Download, size: int, file: PartialReader | None) -> None:
        """`file` is None as long as there is none; `open` brings it."""
        self._download = download
        self._file = file
        self._closed = False
        self.size = size

    def open(self, file: PartialReader) -> None:
        """The file is there now."""
        if self._closed or self._file is not None:
            file.close()
        else:
            self._file = file

    def more_than(self, offset: int) -> Deferred[int]:
        """Fires as soon as more than `offset` bytes can be read; fails when no more will come."""
        return Deferred.fromCoroutine(self._download.more_than(offset))

    def read(self, offset: int, count: int) -> Deferred[bytes]:
        """Fires with some of the bytes at `offset`, which can be read."""
        assert self._file is not None
        return self._file.read(offset, count)

    def close(self) -> None:
        """Gives the file back."""
        self._closed = True
        if self._file is not None:
            self._file.close()
        self._download.left()

    def __str__(self) -> str:
        return str(self._download)
