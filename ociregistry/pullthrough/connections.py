"""The connections over which one blob comes, one after the other: where one breaks, the next goes on."""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet import defer
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from ociregistry.errors import Unavailable
from ociregistry.flights import Bell
from ociregistry.names import Digest, Repository
from ociregistry.pullthrough.retries import Retries
from ociregistry.store.partials import Partial
from ociregistry.upstream.registry import BlobStream, OtherBlob, Registry

_HEADERS_WITHIN = 10.0
"""Seconds that an upstream which has already begun to send a blob has for the headers of the next answer."""


class Connections:
    """Asks `registry` for one blob as often as it takes, more often while somebody watches."""

    log = Logger(namespace="ociregistry.pullthrough")

    def __init__(
        self,
        registry: Registry,
        repository: Repository,
        digest: Digest,
        clock: IReactorTime,
        jitter: Callable[[], float],
    ) -> None:
        self.count = 0
        """How many there were."""
        self._registry = registry
        self._repository = repository
        self._digest = digest
        self._clock = clock
        self._retries = Retries(clock.seconds(), jitter)
        self._watchers = 0
        self._wanted = Bell()

    @property
    def watched(self) -> bool:
        """Whether somebody waits for this blob."""
        return self._watchers > 0

    def watch(self) -> None:
        """Somebody waits for this blob."""
        self._watchers += 1
        self._wanted.ring()

    def unwatch(self) -> None:
        """One who waited has gone."""
        self._watchers -= 1

    async def open(self, start: int) -> BlobStream:
        """The blob from the byte `start`, or from an earlier one; raises what the upstream answers."""
        return await self._open(start, None)

    async def _open(self, start: int, within: float | None) -> BlobStream:
        self.count += 1
        return await self._registry.blob(self._repository, self._digest, start, within)

    async def pour(
        self, stream: BlobStream, partial: Partial, size: int | None, changed: Callable[[], object]
    ) -> None:
        """Appends to `partial` until all `size` bytes are there, or all that the upstream has; calls `changed`.

        Raises `Unavailable` when it gives up, `BlobUnknown`, `OtherBlob` for more bytes than there should be or
        for other ones, and `OSError` from the disk.
        """
        while True:
            try:
                ended_at = await self._pour_one(stream, partial, size, changed)
                if size is None or partial.length == size:
                    return
                if ended_at == stream.start and stream.size is not None:
                    raise OtherBlob(f"{self}: the upstream has {partial.length} of {size} bytes")
                why = Unavailable(f"{self}: the upstream ended the answer early")
            except OtherBlob:
                raise
            except Unavailable as error:
                why = error
            finally:
                stream.body.abort()
            self.log.warn(
                "{blob}: broke off at byte {length} of {size}, to be taken up there: {why}",
                blob=self,
                length=partial.length,
                size=size,
                why=why,
            )
            stream = await self._reopen(partial.length, size, why)

    async def _pour_one(
        self, stream: BlobStream, partial: Partial, size: int | None, changed: Callable[[], object]
    ) -> int:
        at = stream.start
        while data := await stream.body.read():
            # An upstream that knows no ranges begins anew: what is here already is passed over.
            known, at = partial.length - at, at + len(data)
            if known >= len(data):
                continue
            if size is not None and at > size:
                raise OtherBlob(f"{self}: the upstream sent more than {size} bytes")
            self._retries.progress(self._clock.seconds())
            await partial.append(data[known:] if known else data)
            partial.checkpoint(self._clock)
            changed()
        return at

    async def _reopen(self, start: int, size: int | None, why: Unavailable) -> BlobStream:
        while not self._retries.exhausted(self._clock.seconds(), watched=self.watched):
            await self._pause(self._retries.wait(self._clock.seconds(), watched=self.watched))
            try:
                stream = await self._open(start, _HEADERS_WITHIN)
            except OtherBlob:
                raise
            except Unavailable as error:
                self.log.debug("{blob}: not yet: {why}", blob=self, why=error)
                why = error
                continue
            if None not in (size, stream.size) and stream.size != size:
                stream.body.abort()
                raise OtherBlob(f"{self}: the upstream now has {stream.size} bytes in place of {size}")
            return stream
        raise why

    async def _pause(self, seconds: float) -> None:
        """Waits; one who comes to watch ends it."""
        try:
            await self._wanted.wait().addTimeout(seconds, self._clock)
        except defer.TimeoutError:
            return

    def __str__(self) -> str:
        return f"{self._repository}@{self._digest}"
