"""Requests through a forward proxy: in a tunnel for https URLs (CONNECT), in absolute form for http URLs (RFC 9110).

The proxy resolves the names of hosts; this process does not, and so cannot see which addresses they have.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import Any, cast

from twisted.internet import error
from twisted.internet.defer import CancelledError, Deferred, fail
from twisted.internet.endpoints import wrapClientTLS
from twisted.internet.interfaces import IAddress, IProtocol, IProtocolFactory, IStreamClientEndpoint, ITCPTransport
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web.client import URI, Agent, HTTPConnectionPool, ProxyAgent
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent, IAgentEndpointFactory, IBodyProducer, IPolicyForHTTPS, IResponse
from zope.interface import implementer

from ociregistry.config.proxy import NoProxy, Proxies, Proxy
from ociregistry.errors import Denied
from ociregistry.upstream.connect import Dialer
from ociregistry.upstream.failures import ProxyFailed, ProxyUnreachable, TunnelFailed, explain, lacks_descriptors
from ociregistry.upstream.headers import LARGEST_HEADERS, BoundedHeaders
from ociregistry.upstream.http import USER_AGENT, DroppedBody
from ociregistry.upstream.origin import Origin

_STATUS = re.compile(rb"HTTP/1\.[01] ([0-9]{3})[ \r]")
_LOGIN = 407
_LOGINS_REFUSED = frozenset({_LOGIN, 401})
"""The second is tinyproxy's answer to a wrong password."""


@dataclass(frozen=True, slots=True)
class Route:
    """Which requests of one upstream go through which proxy."""

    proxies: Proxies
    no_proxy: NoProxy
    own: frozenset[Origin] = frozenset()
    """Origins for which `no_proxy` does not count: the upstream's own, if its entry names a proxy."""

    def to(self, origin: Origin) -> Proxy | None:
        """Return the proxy for requests to `origin`; None to connect directly."""
        proxy = self.proxies.https if origin.scheme == "https" else self.proxies.http
        if proxy is not None and origin not in self.own and self.no_proxy.covers(origin.host, origin.port):
            return None
        return proxy


def _refusal(proxy: Proxy, status: int, target: str) -> ProxyFailed:
    """Return what a `status` other than 200 in response to CONNECT means."""
    if status in _LOGINS_REFUSED:
        wanted = "refuses the user or the password" if proxy.user else "wants a user and a password"
        return ProxyFailed(proxy, f"it {wanted} ({status})")
    if status >= 500:
        return TunnelFailed(proxy, f"it cannot reach {target} ({status})")
    return ProxyFailed(proxy, f"it refuses to connect to {target} ({status})")


def _credentials(proxy: Proxy) -> dict[bytes, bytes]:
    if not proxy.user and not proxy.password:
        return {}
    told = base64.b64encode(f"{proxy.user}:{proxy.password}".encode())
    return {b"Proxy-Authorization": b"Basic " + told}


@implementer(IAgent)
class RoutedAgent:
    """Sends the requests of one upstream, each directly or through a proxy."""

    def __init__(
        self, route: Route, dialer: Dialer, proxy_policy: IPolicyForHTTPS, pool: HTTPConnectionPool, reactor: Any
    ) -> None:
        """Set up the agent; `proxy_policy` is the TLS policy for connections to a proxy whose own URL is https."""
        self._route = route
        self._check = dialer.check_unresolved
        self._agent = Agent.usingEndpointFactory(reactor, _Endpoints(route, dialer, proxy_policy), pool)
        proxy = route.proxies.http
        endpoint = _ToProxy(proxy, None, dialer, proxy_policy) if proxy is not None else None
        self._absolute = ProxyAgent(BoundedHeaders(endpoint), reactor, pool) if endpoint is not None else None

    def request(
        self,
        method: bytes,
        uri: bytes,
        headers: Headers | None = None,
        bodyProducer: IBodyProducer | None = None,
    ) -> Deferred[IResponse]:
        origin = Origin.of(uri.decode("ascii"))
        proxy = self._route.to(origin)
        if proxy is not None:
            try:
                self._check(origin.host, origin.port)
            except Denied:
                return fail()
        if proxy is None or self._absolute is None or origin.scheme == "https":
            return cast("Deferred[IResponse]", self._agent.request(method, uri, headers, bodyProducer))
        headers = Headers() if headers is None else headers.copy()
        for name, value in _credentials(proxy).items():
            headers.setRawHeaders(name, [value])
        asked: Deferred[IResponse] = self._absolute.request(method, uri.partition(b"#")[0], headers, bodyProducer)
        return asked.addCallback(_check_login, proxy)


def _check_login(response: IResponse, proxy: Proxy) -> IResponse:
    """Return the response to a request in absolute form, unless it is the proxy's own demand for a login."""
    if response.code == _LOGIN:
        response.deliverBody(DroppedBody())
        raise _refusal(proxy, response.code, "")
    return response


