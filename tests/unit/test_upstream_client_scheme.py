"""Which scheme an upstream is asked by: https, and http only when its host does not speak TLS at all."""

from __future__ import annotations

import pytest

from ociregistry.errors import Unavailable
from tests.unit.support.doubles import failed
from tests.unit.test_upstream_client import CDN, HOP, OK, PLAIN, REG, TOKEN, Asking, challenge, token

HTTP = "http://reg.example/"


def test_https_is_tried_first() -> None:
    asking = Asking({REG: [OK]}, scheme=None)
    assert asking.status() == 200
    assert (asking.http.urls, asking.http_considered) == ([f"{REG}v2/team/app/blobs/x"], 0)


def test_a_host_that_does_not_speak_tls_is_asked_by_http() -> None:
    asking = Asking({REG: [PLAIN], HTTP: [OK]}, scheme=None)
    assert asking.status() == 200
    assert asking.http.urls == [f"{REG}v2/team/app/blobs/x", f"{HTTP}v2/team/app/blobs/x"]


def test_but_only_if_that_is_allowed() -> None:
    asking = Asking({REG: [PLAIN]}, scheme=None, plain=False)
    assert failed(asking.ask(), Unavailable) is PLAIN
    assert len(asking.http.urls) == asking.http_considered == 1


@pytest.mark.parametrize("why", ["connection attempt timed out", "TLS failed: certificate verify failed"])
def test_any_other_failure_is_none_of_the_scheme(why: str) -> None:
    asking = Asking({REG: [Unavailable(why)]}, scheme=None)
    assert failed(asking.ask(), Unavailable).message == why
    assert asking.http_considered == 0


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_configured_scheme_is_the_only_one(scheme: str) -> None:
    asking = Asking({f"{scheme}://reg.example/": [PLAIN]}, scheme=scheme)
    assert failed(asking.ask(), Unavailable) is PLAIN
    assert asking.http_considered == 0


def test_what_was_found_out_is_known_for_ten_minutes() -> None:
    asking = Asking({REG: [PLAIN], HTTP: [OK]}, scheme=None)
    asking.status()
    asking.clock.advance(599)
    asking.status()
    assert len(asking.http.urls) == 3
    asking.clock.advance(1)
    asking.status()
    assert [url.startswith(REG) for url in asking.http.urls] == [True, False, False, True, False]


def test_a_host_that_has_spoken_tls_is_not_asked_by_http_when_it_is_down() -> None:
    asking = Asking({REG: [OK, PLAIN]}, scheme=None)
    asking.status()
    assert failed(asking.ask(), Unavailable) is PLAIN
    assert asking.http_considered == 0


def test_a_failure_teaches_nothing() -> None:
    asking = Asking({REG: [PLAIN, PLAIN, OK], HTTP: [Unavailable("down")]}, scheme=None)
    failed(asking.ask(), Unavailable)
    failed(asking.ask(), Unavailable)
    assert asking.status() == 200


def test_only_the_upstreams_own_host_says_whether_it_speaks_tls() -> None:
    """It does, or it could not have redirected; who refuses to be connected to is the storage behind it."""
    asking = Asking({REG: [HOP], CDN: [PLAIN], HTTP: [OK]}, scheme=None)
    failed(asking.ask(), Unavailable)
    assert not [url for url in asking.http.urls if url.startswith("http:")]
    assert asking.http_considered == 0


@pytest.mark.parametrize("later", [0, 3600])
def test_nor_does_its_token_service(later: float) -> None:
    asking = Asking({REG: [challenge(), OK, challenge()], TOKEN: [token("t"), PLAIN], HTTP: [OK]}, scheme=None)
    assert asking.status() == 200
    # Later both have to be found out anew: the scheme, and a token.
    asking.clock.advance(later)
    failed(asking.ask(), Unavailable)
    assert not [url for url in asking.http.urls if url.startswith("http:")]
