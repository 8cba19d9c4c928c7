"""Bearer tokens: fetched once for all who wait, kept while they last."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from ociregistry.config.registries import IdentityToken
from ociregistry.errors import Unavailable
from ociregistry.flights import Flights
from ociregistry.upstream.challenges import BearerChallenge
from ociregistry.upstream.credentials import Credentials, basic
from ociregistry.upstream.manner import NORMALLY, Manner
from ociregistry.upstream.origins import Origin, without_query

LARGEST_TOKEN = 1024 * 1024
"""Bytes."""

_DEFAULT_LIFE = 60.0
_USED_LIFE = 0.9
"""The part of a token's life after which it is fetched anew."""
_MOST_KEPT = 1000
_CLIENT = "ociregistry"


class AccessRefused(Unavailable):
    """A token service does not let us in."""


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """A request to a token service; with a `form` it is a POST."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    form: bytes | None = field(default=None, repr=False)


Fetch = Callable[[TokenRequest, Manner], Coroutine[Deferred[Any], Any, bytes]]
"""Gives the body of the answer, of at most `LARGEST_TOKEN` bytes; raises `Unavailable`, `AccessRefused` too."""


@dataclass(frozen=True, slots=True)
class _Token:
    value: str = field(repr=False)
    expires: float


class Tokens:
    """The tokens of one upstream: some for `credentials`, if the token service is `trusted` with them."""

    log = Logger(namespace="ociregistry.upstream")

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
        self._kept: dict[tuple[BearerChallenge, bool], _Token] = {}
        self._flights: Flights[tuple[BearerChallenge, bool], str] = Flights()

    async def token(self, challenge: BearerChallenge, manner: Manner = NORMALLY, *, anonymous: bool = False) -> str:
        """A token that answers `challenge`; an `anonymous` one may be shown to anybody. Raises `Unavailable`."""
        if self.holds(challenge, anonymous=anonymous):
            return self._kept[challenge, anonymous].value
        return await self._flights.join(
            (challenge, anonymous), lambda: self._fetch_token(challenge, anonymous, manner)
        )

    def holds(self, challenge: BearerChallenge, *, anonymous: bool = False) -> bool:
        """Whether there is a token from an earlier request."""
        kept = self._kept.get((challenge, anonymous))
        return kept is not None and self._clock.seconds() < kept.expires

    def forget(self, challenge: BearerChallenge, token: str, *, anonymous: bool = False) -> None:
        """To be called when the registry refused the `token`; a newer one is kept."""
        kept = self._kept.get((challenge, anonymous))
        if kept is not None and kept.value == token:
            del self._kept[challenge, anonymous]

    async def _fetch_token(self, challenge: BearerChallenge, anonymous: bool, manner: Manner) -> str:
        request = await self._request(challenge, anonymous)
        received = self._clock.seconds()
        try:
            body = await self._fetch(request, manner)
        except AccessRefused:
            if request.headers or request.form:
                self._credentials.forget()
            raise
        try:
            document = json.loads(body)
            value = document.get("token") or document["access_token"]
            life = float(document.get("expires_in") or _DEFAULT_LIFE)
            if not isinstance(value, str) or not value or not value.isascii() or not value.isprintable():
                raise ValueError("the token is not a string of printable characters")
        except (ValueError, OverflowError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Unavailable(f"{self._upstream}: the token service gave no token: {str(error)[:200]!r}") from None
        if len(self._kept) >= _MOST_KEPT:
            self._kept.clear()
        self._kept[challenge, anonymous] = _Token(value, received + life * _USED_LIFE)
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
            self.log.warn(
                "{upstream}: its token service {realm} gets no credentials: it is reached by plain http, or its host "
                "is neither the upstream's own nor named by realm in the upstream's auth",
                upstream=self._upstream,
                realm=without_query(realm),
            )
            credentials = None
        if isinstance(credentials, IdentityToken):
            # OAuth 2.0 as distribution has it: "Requesting a Token", by POST.
            form = {"grant_type": "refresh_token", "client_id": _CLIENT, "refresh_token": credentials.token}
            scope = {"scope": challenge.scope} if challenge.scope else {}
            return TokenRequest(realm, form=urlencode([*query, *(form | scope).items()]).encode("ascii"))
        query += [("scope", scope) for scope in challenge.scope.split()]
        separator = "&" if "?" in realm else "?"
        url = realm + (separator + urlencode(query) if query else "")
        return TokenRequest(url, {"Authorization": basic(credentials)} if credentials is not None else {})