@implementer(IAgentEndpointFactory)
class _Endpoints:
    def __init__(self, route: Route, dialer: Dialer, proxy_policy: IPolicyForHTTPS) -> None:
        self._route = route
        self._dialer = dialer
        self._proxy_policy = proxy_policy

    def endpointForURI(self, uri: URI) -> IStreamClientEndpoint:
        """Return the endpoint for a request for `uri` that is not sent in absolute form."""
        origin = Origin.of(uri.toBytes().decode("ascii"))
        proxy = self._route.to(origin)
        if proxy is None:
            return BoundedHeaders(self._dialer.endpointForURI(uri))
        tunnel = _Tunnel(proxy, origin, _ToProxy(proxy, origin, self._dialer, self._proxy_policy))
        return BoundedHeaders(self._dialer.over_tls(uri, tunnel))


@implementer(IStreamClientEndpoint)
class _ToProxy:
    """Connects to a proxy, for one origin, or for all with None as the origin."""

    def __init__(self, proxy: Proxy, origin: Origin | None, dialer: Dialer, policy: IPolicyForHTTPS) -> None:
        self._proxy = proxy
        self._endpoint = dialer.proxy_endpoint(proxy, origin)
        if proxy.scheme == "https":
            creator = policy.creatorForNetloc(proxy.host.encode("ascii"), proxy.port)
            self._endpoint = wrapClientTLS(creator, self._endpoint)

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """Connect; the Deferred fires with the connection.

        Raises:
            ProxyUnreachable: the proxy's name cannot be resolved, or no connection was made.
        """
        return self._endpoint.connect(protocolFactory).addErrback(self._explain)

    def _explain(self, failure: Failure) -> Failure:
        if failure.check(CancelledError, error.ConnectingCancelledError) or lacks_descriptors(failure.value):
            return failure
        return Failure(ProxyUnreachable(self._proxy, explain(failure.value)))


@implementer(IStreamClientEndpoint)
class _Tunnel:
    """Connects to a host through a proxy (RFC 9110, section 9.3.6)."""

    def __init__(self, proxy: Proxy, origin: Origin, endpoint: IStreamClientEndpoint) -> None:
        self._proxy = proxy
        self._endpoint = endpoint
        self._target = origin.netloc

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """Connect; the Deferred fires with the connection to the host.

        Raises:
            ProxyUnreachable: the proxy cannot be connected to.
            TunnelFailed: the proxy cannot reach the host.
            ProxyFailed: the proxy refuses, or is no HTTP proxy.
        """
        return Deferred.fromCoroutine(self._connect(protocolFactory))

    async def _connect(self, factory: IProtocolFactory) -> IProtocol:
        connection = _Connect(self._proxy, self._target, factory)
        proxy_factory = Factory.forProtocol(lambda: connection)
        proxy_factory.noisy = False
        await self._endpoint.connect(proxy_factory)
        return await connection.established


class _Connect(Protocol):
    """Asks a proxy for a tunnel, and then passes on what comes through it.

    The protocol at the near end of the tunnel writes to this protocol's transport directly.
    """

    def __init__(self, proxy: Proxy, target: str, factory: IProtocolFactory) -> None:
        """Set up the protocol; `factory` makes the one at the near end of the tunnel."""
        self._proxy = proxy
        self._target = target
        self._factory = factory
        self._received = b""
        self._near_end: IProtocol | None = None
        self.established: Deferred[IProtocol] = Deferred(self._cancel)

    @property
    def _transport(self) -> ITCPTransport:
        return cast(ITCPTransport, self.transport)

    def connectionMade(self) -> None:
        target = self._target.encode("ascii")
        headers = {b"Host": target, b"User-Agent": USER_AGENT, **_credentials(self._proxy)}
        lines = [b"CONNECT %s HTTP/1.1" % target, *(b"%s: %s" % header for header in headers.items()), b"", b""]
        self._transport.write(b"\r\n".join(lines))

    def dataReceived(self, data: bytes) -> None:
        if self._near_end is not None:
            self._near_end.dataReceived(data)
            return
        if self.established.called:
            return
        self._received += data
        headers, end, rest = self._received.partition(b"\r\n\r\n")
        if not end and len(headers) < LARGEST_HEADERS:
            return
        self._received = b""
        status = _STATUS.match(headers)
        if status is None or not end:
            self._fail(ProxyFailed(self._proxy, "its response is not that of an HTTP proxy"))
        elif not status[1].startswith(b"2"):
            self._fail(_refusal(self._proxy, int(status[1]), self._target))
        else:
            self._establish(rest)

    def _establish(self, rest: bytes) -> None:
        address = cast(IAddress, self._transport.getPeer())
        self._near_end = cast(IProtocol, self._factory.buildProtocol(address))
        self._near_end.makeConnection(self._transport)
        self.established.callback(self._near_end)
        if rest:
            self._near_end.dataReceived(rest)

    def _fail(self, why: ProxyFailed) -> None:
        self.established.errback(why)
        self._transport.abortConnection()

    def _cancel(self, established: Deferred[IProtocol]) -> None:
        established.errback(CancelledError())
        self._transport.abortConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self._near_end is not None:
            self._near_end.connectionLost(reason)
        elif not self.established.called:
            self.established.errback(ProxyFailed(self._proxy, explain(reason.value)))
