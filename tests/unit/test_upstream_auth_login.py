"""Requests with credentials: they go to the registry that they are for, and on no detour to anybody else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from twisted.logger import LogEvent

from ociregistry.config.registries import IdentityToken, Login, Password
from ociregistry.errors import Unavailable
from ociregistry.upstream.auth import AccessRefused
from ociregistry.upstream.credentials import basic
from tests.unit.support.doubles import failed
from tests.unit.test_upstream_auth import WANTS_BASIC, wants
from tests.unit.test_upstream_client import CDN, OK, REG, TOKEN, Asking, redirect, token

USER = Password("user", "s3cret")
BASIC = basic(USER)
PORTED = "https://reg.example:444/"
HTTP = "http://reg.example/"
AUTH = "https://auth.example/"


def logged_in(script: Mapping[str, Any], *, scheme: str = "https", login: Login = USER) -> Asking:
    """A client with credentials, which auth.example may see as well."""
    return Asking(script, scheme=scheme, login=login, trusts="auth.example")


def shown_to(asking: Asking, url: str) -> list[str | None]:
    """What the requests for URLs that begin so have carried."""
    return [how for where, how in asking.asked if where.startswith(url)]


@pytest.mark.parametrize("to", [PORTED, CDN, "https://evil.reg.example/", "https://reg.example.evil.example/"])
@pytest.mark.parametrize("first", [WANTS_BASIC, OK])
def test_a_password_does_not_go_where_the_registry_redirects_to(to: str, first: dict[str, Any]) -> None:
    """Neither at once nor when it is wanted there."""
    asking = logged_in({REG: [WANTS_BASIC, redirect(f"{to}blob")], to: [first]})
    assert asking.status() == first.get("status", 200)
    assert shown_to(asking, REG) == [None, BASIC]
    assert shown_to(asking, to) == [None]


def test_nor_to_another_scheme_of_its_host() -> None:
    asking = logged_in({HTTP: [WANTS_BASIC, redirect(f"{REG}x")], REG: [WANTS_BASIC]}, scheme="http")
    assert asking.status() == 401
    assert (shown_to(asking, HTTP), shown_to(asking, REG)) == ([None, BASIC], [None])


def test_it_goes_to_its_own_host_after_a_detour() -> None:
    asking = logged_in({f"{REG}v2/": [WANTS_BASIC, redirect(f"{CDN}x")], CDN: [redirect(f"{REG}y")], REG: [OK]})
    assert asking.status() == 200
    assert [how for _, how in asking.asked] == [None, BASIC, None, BASIC]


def test_another_origin_that_wants_a_password_does_not_make_us_show_one() -> None:
    asking = logged_in({REG: [redirect(f"{CDN}x"), OK], CDN: [WANTS_BASIC]})
    assert (asking.status(), asking.status()) == (401, 200)
    assert shown_to(asking, REG) == [None, None]


def test_a_host_that_is_redirected_to_gets_an_anonymous_token_at_most() -> None:
    """Though it challenges with the upstream's own token service, which is trusted with the credentials."""
    asking = logged_in(
        {REG: [wants(), redirect(f"{CDN}x"), redirect(f"{CDN}x")], CDN: [wants(), OK]}
        | {TOKEN: [token("ours"), token("anonymous")]}
    )
    assert asking.status() == 200
    assert shown_to(asking, REG) == [None, "Bearer ours", "Bearer ours"]
    assert shown_to(asking, CDN) == [None, "Bearer anonymous"]
    assert shown_to(asking, TOKEN) == [BASIC, None]


def test_and_ours_is_not_the_anonymous_one() -> None:
    """Of two hosts that want a token of the same service for the same scope, who came first does not matter."""
    asking = logged_in(
        {REG: [redirect(f"{CDN}x"), redirect(f"{CDN}x"), wants(), OK], CDN: [wants(), OK]}
        | {TOKEN: [token("anonymous"), token("ours")]}
    )
    assert (asking.status(), asking.status()) == (200, 200)
    assert shown_to(asking, REG)[-1] == "Bearer ours"
    assert shown_to(asking, TOKEN) == [None, BASIC]


