"""One HTTP request to a host of an upstream, and its response: identity encoding, errors of libraries translated."""

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
from ociregistry.config.proxy import Proxy
from ociregistry.context import Again, Priority, Wanted
from ociregistry.errors import Denied, OutOfDescriptors, Unavailable
from ociregistry.upstream.bandwidth import Bandwidth, Share
from ociregistry.upstream.body import Body
from ociregistry.upstream.breaker import LONGEST_PATIENCE, Attempt, CircuitBreaker, CircuitBreakers, LinkDown
from ociregistry.upstream.failures import (
    ProxyFailed,
    ProxyUnreachable,
    broke_without_response,
    explain,
    is_unreachable,
    lacks_descriptors,
    speaks_no_tls,
    was_cancelled,
)
from ociregistry.upstream.origin import Origin
from ociregistry.upstream.probing import Ping


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """How to make a request, and the redirects and token requests that belong to it."""

    timeout: float = 60.0
    """Seconds for the headers of each response."""
    priority: Priority = Priority.CLIENT
    wanted: Wanted | None = None
    """What the request is for; with None, the request ends when its host counts as down."""


DEFAULT_OPTIONS = RequestOptions()
_PROBE = RequestOptions(timeout=LONGEST_PATIENCE, priority=Priority.METADATA)


USER_AGENT = f"ociregistry/{__version__}".encode("ascii")
_LONGEST_RETRY_AFTER = 3600
"""Seconds."""
_REFUSED = frozenset({401, 403})
_HEAD_REFUSED = frozenset({400, 404, 405, 501})
_IDEMPOTENT = frozenset({"GET", "HEAD"})
"""The methods that are sent here and may be sent twice (RFC 9110, section 9.2.2)."""
_LARGEST_DISCARDED = 64 * 1024
"""Bytes of an unwanted body that are read, so that the connection can be used again."""


class NoTls(Unavailable):
    """The host refused the connection for an https URL, or does not speak TLS."""


class EncodedBody(Exception):
    """The upstream encoded a body although identity encoding was requested."""


@implementer(IAgent)
class IdentityAgent:
    """Sets the headers that every request carries, and refuses encoded responses.

    Accept-Encoding is `identity`, because bodies are hashed, resumed and cached as the bytes that were sent.
    User-Agent names this program and its version, because some registries refuse requests without one.
    This agent is below treq, which would ask for gzip and decode it, so that every request has these headers.
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
        headers.setRawHeaders(b"user-agent", [USER_AGENT])
        requested: Deferred[IResponse] = self._agent.request(method, uri, headers, bodyProducer)
        return requested.addCallback(_check_identity)


class _Url(EncodedURL):
    """A URL that treq sends unchanged if it is ASCII."""

    def to_uri(self) -> EncodedURL:
        """Return the URL with an ASCII host.

        An ASCII host is encoded already, and hyperlink refuses some of those: IPv6 addresses, names with `_`.
        """
        return self if self.host.isascii() else super().to_uri()


class DroppedBody(Protocol):
    """Closes the connection of a body that is not wanted."""

    def connectionMade(self) -> None:
        assert self.transport is not None
        self.transport.loseConnection()


def _check_identity(response: IResponse) -> IResponse:
    for encoding in response.headers.getRawHeaders(b"content-encoding", []):
        if encoding.strip().lower() != b"identity":
            response.deliverBody(DroppedBody())
            raise EncodedBody(
                f"it sent Content-Encoding {encoding[:40].decode('latin-1')!r}, although identity was requested"
            )
    return response


def _date(text: str) -> datetime | None:
    """Return the time that an HTTP date tells; None if it is malformed, or has no time zone."""
    try:
        time = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    return time if time.tzinfo is not None else None


@dataclass(frozen=True, slots=True)
class Response:
    """An upstream's response: status, headers, and a body that must be read, collected, discarded or aborted."""

    upstream: str
    status: int
    url: str
    length: int | None
    """Bytes of the body; None where the upstream does not tell."""
    body: Body
    _headers: Headers
    method: str = "GET"
    """The method of the request."""
    redirected: bool = False
    """Whether a redirect led to this response."""
    proxy: Proxy | None = None
    """The proxy that may have sent this response itself; through a tunnel none can."""
    login: str = ""
    """Whose credentials the request carried, for messages; empty for none."""

    @property
    def outcome(self) -> str:
        """The status for messages, with the proxy that may have sent it, and whose access was refused."""
        through = f", through the proxy {self.proxy}" if self.proxy is not None else ""
        return f"{self.status}{through}{f': {self.refusal}' if self.refusal else ''}"

    @property
    def refusal(self) -> str:
        """Whose access was refused by whom, for messages; empty where it was not."""
        if self.status not in _REFUSED:
            return ""
        return f"{Origin.of(self.url).host} refused {self.login or 'anonymous access (private, or absent)'}"

    def header(self, name: str) -> str:
        """Return the first header `name`, or the empty string."""
        return next(iter(self.headers(name)), "").strip()

    def headers(self, name: str) -> list[str]:
        """Return all headers `name`."""
        # An upstream may send any bytes, and Twisted's own decoding as UTF-8 would fail on some.
        return [value.decode("latin-1") for value in self._headers.getRawHeaders(name.encode("ascii"), [])]

    @property
    def may_refuse_head(self) -> bool:
        """Whether the reason for this response to HEAD may be the method, so that GET may get the content.

        A 404 is honest at most registries. A 403 is about the method where a redirect led to storage by a URL that is
        signed for GET only.
        """
        return self.status in _HEAD_REFUSED or (self.status == 403 and self.redirected)

    @property
    def retry_after(self) -> int:
        """Seconds until a retry, from Retry-After (seconds or a date): at most 3600, and 5 where it is not told.

        A date is compared with that of the response, as this machine's clock may be wrong.
        """
        told = self.header("retry-after")
        if told.isascii() and told.isdigit():
            return min(int(told[:9]), _LONGEST_RETRY_AFTER)
        until = _date(told)
        if until is None:
            return 5
        wait = (until - (_date(self.header("date")) or datetime.now(UTC))).total_seconds()
        return min(max(0, ceil(wait)), _LONGEST_RETRY_AFTER)

    async def collect(self, most: int) -> bytes:
        """Read the whole body.

        Raises:
            Unavailable: the body is longer than `most` bytes, or the connection broke.
        """
        data = bytearray()
        try:
            while piece := await self.body.read():
                data += piece
                if len(data) > most:
                    raise Unavailable(f"{self.upstream}: a response is longer than {most} bytes")
        finally:
            self.body.abort()
        return bytes(data)

    async def discard(self) -> None:
        """Discard the body; a body of at most 64 KiB is read, so that its connection can be used again."""
        try:
            await self.collect(_LARGEST_DISCARDED)
        except Unavailable:
            return


