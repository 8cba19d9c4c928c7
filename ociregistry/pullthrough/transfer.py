"""The connections over which one blob is transferred: retries, resuming, and priority.

Where one connection breaks, the next resumes. Downloads that clients wait for go before background downloads.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace

from twisted.internet import defer
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from ociregistry.concurrency import Backoff, Event
from ociregistry.context import Context, Priority, Wanted
from ociregistry.errors import Unavailable
from ociregistry.names import Digest, Repository
from ociregistry.store.partials import CHECKPOINT_EVERY
from ociregistry.store.smallblobs import AnyPartial
from ociregistry.upstream.breaker import LinkDown
from ociregistry.upstream.http import DEFAULT_OPTIONS
from ociregistry.upstream.mirrors import Source
from ociregistry.upstream.registry import BlobMismatch, BlobStream, Registry

_log = Logger(namespace="ociregistry.pullthrough")


class PriorityScheduler:
    """Tracks the downloads that receive bytes for clients; background downloads pause meanwhile."""

    def __init__(self) -> None:
        self._flowing: set[Hashable] = set()
        self._changed = Event()

    def pauses(self, priority: Priority) -> bool:
        """Tell whether a download of this priority must pause."""
        return priority.pauses and bool(self._flowing)

    def flows(self, download: Hashable, priority: Priority | None) -> None:
        """Note the priority at which `download` receives bytes; None while it receives none."""
        if priority is None or priority.pauses:
            self._flowing.discard(download)
        else:
            self._flowing.add(download)
        self._changed.fire()

    def change(self) -> Deferred[None]:
        """Fire when the result of `pauses` may have changed."""
        return self._changed.wait()


_BACKOFF_FOR_CLIENT = Backoff(first=0.5, longest=5.0)
"""From one try to the next while a client waits."""
_BACKOFF = Backoff(first=0.5, longest=30.0)
"""From one try to the next while no client waits."""
_GIVE_UP = 300.0
"""Seconds without a byte and without a client after which the download fails; its partial is kept."""


class Retries:
    """Back-off since the last progress. All times are in seconds; `jitter` returns numbers from 0 to 1."""

    def __init__(self, now: float, jitter: Callable[[], float]) -> None:
        self._jitter = jitter
        self.progress(now)

    def progress(self, now: float) -> None:
        """Start again without back-off, as bytes came."""
        self._progress = now
        self._tried = now
        self._tries = 0

    def exhausted(self, now: float, priority: Priority) -> bool:
        """Tell whether to give up; never while a client waits."""
        return priority < Priority.CLIENT and now - self._progress >= _GIVE_UP

    def wait(self, now: float, priority: Priority) -> float:
        """Return the seconds from `now` to the next try, and count that try.

        The first try is immediate; the interval between the others doubles. It is measured between the starts of
        two tries, so that a try that took long to fail is followed at once.
        """
        backoff = _BACKOFF if priority < Priority.CLIENT else _BACKOFF_FOR_CLIENT
        wait = max(0.0, self._tried + backoff.interval(self._tries, self._jitter()) - now)
        self._tries += 1
        self._tried = now + wait
        return wait


_LARGEST_UNKNOWN = 10 * 1024**3
"""Bytes, at most, of a blob whose size neither a manifest nor the upstream tells; it might never end."""
_ABANDONED_AFTER = 30.0
"""Seconds for which a download whose size no manifest tells continues without a waiting request."""
_HEADERS_TIMEOUT = 10.0
"""Seconds to wait for the headers of a retry; the upstream has usually begun to send the blob before."""


class Abandoned(Unavailable):
    """Raised when no request waits for a blob whose size no manifest tells, and which may therefore never end."""


class Connections:
    """Requests one blob until it is complete, with shorter retry intervals while a client waits.

    `registry` is called for each request, since the settings may change meanwhile.
    """

    def __init__(
        self,
        registry: Callable[[], Registry],
        repository: Repository,
        digest: Digest,
        expected: int | None,
        scheduler: PriorityScheduler,
        clock: IReactorTime,
        jitter: Callable[[], float],
        context: Context,
    ) -> None:
        """Set up the connections; `context` is that of the request which needs the blob first."""
        self._context = context
        self.began = clock.seconds()
        self.count = 0
        """The number of connections opened so far."""
        self._sources: set[Source] = set()
        """The sources of the bytes so far, and of their end."""
        self._registry = registry
        self._repository = repository
        self._digest = digest
        self._clock = clock
        self._retries = Retries(clock.seconds(), jitter)
        self._expected = expected
        self._scheduler = scheduler
        self._flowing = False
        self._watchers = 0
        self.requested = False
        """Whether a client has requested this blob."""
        self._wanted = Event()
        self._waiting = 0
        self._left_at = clock.seconds()
        self._may_be_abandoned = expected is None
        self._down: LinkDown | None = None
        self._changed: Callable[[], object] = lambda: None
        self.abandoned = False
        """Whether the download ends, or has ended, because no request waited for it."""

    @property
    def priority(self) -> Priority:
        """The priority at present: that of a client while one waits for this blob."""
        return Priority.CLIENT if self._watchers else min(self._context.priority, Priority.BACKGROUND)

    @property
    def clients(self) -> int:
        """The number of clients that wait for this blob."""
        return self._watchers

    @property
    def awaited(self) -> bool:
        """Whether a client or a background task waits for this blob."""
        return self._waiting > 0

    def join(self) -> None:
        """Count one more waiter for the end of the download, without raising its priority."""
        self._waiting += 1

    def leave(self) -> None:
        """Count one waiter less."""
        self._waiting -= 1
        self._left_at = self._clock.seconds()

    def watch(self) -> None:
        """Count one more client that waits for this blob, and raise the priority."""
        self.join()
        self.requested = True
        self._watchers += 1
        self._note_priority()
        self._wanted.fire()

    def unwatch(self) -> None:
        """Count one waiting client less; lower the priority after the last one."""
        self.leave()
        self._watchers -= 1
        self._note_priority()

    def _note_priority(self) -> None:
        self._scheduler.flows(self, self.priority if self._flowing else None)

    @property
    def down(self) -> LinkDown | None:
        """Why the host that is being asked counts as down; None where it does not."""
        return self._down.renewed() if self._down is not None else None

    async def open(self, start: int, size: int | None, changed: Callable[[], object]) -> BlobStream:
        """Open the blob at byte `start`, or at an earlier byte where the upstream supports no ranges.

        Calls `changed` when `down` has changed.

        Raises:
            BlobUnknown: the upstream does not have it.
            BlobMismatch: the upstream's blob has another size than `size`.
            Unavailable: the upstream cannot be asked; `Abandoned` when no request waits any more.
        """
        await self._wait_for_turn()
        self._changed = changed
        return await self._open(start, size, self.priority)

    async def _open(
        self, start: int, size: int | None, priority: Priority, timeout: float = DEFAULT_OPTIONS.timeout
    ) -> BlobStream:
        context = replace(self._context, priority=priority, wanted=Wanted(self._link_down))
        while True:
            self.count += 1
            try:
                stream = await self._registry().blob(
                    self._repository, self._digest, context, start=start, size=self._expected, timeout=timeout
                )
            finally:
                self._down = None
            if stream.size is None or size in (None, stream.size):
                return stream
            stream.body.abort()
            mismatch = BlobMismatch(f"{self}: the upstream has {stream.size} bytes, expected {size}")
            if not stream.source.failed(mismatch.message):
                raise mismatch

    def _link_down(self, error: Unavailable) -> None:
        self._down = error if isinstance(error, LinkDown) else None
        self._changed()

    def report_mismatch(self, why: str) -> bool:
        """Report to the sources of the bytes so far that these are wrong; tell whether others will be asked."""
        reports = [source.failed(why) for source in self._sources]
        return any(reports)

    async def _wait_for_turn(self) -> None:
        """Wait while downloads with a higher priority receive bytes."""
        while self._scheduler.pauses(self.priority):
            await self._scheduler.change()
            self._check_awaited()
            # Time spent paused does not count towards giving up.
            self._retries.progress(self._clock.seconds())

    def _check_awaited(self) -> None:
        """Check that a download whose size no manifest tells had a waiter in the last 30 s.

        Raises:
            Abandoned: it had none.
        """
        if self._may_be_abandoned and not self.awaited and self._clock.seconds() - self._left_at >= _ABANDONED_AFTER:
            self.abandoned = True
            raise Abandoned(f"{self}: download abandoned, no client is waiting and no manifest gives its size")

    async def receive(
        self, stream: BlobStream, partial: AnyPartial, size: int | None, changed: Callable[[], object]
    ) -> None:
        """Append to `partial` until it has `size` bytes, or to the end of the body if `size` is None.

        Calls `changed` after each append, and syncs what came now and then. A source that sent no new byte is told
        so, and the next one is asked. The registry itself does not continue bytes of mirrors of which one is known to
        be bad: its bytes would be lost.

        Raises:
            Unavailable: no try succeeded for too long.
            Abandoned: no request waits any more.
            BlobUnknown: the upstream no longer has the blob.
            BlobMismatch: the upstream has more or fewer bytes than `size`, or the bytes so far are probably wrong.
            OSError: the disk failed.
        """
        checkpoints = LoopingCall(partial.checkpoint, self._clock)
        checkpoints.clock = self._clock
        checkpoints.start(CHECKPOINT_EVERY, now=False)
        try:
            await self._receive(stream, partial, size, changed)
        finally:
            checkpoints.stop()

    async def _receive(
        self, stream: BlobStream, partial: AnyPartial, size: int | None, changed: Callable[[], object]
    ) -> None:
        while True:
            before = partial.length
            try:
                ended_at = await self._receive_once(stream, partial, size, changed)
                if size is None or partial.length == size:
                    # Also where no byte came: an empty body may be wrong, too.
                    self._sources.add(stream.source)
                    return
                why = Unavailable(f"{self}: the upstream ended the response early")
                if ended_at == stream.start and stream.size is not None:
                    why = BlobMismatch(f"{self}: the upstream has {partial.length} of {size} bytes")
            except (BlobMismatch, Abandoned):
                raise
            except Unavailable as error:
                why = error
            finally:
                stream.body.abort()
            passed_on = partial.length == before and stream.source.failed(why.message)
            if isinstance(why, BlobMismatch) and not passed_on:
                raise why
            _log.warn(
                "{blob}: connection lost at byte {length} of {size}, resuming: {why}",
                blob=self,
                length=partial.length,
                size=size,
                why=why,
            )
            stream = await self.reopen(partial.length, size, why)

    async def _receive_once(
        self, stream: BlobStream, partial: AnyPartial, size: int | None, changed: Callable[[], object]
    ) -> int:
        if partial.mirrored and stream.source.distrusts_mirrors:
            raise BlobMismatch(f"{self}: bytes of a mirror are not continued, as a mirror has sent wrong content")
        self._flowing = True
        self._note_priority()
        try:
            return await self._read_all(stream, partial, size, changed)
        finally:
            self._flowing = False
            self._note_priority()

    async def _read_all(
        self, stream: BlobStream, partial: AnyPartial, size: int | None, changed: Callable[[], object]
    ) -> int:
        """Append what comes to `partial`; return the offset at which the body ended."""
        at, most = stream.start, _LARGEST_UNKNOWN if size is None else size
        while pieces := await stream.body.read_pieces():
            # An upstream without range support sends the blob from its start: skip the bytes that are stored already.
            count = sum(map(len, pieces))
            known, at = partial.length - at, at + count
            if known >= count:
                continue
            self._sources.add(stream.source)
            if stream.source.is_mirror:
                await partial.note_mirror()
            if at > most:
                raise BlobMismatch(f"{self}: the upstream sent more than {most} bytes")
            self._retries.progress(self._clock.seconds())
            await partial.append(*([b"".join(pieces)[known:]] if known else pieces))
            changed()
            self._check_awaited()
            if self._scheduler.pauses(self.priority):
                stream.body.pause()
                await self._wait_for_turn()
        return at

    async def reopen(self, start: int, size: int | None, why: Unavailable) -> BlobStream:
        """Open the blob at byte `start` again, with retries and back-off.

        `why` is the error of the previous try.

        Raises:
            Unavailable: no try succeeded for too long; the last error.
            BlobMismatch: the upstream's blob has another size than `size`.
            BlobUnknown: the upstream no longer has the blob.
        """
        while not self._retries.exhausted(self._clock.seconds(), self.priority):
            await self._pause(self._retries.wait(self._clock.seconds(), self.priority))
            self._check_awaited()
            await self._wait_for_turn()
            try:
                priority = Priority.URGENT if self.priority is Priority.CLIENT else self.priority
                return await self._open(start, size, priority, _HEADERS_TIMEOUT)
            except BlobMismatch:
                raise
            except Unavailable as error:
                _log.debug("{blob}: retrying: {why}", blob=self, why=error)
                why = error
        raise why

    async def _pause(self, seconds: float) -> None:
        """Wait for `seconds`, or until a client joins."""
        try:
            await self._wanted.wait().addTimeout(seconds, self._clock)
        except defer.TimeoutError:
            return

    def __str__(self) -> str:
        return f"{self._repository}@{self._digest}"
