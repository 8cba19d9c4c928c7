"""The client of one upstream: scheme, redirects and tokens, with scripted answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock

from ociregistry.config.registries import Login
from ociregistry.errors import Unavailable
from ociregistry.names import Repository, Upstream
from ociregistry.upstream.credentials import AskHelper
from ociregistry.upstream.http import NoTls, Response
from tests.unit.support.bodies import ScriptedAnswer, ScriptedExchanges
from tests.unit.support.common import failed, fired
from tests.unit.support.http_agents import client_over, no_helper

REG = "https://reg.example/"
CDN = "https://cdn.example/"
TOKEN = "https://auth.example/token"
HOP: dict[str, Any] = {"status": 307, "headers": {"Location": f"{CDN}blob"}}
OK: dict[str, Any] = {"data": b"content"}
PLAIN = NoTls("reg.example: the connection was refused")

Script = Mapping[str, Sequence[ScriptedAnswer]]


def challenge(scope: str = "repository:team/app:pull", realm: str = TOKEN) -> dict[str, Any]:
    """Return a 401 that demands a token."""
    return {
        "status": 401,
        "headers": {"WWW-Authenticate": ["Basic realm=x", f'Bearer realm="{realm}",service="s",scope="{scope}"']},
    }


def redirect(to: str, status: int = 307) -> dict[str, Any]:
    """Return a redirect."""
    return {"status": status, "headers": {"Location": to}}


def token(value: str) -> dict[str, Any]:
    """Return an answer of the token service."""
    return {"data": b'{"token": "%b"}' % value.encode()}


class Asking:
    """A client, its requests, and the number of times that http was considered."""

    def __init__(
        self,
        script: Script,
        *,
        scheme: str | None = "https",
        plain: bool = True,
        name: str = "reg.example",
        login: Login | None = None,
        ask: AskHelper = no_helper,
        trusts: str = "",
    ) -> None:
        """Create the client; `trusts` is the host of the token service that may see the credentials."""
        self.clock = Clock()
        self.http = ScriptedExchanges(script)
        self.http_considered = 0
        self._plain = plain
        self.client = client_over(
            self.http,
            self.clock,
            name=name,
            scheme=scheme,
            login=login,
            ask=ask,
            trusts=trusts,
            http_allowed=self._http_allowed,
        )

    def _http_allowed(self) -> Deferred[bool]:
        self.http_considered += 1
        return succeed(self._plain)

    def ask(self, method: str = "GET", path: str = "team/app", what: str = "blobs/x") -> Deferred[Response]:
        """Request something of a repository."""
        repository = Repository(Upstream("reg.example"), path)
        return Deferred.fromCoroutine(self.client.request(method, repository, what, {"Accept": "a"}))

    def status(self, **request: str) -> int:
        """Return the status of the response."""
        return fired(self.ask(**request)).status

    @property
    def asked(self) -> list[tuple[str, str | None]]:
        """Return URL and Authorization header of each request."""
        return [(sent.url, sent.authorization) for sent in self.http.sent]


def test_request_url_and_headers() -> None:
    asking = Asking({REG: [OK]})
    response = fired(asking.ask("HEAD"))
    assert (response.status, response.url) == (200, f"{REG}v2/team/app/blobs/x")
    (sent,) = asking.http.sent
    assert (sent.method, sent.url, sent.headers) == ("HEAD", f"{REG}v2/team/app/blobs/x", {"Accept": "a"})


@pytest.mark.parametrize(
    ("name", "scheme", "url"),
    [
        ("docker.io", "https", "https://registry-1.docker.io/v2/"),
        ("registry-1.docker.io", "https", "https://registry-1.docker.io/v2/"),
        ("reg.example:5000", "http", "http://reg.example:5000/v2/"),
        ("[::1]:5000", "https", "https://[::1]:5000/v2/"),
    ],
)
def test_api_base_url(name: str, scheme: str, url: str) -> None:
    asking = Asking({url: [OK]}, scheme=scheme, name=name)
    assert asking.status() == 200
    assert asking.http_considered == 0


@pytest.mark.parametrize("status", [400, 403, 404, 429, 500, 304])
def test_other_statuses_are_returned(status: int) -> None:
    asking = Asking({REG: [{"status": status}]})
    assert asking.status() == status
    assert len(asking.asked) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_keep_the_method(status: int) -> None:
    asking = Asking({REG: [redirect("/elsewhere?a=%2F", status), OK]})
    assert asking.status(method="HEAD") == 200
    assert [(sent.method, sent.url) for sent in asking.http.sent] == [
        ("HEAD", f"{REG}v2/team/app/blobs/x"),
        ("HEAD", f"{REG}elsewhere?a=%2F"),
    ]


def test_redirect_without_location_is_returned() -> None:
    assert Asking({REG: [{"status": 307}]}).status() == 307


@pytest.mark.parametrize("status", [200, 201, 300, 304, 404])
def test_location_without_redirect_status_is_ignored(status: int) -> None:
    asking = Asking({REG: [redirect("/elsewhere", status)]})
    assert asking.status() == status
    assert len(asking.asked) == 1


def test_redirect_limit() -> None:
    hops = [redirect(f"/{number}") for number in range(10)]
    assert Asking({REG: [*hops, OK]}).status() == 200
    asking = Asking({REG: [*hops, redirect("/10"), OK]})
    assert "more than 10 redirects" in failed(asking.ask(), Unavailable).message
    assert len(asking.asked) == 11


@pytest.mark.parametrize("to", ["http://reg.example/x", "HTTP://cdn.example/x"])
def test_redirect_from_https_must_be_https(to: str) -> None:
    asking = Asking({REG: [redirect(to)]})
    assert failed(asking.ask(), Unavailable).message == "reg.example: it redirects from https to http"
    assert len(asking.asked) == 1


@pytest.mark.parametrize("to", ["ftp://cdn.example/x", "file:///etc/passwd", "https://u:p@cdn.example/x"])
@pytest.mark.parametrize("scheme", ["https", "http"])
def test_redirect_scheme_must_be_http_or_https(scheme: str, to: str) -> None:
    asking = Asking({f"{scheme}://reg.example/": [redirect(to)]}, scheme=scheme)
    message = failed(asking.ask(), Unavailable).message
    redacted = to.replace("u:p@", "")
    assert message == f"reg.example: it redirects to {redacted!r}, which is not an http or https URL"
    assert len(asking.asked) == 1


def test_redirect_after_https_hop_must_be_https() -> None:
    asking = Asking({"http://reg.example/": [HOP], CDN: [redirect("http://cdn.example/x")]}, scheme="http")
    failed(asking.ask(), Unavailable)
    assert len(asking.asked) == 2


@pytest.mark.parametrize(
    "to", ["https://[bad/x", "https://cdn.example:99999/x", "https://cdn.example:port/x", "https://a]b/"]
)
def test_malformed_location_is_an_upstream_error(to: str) -> None:
    asking = Asking({REG: [redirect(f"{to}?X-Signature=secret")], "https": [OK]})
    message = failed(asking.ask(), Unavailable).message
    redacted = to.replace("u:p@", "")
    assert message == f"reg.example: it redirects to {redacted!r}, which is not an http or https URL"


def test_token_is_fetched_after_a_challenge() -> None:
    asking = Asking({REG: [challenge(), OK, OK], TOKEN: [token("t")]})
    assert asking.status() == 200
    assert asking.asked == [
        (f"{REG}v2/team/app/blobs/x", None),
        (f"{TOKEN}?service=s&scope=repository%3Ateam%2Fapp%3Apull", None),
        (f"{REG}v2/team/app/blobs/x", "Bearer t"),
    ]
    # The next request sends it without a challenge.
    asking.status(what="manifests/latest")
    assert asking.asked[3:] == [(f"{REG}v2/team/app/manifests/latest", "Bearer t")]


def test_each_repository_has_its_own_token() -> None:
    asking = Asking({REG: [challenge("a"), OK, challenge("b"), OK], TOKEN: [token("ta"), token("tb"), token("no")]})
    asking.status(path="team/a")
    asking.status(path="team/b")
    asking.status(path="team/a")
    with_token = [(url.split("/")[5], authorization) for url, authorization in asking.asked if authorization]
    assert with_token == [("a", "Bearer ta"), ("b", "Bearer tb"), ("a", "Bearer ta")]


def test_token_is_not_sent_to_redirect_target() -> None:
    asking = Asking({REG: [challenge(), HOP], CDN: [OK], TOKEN: [token("t")]})
    asking.status()
    assert asking.asked[2:] == [(f"{REG}v2/team/app/blobs/x", "Bearer t"), (f"{CDN}blob", None)]


def test_token_is_not_sent_to_another_port_or_scheme() -> None:
    asking = Asking(
        {
            "http://reg.example/": [challenge(), redirect("https://reg.example/x")],
            REG: [redirect("https://reg.example:444/y")],
        }
        | {"https://reg.example:444/": [OK], TOKEN: [token("t")]},
        scheme="http",
    )
    asking.status()
    assert [authorization for url, authorization in asking.asked if url.startswith("https://reg")] == [None, None]


def test_redirect_target_may_demand_its_own_token() -> None:
    asking = Asking(
        {REG: [redirect(f"{CDN}v2/team/app/blobs/x")], CDN: [challenge(realm=f"{CDN}token"), token("c"), OK]}
    )
    assert asking.status() == 200
    assert [authorization for url, authorization in asking.asked if url.startswith(REG)] == [None, None]
    assert asking.asked[-1] == (f"{CDN}v2/team/app/blobs/x", "Bearer c")


def test_refused_cached_token_is_renewed_once() -> None:
    asking = Asking({REG: [challenge(), OK, challenge(), OK], TOKEN: [token("old"), token("new")]})
    asking.status()
    assert asking.status() == 200
    assert [authorization for url, authorization in asking.asked if url.startswith(REG)] == [
        None,
        "Bearer old",
        "Bearer old",
        "Bearer new",
    ]


def test_retries_are_limited() -> None:
    asking = Asking({REG: [challenge()], TOKEN: [token("a"), token("b")]})
    assert asking.status() == 401
    assert len([url for url, _ in asking.asked if url.startswith(REG)]) == 2


def test_token_refused_for_one_repository_is_not_used_for_another() -> None:
    """Registries with one token for everything send the same challenge for both."""
    asking = Asking(
        {f"{REG}v2/team/a/": [challenge("all"), OK], f"{REG}v2/team/b/": [challenge("all"), challenge("all"), OK]}
        | {TOKEN: [token("revoked"), token("new")]}
    )
    asking.status(path="team/a")
    assert asking.status(path="team/b") == 200
    assert asking.asked[-1][1] == "Bearer new"


@pytest.mark.parametrize("header", ["Basic realm=x", "Bearer", "", "Bearer service=s"])
def test_401_without_bearer_challenge_is_returned(header: str) -> None:
    asking = Asking({REG: [{"status": 401, "headers": {"WWW-Authenticate": header}}]})
    assert asking.status() == 401
    assert len(asking.asked) == 1


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_failed_token_service_is_named(status: int) -> None:
    asking = Asking({REG: [challenge()], TOKEN: [{"status": status}]})
    error = failed(asking.ask(), Unavailable)
    refused = ": auth.example refused anonymous access (private, or absent)" if status in (401, 403) else ""
    assert error.message == f"reg.example: its token service answered {status}{refused}"


def test_token_service_may_redirect_to_https_only() -> None:
    asking = Asking({REG: [challenge(), OK], TOKEN: [redirect(f"{CDN}token")], CDN: [token("t")]})
    assert asking.status() == 200
    failed(Asking({REG: [challenge()], TOKEN: [redirect("http://cdn.example/")]}).ask(), Unavailable)
