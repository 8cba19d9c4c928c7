"""Loop detection between caches by the Via header."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ociregistry.context import FROM_CLIENT, Context, Via
from ociregistry.errors import BlobUnknown, LoopDetected, ManifestUnknown, NameUnknown, RegistryError, Unavailable
from ociregistry.names import Upstream
from ociregistry.upstream.mirrors import MirrorClient, Sources
from ociregistry.upstream.registry import ConnectionLimit, Registry
from tests.unit.support.bodies import ScriptedExchanges
from tests.unit.support.common import failed, fired
from tests.unit.support.http_agents import INSTANCE, client_over, registry_over
from tests.unit.test_upstream_client import CDN, HOP, OK, REG, TOKEN, challenge, token
from tests.unit.test_upstream_registry import APP, BY_DIGEST, IMAGE, LAYER, TAGGED, registry

OTHER = "ociregistry-fedcba9876543210"
THIRD = "ociregistry-00000000deadbeef"
LAST = "ociregistry-ffffffffffffffff"

AskHelper = Callable[[Registry, Context], Coroutine[Deferred[Any], Any, object]]

REQUESTS: dict[str, tuple[AskHelper, type[RegistryError]]] = {
    "manifest": (lambda registry, context: registry.manifest(TAGGED, context), ManifestUnknown),
    "digest": (lambda registry, context: registry.manifest(BY_DIGEST, context), ManifestUnknown),
    "blob": (lambda registry, context: registry.blob(APP, LAYER, context, start=5), BlobUnknown),
    "size": (lambda registry, context: registry.blob_size(APP, LAYER, context), BlobUnknown),
    "tags": (lambda registry, context: registry.tags(APP, context=context), NameUnknown),
    "referrers": (lambda registry, context: registry.referrers(APP, IMAGE.digest, context), ManifestUnknown),
}
every_request = pytest.mark.parametrize(("ask", "unknown"), REQUESTS.values(), ids=REQUESTS.keys())


def refused(via: str = "") -> dict[str, Any]:
    """Return a 403, which comes from one of us if it has a Via."""
    return {"status": 403, "data": b"{}", "headers": {"Via": via} if via else {}}


@every_request
def test_every_request_has_a_via(ask: AskHelper, unknown: type[RegistryError]) -> None:
    source, http = registry(refused())
    failed(Deferred.fromCoroutine(ask(source, FROM_CLIENT)), unknown)
    assert [sent.headers["Via"] for sent in http.sent] == [f"1.1 {INSTANCE}"]


@every_request
def test_via_includes_earlier_caches(ask: AskHelper, unknown: type[RegistryError]) -> None:
    source, http = registry(refused())
    failed(Deferred.fromCoroutine(ask(source, Context(Via((OTHER, THIRD))))), unknown)
    # The original registry is unaffected.
    failed(Deferred.fromCoroutine(ask(source, FROM_CLIENT)), unknown)
    assert [sent.headers["Via"] for sent in http.sent] == [
        f"1.1 {OTHER}, 1.1 {THIRD}, 1.1 {INSTANCE}",
        f"1.1 {INSTANCE}",
    ]


def test_redirect_target_gets_a_via() -> None:
    http = ScriptedExchanges({REG: [challenge(), HOP], CDN: [OK], TOKEN: [token("t")]})
    fired(Deferred.fromCoroutine(registry_over(client_over(http)).blob(APP, LAYER)))
    via = f"1.1 {INSTANCE}"
    assert [sent.headers.get("Via") for sent in http.sent] == [via, None, via, via]


@every_request
def test_403_with_our_via_is_a_loop(ask: AskHelper, unknown: type[RegistryError]) -> None:
    source, _ = registry(refused(f"1.1 {INSTANCE}, 1.1 {OTHER}, 1.1 {INSTANCE}"))
    loop = failed(Deferred.fromCoroutine(ask(source, FROM_CLIENT)), LoopDetected)
    assert (loop.status, loop.message) == (403, "reg.example: it leads back to this server")
    # The client must learn of it too.
    assert loop.headers() == {"Via": f"1.1 {INSTANCE}, 1.1 {OTHER}, 1.1 {INSTANCE}, 1.1 {INSTANCE}"}


@every_request
@pytest.mark.parametrize(
    "via", ["", "1.1 varnish", f"1.1 {OTHER}", f"1.1 {OTHER}, 1.1 {THIRD}", f"1.1 {INSTANCE[:-1]}"]
)
def test_other_403_means_unknown(ask: AskHelper, unknown: type[RegistryError], via: str) -> None:
    source, _ = registry(refused(via))
    error = failed(Deferred.fromCoroutine(ask(source, FROM_CLIENT)), unknown)
    assert type(error) is unknown


@pytest.mark.parametrize(("status", "kind"), [(404, ManifestUnknown), (401, ManifestUnknown), (503, Unavailable)])
def test_our_via_in_other_statuses_is_ignored(status: int, kind: type[RegistryError]) -> None:
    source, _ = registry({"status": status, "headers": {"Via": f"1.1 {INSTANCE}"}})
    assert type(failed(Deferred.fromCoroutine(source.manifest(TAGGED)), kind)) is kind


def test_overlong_via_is_a_loop() -> None:
    source, _ = registry(refused(", ".join(f"1.1 ociregistry-{number:016x}" for number in range(17))))
    failed(Deferred.fromCoroutine(source.manifest(TAGGED)), LoopDetected)


MIRROR = "https://mirror.example/"
PEER = Context(Via((OTHER,)))
"""The context of a request that another cache sent."""


def mirrored(*answers: dict[str, Any], instance: str = INSTANCE) -> tuple[Registry, ScriptedExchanges]:
    """Return a registry with one mirror, which sends these answers."""
    clock = Clock()
    http = ScriptedExchanges({MIRROR: list(answers)})
    mirror = MirrorClient("mirror.example", client_over(http, clock, name="mirror.example"), clock)
    sources = Sources("reg.example", [mirror], client_over(http))
    return Registry(Upstream("reg.example"), sources, ConnectionLimit(1), instance), http


@pytest.mark.parametrize(
    ("passed", "loops"),
    [
        # The mirror is the cache that asks, or leads to it.
        ([OTHER, INSTANCE, OTHER], True),
        ([OTHER, INSTANCE, THIRD, OTHER], True),
        # It is part of another loop.
        ([OTHER, INSTANCE, THIRD, THIRD], False),
        ([], False),
    ],
)
def test_mirror_that_leads_to_the_asking_cache(passed: list[str], loops: bool) -> None:
    source, http = mirrored(refused(", ".join(f"1.1 {name}" for name in passed)), instance=OTHER.replace("f", "e"))
    context = Context(Via((OTHER,)))
    found = fired(Deferred.fromCoroutine(source.loops(APP, "manifests/1", context)))
    assert found is None
    assert http.sent == []
    source, http = mirrored(refused(", ".join(f"1.1 {name}" for name in passed)), instance=LAST)
    found = fired(Deferred.fromCoroutine(source.loops(APP, "manifests/1", context)))
    assert (found is not None) == loops
    assert [(sent.method, sent.headers["Via"]) for sent in http.sent] == [("HEAD", f"1.1 {OTHER}, 1.1 {LAST}")]


def test_look_goes_on_through_a_ring_and_its_result_comes_back() -> None:
    """Only the lowest name of a ring ends it; each cache on the way tells the one before what it was told."""
    way = [THIRD, LAST, OTHER, THIRD]
    source, http = mirrored(refused(", ".join(f"1.1 {name}" for name in way)), instance=OTHER)
    context = Context(Via((THIRD, LAST)))
    found = fired(Deferred.fromCoroutine(source.loops(APP, "manifests/1", context)))
    assert found is not None
    assert Via.parse(found.via).instances == (*way, OTHER)
    assert len(http.sent) == 1


@pytest.mark.parametrize("answer", [OK, {"status": 404}, Unavailable("down")])
def test_mirror_that_answers_otherwise_is_no_loop(answer: Any) -> None:
    source, _ = mirrored(answer, answer, instance=LAST)
    assert fired(Deferred.fromCoroutine(source.loops(APP, "manifests/1", PEER))) is None


def test_registry_without_mirrors_leads_nowhere() -> None:
    source, http = registry()
    assert fired(Deferred.fromCoroutine(source.loops(APP, "manifests/1", PEER))) is None
    assert http.sent == []
