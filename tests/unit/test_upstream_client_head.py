"""Hosts that do not support HEAD are asked by GET; content that does not exist costs a GET every ten minutes."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from ociregistry.errors import BlobUnknown, ManifestUnknown, RegistryError, Unavailable
from ociregistry.names import Digest
from ociregistry.upstream.registry import Registry
from tests.images import make_image
from tests.unit.support.bodies import ScriptedAnswer, ScriptedExchanges
from tests.unit.support.common import failed, fired, image, manifest
from tests.unit.support.http_agents import client_over, registry_over
from tests.unit.test_upstream_client import REG
from tests.unit.test_upstream_registry import APP, GOOD, IMAGE, LAYER, TAGGED

REFUSALS = [400, 404, 405, 501]
HOUR, TEN_MINUTES = 3600, 600
OTHER_TAG = image("reg.example/team/app:2")
FIRST_BYTE: dict[str, Any] = {"status": 206, "data": b"x", "headers": {"Content-Range": "bytes 0-0/12345"}}


class Asked:
    """A registry with scripted answers, and a clock."""

    def __init__(self, *answers: ScriptedAnswer) -> None:
        self.clock = Clock()
        self.http = ScriptedExchanges({REG: answers})
        self.registry: Registry = registry_over(client_over(self.http, self.clock))

    def digest(self, of: Any = TAGGED) -> Deferred[Digest | None]:
        """Ask for the digest of a manifest."""
        return Deferred.fromCoroutine(self.registry.manifest_digest(of))

    def size(self) -> Deferred[int | None]:
        """Ask for the size of a blob."""
        return Deferred.fromCoroutine(self.registry.blob_size(APP, LAYER))

    @property
    def methods(self) -> str:
        """The methods of all requests."""
        return " ".join(sent.method for sent in self.http.sent)


@pytest.mark.parametrize("status", REFUSALS)
def test_manifest_is_requested_by_get_where_head_is_refused(status: int) -> None:
    """Watchtower took such images for up to date (nicholas-fedor/watchtower#669, a 404).

    It now falls back to GET, as do imgpkg (carvel-dev/imgpkg#149), docker-registry-util (its #3, for Nexus) and
    containerd.
    """
    asked = Asked({"status": status}, GOOD)
    assert fired(asked.digest()) == IMAGE.digest
    assert asked.methods == "HEAD GET"
    accepts = [sent.headers["Accept"] for sent in asked.http.sent]
    assert accepts[0] == accepts[1]


def test_digest_is_that_of_the_body() -> None:
    answer = {"data": IMAGE.data, "headers": {"Content-Type": IMAGE.media_type}}
    assert fired(Asked({"status": 405}, answer).digest()) == IMAGE.digest
    other = {**GOOD, "data": manifest(make_image("other")).data}
    failed(Asked({"status": 405}, other).digest(), Unavailable)


@pytest.mark.parametrize("status", REFUSALS)
def test_first_byte_of_blob_is_requested_where_head_is_refused(status: int) -> None:
    """Pull-through caches answer HEAD with 404 for a blob that GET fetches (distribution/distribution#4747)."""
    asked = Asked({"status": status}, FIRST_BYTE)
    assert fired(asked.size()) == 12345
    assert [(sent.method, sent.headers.get("Range")) for sent in asked.http.sent] == [
        ("HEAD", None),
        ("GET", "bytes=0-0"),
    ]


@pytest.mark.parametrize("status", REFUSALS)
def test_missing_head_support_is_remembered_for_an_hour(status: int) -> None:
    asked = Asked({"status": status}, GOOD)
    fired(asked.digest())
    asked.clock.advance(HOUR - 1)
    # It holds for all repositories and tags of the host.
    assert fired(asked.digest(OTHER_TAG)) == IMAGE.digest
    assert asked.methods == "HEAD GET GET"
    asked.clock.advance(1)
    fired(asked.digest())
    assert asked.methods == "HEAD GET GET HEAD"


@pytest.mark.parametrize("status", [405, 501])
def test_405_and_501_are_remembered_whatever_get_answers(status: int) -> None:
    asked = Asked({"status": status}, {"status": 404})
    for _ in range(2):
        failed(asked.digest(), ManifestUnknown)
    assert asked.methods == "HEAD GET GET"


def test_manifests_and_blobs_are_remembered_separately() -> None:
    """A cache may support HEAD for manifests alone, and a GET of a manifest may count against a rate limit."""
    asked = Asked({"status": 404}, FIRST_BYTE, {**GOOD, "data": b""}, FIRST_BYTE)
    fired(asked.size())
    fired(asked.digest())
    fired(asked.size())
    assert asked.methods == "HEAD GET HEAD GET"


@pytest.mark.parametrize(("ask", "unknown"), [("digest", ManifestUnknown), ("size", BlobUnknown)])
def test_missing_content_costs_a_get_every_ten_minutes(ask: str, unknown: type[RegistryError]) -> None:
    asked = Asked({"status": 404})
    for _ in range(3):
        failed(getattr(asked, ask)(), unknown)
        asked.clock.advance(TEN_MINUTES / 3 - 1)
    assert asked.methods == "HEAD GET HEAD HEAD"
    asked.clock.advance(3)
    failed(getattr(asked, ask)(), unknown)
    assert asked.methods == "HEAD GET HEAD HEAD HEAD GET"


def test_confirmed_404_is_remembered_for_the_same_content_only() -> None:
    """A pull-through cache may answer HEAD with 404 only for content that it has not fetched yet."""
    asked = Asked({"status": 404}, {"status": 404}, {"status": 404}, GOOD)
    failed(asked.digest(), ManifestUnknown)
    assert fired(asked.digest(OTHER_TAG)) == IMAGE.digest
    assert asked.methods == "HEAD GET HEAD GET"


def test_content_that_exists_again_is_found_at_once() -> None:
    asked = Asked({"status": 404}, {"status": 404}, {**GOOD, "data": b""})
    failed(asked.digest(), ManifestUnknown)
    assert fired(asked.digest()) == IMAGE.digest
    assert asked.methods == "HEAD GET HEAD"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_failed_get_is_not_remembered(status: int) -> None:
    asked = Asked({"status": 404}, {"status": status}, {**GOOD, "data": b""})
    failed(asked.digest(), Unavailable)
    asked.clock.advance(5)
    assert fired(asked.digest()) == IMAGE.digest
    assert asked.methods == "HEAD GET HEAD"


@pytest.mark.parametrize("status", [401, 403, 429, 500, 502, 503, 504])
def test_other_statuses_are_final(status: int) -> None:
    asked = Asked({"status": status}, GOOD)
    failed(asked.digest(), RegistryError)
    assert asked.methods == "HEAD"


def test_supported_head_costs_no_get() -> None:
    asked = Asked({**GOOD, "data": b""})
    for _ in range(3):
        assert fired(asked.digest()) == IMAGE.digest
    assert asked.methods == "HEAD HEAD HEAD"
