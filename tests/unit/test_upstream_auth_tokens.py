"""Tokens: requests are shared, and tokens are cached for nine tenths of their lifetime."""

from __future__ import annotations

import json
from collections.abc import Callable
from urllib.parse import parse_qsl, urlsplit

import pytest
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock

from ociregistry.errors import Unavailable
from ociregistry.upstream.auth import BearerChallenge, TokenRequest, Tokens
from ociregistry.upstream.credentials import Credentials
from ociregistry.upstream.http import RequestOptions
from tests.unit.support.common import failed, fired
from tests.unit.support.http_agents import no_helper

REALM = "https://auth.example/token"
CHALLENGE = BearerChallenge(REALM, "registry", "repository:a/b:pull")
OTHER = BearerChallenge(REALM, "registry", "repository:c/d:pull")


class TokenService:
    """Token service with a new token for each request, at once or when the test says so."""

    def __init__(self) -> None:
        self.urls: list[str] = []
        self.requests: list[TokenRequest] = []
        self.held: list[Deferred[bytes]] = []
        self.hold = False
        self.body: Callable[[int], bytes] = lambda number: json.dumps({"token": f"t{number}"}).encode()

    async def __call__(self, request: TokenRequest, options: RequestOptions) -> bytes:
        self.requests.append(request)
        self.urls.append(request.url)
        number = len(self.urls)
        if self.hold:
            self.held.append(Deferred())
            return await self.held[-1]
        return await succeed(self.body(number))

    def gives(self, **document: object) -> None:
        """Set the document of the next answers."""
        self.body = lambda number: json.dumps(document).encode()


@pytest.fixture
def service() -> TokenService:
    """Return a token service."""
    return TokenService()


@pytest.fixture
def tokens(service: TokenService, clock: Clock) -> Tokens:
    """Return the token cache over it."""
    return Tokens("reg.example", service, Credentials(None, no_helper, clock), lambda origin: False, clock)


def ask(tokens: Tokens, challenge: BearerChallenge = CHALLENGE) -> Deferred[str]:
    """Request a token."""
    return Deferred.fromCoroutine(tokens.token(challenge))


def test_request_has_service_and_scopes(service: TokenService, tokens: Tokens) -> None:
    scopes = BearerChallenge("https://a/t", "s&x", "repository:a:pull repository:b:pull,push")
    assert fired(ask(tokens, scopes)) == "t1"
    (url,) = service.urls
    assert url.startswith("https://a/t?")
    assert parse_qsl(urlsplit(url).query) == [
        ("service", "s&x"),
        ("scope", "repository:a:pull"),
        ("scope", "repository:b:pull,push"),
    ]


@pytest.mark.parametrize(
    ("challenge", "url"),
    [
        (BearerChallenge("https://a/t"), "https://a/t"),
        (BearerChallenge("http://a/t?x=1", "s"), "http://a/t?x=1&service=s"),
    ],
)
def test_realm_with_query(service: TokenService, tokens: Tokens, challenge: BearerChallenge, url: str) -> None:
    fired(ask(tokens, challenge))
    assert service.urls == [url]


@pytest.mark.parametrize("realm", ["auth.example/token", "ftp://auth.example", "file:///etc/passwd", "://", "token"])
def test_realm_that_is_no_url_is_not_requested(service: TokenService, tokens: Tokens, realm: str) -> None:
    error = failed(ask(tokens, BearerChallenge(realm)), Unavailable)
    assert "realm" in error.message
    assert service.urls == []


@pytest.mark.parametrize("realm", ["https://[bad/token", "https://a]/token"])
def test_malformed_realm_is_an_upstream_error(tokens: Tokens, realm: str) -> None:
    failed(ask(tokens, BearerChallenge(realm)), Unavailable)


def test_concurrent_requests_share_one_fetch(service: TokenService, tokens: Tokens) -> None:
    service.hold = True
    waiting = [ask(tokens) for _ in range(3)]
    other = ask(tokens, OTHER)
    assert len(service.urls) == 2
    waiting[0].cancel()
    waiting[0].addErrback(lambda _: None)
    service.held[0].callback(b'{"token": "mine"}')
    assert [fired(mine) for mine in waiting[1:]] == ["mine", "mine"]
    assert not other.called
    service.held[1].callback(b'{"token": "other"}')
    assert fired(other) == "other"


def test_failure_reaches_all_and_is_not_cached(service: TokenService, tokens: Tokens) -> None:
    service.hold = True
    waiting = [ask(tokens) for _ in range(2)]
    service.held[0].errback(Unavailable("down"))
    for mine in waiting:
        assert failed(mine, Unavailable).message == "down"
    service.hold = False
    assert fired(ask(tokens)) == "t2"


