"""The scheme of an upstream: https, and http only if its host does not speak TLS."""

from __future__ import annotations

import pytest

from ociregistry.errors import Unavailable
from tests.unit.support.common import failed
from tests.unit.test_upstream_client import CDN, HOP, OK, PLAIN, REG, TOKEN, Asking, challenge, token

HTTP = "http://reg.example/"


def test_https_is_tried_first() -> None:
    asking = Asking({REG: [OK]}, scheme=None)
    assert asking.status() == 200
    assert (asking.http.urls, asking.http_considered) == ([f"{REG}v2/team/app/blobs/x"], 0)


def test_http_if_host_does_not_speak_tls() -> None:
    asking = Asking({REG: [PLAIN], HTTP: [OK]}, scheme=None)
    assert asking.status() == 200
    assert asking.http.urls == [f"{REG}v2/team/app/blobs/x", f"{HTTP}v2/team/app/blobs/x"]


def test_http_only_if_allowed() -> None:
    asking = Asking({REG: [PLAIN]}, scheme=None, plain=False)
    assert failed(asking.ask(), Unavailable) is PLAIN
    assert len(asking.http.urls) == asking.http_considered == 1


@pytest.mark.parametrize("why", ["connection attempt timed out", "TLS failed: certificate verify failed"])
def test_other_failures_cause_no_fallback(why: str) -> None:
    asking = Asking({REG: [Unavailable(why)]}, scheme=None)
    assert failed(asking.ask(), Unavailable).message == why
    assert asking.http_considered == 0


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_configured_scheme_is_the_only_one(scheme: str) -> None:
    asking = Asking({f"{scheme}://reg.example/": [PLAIN]}, scheme=scheme)
    assert failed(asking.ask(), Unavailable) is PLAIN
    assert asking.http_considered == 0


def test_detected_scheme_is_cached_for_ten_minutes() -> None:
    asking = Asking({REG: [PLAIN], HTTP: [OK]}, scheme=None)
    asking.status()
    asking.clock.advance(599)
    asking.status()
    assert len(asking.http.urls) == 3
    asking.clock.advance(1)
    asking.status()
    assert [url.startswith(REG) for url in asking.http.urls] == [True, False, False, True, False]


def test_host_with_known_tls_is_not_asked_by_http() -> None:
    asking = Asking({REG: [OK, PLAIN]}, scheme=None)
    asking.status()
    assert failed(asking.ask(), Unavailable) is PLAIN
    assert asking.http_considered == 0


def test_failure_is_not_cached() -> None:
    asking = Asking({REG: [PLAIN, PLAIN, OK], HTTP: [Unavailable("down")]}, scheme=None)
    failed(asking.ask(), Unavailable)
    failed(asking.ask(), Unavailable)
    assert asking.status() == 200


def test_refusal_by_redirect_target_causes_no_fallback() -> None:
    """The upstream has spoken TLS to redirect; the storage behind it refuses connections."""
    asking = Asking({REG: [HOP], CDN: [PLAIN], HTTP: [OK]}, scheme=None)
    failed(asking.ask(), Unavailable)
    assert not [url for url in asking.http.urls if url.startswith("http:")]
    assert asking.http_considered == 0


@pytest.mark.parametrize("later", [0, 3600])
def test_refusal_by_token_service_causes_no_fallback(later: float) -> None:
    asking = Asking({REG: [challenge(), OK, challenge()], TOKEN: [token("t"), PLAIN], HTTP: [OK]}, scheme=None)
    assert asking.status() == 200
    # Later, both scheme and token have expired.
    asking.clock.advance(later)
    failed(asking.ask(), Unavailable)
    assert not [url for url in asking.http.urls if url.startswith("http:")]
