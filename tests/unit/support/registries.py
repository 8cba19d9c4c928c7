"""Upstreams in memory: every request waits for the answer that the test gives it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ociregistry.manifests import Manifest
from ociregistry.names import Digest, ImageReference, Repository, Upstream
from ociregistry.pullthrough.cache import PullThrough
from ociregistry.upstream.body import Body
from ociregistry.upstream.http import DEFAULT_OPTIONS, RequestOptions
from ociregistry.upstream.network import Registries
from ociregistry.upstream.registry import BlobStream, Registry, TagPage
from ociregistry.via import NO_VIA, Via
from tests.unit.support.bodies import Connection, connected, end
from tests.unit.support.doubles import until


class Call:
    """One request to an upstream, made for who stands in `chain`: `kind` is the method, and `result` what the test
    fires it with."""

    options = DEFAULT_OPTIONS

    def __init__(self, kind: str, *what: object, via: Via = NO_VIA) -> None:
        self.kind = kind
        self.via = via
        self.what = " ".join(map(str, what))
        self.result: Deferred[Any] = Deferred()

    def answer(self, value: object) -> None:
        """It succeeds."""
        self.result.callback(value)

    def refuse(self, error: Exception) -> None:
        """It fails."""
        self.result.errback(error)

    def stream(self, size: int | None, start: int = 0) -> Sending:
        """It is a blob of so many bytes that the test sends, from the byte `start`."""
        sending = Sending(size, start)
        self.answer(sending.stream)
        return sending


class Sending:
    """A blob on its way."""

    def __init__(self, size: int | None, start: int) -> None:
        self.body: Body
        self.connection: Connection
        self.body, self.connection = connected(Clock())
        self.stream = BlobStream(size, start, self.body)

    def send(self, data: bytes) -> Sending:
        """Some bytes come."""
        self.body.dataReceived(data)
        return self

    def end(self, why: BaseException | None = None) -> None:
        """No more will come."""
        end(self.body, why)


async def landed(cache: PullThrough) -> None:
    """All downloads have ended, which shows nowhere else."""
    await until(lambda: not cache._downloads)


class MemoryRegistry(Registry):
    """An upstream that answers when the test says so."""

    def __init__(self, upstream: Upstream, calls: list[Call], via: Via = NO_VIA) -> None:
        self.upstream = upstream
        self._calls = calls
        self._via = via

    def with_via(self, via: Via) -> Registry:
        """It answers to all who stand behind us as well."""
        return MemoryRegistry(self.upstream, self._calls, via)

    def _call(self, kind: str, *what: object) -> Deferred[Any]:
        self._calls.append(Call(kind, *what, via=self._via))
        return self._calls[-1].result

    async def manifest(self, image: ImageReference, options: RequestOptions = DEFAULT_OPTIONS) -> Manifest:
        asked = self._call("manifest", image)
        self._calls[-1].options = options
        return cast(Manifest, await asked)

    async def blob(
        self, repository: Repository, digest: Digest, start: int = 0, options: RequestOptions = DEFAULT_OPTIONS
    ) -> BlobStream:
        where = (f"from {start}",) if start else ()
        asked = self._call("blob", repository, digest, *where)
        self._calls[-1].options = options
        return cast(BlobStream, await asked)

    async def manifest_digest(self, image: ImageReference) -> Digest | None:
        return cast("Digest | None", await self._call("manifest_digest", image))

    async def blob_size(self, repository: Repository, digest: Digest) -> int:
        return cast(int, await self._call("blob_size", repository, digest))

    async def tags(self, repository: Repository, count: int | None, last: str) -> TagPage:
        return cast(TagPage, await self._call("tags", repository, count, last))

    async def referrers(self, repository: Repository, digest: Digest) -> Manifest:
        return cast(Manifest, await self._call("referrers", repository, digest))


class MemoryRegistries(Registries):
    """All upstreams, and every request to any of them."""

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
        """All requests, in words."""
        return [f"{call.kind} {call.what}" for call in self.calls]
