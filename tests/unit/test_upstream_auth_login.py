"""Requests with credentials: they are sent to the registry only, not to redirect targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from twisted.logger import LogEvent, LogLevel

from ociregistry.config.registries import IdentityToken, Login, Password
from ociregistry.errors import Unavailable
from ociregistry.upstream.auth import AccessRefused
from ociregistry.upstream.credentials import basic
from tests.unit.support.common import failed, fired, texts
from tests.unit.test_upstream_auth import WANTS_BASIC, wants
from tests.unit.test_upstream_client import CDN, OK, REG, TOKEN, Asking, redirect, token

USER = Password("user", "s3cret")
BASIC = basic(USER)
PORTED = "https://reg.example:444/"
HTTP = "http://reg.example/"
AUTH = "https://auth.example/"


def logged_in(script: Mapping[str, Any], *, scheme: str = "https", login: Login = USER) -> Asking:
    """Return a client with credentials that auth.example may see as well."""
    return Asking(script, scheme=scheme, login=login, trusts="auth.example")


def shown_to(asking: Asking, url: str) -> list[str | None]:
    """Return the Authorization headers of requests whose URL starts with this."""
    return [authorization for where, authorization in asking.asked if where.startswith(url)]


@pytest.mark.parametrize("to", [PORTED, CDN, "https://evil.reg.example/", "https://reg.example.evil.example/"])
@pytest.mark.parametrize("first", [WANTS_BASIC, OK])
def test_password_is_not_sent_to_redirect_target(to: str, first: dict[str, Any]) -> None:
    """Neither at once nor after a challenge."""
    asking = logged_in({REG: [WANTS_BASIC, redirect(f"{to}blob")], to: [first]})
    assert asking.status() == first.get("status", 200)
    assert shown_to(asking, REG) == [None, BASIC]
    assert shown_to(asking, to) == [None]


def test_password_is_not_sent_to_another_scheme() -> None:
    asking = logged_in({HTTP: [WANTS_BASIC, redirect(f"{REG}x")], REG: [WANTS_BASIC]}, scheme="http")
    assert asking.status() == 401
    assert (shown_to(asking, HTTP), shown_to(asking, REG)) == ([None, BASIC], [None])


def test_password_is_sent_to_own_host_after_a_redirect() -> None:
    asking = logged_in({f"{REG}v2/": [WANTS_BASIC, redirect(f"{CDN}x")], CDN: [redirect(f"{REG}y")], REG: [OK]})
    assert asking.status() == 200
    assert [authorization for _, authorization in asking.asked] == [None, BASIC, None, BASIC]


def test_challenge_of_another_origin_triggers_no_login() -> None:
    asking = logged_in({REG: [redirect(f"{CDN}x"), OK], CDN: [WANTS_BASIC]})
    assert (asking.status(), asking.status()) == (401, 200)
    assert shown_to(asking, REG) == [None, None]


def test_redirect_target_gets_only_an_anonymous_token() -> None:
    """Even if its challenge names the upstream's token service, which may see the credentials."""
    asking = logged_in(
        {REG: [wants(), redirect(f"{CDN}x"), redirect(f"{CDN}x")], CDN: [wants(), OK]}
        | {TOKEN: [token("ours"), token("anonymous")]}
    )
    assert asking.status() == 200
    assert shown_to(asking, REG) == [None, "Bearer ours", "Bearer ours"]
    assert shown_to(asking, CDN) == [None, "Bearer anonymous"]
    assert shown_to(asking, TOKEN) == [BASIC, None]


def test_anonymous_token_is_not_used_for_the_registry() -> None:
    """For the same service and scope, regardless of which host asked first."""
    asking = logged_in(
        {REG: [redirect(f"{CDN}x"), redirect(f"{CDN}x"), wants(), OK], CDN: [wants(), OK]}
        | {TOKEN: [token("anonymous"), token("ours")]}
    )
    assert (asking.status(), asking.status()) == (200, 200)
    assert shown_to(asking, REG)[-1] == "Bearer ours"
    assert shown_to(asking, TOKEN) == [None, BASIC]


@pytest.mark.parametrize("to", ["https://auth.example:444/token", f"{CDN}token", f"{REG}token"])
def test_redirect_target_of_token_service_gets_no_password(to: str) -> None:
    asking = logged_in({f"{REG}v2/": [wants(), OK], TOKEN: [redirect(to)], to: [token("t")]})
    assert asking.status() == 200
    assert shown_to(asking, TOKEN) == [BASIC]
    assert shown_to(asking, to) == [None]


