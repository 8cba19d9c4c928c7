"""Upstreams in memory: every request waits for the test's answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ociregistry.context import FROM_CLIENT, Context
from ociregistry.errors import LoopDetected
from ociregistry.manifests import Manifest
from ociregistry.names import Digest, ImageReference, Repository, Upstream
from ociregistry.pullthrough.cache import PullThrough
from ociregistry.upstream.body import Body
from ociregistry.upstream.http import DEFAULT_OPTIONS
from ociregistry.upstream.mirrors import Source
from ociregistry.upstream.network import Registries
from ociregistry.upstream.paging import FIRST_PAGE, PageRequest, TagPage
from ociregistry.upstream.registry import BlobStream, Registry, uses_reserved
from tests.unit.support.bodies import Connection, connected, end
from tests.unit.support.common import until


class Call:
    """A request to an upstream: `kind` is the method, and `result` the Deferred for its answer."""

    size: int | None = None
    """The number of bytes of the whole blob, as the caller knows it."""
    timeout: float | None = None
    """The number of seconds for the headers of a blob."""

    def __init__(self, kind: str, *what: object, context: Context = FROM_CLIENT) -> None:
        self.kind = kind
        self.context = context
        self.what = " ".join(map(str, what))
        self.result: Deferred[Any] = Deferred()

    def answer(self, value: object) -> None:
        """Answer the request."""
        self.result.callback(value)

    def refuse(self, error: Exception) -> None:
        """Fail the request."""
        self.result.errback(error)

    @property
    def reserved(self) -> bool:
        """Whether the blob may use the reserved connections."""
        return uses_reserved(self.context.priority, self.size)

    def stream(self, size: int | None, start: int = 0, source: Source | None = None) -> Sending:
        """Answer with a blob of `size` bytes from byte `start`, which the test sends."""
        sending = Sending(size, start, source or ReportedSource())
        self.answer(sending.stream)
        return sending


class ReportedSource(Source):
    """A source of blobs: the registry itself, or with `others` a mirror; keeps what is reported to it."""

    distrusts_mirrors = False

    def __init__(self, *, others: bool = False) -> None:
        self.is_mirror = others
        self.reports: list[str] = []

    def failed(self, why: str) -> bool:
        """Keep the report."""
        self.reports.append(why)
        return self.is_mirror


class Sending:
    """A blob being sent."""

    def __init__(self, size: int | None, start: int, source: Source) -> None:
        self.body: Body
        self.connection: Connection
        self.body, self.connection = connected(Clock())
        self.stream = BlobStream(size, start, self.body, source)

    def send(self, data: bytes) -> Sending:
        """Send some bytes."""
        self.body.dataReceived(data)
        return self

    def end(self, why: BaseException | None = None) -> None:
        """End the body."""
        end(self.body, why)


async def downloads_ended(cache: PullThrough) -> None:
    """Wait until all downloads have ended."""
    await until(lambda: not cache.in_flight)


class MemoryRegistry(Registry):
    """An upstream whose answers the test decides."""

    def __init__(self, upstream: Upstream, calls: list[Call]) -> None:
        self.upstream = upstream
        self._calls = calls

    def _call(self, context: Context, kind: str, *what: object) -> Deferred[Any]:
        self._calls.append(Call(kind, *what, context=context))
        return self._calls[-1].result

    async def manifest(self, image: ImageReference, context: Context = FROM_CLIENT) -> Manifest:
        return cast(Manifest, await self._call(context, "manifest", image))

    async def blob(
        self,
        repository: Repository,
        digest: Digest,
        context: Context = FROM_CLIENT,
        *,
        start: int = 0,
        size: int | None = None,
        timeout: float = DEFAULT_OPTIONS.timeout,
    ) -> BlobStream:
        where = (f"from {start}",) if start else ()
        asked = self._call(context, "blob", repository, digest, *where)
        self._calls[-1].size, self._calls[-1].timeout = size, timeout
        return cast(BlobStream, await asked)

    async def manifest_digest(self, image: ImageReference, context: Context = FROM_CLIENT) -> Digest | None:
        return cast("Digest | None", await self._call(context, "manifest_digest", image))

    async def blob_size(self, repository: Repository, digest: Digest, context: Context = FROM_CLIENT) -> int:
        return cast(int, await self._call(context, "blob_size", repository, digest))

    async def tags(
        self, repository: Repository, page: PageRequest = FIRST_PAGE, context: Context = FROM_CLIENT
    ) -> TagPage:
        return cast(TagPage, await self._call(context, "tags", repository, page.query))

    async def loops(self, repository: Repository, path: str, context: Context) -> LoopDetected | None:
        return cast("LoopDetected | None", await self._call(context, "loops", repository, path))

    async def referrers(self, repository: Repository, digest: Digest, context: Context = FROM_CLIENT) -> Manifest:
        return cast(Manifest, await self._call(context, "referrers", repository, digest))


class MemoryRegistries(Registries):
    """All upstreams, and the requests to any of them."""

    def __init__(self, *allowed: str) -> None:
        self.calls: list[Call] = []
        super().__init__(allowed, lambda upstream: MemoryRegistry(upstream, self.calls))

    def __iter__(self) -> Iterator[Call]:
        return iter(self.calls)

    def __len__(self) -> int:
        return len(self.calls)

    def __getitem__(self, number: int) -> Call:
        return self.calls[number]

    @property
    def asked(self) -> list[str]:
        """Return all requests as text."""
        return [f"{call.kind} {call.what}" for call in self.calls]
