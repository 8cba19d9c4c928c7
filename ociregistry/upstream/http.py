"""One HTTP request to a host of an upstream and its response: identity encoding, foreign failures translated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from http.cookiejar import CookieJar, DefaultCookiePolicy
from math import ceil
from typing import Any

from hyperlink import EncodedURL
from treq.client import HTTPClient
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.protocol import Protocol
from twisted.web.http_headers import Headers
from twisted.web.iweb import UNKNOWN_LENGTH, IAgent, IBodyProducer, IResponse
from zope.interface import implementer

from ociregistry import __version__
from ociregistry.errors import Denied, Unavailable
from ociregistry.upstream.bandwidth import Bandwidth, Share
from ociregistry.upstream.body import Body
from ociregistry.upstream.breaker import Attempt, CircuitBreaker, CircuitBreakers
from ociregistry.upstream.failures import explain, is_unreachable, speaks_no_tls, was_cancelled
from ociregistry.upstream.origin import Origin


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """How a request is made, with all that it takes: redirects, tokens."""

    within: float = 30.0
    """Seconds for the headers of each answer."""
    insist: bool = False
    """Whether it is made even if the host could not be reached a moment ago: somebody waits for it."""
    small: bool = False
    """Whether it is for a small object, which does not wait for a connection behind large ones."""
    last: bool = False
    """For the lowest priority: refused while the registry's rate limit is nearly used up."""


DEFAULT_OPTIONS = RequestOptions()


_USER_AGENT = f"ociregistry/{__version__}".encode("ascii")
_LONGEST_RETRY_AFTER = 3600
_HEAD_REFUSED = frozenset({400, 403, 405, 501})
_LARGEST_LEFTOVER = 64 * 1024
"""Bytes that are read, not cut off, so that the connection can serve the next request."""


class NoTls(Unavailable):
    """The host does not speak TLS at all."""


class Encoded(Exception):
    """The upstream encoded a body that was to come as it is."""


@implementer(IAgent)
class IdentityAgent:
    """Sets the headers that every request carries, and refuses encoded responses.

    Accept-Encoding is `identity`, because what is hashed, resumed and cached must not be encoded on the way.
    User-Agent names this program and its version, because some registries refuse requests without one.
    It stands below treq, which asks for gzip and decodes it, so that no request goes out without these headers.
    """

    def __init__(self, agent: IAgent) -> None:
        self._agent = agent

    def request(
        self,
        method: bytes,
        uri: bytes,
        headers: Headers | None = None,
        bodyProducer: IBodyProducer | None = None,
    ) -> Deferred[IResponse]:
        headers = Headers() if headers is None else headers.copy()
        headers.setRawHeaders(b"accept-encoding", [b"identity"])
        headers.setRawHeaders(b"user-agent", [_USER_AGENT])
        requested: Deferred[IResponse] = self._agent.request(method, uri, headers, bodyProducer)
        return requested.addCallback(_as_it_is)


class _Url(EncodedURL):
    """A URL as it goes onto the wire."""

    def to_uri(self) -> EncodedURL:
        """What is ASCII is encoded already, and hyperlink refuses some of it: IPv6 addresses, names with `_`."""
        return self if self.host.isascii() else super().to_uri()


class _Dropped(Protocol):
    def connectionMade(self) -> None:
        assert self.transport is not None
        self.transport.loseConnection()


def _as_it_is(response: IResponse) -> IResponse:
    for encoding in response.headers.getRawHeaders(b"content-encoding", []):
        if encoding.strip().lower() != b"identity":
            response.deliverBody(_Dropped())
            raise Encoded(f"it sent Content-Encoding {encoding[:40]!r}, though identity was asked for")
    return response


