"""Authentication at registries: challenges, Bearer tokens, and the Authorization of each request.

RFC 7617 (Basic), RFC 6750 (Bearer), and the token authentication of distribution. Concurrent requests share one token
request. Credentials are sent only to the upstream's own origin and to token services that are trusted with them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from math import isfinite, nan
from typing import Any
from urllib.parse import urlencode

from cachetools import LRUCache, TLRUCache
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from ociregistry.concurrency import SingleFlight
from ociregistry.config.registries import IdentityToken, Password
from ociregistry.context import Wanted
from ociregistry.errors import Unavailable
from ociregistry.names import Repository
from ociregistry.strictjson import parse_json
from ociregistry.upstream.breaker import LinkDown
from ociregistry.upstream.credentials import Credentials, basic, spell_login
from ociregistry.upstream.http import DEFAULT_OPTIONS, RequestOptions
from ociregistry.upstream.origin import Origin, without_query

_log = Logger(namespace="ociregistry.upstream")

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
# Commas separate both challenges and their parameters (RFC 9110, section 11.6.1): a part that is a single word, or
# begins with two words, begins a challenge.
# An unterminated quote extends to the end of the header, so that no part of it is matched twice.
_PART = re.compile(r'(?:[^",]|"(?:[^"\\]|\\.?)*(?:"|\Z))+', re.DOTALL)
_MOST_HEADERS = 8
"""Headers of a response that are read."""
_LONGEST_HEADER = 4096
"""Characters of a header that are read."""
_BEGINNING = re.compile(rf"\s*(?P<scheme>{_TOKEN})(?:\s+(?!\s|=)(?P<rest>.*)|\s*)", re.DOTALL)
_PARAMETER = re.compile(rf'\s*(?P<name>{_TOKEN})\s*=\s*(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<plain>[^\s",]+))\s*')


@dataclass(frozen=True, slots=True)
class BasicChallenge:
    """A challenge that asks for a user and a password."""


@dataclass(frozen=True, slots=True)
class BearerChallenge:
    """A challenge that asks for a token for `service` and `scope`, to be fetched at the URL `realm`."""

    realm: str
    service: str = ""
    scope: str = ""

    def with_default_scope(self, default: str) -> BearerChallenge:
        """Return the challenge, with the scope `default` where its own is missing or empty."""
        return self if self.scope.strip() else replace(self, scope=default)

    def widened(self, other: BearerChallenge) -> BearerChallenge:
        """Return the challenge `other` for the scopes of both."""
        scopes = dict.fromkeys([*self.scope.split(), *other.scope.split()])
        return replace(other, scope=" ".join(scopes))


Challenge = BasicChallenge | BearerChallenge


def best_challenge(headers: Iterable[str]) -> Challenge | None:
    """Return the challenge of `WWW-Authenticate` headers to answer: Bearer if there is one, else Basic, else None."""
    found = list(_challenges(headers))
    return next((one for one in found if isinstance(one, BearerChallenge)), next(iter(found), None))


def lacks_scope(headers: Iterable[str]) -> bool:
    """Return whether a token was refused because its scope is insufficient (RFC 6750, section 3.1)."""
    return ("bearer", "insufficient_scope") in (
        (scheme, parameters.get("error")) for scheme, parameters in _parsed(headers)
    )


def _challenges(headers: Iterable[str]) -> Iterator[Challenge]:
    for scheme, parameters in _parsed(headers):
        if scheme == "basic":
            yield BasicChallenge()
        elif scheme == "bearer" and parameters.get("realm"):
            yield BearerChallenge(parameters["realm"], parameters.get("service", ""), parameters.get("scope", ""))


def _parsed(headers: Iterable[str]) -> list[tuple[str, dict[str, str]]]:
    """Return the scheme of each challenge, and its parameters by name; schemes and names are in lower case."""
    challenges: list[tuple[str, dict[str, str]]] = []
    for header in islice(headers, _MOST_HEADERS):
        parameters: dict[str, str] = {}
        for part in _PART.findall(header[:_LONGEST_HEADER]):
            beginning = _BEGINNING.fullmatch(part)
            if beginning is not None:
                parameters = {}
                challenges.append((beginning["scheme"].lower(), parameters))
            parameter = _PARAMETER.fullmatch((beginning["rest"] or "") if beginning else part)
            if parameter is not None:
                quoted = parameter["quoted"]
                value = parameter["plain"] if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
                parameters[parameter["name"].lower()] = value
    return challenges


LARGEST_TOKEN = 1024 * 1024
"""Bytes of a token service's response."""

