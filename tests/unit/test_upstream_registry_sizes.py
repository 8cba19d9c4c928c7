"""Blob sizes from storage that refuses HEAD: determined by a GET of the first byte."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.defer import Deferred

from ociregistry.errors import BlobUnknown, RegistryError, Unavailable
from ociregistry.names import Digest, Repository, Upstream
from ociregistry.upstream.registry import Registry
from tests.images import make_image
from tests.unit.support.bodies import ScriptedAnswer, ScriptedExchanges
from tests.unit.support.common import failed, fired, on_reactor, until
from tests.unit.support.http_agents import client_over, registry_over
from tests.unit.support.wire import Network
from tests.unit.test_upstream_client import CDN, HOP, REG
from tests.unit.test_upstream_registry import APP, LAYER
from tests.upstream import ScriptedRegistry
from tests.upstream_rules import Redirect, Reply

REFUSALS = [400, 403, 405, 501]
BUILT = make_image("sizes", layer_size=8 * 1024 * 1024)


def part(content_range: str) -> dict[str, Any]:
    """Return the first byte as a 206."""
    return {"status": 206, "data": b"x", "headers": {"Content-Range": content_range}}


def refused(status: int) -> dict[str, Any]:
    """Return a refusal of HEAD."""
    return {"status": status, "data": b"signed for GET"}


class RegistryWithStorage:
    """A registry that redirects to storage with scripted answers."""

    def __init__(self, *storage: ScriptedAnswer) -> None:
        self.http = ScriptedExchanges({CDN: storage, REG: [HOP]})
        self.registry = registry_over(client_over(self.http))

    def ask(self) -> Deferred[int | None]:
        """Request the size."""
        return Deferred.fromCoroutine(self.registry.blob_size(APP, LAYER))

    @property
    def asked(self) -> list[tuple[str, str, str | None]]:
        """Return method, host and range of each request."""
        return [(sent.method, sent.url.split("/")[2], sent.headers.get("Range")) for sent in self.http.sent]


@pytest.mark.parametrize("status", REFUSALS)
def test_refused_head_is_replaced_by_get_of_first_byte(status: int) -> None:
    sized_registry = RegistryWithStorage(refused(status), part("bytes 0-0/12345"))
    assert fired(sized_registry.ask()) == 12345
    # A new GET to the registry, because the URL may be signed for HEAD only.
    assert sized_registry.asked == [
        ("HEAD", "reg.example", None),
        ("HEAD", "cdn.example", None),
        ("GET", "reg.example", "bytes=0-0"),
        ("GET", "cdn.example", "bytes=0-0"),
    ]


def test_storage_without_ranges_gives_content_length() -> None:
    sized_registry = RegistryWithStorage(refused(403), {"status": 200, "data": b"x" * 10, "length": 12345})
    assert fired(sized_registry.ask()) == 12345


def test_unknown_total_size() -> None:
    assert fired(RegistryWithStorage(refused(403), part("bytes 0-0/*")).ask()) is None


@pytest.mark.parametrize("content_range", ["", "bytes 0-0/many", "items 0-0/12345", "bytes */12345"])
def test_malformed_content_range(content_range: str) -> None:
    assert fired(RegistryWithStorage(refused(403), part(content_range)).ask()) is None


def test_empty_blob_has_no_first_byte() -> None:
    unsatisfiable = {"status": 416, "headers": {"Content-Range": "bytes */0"}}
    assert fired(RegistryWithStorage(refused(403), unsatisfiable).ask()) == 0


def test_404_of_storage_is_unknown() -> None:
    failed(RegistryWithStorage(refused(403)).ask(), BlobUnknown)
    failed(RegistryWithStorage({"status": 404}).ask(), BlobUnknown)


@pytest.mark.parametrize("status", [400, 405, 500])
def test_storage_refusing_get_is_an_error(status: int) -> None:
    message = failed(RegistryWithStorage(refused(403), {"status": status}).ask(), Unavailable).message
    assert message == f"reg.example: it answered {status}"


@pytest.mark.parametrize("status", [401, 416, 429, 500, 503])
def test_other_statuses_are_final(status: int) -> None:
    sized_registry = RegistryWithStorage({"status": status}, part("bytes 0-0/12345"))
    failed(sized_registry.ask(), RegistryError)
    assert [method for method, _, _ in sized_registry.asked] == ["HEAD", "HEAD"]


def test_refusal_by_the_registry_is_final() -> None:
    http = ScriptedExchanges({REG: [refused(403), part("bytes 0-0/12345")]})
    failed(Deferred.fromCoroutine(registry_over(client_over(http)).blob_size(APP, LAYER)), BlobUnknown)
    assert [sent.method for sent in http.sent] == ["HEAD"]


@pytest.mark.parametrize("status", REFUSALS)
def test_refused_get_is_not_repeated(status: int) -> None:
    """Only a refused HEAD is replaced."""
    sized_registry = RegistryWithStorage(refused(status))
    failed(Deferred.fromCoroutine(sized_registry.registry.blob(APP, LAYER)), RegistryError)
    assert [method for method, _, _ in sized_registry.asked] == ["GET", "GET"]


@pytest.mark.parametrize("ranges", [True, False])
@on_reactor
async def test_rest_of_the_blob_is_not_transferred(
    network: Network, upstream: ScriptedRegistry, ranges: bool
) -> None:
    layer = BUILT.layers[0]
    with ScriptedRegistry() as storage:
        storage.add("team/app", BUILT)
        storage.script("*", Reply(403, b"signed for GET"), method="HEAD")
        if not ranges:
            storage.script("*", Reply(200, layer.data), method="GET")
        upstream.script("*", Redirect(storage.url))
        registry: Registry = network.registry(upstream.host, scheme="http", connections=1)
        where = Repository(Upstream.parse(upstream.host), "team/app")
        for _ in range(4):
            assert await registry.blob_size(where, Digest(layer.digest)) == len(layer.data)
        # All requests have ended, with no more data than socket buffers hold.
        await until(lambda: all(request.done for request in storage.requests))
        assert storage.bytes_sent(layer.digest) < 4 * (1 if ranges else len(layer.data) * 3 // 4) + 100