@dataclass(frozen=True, slots=True)
class Response:
    """What an upstream answered: status, headers, and a body to be read, collected or discarded."""

    upstream: str
    status: int
    url: str
    length: int | None
    """Of the body, in bytes, where the upstream told it."""
    body: Body
    _headers: Headers
    redirected: bool = False
    """Whether it is the answer of another place than the one that was asked first."""

    def header(self, name: str) -> str:
        """The first header `name`, or the empty string."""
        return next(iter(self.headers(name)), "").strip()

    def headers(self, name: str) -> list[str]:
        """All headers `name`."""
        # Whatever bytes an upstream sends: Twisted would take them for UTF-8.
        return [value.decode("latin-1") for value in self._headers.getRawHeaders(name.encode("ascii"), [])]

    def refuses_head(self, method: str) -> bool:
        """Whether storage behind a registry refuses this kind of request: its URL is signed for GET."""
        return method == "HEAD" and self.redirected and self.status in _HEAD_REFUSED

    @property
    def retry_after(self) -> int:
        """For how many seconds it wants to be left alone; 5 where it does not say."""
        told = self.header("retry-after")
        if told.isascii() and told.isdigit():
            return min(int(told[:9]), _LONGEST_RETRY_AFTER)
        try:
            wait = (parsedate_to_datetime(told) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return 5
        return min(max(0, ceil(wait)), _LONGEST_RETRY_AFTER)

    async def collect(self, most: int) -> bytes:
        """The whole body; raises `Unavailable` when it is longer than `most` bytes or breaks off."""
        data = bytearray()
        try:
            while piece := await self.body.read():
                data += piece
                if len(data) > most:
                    raise Unavailable(f"{self.upstream}: an answer is longer than {most} bytes")
        finally:
            self.body.abort()
        return bytes(data)

    async def discard(self) -> None:
        """Lets go of the body, and keeps the connection for others when the rest of it is short."""
        try:
            await self.collect(_LARGEST_LEFTOVER)
        except Unavailable:
            return


class HttpClient:
    """Sends single requests for `upstream`, without following anything."""

    def __init__(
        self,
        upstream: str,
        agent: IAgent,
        breakers: CircuitBreakers,
        bandwidth: Bandwidth,
        drop_idle: Callable[[], object],
        clock: IReactorTime,
    ) -> None:
        """`drop_idle` closes the connections that wait for another request."""
        self._bandwidth = bandwidth
        self._breakers = breakers
        self._upstream = upstream
        self._drop_idle = drop_idle
        # No registry needs cookies, and what one host sets another must not see.
        cookies: Any = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
        self._client = HTTPClient(IdentityAgent(agent), cookies)
        self._clock = clock

    async def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None = None,
        options: RequestOptions = DEFAULT_OPTIONS,
    ) -> Response:
        """The response to one request.

        Raises `Unavailable` with the reason when there is none, `NoTls` and `LinkDown` too, and `Denied` when its
        address is not allowed.
        """
        breaker = self._breakers.to(Origin.of(url))
        attempt = breaker.enter(self._upstream, insist=options.insist)
        raw = Headers({name: [value] for name, value in headers.items()})
        deadline: IDelayedCall | None = None
        try:
            requested = self._client.request(
                method, _Url.from_text(url), headers=raw, data=body, unbuffered=True, allow_redirects=False
            )
            deadline = self._clock.callLater(options.within, requested.cancel)
            response = await requested
        except Denied:
            attempt.abandoned()
            raise
        except Exception as error:
            if was_cancelled(error) and deadline is not None and deadline.active():
                # Not by us: whoever waits for this does so no longer.
                attempt.abandoned()
                raise CancelledError from error
            raise self._failure(url, error, attempt) from error
        finally:
            if deadline is not None and deadline.active():
                deadline.cancel()
        attempt.answered()
        length = None if response.length is UNKNOWN_LENGTH else int(response.length)
        received = self._body(response, length, breaker)
        return Response(self._upstream, response.code, url, length, received, response.headers)

    def _body(self, response: IResponse, length: int | None, breaker: CircuitBreaker) -> Body:
        stalled = partial(self._stalled, breaker)
        if self._bandwidth.is_small(length):
            body = Body(self._upstream, self._clock, stalled, self._draw_small)
            response.deliverBody(body)
            return body
        share = Share(self._bandwidth, length)
        body = Body(self._upstream, self._clock, stalled, share.draw)
        response.deliverBody(body)
        share.begin(body.set_receive_buffer)
        body.ended.addCallback(lambda _: share.end())
        return body

    def _draw_small(self, count: int) -> float:
        self._bandwidth.draw(count)
        return 0.0

    def _failure(self, url: str, error: Exception, attempt: Attempt) -> Unavailable:
        if was_cancelled(error):
            self._drop_idle()
        why, refused = explain(error), speaks_no_tls(error)
        if is_unreachable(error):
            attempt.failed(why, refused=refused)
        else:
            attempt.abandoned()
        kind = NoTls if url.startswith("https:") and refused else Unavailable
        return kind(f"{self._upstream}: {why}")

    def _stalled(self, breaker: CircuitBreaker, why: str, silent: float) -> None:
        """A body has been silent for so many seconds."""
        # What waits for another request on the same path will not move either: after an outage an old TCP
        # connection can take minutes to, a new one moves at once.
        self._drop_idle()
        breaker.failed(self._clock.seconds() - silent, why)
