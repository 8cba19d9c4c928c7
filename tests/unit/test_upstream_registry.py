"""A registry's manifests, blobs, tags and referrers: validation of responses and errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.web.http_headers import Headers

from ociregistry.errors import BlobUnknown, ManifestUnknown, NameUnknown, RegistryError, Unavailable
from ociregistry.manifests import LARGEST_MANIFEST, MEDIA_TYPES, OCI_INDEX
from ociregistry.names import Digest, Upstream
from ociregistry.upstream.body import Body
from ociregistry.upstream.client import Client
from ociregistry.upstream.http import Response
from ociregistry.upstream.registry import BlobStream, Registry
from tests.images import make_image
from tests.unit.support.bodies import ScriptedExchanges, connected, end
from tests.unit.support.common import failed, fired, image, manifest
from tests.unit.support.http_agents import client_over, registry_over

REG = Upstream("reg.example")
APP = image("reg.example/team/app:1").repository
BUILT = make_image("registry")
IMAGE = manifest(BUILT)
TAGGED = image("reg.example/team/app:1")
BY_DIGEST = image(f"reg.example/team/app@{IMAGE.digest}")
LAYER = Digest(BUILT.layers[0].digest)
GOOD: dict[str, Any] = {
    "data": IMAGE.data,
    "headers": {"Content-Type": IMAGE.media_type, "Docker-Content-Digest": IMAGE.digest},
}


def registry(*answers: Mapping[str, Any] | Exception, most: int = 2) -> tuple[Registry, ScriptedExchanges]:
    """Return a registry with these answers in order."""
    http = ScriptedExchanges({"https://reg.example/": answers})
    return registry_over(client_over(http), most), http


def with_headers(**headers: str) -> dict[str, Any]:
    """Return a valid manifest response with these headers."""
    return {
        **GOOD,
        "headers": {**GOOD["headers"], **{name.replace("_", "-"): value for name, value in headers.items()}},
    }


@pytest.mark.parametrize("asked", [TAGGED, BY_DIGEST])
def test_manifest_by_tag_and_by_digest(asked: Any) -> None:
    source, http = registry(GOOD)
    assert fired(Deferred.fromCoroutine(source.manifest(asked))) == IMAGE
    (sent,) = http.sent
    assert (sent.method, sent.url) == ("GET", f"https://reg.example/v2/team/app/manifests/{asked.reference}")
    assert sent.headers["Accept"].split(", ") == list(MEDIA_TYPES)


@pytest.mark.parametrize("spelled", [f"{IMAGE.media_type}; charset=utf-8", IMAGE.media_type.upper()])
def test_manifest_without_digest_header(spelled: str) -> None:
    answer = {"data": IMAGE.data, "headers": {"Content-Type": spelled}}
    assert fired(Deferred.fromCoroutine(registry(answer)[0].manifest(TAGGED))) == IMAGE


def test_manifest_by_sha512() -> None:
    digest = Digest.of(IMAGE.data, "sha512")
    for answer, asked in (
        (GOOD, image(f"reg.example/team/app@{digest}")),
        (with_headers(Docker_Content_Digest=digest), TAGGED),
    ):
        assert fired(Deferred.fromCoroutine(registry(answer)[0].manifest(asked))).digest == digest


def test_manifest_digest_mismatch_is_refused() -> None:
    for wrong in (make_image("another").manifest.data, IMAGE.data[:-1], IMAGE.data + b" ", b""):
        error = failed(Deferred.fromCoroutine(registry({**GOOD, "data": wrong})[0].manifest(BY_DIGEST)), Unavailable)
        assert error.message.startswith(f"{BY_DIGEST}: ")


@pytest.mark.parametrize(
    "header", [Digest.of(b"another"), "sha256:0", "md5:" + "0" * 32, "x" * 100_000, IMAGE.digest.upper()]
)
def test_wrong_digest_header_is_refused(header: str) -> None:
    source, _ = registry(with_headers(Docker_Content_Digest=header))
    error = failed(Deferred.fromCoroutine(source.manifest(TAGGED)), Unavailable)
    assert len(error.message) < 1000


@pytest.mark.parametrize("media_type", ["", "application/json", OCI_INDEX, "text/html"])
def test_content_type_mismatch_is_refused(media_type: str) -> None:
    source, _ = registry(with_headers(Content_Type=media_type))
    failed(Deferred.fromCoroutine(source.manifest(TAGGED)), Unavailable)


def test_oversized_manifest_is_not_read() -> None:
    source, _ = registry({**GOOD, "data": IMAGE.data.ljust(LARGEST_MANIFEST + 1)})
    assert "longer than" in failed(Deferred.fromCoroutine(source.manifest(TAGGED)), Unavailable).message


@pytest.mark.parametrize("status", [401, 403, 404])
def test_unknown_or_forbidden_content(status: int) -> None:
    def ask(method: str, *args: Any) -> Deferred[object]:
        source, _ = registry({"status": status, "data": b"{}"})
        return Deferred.fromCoroutine(getattr(source, method)(*args))

    unknown: list[RegistryError] = [
        failed(ask("manifest", TAGGED), ManifestUnknown),
        failed(ask("blob", APP, LAYER), BlobUnknown),
        failed(ask("blob_size", APP, LAYER), BlobUnknown),
        failed(ask("tags", APP), NameUnknown),
        failed(ask("referrers", APP, LAYER), ManifestUnknown),
    ]
    for error in unknown[:-1]:
        assert "reg.example/team/app" in error.message
        assert str(status) in error.message


@pytest.mark.parametrize("status", [200 + 4, 206, 300, 400, 405, 416, 429, 500, 502, 503, 504])
def test_other_statuses_are_upstream_errors(status: int) -> None:
    for method, args in (("manifest", (TAGGED,)), ("blob", (APP, LAYER)), ("tags", (APP,))):
        source, _ = registry({"status": status})
        error = failed(Deferred.fromCoroutine(getattr(source, method)(*args)), Unavailable)
        assert error.message == f"reg.example: it answered {status}"


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7),
        ("3600", 3600),
        ("86400", 3600),
        ("9" * 5000, 3600),
        ("", 5),
        ("-1", 5),
        ("1.5", 5),
        ("²", 5),
        ("Fri, 31 Dec 9998 23:59:59 GMT", 3600),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 0),
        ("Fri, 31 Dec 2026 23:59:59 -0000", 5),
        ("Fri, 31 Mumble 2026 23:59:59 GMT", 5),
        pytest.param("Fri, 31 Dec 99999999999999999999 23:59:59 GMT", 5),
        pytest.param("Fri, 31 Dec 2026 23:59:59 +99999999999999999999", 5),
    ],
)
def test_retry_after_is_passed_on(header: str, seconds: int) -> None:
    source, _ = registry({"status": 429, "headers": {"Retry-After": header}})
    assert failed(Deferred.fromCoroutine(source.manifest(TAGGED)), Unavailable).retry_after == seconds


def test_non_ascii_digits_in_retry_after_are_ignored() -> None:
    source, _ = registry({"status": 429, "headers": {"Retry-After": ["\xb2".encode("latin-1")]}})
    assert failed(Deferred.fromCoroutine(source.manifest(TAGGED)), Unavailable).retry_after == 5


def test_blob_stream_and_size() -> None:
    source, http = registry({"data": b"content"})
    stream = fired(Deferred.fromCoroutine(source.blob(APP, LAYER)))
    assert stream.size == 7
    assert fired(stream.body.read()) == b"content"
    assert http.urls == [f"https://reg.example/v2/team/app/blobs/{LAYER}"]


class Growing(Client):
    """Client whose response bodies end when the test says so."""

    def __init__(self) -> None:
        self.bodies: list[Body] = []
        self.status = 200

    async def request(self, *args: object, **kwargs: object) -> Response:
        body, _ = connected()
        self.bodies.append(body)
        if self.status != 200:
            end(body)
        return Response("reg.example", self.status, "https://reg.example/", None, body, Headers())


def test_blob_without_content_length() -> None:
    client = Growing()
    stream = fired(Deferred.fromCoroutine(registry_over(client, 1).blob(APP, LAYER)))
    assert stream.size is None
    end(client.bodies[0])


def test_connection_slot_is_held_until_the_body_ends() -> None:
    client = Growing()
    source = registry_over(client, 2)
    asked: list[Deferred[BlobStream]] = [Deferred.fromCoroutine(source.blob(APP, LAYER)) for _ in range(4)]
    assert [one.called for one in asked] == [True, True, False, False]
    end(client.bodies[1])
    assert [one.called for one in asked] == [True, True, True, False]
    # A cancelled waiter leaves its slot to the next.
    asked[3].cancel()
    asked[3].addErrback(lambda _: None)
    asked.append(Deferred.fromCoroutine(source.blob(APP, LAYER)))
    end(client.bodies[0])
    assert asked[4].called
    for body in client.bodies[2:]:
        end(body)


def test_refused_blob_frees_its_slot() -> None:
    client = Growing()
    source = registry_over(client, 1)
    client.status = 404
    for _ in range(3):
        failed(Deferred.fromCoroutine(source.blob(APP, LAYER)), BlobUnknown)
    client.status = 200
    assert fired(Deferred.fromCoroutine(source.blob(APP, LAYER))).size is None
    end(client.bodies[-1])


def test_manifests_do_not_wait_for_blobs() -> None:
    client = Growing()
    source = registry_over(client, 1)
    fired(Deferred.fromCoroutine(source.blob(APP, LAYER)))
    client.status = 404
    failed(Deferred.fromCoroutine(source.manifest(TAGGED)), ManifestUnknown)
    end(client.bodies[0])


def test_blob_size_by_head() -> None:
    source, http = registry({"headers": {"Content-Length": "12345"}})
    assert fired(Deferred.fromCoroutine(source.blob_size(APP, LAYER))) == 12345
    assert http.sent[0].method == "HEAD"


@pytest.mark.parametrize("header", ["", "-5", "many", "5.0", "٣"])
def test_malformed_content_length_is_no_size(header: str) -> None:
    source, _ = registry({"headers": {"Content-Length": header}})
    assert fired(Deferred.fromCoroutine(source.blob_size(APP, LAYER))) is None
