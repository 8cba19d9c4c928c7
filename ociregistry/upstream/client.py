"""Requests to one registry's API: finds the scheme, answers challenges, follows redirects, and pauses after a 429.

A 429 is returned like any other status, and the requests of the time in its Retry-After fail with `Unavailable`.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from math import ceil
from urllib.parse import urlsplit

from cachetools import TTLCache
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from ociregistry.context import Priority
from ociregistry.errors import OutOfDescriptors, Unavailable
from ociregistry.names import Repository
from ociregistry.upstream.auth import (
    LARGEST_TOKEN,
    AccessRefused,
    Authenticator,
    Authorization,
    Scope,
    TokenRequest,
    Tokens,
)
from ociregistry.upstream.breaker import LinkDown
from ociregistry.upstream.credentials import Credentials
from ociregistry.upstream.http import DEFAULT_OPTIONS, HttpClient, NoTls, RequestOptions, Response
from ociregistry.upstream.origin import Origin, redirected
from ociregistry.upstream.ratelimit import RateLimit

_log = Logger(namespace="ociregistry.upstream")

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MOST_HOPS = 10
_MOST_REFUSALS_IN_ALL = 8
"""The 401 responses to one request that may each lead to a retry, over all hosts that it is redirected to."""
_SCHEME_TTL = 600.0
"""Seconds for which a detected scheme is remembered."""
_HEAD_UNSUPPORTED_FOR = 3600.0
"""Seconds for which a host that answered HEAD otherwise than GET is asked by GET alone."""
_CONFIRMED_FOR = 600.0
"""Seconds for which a response to HEAD that GET has confirmed is believed."""
_MOST_CONFIRMED = 1000
_REFUSAL_TOLD_FOR = 600.0
"""Seconds for which the same refusal of credentials is not logged again."""
_METHOD_REFUSED = frozenset({405, 501})
_CONTENT_EXISTS = frozenset({200, 206, 416})
"""The statuses of GET for content that is there; 416 is for the first byte of an empty blob."""
_FIRST_BYTE = {"Range": "bytes=0-0"}
_ENDPOINT = re.compile(r"(?P<name>[A-Za-z0-9._/-]+)/(?:manifests|blobs|tags|referrers)/[^/]+")
"""What follows `/v2/` in a URL of a registry's API; `name` is the repository's."""
_FORM = {"Content-Type": "application/x-www-form-urlencoded"}

Headers = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class BaseUrl:
    """The location of a registry's API.

    With None as `scheme`, https is tried first. `path` is what precedes the names of repositories. `ns` is the query
    parameter that tells a mirror which registry is meant; it is empty where the parameter is not sent.
    """

    scheme: str | None
    netloc: str
    path: str = "/v2"
    ns: str = ""

    def origin(self, scheme: str) -> Origin:
        """Return the origin of the API's URLs."""
        return Origin.of(f"{scheme}://{self.netloc}/")

    def url(self, scheme: str, repository: Repository | None, path: str) -> str:
        """Return the URL of `path` below a repository, such as `manifests/latest`; without one, that of the API."""
        if repository is None:
            return f"{scheme}://{self.netloc}{self.path.partition('/v2')[0]}/v2/"
        url = f"{scheme}://{self.netloc}{self.path}/{repository.path}/{path}"
        return url + (("&" if "?" in path else "?") + f"ns={self.ns}" if self.ns else "")