_DEFAULT_LIFETIME = 60.0
"""Seconds for which a token is valid where the token service does not tell."""
_USED_FRACTION = 0.9
"""The fraction of its life for which a token is used."""
_MOST_TOKENS = 1000
_CLIENT = "ociregistry"


class AccessRefused(Unavailable):
    """A token service refused access."""


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """A request to a token service: a POST where it has a `form`, else a GET."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    form: bytes | None = field(default=None, repr=False)
    login: str = ""
    """Whose credentials it carries, for messages; empty for none."""


Fetch = Callable[[TokenRequest, RequestOptions], Coroutine[Deferred[Any], Any, bytes]]
"""Sends a token request and returns the body of the response, at most `LARGEST_TOKEN` bytes.

Raises:
    Unavailable: the token service cannot be asked.
    AccessRefused: it refuses access.
"""


@dataclass(frozen=True, slots=True)
class _Token:
    value: str = field(repr=False)
    expires: float
    login: str
    """Whose credentials it was given for; empty for none."""


TokenKey = tuple[BearerChallenge, bool]
"""What a token answers, and whether it is anonymous."""


class _Waiting:
    """The requests that wait for one token: all are told when the token service counts as down."""

    def __init__(self) -> None:
        self._told: list[Callable[[Unavailable], object]] = []
        self._down: LinkDown | None = None

    def options(self, options: RequestOptions) -> RequestOptions:
        """Return the options of the token request, which goes on for later requests."""
        wanted = options.wanted
        return replace(options, wanted=Wanted(self._link_down, wanted.again if wanted is not None else None))

    def _link_down(self, error: Unavailable) -> None:
        self._down = error if isinstance(error, LinkDown) else None
        for told in list(self._told):
            told(error)

    async def wait(self, token: Deferred[str], wanted: Wanted | None) -> str:
        """Return the result of `token`.

        Raises:
            Unavailable: the token service counts as down, and the request does not go on then.
        """
        errors: list[Unavailable] = []

        def end(error: Unavailable) -> None:
            errors.append(error)
            token.cancel()

        told = wanted.link_down if wanted is not None else end
        self._told.append(told)
        down = self._down.renewed() if self._down is not None else None
        if down is not None:
            told(down)
        try:
            return await token
        except CancelledError:
            if errors:
                raise Unavailable(errors[0].message, errors[0].retry_after) from None
            raise
        finally:
            self._told.remove(told)


class Tokens:
    """Fetches and caches the tokens of one upstream.

    A token request carries the `credentials` only where `trusted` allows it for the origin of the token service.
    """

    def __init__(
        self,
        upstream: str,
        fetch: Fetch,
        credentials: Credentials,
        trusted: Callable[[Origin], bool],
        clock: IReactorTime,
    ) -> None:
        self._upstream = upstream
        self._fetch = fetch
        self._credentials = credentials
        self._trusted = trusted
        self._clock = clock
        self._cache: TLRUCache[TokenKey, _Token, float] = TLRUCache(
            _MOST_TOKENS, ttu=lambda key, token, now: token.expires, timer=clock.seconds
        )
        self._single_flight: SingleFlight[TokenKey, str] = SingleFlight()
        self._waiting: dict[TokenKey, _Waiting] = {}

    async def token(
        self, challenge: BearerChallenge, options: RequestOptions = DEFAULT_OPTIONS, *, anonymous: bool = False
    ) -> str:
        """Return a token that answers `challenge`, from the cache or from the token service.

        An `anonymous` token is requested without credentials, so that any host may be sent it.

        Raises:
            Unavailable: the credential helper failed, or the token service cannot be asked or gave no token.
            AccessRefused: the token service refuses access.
        """
        key = challenge, anonymous
        cached = self._cache.get(key)
        if cached is not None:
            return cached.value
        waiting = self._waiting.setdefault(key, _Waiting())
        token = self._single_flight.join(key, lambda: self._fetch_shared(key, waiting.options(options)))
        return await waiting.wait(token, options.wanted)

    def holds(self, challenge: BearerChallenge, *, anonymous: bool = False) -> bool:
        """Return whether the cache holds a token for `challenge` that has not expired."""
        return (challenge, anonymous) in self._cache

    def login(self, challenge: BearerChallenge, *, anonymous: bool = False) -> str:
        """Return whose credentials the token for `challenge` in the cache was given for; empty for none."""
        cached = self._cache.get((challenge, anonymous))
        return cached.login if cached is not None else ""

    def forget(self, challenge: BearerChallenge, token: str, *, anonymous: bool = False) -> None:
        """Drop a `token` that the registry refused; a newer one for the same challenge is kept."""
        cached = self._cache.get((challenge, anonymous))
        if cached is not None and cached.value == token:
            self._cache.pop((challenge, anonymous), None)

    async def _fetch_shared(self, key: TokenKey, options: RequestOptions) -> str:
        challenge, anonymous = key
        try:
            return await self._fetch_token(challenge, anonymous, options)
        finally:
            self._waiting.pop(key, None)

    async def _fetch_token(self, challenge: BearerChallenge, anonymous: bool, options: RequestOptions) -> str:
        request = await self._request(challenge, anonymous)
        received = self._clock.seconds()
        try:
            body = await self._fetch(request, options)
        except AccessRefused:
            if request.headers or request.form:
                self._credentials.forget()
            raise
        try:
            value, lifetime = _token_in(parse_json(body))
        except ValueError as error:
            raise Unavailable(f"{self._upstream}: the token service gave no token: {error}") from None
        self._cache[challenge, anonymous] = _Token(value, received + lifetime * _USED_FRACTION, request.login)
        return value

    async def _request(self, challenge: BearerChallenge, anonymous: bool) -> TokenRequest:
        realm = challenge.realm
        try:
            origin = Origin.of(realm)
        except ValueError:
            raise Unavailable(f"{self._upstream}: the token realm {without_query(realm)!r} is not a URL") from None
        query = [("service", challenge.service)] if challenge.service else []
        credentials = None if anonymous else await self._credentials.get()
        if credentials is not None and not self._trusted(origin):
            _log.warn(
                "{upstream}: credentials not sent to the token service {realm}: it uses plain http, or its host "
                "is neither the upstream's own nor named by realm in the upstream's auth",
                upstream=self._upstream,
                realm=without_query(realm),
            )
            credentials = None
        login = spell_login(credentials)
        if isinstance(credentials, IdentityToken):
            # Distribution's OAuth 2.0 token API, "Requesting a Token": an identity token is sent by POST.
            form = {"grant_type": "refresh_token", "client_id": _CLIENT, "refresh_token": credentials.token}
            scope = {"scope": challenge.scope} if challenge.scope else {}
            return TokenRequest(realm, form=urlencode([*query, *(form | scope).items()]).encode("ascii"), login=login)
        query += [("scope", scope) for scope in challenge.scope.split()]
        separator = "&" if "?" in realm else "?"
        url = realm + (separator + urlencode(query) if query else "")
        return TokenRequest(
            url, {"Authorization": basic(credentials)} if credentials is not None else {}, login=login
        )


_MOST_CHALLENGES = 1000
_MOST_REFUSALS = 3
"""The 401 responses of one scope to one request that may each lead to a retry."""

Scope = tuple[Origin, Repository | None]
"""An origin, and a repository there; None for the root of its API."""


def _token_in(document: object) -> tuple[str, float]:
    """Return the token in the answer of a token service, and its lifetime in seconds.

    Raises:
        ValueError: there is none.
    """
    answer = document if isinstance(document, dict) else {}
    token = answer.get("token") or answer.get("access_token")
    if not isinstance(token, str) or not token or not token.isascii() or not token.isprintable():
        raise ValueError("the token is not a string of printable characters")
    try:
        lifetime = float(answer.get("expires_in") or _DEFAULT_LIFETIME)
    except (ValueError, TypeError, OverflowError):
        lifetime = nan
    if not isfinite(lifetime):
        raise ValueError("expires_in is not a number of seconds")
    return token, lifetime


@dataclass(frozen=True, slots=True)
class Authorization:
    """An `Authorization` header; `cached` where it was cached before this request, and may be out of date."""

    header: str = field(repr=False)
    cached: bool
    login: str = ""
    """Whose credentials it stands for, for messages; empty for none."""


class Authenticator:
    """Chooses the Authorization of each request to one upstream.

    Credentials are for the upstream's own origin only. A host that it redirects to gets an anonymous token if it
    asks for one, and nothing else.
    """

    def __init__(self, credentials: Credentials, tokens: Tokens) -> None:
        self._credentials = credentials
        self._tokens = tokens
        self._challenges: LRUCache[Scope, BearerChallenge] = LRUCache(_MOST_CHALLENGES)
        self._basic_origin: Origin | None = None

    async def authorization(
        self, scope: Scope, own: Origin, options: RequestOptions = DEFAULT_OPTIONS
    ) -> Authorization | None:
        """Return the Authorization for a request to `scope`, chosen by the challenges so far; None for no header.

        Raises:
            Unavailable: no token can be fetched, or the credential helper failed.
        """
        challenge = self._challenges.get(scope)
        anonymous = scope[0] != own
        if challenge is not None:
            cached = self._tokens.holds(challenge, anonymous=anonymous)
            try:
                token = await self._tokens.token(challenge, options, anonymous=anonymous)
                login = self._tokens.login(challenge, anonymous=anonymous)
                return Authorization(f"Bearer {token}", cached, login)
            except Unavailable:
                # The token service may have moved: the next request carries no token, and its challenge tells where.
                self._challenges.pop(scope, None)
                raise
        if anonymous or self._basic_origin != own:
            return None
        cached = self._credentials.from_helper
        credentials = await self._credentials.get()
        if not isinstance(credentials, Password):
            return None
        return Authorization(basic(credentials), cached, spell_login(credentials))

    def handle_unauthorized(
        self,
        scope: Scope,
        own: Origin,
        authorizations: Sequence[Authorization | None],
        challenges: Sequence[str],
        default_scope: str,
    ) -> bool:
        """Take in a 401 from `scope` with the `WWW-Authenticate` headers `challenges`; return whether to retry.

        Retry order: no Authorization, a cached one, a fresh one, then the other scheme or a token for a wider scope.
        What was refused is dropped from the caches, and the challenge is remembered for the next requests.

        `authorizations` are those that `scope` refused during this request, the latest last.
        `default_scope` is used where the challenge tells no scope; its form is `repository:NAME:pull`.
        """
        authorization = authorizations[-1]
        known = self._challenges.get(scope)
        challenge = best_challenge(challenges)
        if isinstance(challenge, BearerChallenge):
            challenge = challenge.with_default_scope(default_scope)
        if authorization is not None:
            self._forget(known, authorization, scope, own)
        if len(authorizations) > _MOST_REFUSALS or (authorization is None and len(authorizations) > 1):
            return False
        bearer = isinstance(challenge, BearerChallenge)
        if authorization is not None and not authorization.cached and bearer == (known is not None):
            if known is None or not isinstance(challenge, BearerChallenge):
                return False
            challenge = known.widened(challenge)
            if not lacks_scope(challenges) or challenge.scope == known.scope:
                return False
        return self._remember(challenge, scope, own)

    def _forget(self, known: BearerChallenge | None, authorization: Authorization, scope: Scope, own: Origin) -> None:
        if known is not None:
            self._tokens.forget(known, authorization.header.removeprefix("Bearer "), anonymous=scope[0] != own)
        else:
            self._credentials.forget()

    def _remember(self, challenge: Challenge | None, scope: Scope, own: Origin) -> bool:
        if challenge is None:
            return False
        if isinstance(challenge, BasicChallenge):
            self._challenges.pop(scope, None)
            self._basic_origin = own if scope[0] == own else self._basic_origin
            return scope[0] == own and self._credentials.configured
        self._challenges[scope] = challenge
        return True
