"""Token requests with credentials: which token service receives them and in which form."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import parse_qsl

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel

from ociregistry.config.registries import Helper, IdentityToken, Login, Password
from ociregistry.errors import Unavailable
from ociregistry.upstream.auth import AccessRefused, BearerChallenge, TokenRequest, Tokens
from ociregistry.upstream.credentials import Credentials, basic
from ociregistry.upstream.http import RequestOptions
from tests.unit.support.common import failed, fired, texts
from tests.unit.test_upstream_auth_tokens import TokenService
from tests.unit.test_upstream_credentials import HelperStub

REALM = "https://auth.example/token"
USER = Password("user", "s3cret")
IDENTITY = IdentityToken("s3cret")
CHALLENGE = BearerChallenge(REALM, "registry", "repository:a/b:pull")


class Asked:
    """Tokens for a login; auth.example may see the credentials."""

    def __init__(self, login: Login | None, trusted: Sequence[str] = ("auth.example",)) -> None:
        self.service = TokenService()
        self.helper = HelperStub()
        clock = Clock()
        self.credentials = Credentials(login, self.helper, clock)
        self.tokens = Tokens(
            "reg.example", self.service, self.credentials, lambda origin: origin.host in trusted, clock
        )

    def token(self, challenge: BearerChallenge = CHALLENGE, *, anonymous: bool = False) -> str:
        """Return a token."""
        return fired(self.asked(challenge, anonymous=anonymous))

    def asked(self, challenge: BearerChallenge = CHALLENGE, *, anonymous: bool = False) -> Deferred[str]:
        """Return a Deferred that fires with a token."""
        return Deferred.fromCoroutine(self.tokens.token(challenge, anonymous=anonymous))

    @property
    def requests(self) -> list[TokenRequest]:
        """Return the requests to the token service."""
        return self.service.requests


def test_password_is_sent_to_a_trusted_token_service() -> None:
    asked = Asked(USER)
    assert asked.token() == "t1"
    (request,) = asked.requests
    assert request.url == f"{REALM}?service=registry&scope=repository%3Aa%2Fb%3Apull"
    assert dict(request.headers) == {"Authorization": basic(USER)}
    assert request.form is None


def test_identity_token_is_posted() -> None:
    asked = Asked(IDENTITY)
    assert asked.token(BearerChallenge(f"{REALM}?x=1", "reg&istry", "repository:a:pull repository:b:pull")) == "t1"
    (request,) = asked.requests
    # The URL, which others may log, contains nothing of it.
    assert (request.url, dict(request.headers)) == (f"{REALM}?x=1", {})
    assert request.form is not None
    assert sorted(parse_qsl(request.form.decode("ascii"))) == [
        ("client_id", "ociregistry"),
        ("grant_type", "refresh_token"),
        ("refresh_token", "s3cret"),
        ("scope", "repository:a:pull repository:b:pull"),
        ("service", "reg&istry"),
    ]


def test_post_without_service_and_scope() -> None:
    asked = Asked(IDENTITY)
    asked.token(BearerChallenge(REALM))
    form = asked.requests[0].form or b""
    assert {name for name, _ in parse_qsl(form.decode(), keep_blank_values=True)} == {
        "client_id",
        "grant_type",
        "refresh_token",
    }


@pytest.mark.parametrize("secret", ["a+b/c==", "a b&scope=all", "ü"])
def test_identity_token_is_encoded(secret: str) -> None:
    asked = Asked(IdentityToken(secret))
    asked.token()
    form = asked.requests[0].form or b""
    assert dict(parse_qsl(form.decode("ascii")))["refresh_token"] == secret


@pytest.mark.parametrize("login", [USER, IDENTITY, Helper("fake")])
@pytest.mark.parametrize("realm", ["https://evil.example/token?sig=hidden", "https://auth.example.evil.example/"])
def test_other_token_services_get_no_credentials(events: list[LogEvent], realm: str, login: Login) -> None:
    asked = Asked(login)
    assert asked.token(BearerChallenge(realm, "s")) == "t1"
    (request,) = asked.requests
    assert (dict(request.headers), request.form) == ({}, None)
    assert request.url.startswith(realm)
    # The operator is warned, once for each token.
    (warning,) = texts(events, LogLevel.warn)
    assert warning == (
        f"reg.example: credentials not sent to the token service {realm.partition('?')[0]}: it uses plain http, "
        "or its host is neither the upstream's own nor named by realm in the upstream's auth"
    )


@pytest.mark.parametrize(("login", "realm"), [(None, "https://evil.example/token"), (USER, REALM)])
def test_no_warning_without_need(events: list[LogEvent], login: Login | None, realm: str) -> None:
    Asked(login).token(BearerChallenge(realm))
    assert texts(events, LogLevel.warn) == []


def test_anonymous_token_request_has_no_credentials(events: list[LogEvent]) -> None:
    asked = Asked(USER)
    assert asked.token(anonymous=True) == "t1"
    assert dict(asked.requests[0].headers) == {}
    assert texts(events, LogLevel.warn) == []


def test_anonymous_token_does_not_run_the_helper() -> None:
    asked = Asked(Helper("fake"))
    asked.token(anonymous=True)
    assert asked.helper.asked == []


def test_anonymous_and_own_tokens_are_separate() -> None:
    """Even for the same challenge."""
    asked = Asked(USER)
    assert [asked.token(), asked.token(anonymous=True)] == ["t1", "t2"]
    assert [asked.token(), asked.token(anonymous=True)] == ["t1", "t2"]
    asked.tokens.forget(CHALLENGE, "t2", anonymous=True)
    assert asked.tokens.holds(CHALLENGE)
    assert not asked.tokens.holds(CHALLENGE, anonymous=True)
    assert [asked.token(), asked.token(anonymous=True)] == ["t1", "t3"]
    asked.tokens.forget(CHALLENGE, "t1")
    assert [asked.token(), asked.token(anonymous=True)] == ["t4", "t3"]


def test_anonymous_and_own_requests_in_flight_are_separate() -> None:
    asked = Asked(USER)
    asked.service.hold = True
    ours, anonymous = asked.asked(), asked.asked(anonymous=True)
    assert [dict(request.headers) for request in asked.requests] == [{"Authorization": basic(USER)}, {}]
    asked.service.held[1].callback(b'{"token": "anonymous"}')
    assert fired(anonymous) == "anonymous"
    assert not ours.called
    asked.service.held[0].callback(b'{"token": "ours"}')
    assert fired(ours) == "ours"


class Refusing(Tokens):
    """Tokens whose service fails."""

    def __init__(self, credentials: Credentials, error: Exception) -> None:
        async def fetch(request: TokenRequest, options: RequestOptions) -> bytes:
            raise error

        super().__init__("reg.example", fetch, credentials, lambda origin: True, Clock())


@pytest.mark.parametrize(("error", "kept"), [(AccessRefused("no"), False), (Unavailable("down"), True)])
def test_helper_credentials_are_dropped_when_refused(error: Exception, kept: bool) -> None:
    credentials = Credentials(Helper("fake"), HelperStub(), Clock())
    failed(Deferred.fromCoroutine(Refusing(credentials, error).token(CHALLENGE)), type(error))
    assert credentials.from_helper is kept


def test_identity_token_is_dropped_when_refused() -> None:
    async def ask(helper: Helper) -> IdentityToken:
        return IDENTITY

    credentials = Credentials(Helper("fake"), ask, Clock())
    failed(Deferred.fromCoroutine(Refusing(credentials, AccessRefused("no")).token(CHALLENGE)), AccessRefused)
    assert not credentials.from_helper


def test_unsent_credentials_are_kept() -> None:
    credentials = Credentials(Helper("fake"), HelperStub(), Clock())
    fired(Deferred.fromCoroutine(credentials.get()))
    asked = Refusing(credentials, AccessRefused("no")).token(CHALLENGE, anonymous=True)
    failed(Deferred.fromCoroutine(asked), AccessRefused)
    assert credentials.from_helper


def test_failing_helper_sends_no_token_request() -> None:
    asked = Asked(Helper("fake"))
    asked.helper.hold = True
    waiting = asked.asked()
    asked.helper.held[0].errback(Unavailable("reg.example: docker-credential-fake gave no answer"))
    failed(waiting, Unavailable)
    assert asked.requests == []


@pytest.mark.parametrize("login", [USER, IDENTITY])
def test_secrets_are_not_printed(login: Login, events: list[LogEvent]) -> None:
    asked = Asked(login)
    asked.service.gives(token="secret-token")
    assert asked.token() == "secret-token"
    printed = [*map(repr, asked.requests), repr(asked.tokens._cache), *map(str, events)]
    assert not [text for text in printed if "s3cret" in text or "secret-token" in text or basic(USER) in text]