def test_password_follows_redirect_within_the_token_service() -> None:
    asking = logged_in({REG: [wants(), OK], TOKEN: [redirect("/elsewhere")], AUTH: [token("t")]})
    assert asking.status() == 200
    assert shown_to(asking, AUTH) == [BASIC, BASIC]


def test_identity_token_is_posted_as_a_form() -> None:
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
def test_post_follows_no_redirect(to: str, status: int) -> None:
    asking = logged_in({REG: [wants()], TOKEN: [redirect(to, status)]}, login=IdentityToken("s3cret"))
    message = failed(asking.ask(), Unavailable).message
    assert message == f"reg.example: its token service answered {status}"
    assert [sent.method for sent in asking.http.sent] == ["GET", "POST"]


@pytest.mark.parametrize("login", [USER, IdentityToken("s3cret")])
@pytest.mark.parametrize(("status", "refused"), [(400, True), (401, True), (403, True), (404, True), (500, False)])
def test_refusal_by_the_token_service(status: int, refused: bool, login: Login) -> None:
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
def test_no_secret_in_logs_or_errors(script: Mapping[str, Any], login: Login, events: list[LogEvent]) -> None:
    asking = logged_in(script, login=login)
    objects: list[object] = []
    asking.ask().addBoth(lambda result: objects.append(getattr(result, "value", result)))
    printed = [*map(str, objects), *map(repr, objects), *map(str, events)]
    secrets = "s3cret", BASIC.partition(" ")[2], "secret-token"
    assert objects
    assert not [text for text in printed if any(secret in text for secret in secrets)]


# Whose access was refused


def errors(events: list[LogEvent]) -> list[str]:
    """Return the log lines at level error."""
    return texts(events, LogLevel.error)


@pytest.mark.parametrize("status", [401, 403])
def test_refused_user_is_named(status: int, events: list[LogEvent]) -> None:
    asking = logged_in({REG: [WANTS_BASIC, {"status": status}]})
    assert fired(asking.ask()).outcome == f"{status}: reg.example refused the user user"
    assert errors(events) == [f"reg.example: reg.example refused the user user ({status})"]


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(("login", "who"), [(USER, "the user user"), (IdentityToken("s3cret"), "the identity token")])
def test_login_that_the_token_service_refused_is_named(
    status: int, login: Login, who: str, events: list[LogEvent]
) -> None:
    asking = logged_in({REG: [wants()], TOKEN: [{"status": status}]}, login=login)
    error = failed(asking.ask(), AccessRefused)
    assert error.message == f"reg.example: its token service answered {status}: auth.example refused {who}"
    assert errors(events) == [f"reg.example: auth.example refused {who} ({status})"]


def test_user_whose_token_the_registry_refused_is_named(events: list[LogEvent]) -> None:
    asking = logged_in({REG: [wants(), {"status": 403}], TOKEN: [token("ours")]})
    assert fired(asking.ask()).outcome == "403: reg.example refused the user user"
    assert errors(events) == ["reg.example: reg.example refused the user user (403)"]


@pytest.mark.parametrize("status", [401, 403])
def test_refused_anonymous_access_is_told_apart(status: int, events: list[LogEvent]) -> None:
    asking = Asking({REG: [{"status": status}]})
    assert fired(asking.ask()).outcome == f"{status}: reg.example refused anonymous access (private, or absent)"
    asking = Asking({REG: [wants(), {"status": status}], TOKEN: [token("anonymous")]})
    assert fired(asking.ask()).outcome == f"{status}: reg.example refused anonymous access (private, or absent)"
    assert errors(events) == []


def test_refusal_by_redirect_target_is_not_one_of_the_user(events: list[LogEvent]) -> None:
    asking = logged_in({REG: [WANTS_BASIC, redirect(f"{CDN}x")], CDN: [{"status": 403}]})
    assert fired(asking.ask()).outcome == "403: cdn.example refused anonymous access (private, or absent)"
    assert errors(events) == []


def test_refusal_is_logged_once_in_ten_minutes(events: list[LogEvent]) -> None:
    asking = logged_in({REG: [WANTS_BASIC, {"status": 401}] * 10})
    for _ in range(3):
        asking.status()
    assert len(errors(events)) == 1
    asking.clock.advance(600)
    asking.status()
    assert len(errors(events)) == 2


def test_no_secret_is_logged(events: list[LogEvent]) -> None:
    for login in (USER, IdentityToken("s3cret")):
        asking = logged_in({REG: [wants(), {"status": 403}], TOKEN: [token("t0ken")]}, login=login)
        told = fired(asking.ask()).outcome
        assert "s3cret" not in told + str(events)
        assert "t0ken" not in told + str(events)
