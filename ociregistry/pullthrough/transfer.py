"""The connections over which one blob comes: retries, resuming, and priority.

Where one connection breaks, the next goes on. What clients wait for goes before what nobody has asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace

from twisted.internet import defer
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from ociregistry.concurrency import Event
from ociregistry.errors import Unavailable
from ociregistry.names import Digest, Repository
from ociregistry.store.partials import Partial
from ociregistry.upstream.http import RequestOptions
from ociregistry.upstream.registry import BlobMismatch, BlobStream, Registry


class PriorityScheduler:
    """Knows which downloads that clients wait for are flowing; the others stand still meanwhile."""

    def __init__(self) -> None:
        self._flowing: set[Hashable] = set()
        self._changed = Event()

    @property
    def yields(self) -> bool:
        """Whether what nobody waits for must stand still."""
        return bool(self._flowing)

    def flows(self, download: Hashable, *, waited_for: bool) -> None:
        """Bytes come for `download`, and a client waits for them, or not."""
        if waited_for:
            self._flowing.add(download)
        else:
            self._flowing.discard(download)
        self._changed.fire()

    def ended(self, download: Hashable) -> None:
        """No more bytes come for it."""
        self.flows(download, waited_for=False)

    def change(self) -> Deferred[None]:
        """Fires when something has changed."""
        return self._changed.wait()


_FIRST = 0.5
_WATCHED = 5.0
"""Seconds, at most, from one try to the next while somebody waits."""
_UNWATCHED = 30.0
_GIVE_UP = 300.0
"""Seconds without a byte, and without anybody who waits, after which the download ends; its partial stays."""


class Retries:
    """Counts the tries since the last progress. All times are in seconds; `jitter` gives numbers from 0 to 1."""

    def __init__(self, now: float, jitter: Callable[[], float]) -> None:
        self._jitter = jitter
        self.progress(now)

    def progress(self, now: float) -> None:
        """Bytes came."""
        self._progress = now
        self._tried = now
        self._tries = 0

    def exhausted(self, now: float, *, watched: bool) -> bool:
        """Whether it is time to give up."""
        return not watched and now - self._progress >= _GIVE_UP

    def wait(self, now: float, *, watched: bool) -> float:
        """How long from `now` to the next try, which counts as made then.

        The first comes at once; the distance of the others doubles. It is measured from try to try: one that
        took long to fail is followed at once.
        """
        longest = _WATCHED if watched else _UNWATCHED
        distance = min(longest, _FIRST * 2 ** (self._tries - 1)) if self._tries else 0.0
        wait = max(0.0, self._tried + distance * (0.5 + self._jitter() / 2) - now)
        self._tries += 1
        self._tried = now + wait
        return wait


_SMALL = 64 * 1024
"""Bytes of a blob that goes before larger ones: a config."""
_LARGEST_UNTOLD = 10 * 1024**3
"""Bytes of a blob whose size neither a manifest nor the upstream tells: there must be an end to it."""
_ALONE = 30.0
"""Seconds for which a blob whose size no manifest tells goes on while nobody waits for it."""
_HEADERS_WITHIN = 10.0
"""Seconds that an upstream which has already begun to send a blob has for the headers of the next answer."""


class Abandoned(Unavailable):
    """Nobody waits for a blob whose size no manifest tells, which may therefore never end."""


class Connections:
    """Asks for one blob as often as it takes, more often while somebody watches.

    `registry` gives whom to ask each time: the settings may change meanwhile.
    """

    log = Logger(namespace="ociregistry.pullthrough")

    def __init__(
        self,
        registry: Callable[[], Registry],
        repository: Repository,
        digest: Digest,
        expected: int | None,
        scheduler: PriorityScheduler,
        clock: IReactorTime,
        jitter: Callable[[], float],
        *,
        extra: bool = True,
    ) -> None:
        """While nobody watches, an `extra` one takes none of the upstream's connections for blobs."""
        self._extra = extra
        self.count = 0
        """How many there were."""
        self._registry = registry
        self._repository = repository
        self._digest = digest
        self._clock = clock
        self._retries = Retries(clock.seconds(), jitter)
        self._options = RequestOptions(small=expected is not None and expected <= _SMALL)
        self._scheduler = scheduler
        self._flowing = False
        self._watchers = 0
        self._wanted = Event()
        self._waiting = 0
        self._left_at = clock.seconds()
        self._ends_alone = expected is None
        self.abandoned = False
        """Whether it ends, or has ended, because nobody waited for it."""

    @property
    def watched(self) -> bool:
        """Whether somebody waits for this blob."""
        return self._watchers > 0

    @property
    def awaited(self) -> bool:
        """Whether anybody waits for this blob, a client or not."""
        return self._waiting > 0

    def join(self) -> None:
        """Count one more that waits for this blob to end, without giving it precedence."""
        self._waiting += 1

    def leave(self) -> None:
        """Count one less."""
        self._waiting -= 1
        self._left_at = self._clock.seconds()

    def watch(self) -> None:
        """Somebody waits for this blob."""
        self.join()
        self._watchers += 1
        self._scheduler.flows(self, waited_for=self._flowing)
        self._wanted.fire()

    def unwatch(self) -> None:
        """One who waited has gone."""
        self.leave()
        self._watchers -= 1
        self._scheduler.flows(self, waited_for=self._flowing and self.watched)

    async def open(self, start: int) -> BlobStream:
        """The blob from the byte `start`, or from an earlier one; raises what the upstream answers."""
        await self._turn()
        return await self._open(start, self._options)

    async def _open(self, start: int, options: RequestOptions) -> BlobStream:
        self.count += 1
        extra = self._extra and not self.watched
        options = replace(options, small=options.small or extra)
        return await self._registry().blob(self._repository, self._digest, start, options)

    async def _turn(self) -> None:
        """Waits while others go first."""
        while self._scheduler.yields and not self.watched:
            await self._scheduler.change()
            self._check_awaited()
            # That no byte comes meanwhile is no reason to give up.
            self._retries.progress(self._clock.seconds())

    def _check_awaited(self) -> None:
        """Raises: `Abandoned` when its size is untold and nobody has waited for it for a while."""
        if self._ends_alone and not self.awaited and self._clock.seconds() - self._left_at >= _ALONE:
            self.abandoned = True
            raise Abandoned(f"{self}: it ends, as nobody waits for it and no manifest tells its size")

    async def pour(
        self, stream: BlobStream, partial: Partial, size: int | None, changed: Callable[[], object]
    ) -> None:
        """Appends to `partial` until all `size` bytes are there, or all that the upstream has; calls `changed`.

        Raises `Unavailable` when it gives up, `Abandoned` when nobody waits, `BlobUnknown`, `OtherBlob` for more
        bytes than there should be or for other ones, and `OSError` from the disk.
        """
        while True:
            try:
                ended_at = await self._pour_one(stream, partial, size, changed)
                if size is None or partial.length == size:
                    return
                if ended_at == stream.start and stream.size is not None:
                    raise BlobMismatch(f"{self}: the upstream has {partial.length} of {size} bytes")
                why = Unavailable(f"{self}: the upstream ended the answer early")
            except (BlobMismatch, Abandoned):
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
            stream = await self.reopen(partial.length, size, why)

    async def _pour_one(
        self, stream: BlobStream, partial: Partial, size: int | None, changed: Callable[[], object]
    ) -> int:
        at = stream.start
        self._flowing = True
        self._scheduler.flows(self, waited_for=self.watched)
        try:
            return await self._read_all(stream, at, partial, size, changed)
        finally:
            self._flowing = False
            self._scheduler.ended(self)

    async def _read_all(
        self, stream: BlobStream, at: int, partial: Partial, size: int | None, changed: Callable[[], object]
    ) -> int:
        most = _LARGEST_UNTOLD if size is None else size
        while data := await stream.body.read():
            # An upstream that knows no ranges begins anew: what is here already is passed over.
            known, at = partial.length - at, at + len(data)
            if known >= len(data):
                continue
            if at > most:
                raise BlobMismatch(f"{self}: the upstream sent more than {most} bytes")
            self._retries.progress(self._clock.seconds())
            await partial.append(data[known:] if known else data)
            partial.checkpoint(self._clock)
            changed()
            self._check_awaited()
            if self._scheduler.yields and not self.watched:
                stream.body.hold()
                await self._turn()
        return at

    async def reopen(self, start: int, size: int | None, why: Unavailable) -> BlobStream:
        """As `open`, again and again as long as it is worth it; `why` is why the last one did not do."""
        while not self._retries.exhausted(self._clock.seconds(), watched=self.watched):
            await self._pause(self._retries.wait(self._clock.seconds(), watched=self.watched))
            self._check_awaited()
            await self._turn()
            try:
                stream = await self._open(start, replace(self._options, within=_HEADERS_WITHIN, insist=self.watched))
            except BlobMismatch:
                raise
            except Unavailable as error:
                self.log.debug("{blob}: not yet: {why}", blob=self, why=error)
                why = error
                continue
            if None not in (size, stream.size) and stream.size != size:
                stream.body.abort()
                raise BlobMismatch(f"{self}: the upstream now has {stream.size} bytes in place of {size}")
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