class Client:
    """A client of one registry or mirror."""

    def __init__(
        self,
        name: str,
        base: BaseUrl,
        http: HttpClient,
        credentials: Credentials,
        trusted: Callable[[Origin], bool],
        http_allowed: Callable[[], Awaitable[bool]],
        clock: IReactorTime,
    ) -> None:
        """Create a client.

        `name` is used in messages. `trusted` says whether a token service gets the credentials. `http_allowed` says
        whether http may be tried where the scheme is not configured.
        """
        self._name = name
        self._base = base
        self._detected_scheme: tuple[str, float] | None = None
        self._http = http
        self._http_allowed = http_allowed
        self._clock = clock
        self._rate_limited_until = 0.0
        self._head_unsupported: TTLCache[str, bool, float] = TTLCache(
            maxsize=2, ttl=_HEAD_UNSUPPORTED_FOR, timer=clock.seconds
        )
        """The endpoints, `manifests` or `blobs`, at which HEAD is not to be relied on."""
        self._confirmed: TTLCache[tuple[Repository, str], int, float] = TTLCache(
            _MOST_CONFIRMED, ttl=_CONFIRMED_FOR, timer=clock.seconds
        )
        """The error statuses of HEAD that GET confirmed, for content that really is not there."""
        self._refusals: TTLCache[str, None, float] = TTLCache(
            _MOST_CONFIRMED, ttl=_REFUSAL_TOLD_FOR, timer=clock.seconds
        )
        """The refusals that were logged of late."""
        self._rate_limit = RateLimit(clock)
        self._authenticator = Authenticator(credentials, Tokens(name, self._fetch_token, credentials, trusted, clock))

    async def request(
        self,
        method: str,
        repository: Repository,
        path: str,
        headers: Headers | None = None,
        options: RequestOptions = DEFAULT_OPTIONS,
    ) -> Response:
        """Request `path` below `repository`: answer challenges, follow redirects.

        A host that does not support HEAD is asked by GET: for a whole manifest, or for the first byte of a blob.

        Returns:
            The last response, of any status.

        Raises:
            Unavailable: the registry or its token service cannot be asked, or is rate limited.
            AccessRefused: the token service refuses access.
            Denied: the registry, a redirect or the token service leads to an address that is not allowed.
        """
        if method == "HEAD":
            return await self._head(repository, path, headers or {}, options)
        return await self._request(method, repository, path, headers or {}, options)

    async def ping(self, options: RequestOptions = DEFAULT_OPTIONS) -> Response:
        """Request the root of the API with the credentials that it asks for, as `request` does.

        Returns and raises as `request` does.
        """
        return await self._request("GET", None, "", {}, options)

    async def _head(self, repository: Repository, path: str, headers: Headers, options: RequestOptions) -> Response:
        endpoint = path.partition("/")[0]
        status: int | None = None
        if endpoint not in self._head_unsupported:
            response = await self._request("HEAD", repository, path, headers, options)
            status = response.status
            if not response.may_refuse_head or self._confirmed.get((repository, path)) == status:
                return response
            await response.discard()
        headers = {**headers, **(_FIRST_BYTE if endpoint == "blobs" else {})}
        response = await self._request("GET", repository, path, headers, options)
        if response.status == status:
            # Without this, each HEAD for something that is not there would cost a GET too, and count twice against
            # the registry's rate limit.
            self._confirmed[repository, path] = status
        elif status in _METHOD_REFUSED or (status is not None and response.status in _CONTENT_EXISTS):
            self._head_unsupported[endpoint] = True
        return response

    async def _request(
        self, method: str, repository: Repository | None, path: str, headers: Headers, options: RequestOptions
    ) -> Response:
        wait = self._rate_limited_until - self._clock.seconds()
        if wait > 0:
            raise Unavailable(f"{self._name}: rate limited (429), retry in {wait:.0f} s", ceil(wait))
        delay = self._rate_limit.delay() if options.priority is Priority.METADATA else 0.0
        if delay > 0:
            why = f"rate limit nearly used up, lowest-priority requests paused for {delay:.0f} s"
            raise Unavailable(f"{self._name}: {why}", ceil(delay))
        refused: dict[Scope, list[Authorization | None]] = {}
        while True:
            exchange = await self._send(method, repository, path, headers, options)
            authorization = exchange.authorization
            response = replace(exchange.response, login=authorization.login if authorization is not None else "")
            if Origin.of(response.url) == exchange.origin:
                self._rate_limit.update(response)
            if response.status == 429:
                self._note_rate_limit(response, options)
            if response.status != 401:
                self._log_refusal(response)
                return response
            scope = Origin.of(response.url), repository
            refused.setdefault(scope, []).append(exchange.authorization)
            if sum(map(len, refused.values())) > _MOST_REFUSALS_IN_ALL:
                self._log_refusal(response)
                return response
            challenges = response.headers("www-authenticate")
            default = _pull_scope(response, repository)
            if not self._authenticator.handle_unauthorized(
                scope, exchange.origin, refused[scope], challenges, default
            ):
                self._log_refusal(response)
                return response
            await response.discard()

    def _log_refusal(self, response: Response) -> None:
        """Log refused credentials, at most every ten minutes: clients are only told that nothing is there."""
        refusal = response.refusal if response.login else ""
        if refusal and refusal not in self._refusals:
            self._refusals[refusal] = None
            _log.error("{upstream}: {why} ({status})", upstream=self._name, why=refusal, status=response.status)

    def _note_rate_limit(self, response: Response, options: RequestOptions) -> None:
        # Callers of the lowest priority wait by themselves; a 429 to one of them must not block other requests.
        if options.priority is Priority.METADATA:
            return
        self._rate_limited_until = max(self._rate_limited_until, self._clock.seconds() + response.retry_after)

    async def _send(
        self, method: str, repository: Repository | None, path: str, headers: Headers, options: RequestOptions
    ) -> _Exchange:
        scheme = self._known_scheme()
        if scheme is not None:
            return await self._exchange(scheme, method, repository, path, headers, options)
        try:
            exchange = await self._exchange("https", method, repository, path, headers, options)
            scheme = "https"
        except (NoTls, LinkDown) as error:
            if (isinstance(error, LinkDown) and not error.refused) or not await self._http_allowed():
                raise
            exchange = await self._exchange("http", method, repository, path, headers, options)
            scheme = "http"
        self._detected_scheme = (scheme, self._clock.seconds() + _SCHEME_TTL)
        return exchange

    def _known_scheme(self) -> str | None:
        detected, until = self._detected_scheme or (None, 0.0)
        return detected if self._base.scheme is None and self._clock.seconds() < until else self._base.scheme

    async def _exchange(
        self,
        scheme: str,
        method: str,
        repository: Repository | None,
        path: str,
        headers: Headers,
        options: RequestOptions,
    ) -> _Exchange:
        url = self._base.url(scheme, repository, path)
        own = Origin.of(url)

        async def authorization(origin: Origin) -> Authorization | None:
            return await self._authenticator.authorization((origin, repository), own, options)

        response, last = await self._follow_redirects(method, url, headers, authorization, options)
        return _Exchange(response, last, own)

    async def _follow_redirects(
        self,
        method: str,
        url: str,
        headers: Headers,
        authorize: Callable[[Origin], Awaitable[Authorization | None]],
        options: RequestOptions,
    ) -> tuple[Response, Authorization | None]:
        own = Origin.of(url)
        for hops in range(_MOST_HOPS + 1):
            origin = Origin.of(url)
            authorization = await authorize(origin)
            try:
                authorized = headers if authorization is None else {**headers, "Authorization": authorization.header}
                response = await self._http.send(method, url, authorized, options=options)
            except OutOfDescriptors:
                raise
            except Unavailable as error:
                if origin == own:
                    raise
                # Subtypes make the caller try http, which a failure of another host is no reason for.
                message = f"{error.message}, at {origin.host}, to which it redirects"
                raise Unavailable(message, error.retry_after) from None
            location = response.header("location")
            if response.status not in _REDIRECTS or not location:
                return replace(response, redirected=hops > 0), authorization
            await response.discard()
            try:
                url = redirected(url, location)
            except ValueError as error:
                raise Unavailable(f"{self._name}: {error}") from None
        raise Unavailable(f"{self._name}: more than {_MOST_HOPS} redirects")

    async def _fetch_token(self, request: TokenRequest, options: RequestOptions) -> bytes:
        # Send the Authorization to the token service only, not to hosts that it redirects to.
        realm = Origin.of(request.url)
        header = request.headers.get("Authorization")
        own = Authorization(header, cached=False) if header else None

        async def authorization(origin: Origin) -> Authorization | None:
            return own if origin == realm else None

        try:
            if request.form is not None:
                response = await self._http.send("POST", request.url, _FORM, request.form, options)
            else:
                response, _ = await self._follow_redirects("GET", request.url, {}, authorization, options)
        except (NoTls, LinkDown) as error:
            raise Unavailable(error.message, error.retry_after) from None
        if response.status == 200:
            return await response.collect(LARGEST_TOKEN)
        if response.status == 429:
            self._note_rate_limit(response, options)
        await response.discard()
        response = replace(response, login=request.login)
        self._log_refusal(response)
        kind = AccessRefused if response.status in (400, 401, 403, 404) else Unavailable
        raise kind(f"{self._name}: its token service answered {response.outcome}", response.retry_after)


@dataclass(frozen=True, slots=True)
class _Exchange:
    """A response, the Authorization of the request that it answers, and the origin that was asked first."""

    response: Response
    authorization: Authorization | None
    origin: Origin


def _pull_scope(response: Response, repository: Repository | None) -> str:
    """Return the scope of a token to pull what `response` refuses, in the form `repository:NAME:pull`.

    NAME comes from the response's URL, which may be a redirect's; where that is no URL of a registry's API, it is
    the path of `repository`. For the root of the API, it is no scope.
    """
    if repository is None:
        return ""
    match = _ENDPOINT.fullmatch(urlsplit(response.url).path.partition("/v2/")[2])
    return f"repository:{match['name'] if match else repository.path}:pull"