@pytest.mark.parametrize("to", ["https://auth.example:444/token", f"{CDN}token", f"{REG}token"])
def test_where_a_token_service_redirects_to_gets_no_password(to: str) -> None:
    asking = logged_in({f"{REG}v2/": [wants(), OK], TOKEN: [redirect(to)], to: [token("t")]})
    assert asking.status() == 200
    assert shown_to(asking, TOKEN) == [BASIC]
    assert shown_to(asking, to) == [None]


def test_but_another_path_of_its_own_does() -> None:
    asking = logged_in({REG: [wants(), OK], TOKEN: [redirect("/elsewhere")], AUTH: [token("t")]})
    assert asking.status() == 200
    assert shown_to(asking, AUTH) == [BASIC, BASIC]


def test_an_identity_token_is_posted_as_a_form() -> None:
    asking = logged_in({REG: [wants("a b"), OK], TOKEN: [token("t")]}, login=IdentityToken("s3cret"))
    assert asking.status() == 200
    posted = asking.http.sent[1]
    assert (posted.method, posted.url) == ("POST", TOKEN)
    assert posted.headers == {"Content-Type": "application/x-www-form-urlencoded"}
    assert posted.body is not None
    assert b"refresh_token=s3cret" in posted.body
    assert [sent.body for sent in asking.http.sent if sent is not posted] == [None, None]


@pytest.mark.parametrize("to", ["/elsewhere", f"{CDN}token"])
@pytest.mark.parametrize("status", [302, 307, 308])
def test_what_is_posted_follows_no_redirect(to: str, status: int) -> None:
    asking = logged_in({REG: [wants()], TOKEN: [redirect(to, status)]}, login=IdentityToken("s3cret"))
    message = failed(asking.ask(), Unavailable).message
    assert message == f"reg.example: its token service answered {status}"
    assert [sent.method for sent in asking.http.sent] == ["GET", "POST"]


@pytest.mark.parametrize("login", [USER, IdentityToken("s3cret")])
@pytest.mark.parametrize(("status", "refused"), [(400, True), (401, True), (403, True), (404, True), (500, False)])
def test_a_token_service_that_refuses_us(status: int, refused: bool, login: Login) -> None:
    asking = logged_in({REG: [wants()], TOKEN: [{"status": status}]}, login=login)
    assert isinstance(failed(asking.ask(), Unavailable), AccessRefused) is refused
    assert shown_to(asking, REG) == [None]


@pytest.mark.parametrize("login", [USER, IdentityToken("s3cret")])
@pytest.mark.parametrize(
    "script",
    [
        {REG: [wants(), OK], TOKEN: [token("secret-token")]},
        {REG: [wants()], TOKEN: [{"status": 401, "data": b"user:s3cret is wrong"}]},
        {REG: [wants()], TOKEN: [{"data": b"s3cret"}]},
        {REG: [wants()], TOKEN: [redirect("ftp://elsewhere/?s3cret")]},
        {REG: [wants(realm="https://evil.example/?s3cret"), OK], "https://evil.example/": [token("secret-token")]},
        {REG: [WANTS_BASIC]},
    ],
)
def test_no_secret_is_logged_or_told(script: Mapping[str, Any], login: Login, events: list[LogEvent]) -> None:
    asking = logged_in(script, login=login)
    told: list[object] = []
    asking.ask().addBoth(lambda result: told.append(getattr(result, "value", result)))
    printed = [*map(str, told), *map(repr, told), *map(str, events)]
    secrets = "s3cret", BASIC.partition(" ")[2], "secret-token"
    assert told
    assert not [text for text in printed if any(secret in text for secret in secrets)]
