"""A download: one blob in flight from an upstream into the store, watched by any number of readers."""

from __future__ import annotations

from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.logger import Logger

from ociregistry.errors import RegistryError, Unavailable
from ociregistry.flights import Bell
from ociregistry.names import Digest, Repository
from ociregistry.store.partials import DigestMismatch, Partial, PartialReader
from ociregistry.store.store import Store
from ociregistry.upstream.registry import BlobStream, Registry


class Download:
    """Fetches a blob into a partial and makes it a blob of the store.

    It belongs to no client: it goes on when all have gone. `size` is None until it is known; what can be read,
    `available`, leaves out the last byte until the digest holds.
    """

    log = Logger(namespace="ociregistry.pullthrough")

    def __init__(
        self, registry: Registry, store: Store, repository: Repository, digest: Digest, expected: int | None
    ) -> None:
        """`expected` is the size in bytes that a manifest of `repository` gives the blob, if one does."""
        self.repository = repository
        self.digest = digest
        self.size: int | None = None
        self.error: RegistryError | None = None
        self._registry = registry
        self._store = store
        self._expected = expected
        self._partial: Partial | None = None
        self._verified = False
        self._changed = Bell()
        self._running: Deferred[None] = succeed(None)

    def start(self) -> Deferred[None]:
        """Begins; fires, never fails, when the download has ended and its blob is in the store, or is not."""
        self._running = Deferred.fromCoroutine(self._run())
        return self._running

    def cancel(self) -> Deferred[None]:
        """Ends it; readers are told that no more will come. Fires when it has ended."""
        ended: Deferred[None] = Deferred()
        self._running.addCallback(lambda _: ended.callback(None))
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
        # An empty blob has no last byte to hold back until the digest holds.
        while self._partial is None or self.size is None or (self.size == 0 and not self._verified):
            if self.error is not None:
                raise self.error
            await self._changed.wait()
        return DownloadReader(self, self._partial.reader(), self.size)

    async def more_than(self, offset: int) -> int:
        """`available`, as soon as it is more than `offset`. Raises what the download failed with."""
        while self.available <= offset:
            if self.error is not None:
                raise self.error
            await self._changed.wait()
        return self.available

    async def _run(self) -> None:
        try:
            stream = await self._registry.blob(self.repository, self.digest)
            try:
                await self._receive(stream)
            finally:
                stream.body.abort()
        except RegistryError as error:
            self.error = error
        except OSError as error:
            self.error = Unavailable(f"{self}: cannot be stored: {error.strerror or error}")
        except CancelledError:
            self.error = Unavailable(f"{self}: the server is stopping")
        except Exception as error:
            self.log.failure("the download of {download} failed", download=self)
            self.error = Unavailable(f"{self}: the download failed: {type(error).__name__}")
        watched = self._changed.ring()
        if self.error is not None and not watched:
            self.log.error("{why}", why=self.error)

    async def _receive(self, stream: BlobStream) -> None:
        expected = stream.size if self._expected is None else self._expected
        if stream.size is not None and stream.size != expected:
            raise Unavailable(f"{self}: the upstream has {stream.size} bytes, its manifest says {expected}")
        partial = await self._store.new_partial(self.digest)
        try:
            self._partial, self.size = partial, expected
            self._changed.ring()
            while data := await stream.body.read():
                await partial.append(data)
                if self.size is not None and partial.length > self.size:
                    raise Unavailable(f"{self}: the upstream sent more than {self.size} bytes")
                self._changed.ring()
            if self.size is not None and partial.length < self.size:
                raise Unavailable(f"{self}: the upstream sent {partial.length} of {self.size} bytes")
            self._verify(partial)
            await self._store.commit(partial)
        except BaseException:
            await partial.discard()
            raise
        finally:
            partial.close()

    def _verify(self, partial: Partial) -> None:
        try:
            partial.verify()
        except DigestMismatch as mismatch:
            raise Unavailable(f"{self}: {mismatch}") from None
        self.size = partial.length
        self._verified = True
        self._changed.ring()

    def __str__(self) -> str:
        return f"{self.repository}@{self.digest}"


class DownloadReader:
    """A client's view of a download; it never learns when the partial becomes a blob."""

    def __init__(self, download: Download, file: PartialReader, size: int) -> None:
        self._download = download
        self._file = file
        self.size = size

    def more_than(self, offset: int) -> Deferred[int]:
        """Fires as soon as more than `offset` bytes can be read; fails when no more will come."""
        return Deferred.fromCoroutine(self._download.more_than(offset))

    def read(self, offset: int, count: int) -> Deferred[bytes]:
        """Fires with some of the bytes at `offset`, which can be read."""
        return self._file.read(offset, count)

    def close(self) -> None:
        """Gives the file back."""
        self._file.close()

    def __str__(self) -> str:
        return str(self._download)