@dataclass(frozen=True, slots=True)
class _Attempts:
    """One request through the circuit breakers of its host and of its proxy, if it has one."""

    breaker: CircuitBreaker
    """The host's."""
    at_host: Attempt
    proxy: Proxy | None
    at_proxy: Attempt | None

    def answered(self) -> None:
        """Report that a response came, of any status."""
        self.at_host.answered()
        if self.at_proxy is not None:
            self.at_proxy.answered()

    def failed(self, error: Exception, why: str, *, refused: bool) -> None:
        """Report the failure to the circuit breaker of the proxy or the host, whichever could not be reached."""
        if self.at_proxy is not None and isinstance(error, ProxyUnreachable):
            self.at_proxy.failed(error.why)
            self.at_host.abandoned()
            return
        if is_unreachable(error):
            self.at_host.failed(why, refused=refused)
        else:
            self.at_host.abandoned()
        if self.at_proxy is None:
            return
        if was_cancelled(error):
            # The deadline may have passed before the connection to the proxy was made.
            self.at_proxy.abandoned()
        else:
            self.at_proxy.answered()

    def abandoned(self) -> None:
        """Report that the request tells nothing about either: it was cancelled or denied."""
        self.at_host.abandoned()
        if self.at_proxy is not None:
            self.at_proxy.abandoned()