@pytest.mark.parametrize(
    ("extra", "kept"),
    [
        ({"expires_in": 300}, 270),
        ({}, 54),
        ({"expires_in": 0}, 54),
        ({"expires_in": None}, 54),
        ({"expires_in": "100"}, 90),
    ],
)
def test_token_is_cached_for_nine_tenths_of_its_lifetime(
    service: TokenService, tokens: Tokens, clock: Clock, extra: dict[str, object], kept: float
) -> None:
    service.gives(token="good", **extra)
    assert fired(ask(tokens)) == "good"
    clock.advance(kept - 0.01)
    fired(ask(tokens))
    assert len(service.urls) == 1
    clock.advance(0.01)
    fired(ask(tokens))
    assert len(service.urls) == 2


def test_each_challenge_has_its_own_token(service: TokenService, tokens: Tokens) -> None:
    assert [fired(ask(tokens)), fired(ask(tokens, OTHER)), fired(ask(tokens))] == ["t1", "t2", "t1"]


def test_refused_token_is_dropped(service: TokenService, tokens: Tokens) -> None:
    fired(ask(tokens))
    fired(ask(tokens, OTHER))
    tokens.forget(CHALLENGE, "t1")
    tokens.forget(CHALLENGE, "t1")
    assert fired(ask(tokens)) == "t3"
    assert fired(ask(tokens, OTHER)) == "t2"
    # Forgetting the old token late does not drop the new one.
    tokens.forget(CHALLENGE, "t1")
    assert fired(ask(tokens)) == "t3"


@pytest.mark.parametrize(
    ("document", "token"),
    [
        ({"access_token": "a"}, "a"),
        ({"token": "t", "access_token": "a"}, "t"),
        ({"token": "", "access_token": "a"}, "a"),
        ({"token": None, "access_token": "a"}, "a"),
    ],
)
def test_token_under_either_key(
    service: TokenService, tokens: Tokens, document: dict[str, object], token: str
) -> None:
    service.gives(**document)
    assert fired(ask(tokens)) == token


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"null",
        b"[]",
        b'"token"',
        b"{}",
        b'{"token": ""}',
        b'{"token": "t", "expires_in": NaN}',
        b'{"token": "t", "expires_in": -Infinity}',
        b'{"token": "t", "expires_in": "nan"}',
        b'{"token": "t", "expires_in": "Infinity"}',
        b'{"token": "t", "expires_in": 1e999}',
        b'{"access_token": ""}',
        b'{"token": null}',
        b'{"token": 5}',
        b'{"token": ["a"]}',
        b'{"token": "a\\r\\nX-Injected: 1"}',
        b'{"token": "a\\u0000"}',
        '{"token": "ü"}'.encode(),
        b'{"token": "\\ud800"}',
        b'{"token": "a", "expires_in": "soon"}',
        b'{"token": "a", "expires_in": [1]}',
        b'{"token": "a", "expires_in": 1%s}' % (b"0" * 400),
        b'{"token": "a", "expires_in": 1%s}' % (b"0" * 5000),
        b'{"token": \xff}',
        b"[" * 100_000,
    ],
)
def test_malformed_answer_is_an_upstream_error(service: TokenService, tokens: Tokens, body: bytes) -> None:
    service.body = lambda number: body
    error = failed(ask(tokens), Unavailable)
    assert error.message.startswith("reg.example: ")
    assert len(error.message) < 1000
    service.gives(token="good")
    assert fired(ask(tokens)) == "good"


@pytest.mark.parametrize("life", [b"-5", b'"-0.5"'])
def test_token_without_lifetime_is_used_once(service: TokenService, tokens: Tokens, life: bytes) -> None:
    service.body = lambda number: b'{"token": "t%d", "expires_in": %b}' % (number, life)
    assert fired(ask(tokens)) == "t1"
    assert fired(ask(tokens)) == "t2"


def test_cached_tokens_are_limited(service: TokenService, tokens: Tokens) -> None:
    for number in range(1500):
        fired(ask(tokens, BearerChallenge(REALM, "", f"repository:{number}:pull")))
    assert len(tokens._cache) <= 1000


def challenges(count: int) -> list[BearerChallenge]:
    """Return `count` challenges for different repositories."""
    return [BearerChallenge(REALM, "", f"repository:{number}:pull") for number in range(count)]


def test_least_recently_used_token_is_dropped_when_full(service: TokenService, tokens: Tokens) -> None:
    known = challenges(1000)
    for challenge in (*known, known[0], OTHER):
        fired(ask(tokens, challenge))
    assert len(service.urls) == 1001
    assert [tokens.holds(challenge) for challenge in (*known[:3], OTHER)] == [True, False, True, True]


def test_expired_token_is_dropped_first_when_full(service: TokenService, tokens: Tokens, clock: Clock) -> None:
    known = challenges(1000)
    service.gives(token="long", expires_in=1000)
    for challenge in known[:-1]:
        fired(ask(tokens, challenge))
    service.gives(token="short", expires_in=100)
    for challenge in (known[-1], OTHER):
        clock.advance(90)
        fired(ask(tokens, challenge))
    assert [tokens.holds(challenge) for challenge in (*known, OTHER)] == [True] * 999 + [False, True]
