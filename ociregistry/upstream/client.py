"""Requests to one upstream's API: scheme, tokens and redirects, with a response that is the registry's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from urllib.parse import urljoin, urlsplit

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime

from ociregistry.errors import Unavailable
from ociregistry.names import DOCKER_HUB, Repository, Upstream
from ociregistry.upstream.challenges import BearerChallenge
from ociregistry.upstream.exchange import Exchanges, NoTls, Response
from ociregistry.upstream.tokens import LARGEST_TOKEN, Tokens

_DOCKER_HUB_API = "registry-1.docker.io"
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MOST_HOPS = 10
_SCHEME_KEPT = 600.0
"""Seconds for which a scheme that was found out is remembered."""

_MOST_CHALLENGES = 1000

_Origin = tuple[str, str | None, int | None]
_Scope = tuple[_Origin, Repository]

PlainAllowed = Callable[[Upstream], Deferred[bool]]
"""Whether an upstream without a configured scheme may be asked over http."""


class Client:
    """Asks one upstream, as distribution-spec clients do."""

    def __init__(
        self,
        upstream: Upstream,
        scheme: str | None,
        exchanges: Exchanges,
        plain_allowed: PlainAllowed,
        clock: IReactorTime,
    ) -> None:
        self._upstream = upstream
        self._netloc = _DOCKER_HUB_API if upstream.name == DOCKER_HUB else upstream.name
        self._scheme = scheme
        self._learned: tuple[str, float] | None = None
        self._exchanges = exchanges
        self._plain_allowed = plain_allowed
        self._clock = clock
        self._tokens = Tokens(str(upstream), self._fetch_token, clock)
        self._challenges: dict[_Scope, BearerChallenge] = {}

    async def request(
        self, method: str, repository: Repository, path: str, headers: Mapping[str, str] | None = None
    ) -> Response:
        """The answer to a request for `path` below `repository`, whatever its status.

        A token that the upstream wants is fetched; redirects are followed. Raises `Unavailable`.
        """
        # Who is refused may come back once with a token; twice, if the first was one from an earlier request.
        refused: dict[_Scope, bool] = {}
        while True:
            response = await self._send(method, repository, path, headers or {})
            scope = _origin(response.url), repository
            challenges = map(BearerChallenge.parse, response.headers("www-authenticate"))
            challenge = next(filter(None, challenges), None)
            if response.status != 401 or challenge is None or not refused.get(scope, True):
                return response
            await response.discard()
            self._remember(scope, challenge)
            refused[scope] = scope not in refused and self._tokens.holds(challenge)

    def _remember(self, scope: _Scope, challenge: BearerChallenge) -> None:
        if scope in self._challenges:
            self._tokens.forget(self._challenges.pop(scope))
        if len(self._challenges) >= _MOST_CHALLENGES:
            self._challenges.clear()
        self._challenges[scope] = challenge

    async def _send(self, method: str, repository: Repository, path: str, headers: Mapping[str, str]) -> Response:
        target = f"{self._netloc}/v2/{repository.path}/{path}"
        scheme = self._known_scheme()
        if scheme is not None:
            return await self._follow(method, f"{scheme}://{target}", headers, repository)
        try:
            response = await self._follow(method, f"https://{target}", headers, repository)
            scheme = "https"
        except NoTls:
            if not await self._plain_allowed(self._upstream):
                raise
            response = await self._follow(method, f"http://{target}", headers, repository)
            scheme = "http"
        self._learned = (scheme, self._clock.seconds() + _SCHEME_KEPT)
        return response

    def _known_scheme(self) -> str | None:
        if self._scheme is None and self._learned is not None and self._clock.seconds() < self._learned[1]:
            return self._learned[0]
        return self._scheme

    async def _follow(
        self, method: str, url: str, headers: Mapping[str, str], repository: Repository | None
    ) -> Response:
        own = _origin(url)
        for _ in range(_MOST_HOPS + 1):
            authorized = await self._authorized(url, headers, repository)
            try:
                response = await self._exchanges.send(method, url, authorized)
            except NoTls as error:
                # Only of the upstream's own host does it say how that wants to be spoken to.
                if repository is None or _origin(url) != own:
                    raise Unavailable(error.message) from None
                raise
            location = response.header("location")
            if response.status not in _REDIRECTS or not location:
                return response
            await response.discard()
            url = self._redirected(url, location)
        raise Unavailable(f"{self._upstream}: more than {_MOST_HOPS} redirects")

    async def _authorized(
        self, url: str, headers: Mapping[str, str], repository: Repository | None
    ) -> Mapping[str, str]:
        # Only the origin that asked for a token gets it: a storage service refuses requests that carry two
        # authorisations, and a registry may redirect to another one that has a token service of its own.
        challenge = self._challenges.get((_origin(url), repository)) if repository else None
        if challenge is None:
            return headers
        return {**headers, "Authorization": f"Bearer {await self._tokens.token(challenge)}"}

    def _redirected(self, url: str, location: str) -> str:
        try:
            target = urljoin(url, location)
            scheme, _host, _port = _origin(target)
        except ValueError:
            raise Unavailable(f"{self._upstream}: it redirects to {location[:200]!r}, which is no URL") from None
        if scheme not in ("http", "https") or (scheme == "http" and url.startswith("https:")):
            raise Unavailable(f"{self._upstream}: it redirects from {urlsplit(url).scheme} to {scheme or 'nowhere'}")
        return target

    async def _fetch_token(self, url: str) -> bytes:
        response = await self._follow("GET", url, {}, None)
        if response.status != 200:
            await response.discard()
            raise Unavailable(f"{self._upstream}: its token service answered {response.status}")
        return await response.collect(LARGEST_TOKEN)


def _origin(url: str) -> _Origin:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