class HttpClient:
    """Sends single requests for `upstream`; follows no redirects and answers no challenges."""

    def __init__(
        self,
        upstream: str,
        agent: IAgent,
        breakers: CircuitBreakers,
        bandwidth: Bandwidth,
        drop_idle: Callable[[], object],
        clock: IReactorTime,
        proxy_of: Callable[[Origin], Proxy | None] = lambda origin: None,
        want: Callable[[CircuitBreaker, Ping, Again | None], object] = lambda breaker, ping, again: None,
        received: Callable[[int], object] = lambda count: None,
    ) -> None:
        """Create a client.

        `drop_idle` closes the idle connections of the pool. `proxy_of` tells the proxy that `agent` sends requests to
        an origin through. `want` is called with the breaker of a host that a request missed, and with its probes;
        `received` with the number of bytes of each piece of a body.
        """
        self._want = want
        self._received = received
        self._bandwidth = bandwidth
        self._breakers = breakers
        self._upstream = upstream
        self._drop_idle = drop_idle
        # No registry needs cookies, and a cookie of one host must not be sent to another.
        cookies: Any = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
        self._client = HTTPClient(IdentityAgent(agent), cookies)
        self._clock = clock
        self._proxy_of = proxy_of

    async def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None = None,
        options: RequestOptions = DEFAULT_OPTIONS,
    ) -> Response:
        """Send one request and return its response, of any status, when its headers have come.

        A GET or HEAD whose connection is closed or reset before the headers is sent once more at once, within the
        same time; only the second outcome is reported to the circuit breaker.

        Raises:
            Unavailable: no response came; the message tells the reason.
            NoTls: the host does not speak TLS, or refuses the connection, for an https URL.
            LinkDown: the circuit breaker of the host or of its proxy is open.
            Denied: the host's address is not allowed.
            CancelledError: the caller cancelled the request.
        """
        origin = Origin.of(url)
        attempt = self._enter(origin, options)
        raw = Headers({name: [value] for name, value in headers.items()})
        ended = False

        def end() -> None:
            nonlocal ended
            ended = True
            requested.cancel()

        def link_down(error: LinkDown) -> None:
            self._missed(attempt.breaker, origin, options)
            if options.wanted is not None:
                options.wanted.link_down(error)
            else:
                end()

        probes = attempt.at_host.down is not None
        timeout = min(options.timeout, LONGEST_PATIENCE) if probes else options.timeout
        requested = Deferred.fromCoroutine(self._exchange(method, url, raw, body))
        deadline: IDelayedCall = self._clock.callLater(timeout, end)
        attempt.at_host.link_down, attempt.at_host.give_up = link_down, end
        if attempt.at_host.down is not None and options.wanted is not None:
            options.wanted.link_down(attempt.at_host.down)
        try:
            response = await requested
        except Denied:
            attempt.abandoned()
            raise
        except Exception as error:
            if was_cancelled(error) and not ended:
                attempt.abandoned()
                raise CancelledError from error
            failure = self._failure(url, error, attempt)
            self._missed(attempt.breaker, origin, options)
            raise failure from error
        finally:
            if deadline.active():
                deadline.cancel()
        attempt.answered()
        length = None if response.length is UNKNOWN_LENGTH else int(response.length)
        received = self._body(response, length, attempt.breaker)
        proxy = attempt.proxy if url.startswith("http:") else None
        return Response(self._upstream, response.code, url, length, received, response.headers, method, proxy=proxy)

    def _enter(self, origin: Origin, options: RequestOptions) -> _Attempts:
        proxy = self._proxy_of(origin)
        priority = options.priority
        breaker = self._breakers.get(origin, proxy)
        at_proxy: Attempt | None = None
        try:
            if proxy is not None:
                at_proxy = self._breakers.get(proxy).enter(self._upstream, priority)
            return _Attempts(breaker, breaker.enter(self._upstream, priority), proxy, at_proxy)
        except LinkDown:
            if at_proxy is not None:
                at_proxy.abandoned()
            elif proxy is not None:
                breaker = self._breakers.get(proxy)
            self._missed(breaker, origin, options)
            raise

    def _missed(self, breaker: CircuitBreaker, origin: Origin, options: RequestOptions) -> None:
        """Have the host probed, if it is down, unless the request was of the lowest priority, as probes are."""
        if breaker.is_open and options.priority > Priority.METADATA:
            again = options.wanted.again if options.wanted is not None else None
            self._want(breaker, partial(self._ping, origin), again)

    async def _ping(self, origin: Origin) -> None:
        """Send `GET /v2/` to a host, without credentials.

        Raises:
            RegistryError: no response came.
        """
        response = await self.send("GET", f"{origin.scheme}://{origin.netloc}/v2/", {}, options=_PROBE)
        await response.discard()

    async def _exchange(self, method: str, url: str, headers: Headers, body: bytes | None) -> IResponse:
        async def request() -> IResponse:
            return await self._client.request(
                method, _Url.from_text(url), headers=headers, data=body, unbuffered=True, allow_redirects=False
            )

        try:
            return await request()
        except Exception as error:
            if method not in _IDEMPOTENT or not broke_without_response(error):
                raise
            return await request()

    def _body(self, response: IResponse, length: int | None, breaker: CircuitBreaker) -> Body:
        stalled = partial(self._stalled, breaker)
        if self._bandwidth.is_small(length):
            body = Body(self._upstream, self._clock, stalled, partial(self._count, self._consume_small))
            response.deliverBody(body)
            return body
        share = Share(self._bandwidth, length)
        body = Body(self._upstream, self._clock, stalled, partial(self._count, share.consume))
        response.deliverBody(body)
        share.begin(body.set_receive_buffer)
        if length is not None:
            # Not a body in chunks, as these can be so small that parsing 1 MiB of them takes long.
            body.receive_pieces(self._bandwidth.piece)
        body.ended.addCallback(lambda _: share.end())
        return body

    def _count(self, consume: Callable[[int], float], count: int) -> float:
        self._received(count)
        return consume(count)

    def _consume_small(self, count: int) -> float:
        self._bandwidth.consume(count)
        return 0.0

    def _failure(self, url: str, error: Exception, attempt: _Attempts) -> Unavailable:
        if was_cancelled(error):
            self._drop_idle()
        why, refused = explain(error), speaks_no_tls(error)
        if attempt.proxy is not None and not isinstance(error, ProxyFailed):
            why += f", through the proxy {attempt.proxy}"
        attempt.failed(error, why, refused=refused)
        if lacks_descriptors(error):
            return OutOfDescriptors(f"{self._upstream}: {why}")
        kind = NoTls if url.startswith("https:") and refused else Unavailable
        return kind(f"{self._upstream}: {why}")

    def _stalled(self, breaker: CircuitBreaker, why: str, silent: float) -> None:
        """Report to the circuit breaker that no byte of a body came for `silent` seconds."""
        # Idle connections to the same host have stalled too: after an outage an old TCP connection can take minutes
        # to recover, while a new one works at once.
        self._drop_idle()
        breaker.stalled(self._clock.seconds() - silent, why)
