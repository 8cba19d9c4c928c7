"""A daemon client that answers when the test says so, and a fetcher over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ociregistry.manifests import Manifest
from ociregistry.names import Digest, ImageReference, Repository
from ociregistry.pullthrough.cache import FoundManifest
from ociregistry.pullthrough.fetchers import DaemonFetcher
from ociregistry.store.store import Store
from ociregistry.upstream.body import Body
from ociregistry.upstream.daemon_client import DaemonClient
from tests.images import make_image
from tests.unit.support.bodies import Connection, connected
from tests.unit.support.common import image, manifest, until
from tests.unit.support.loads import settle
from tests.unit.support.registries import Call

BUILT = make_image("beside", layers=1, layer_size=5000)
IMAGE = manifest(BUILT)
APP = image("reg.example/app:1")
LAYER = Digest(BUILT.layers[0].digest)
DATA = BUILT.layers[0].data


class FakeDaemonClient(DaemonClient):
    """A daemon client that answers when the test says so."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def _ask(self, kind: str, *what: object) -> Deferred[Any]:
        self.calls.append(Call(kind, *what))
        return self.calls[-1].result

    async def manifest(self, image: ImageReference) -> Manifest:
        return cast(Manifest, await self._ask("manifest", image))

    async def referrers(self, repository: Repository, digest: Digest) -> Manifest:
        return cast(Manifest, await self._ask("referrers", repository, digest))

    async def blob(self, repository: Repository, digest: Digest, start: int) -> Body:
        return cast(Body, await self._ask("blob", repository, digest, start))


class DaemonFetcherHarness:
    """A fetcher over the daemon client."""

    def __init__(self, store: Store, root: Path, clock: Clock) -> None:
        self._root = root
        self._store = store
        self.clock = clock
        self.daemon = FakeDaemonClient()
        self.fetcher = DaemonFetcher(store, self.daemon, 60.0, clock, lambda upstream: None)
        self.advance: list[int] = []

    @property
    def asked(self) -> list[str]:
        """Return all requests to the daemon."""
        return [f"{call.kind} {call.what}" for call in self.daemon.calls]

    async def call(self, count: int) -> Call:
        """Wait for request number `count` and return it."""
        await until(lambda: len(self.daemon.calls) == count)
        return self.daemon.calls[-1]

    async def respond(self, count: int, data: bytes) -> tuple[Body, Connection]:
        """Answer request number `count` with a body that begins with these bytes."""
        body, connection = connected()
        (await self.call(count)).answer(body)
        if data:
            advance = sum(self.advance)
            body.dataReceived(data)
            await until(lambda: sum(self.advance) == advance + len(data))
        return body, connection

    def store_blob(self, digest: Digest = LAYER, data: bytes = DATA) -> None:
        """Write the blob into the store, as the daemon does."""
        (self._root / "blobs" / digest.hex).write_bytes(data)

    def manifest(self) -> Deferred[FoundManifest]:
        """Fetch the manifest."""
        return Deferred.fromCoroutine(self.fetcher.manifest(APP))

    def blob(self, digest: Digest = LAYER, size: int = len(DATA)) -> Deferred[None]:
        """Fetch the layer."""
        return Deferred.fromCoroutine(self.fetcher.blob(APP.repository, digest, size, self.advance.append))

    async def wait_until_done(self, waiting: Deferred[None]) -> None:
        """Advance the clock, scanning the store in between, until the fetch ends."""
        while not waiting.called:
            await settle(self._store)
            self.clock.advance(0.5)

    async def scan_without_result(self, waiting: Deferred[None]) -> None:
        """Let the store scan five times; the fetch must still wait."""
        for _ in range(5):
            await settle(self._store)
            self.clock.advance(0.5)
        await settle(self._store)
        assert not waiting.called
