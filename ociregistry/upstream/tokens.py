"""Bearer tokens: fetched once for all who wait, kept while they last."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urlsplit

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime

from ociregistry.errors import Unavailable
from ociregistry.flights import Flights
from ociregistry.upstream.challenges import BearerChallenge

LARGEST_TOKEN = 1024 * 1024
"""Bytes."""

_DEFAULT_LIFE = 60.0
_USED_LIFE = 0.9
"""The part of a token's life after which it is fetched anew."""
_MOST_KEPT = 1000

Fetch = Callable[[str], Coroutine[Deferred[Any], Any, bytes]]
"""Gives the body of a URL, of at most `LARGEST_TOKEN` bytes; raises `Unavailable`."""


@dataclass(frozen=True, slots=True)
class _Token:
    value: str
    expires: float


class Tokens:
    """The tokens of one upstream."""

    def __init__(self, upstream: str, fetch: Fetch, clock: IReactorTime) -> None:
        self._upstream = upstream
        self._fetch = fetch
        self._clock = clock
        self._kept: dict[BearerChallenge, _Token] = {}
        self._flights: Flights[BearerChallenge, str] = Flights()

    async def token(self, challenge: BearerChallenge) -> str:
        """A token that answers `challenge`; raises `Unavailable`."""
        if self.holds(challenge):
            return self._kept[challenge].value
        return await self._flights.join(challenge, lambda: self._fetch_token(challenge))

    def holds(self, challenge: BearerChallenge) -> bool:
        """Whether there is a token from an earlier request."""
        kept = self._kept.get(challenge)
        return kept is not None and self._clock.seconds() < kept.expires

    def forget(self, challenge: BearerChallenge) -> None:
        """To be called when the registry refused the token."""
        self._kept.pop(challenge, None)

    async def _fetch_token(self, challenge: BearerChallenge) -> str:
        try:
            realm = urlsplit(challenge.realm)
            sound = realm.scheme in ("http", "https") and bool(realm.hostname) and realm.port != 0
        except ValueError:
            sound = False
        if not sound:
            raise Unavailable(f"{self._upstream}: the token realm {challenge.realm[:200]!r} is not a URL")
        query = [("service", challenge.service)] if challenge.service else []
        query += [("scope", scope) for scope in challenge.scope.split()]
        separator = "&" if "?" in challenge.realm else "?"
        received = self._clock.seconds()
        body = await self._fetch(challenge.realm + (separator + urlencode(query) if query else ""))
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
        self._kept[challenge] = _Token(value, received + life * _USED_LIFE)
        return value
