"""Connects to upstreams: resolves names in threads of its own, and checks each address before connecting to it.

Addresses that a client must not reach through the daemon (loopback, link-local, metadata services) are refused unless
the operator named the host.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterator
from typing import Any, cast

from twisted.internet import defer
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.error import DNSLookupError
from twisted.internet.interfaces import (
    IAddress,
    IHostnameResolver,
    IHostResolution,
    IProtocol,
    IProtocolFactory,
    IReactorFromThreads,
    IReactorPluggableNameResolver,
    IResolutionReceiver,
    IStreamClientEndpoint,
    ITransport,
)
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.threads import deferToThreadPool
from twisted.python.failure import Failure
from twisted.web.client import URI
from twisted.web.iweb import IAgentEndpointFactory, IPolicyForHTTPS
from zope.interface import implementer

from ociregistry.concurrency import DaemonThreadPool, SingleFlight
from ociregistry.config.proxy import Proxy
from ociregistry.errors import Denied, is_out_of_descriptors
from ociregistry.process import lowest_free_descriptor
from ociregistry.upstream.bandwidth import SMALLEST_BUFFER, Bandwidth
from ociregistry.upstream.breaker import CircuitBreaker, CircuitBreakers
from ociregistry.upstream.origin import Origin

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_CLOUD_METADATA = frozenset(
    map(
        ipaddress.ip_address,
        (
            "169.254.169.254",  # most clouds
            "100.100.100.200",  # Alibaba
            "168.63.129.16",  # Azure
            "192.0.0.192",  # Oracle, older
            "fd00:ec2::254",  # AWS
            "fd20:ce::254",  # Google
            "fd00:42::42",  # Scaleway
            "fd00:c1::a9fe:a9fe",  # Oracle
        ),
    )
)
# Networks in which translators and tunnels embed an IPv4 address in the last 32 bits: RFC 4291, 2765, 6052, 8215.
_LAST_32_BITS = tuple(
    ipaddress.IPv6Network(net)
    for net in ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48")
)
_BEHIND_48_BITS = ipaddress.IPv6Network("64:ff9b:1::/48")
_THIS_NETWORK = ipaddress.ip_network("0.0.0.0/8")
_FORBIDDEN_KINDS: tuple[tuple[str, Callable[[_Address], bool]], ...] = (
    ("cloud metadata", _CLOUD_METADATA.__contains__),
    ("loopback", lambda address: address.is_loopback),
    ("link-local", lambda address: address.is_link_local),
    ("unspecified", lambda address: address.is_unspecified or address in _THIS_NETWORK),
    ("multicast", lambda address: address.is_multicast or address == ipaddress.IPv4Address("255.255.255.255")),
)


def forbidden(host: str) -> str | None:
    """Return the kind of the IP address `host` if only hosts that the operator named may have it, else None."""
    for address in _with_embedded_ipv4(ipaddress.ip_address(host.partition("%")[0])):
        for kind, holds in _FORBIDDEN_KINDS:
            if holds(address):
                return kind
    return None


def address_in(host: str) -> str | None:
    """Return the IP address that a host name stands for in every resolver, or None.

    Resolvers take IPv4 addresses in several notations (`127.1`, `0x7f000001`), and `localhost` for this machine
    (RFC 6761, section 6.3).
    """
    name = host.rstrip(".")
    if f".{name}".endswith(".localhost"):
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_address(name)) if ":" in name else socket.inet_ntoa(socket.inet_aton(name))
    except (OSError, ValueError):
        return None


def is_private(host: str) -> bool:
    """Return whether the IP address `host` is private, that is, not routed on the Internet."""
    return ipaddress.ip_address(host.partition("%")[0]).is_private


def _with_embedded_ipv4(address: _Address) -> Iterator[_Address]:
    """Yield the address, and each IPv4 address that it may embed."""
    yield address
    if isinstance(address, ipaddress.IPv6Address):
        if any(address in network for network in _LAST_32_BITS):
            yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if address in _BEHIND_48_BITS:
            # The IPv4 address is around bits 64 to 71, which are reserved (RFC 6052, section 2.2). Where all of its
            # bits are zero, the address is in the last 32 bits, which were yielded above.
            early = (int(address) >> 64 & 0xFFFF) << 16 | int(address) >> 40 & 0xFFFF
            if early:
                yield ipaddress.IPv4Address(early)
        if address.sixtofour is not None:
            yield address.sixtofour
        if address.teredo is not None:
            yield from address.teredo


_THREADS = 64
"""Look-ups that can hang at the same time before they delay others."""

GetAddrInfo = Callable[..., list[Any]]


class Resolver:
    """Resolves host names with the operating system; concurrent requests for one name share a look-up."""

    def __init__(self, reactor: IReactorFromThreads, getaddrinfo: GetAddrInfo = socket.getaddrinfo) -> None:
        self._reactor = reactor
        self._getaddrinfo = getaddrinfo
        self._threads = DaemonThreadPool(_THREADS, "resolver")
        self._single_flight: SingleFlight[str, tuple[str, ...] | OSError] = SingleFlight()

    def start(self) -> None:
        """Start the threads; call it after the process has daemonized, because threads do not survive a fork."""
        self._threads.start()

    def stop(self) -> None:
        """Stop the threads without waiting for look-ups that hang; their threads end with them."""
        self._threads.end()

    def addresses(self, host: str) -> Deferred[tuple[str, ...]]:
        """Resolve `host`; the Deferred fires with its IP addresses, at least one, best first.

        Raises:
            DNSLookupError: it cannot be resolved; the Deferred fails with it.
            OSError: the same, as no file descriptor is left.
        """
        return self._single_flight.join(host, lambda: self._look_up(host)).addCallback(_result_or_error)

    async def _look_up(self, host: str) -> tuple[str, ...] | OSError:
        # An error is returned as a value: raised when all callers have cancelled, it would be logged as unhandled.
        try:
            found = await deferToThreadPool(self._reactor, self._threads, self._ask, host)
        except UnicodeError as error:
            return DNSLookupError(str(error))
        except OSError as error:
            return error if is_out_of_descriptors(error) else DNSLookupError(str(error))
        addresses = tuple(dict.fromkeys(str(entry[4][0]) for entry in found))
        return addresses or DNSLookupError("it has no address")

    def _ask(self, host: str) -> list[Any]:
        try:
            return self._getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except OSError:
            # Without a descriptor the C library may say that there is no such name.
            lowest_free_descriptor()
            raise


def _result_or_error(result: tuple[str, ...] | OSError) -> tuple[str, ...]:
    if isinstance(result, OSError):
        raise result
    return result


_TIMEOUT = 30.0
"""Seconds for a name to be resolved, and again for a connection to be made; clients wait for less."""
_PROXY_TIMEOUT = 10.0
"""The same for a proxy: only this tells that it is down, for it is silent as well while it waits for a host."""

IsConfigured = Callable[[str, int], bool]
"""Returns whether the operator named a host (an IPv6 address without brackets) and port."""


@implementer(IAgentEndpointFactory)
class Dialer:
    """Makes the connections of one upstream's Agent."""

    def __init__(
        self,
        upstream: str,
        resolver: Resolver,
        is_configured: IsConfigured,
        policy: IPolicyForHTTPS,
        bandwidth: Bandwidth,
        reactor: Any,
        breakers: CircuitBreakers,
    ) -> None:
        """Set up the dialer; hosts for which `is_configured` returns True may have any address.

        The circuit breakers are told of each connection made, and whenever bytes come from a host.
        """
        self._breakers = breakers
        self._upstream = upstream
        self._resolver = resolver
        self._is_configured = is_configured
        self._policy = policy
        self._bandwidth = bandwidth
        self._reactor = reactor

    def endpointForURI(self, uri: URI) -> IStreamClientEndpoint:
        """Return the endpoint for a request for `uri`."""
        host, port = uri.host.decode("ascii"), uri.port
        breaker = self._breakers.get(Origin.of(uri.toBytes().decode("ascii")))
        endpoint = _CheckedEndpoint(host, port, self._is_configured(host, port), _TIMEOUT, breaker, self)
        return self.over_tls(uri, endpoint) if uri.scheme == b"https" else endpoint

    def proxy_endpoint(self, proxy: Proxy, origin: Origin | None) -> IStreamClientEndpoint:
        """Return the endpoint for TCP connections to `proxy`, for `origin` alone if that is not None."""
        breaker = self._breakers.get(proxy) if origin is None else self._breakers.get(origin, proxy)
        return _CheckedEndpoint(proxy.host, proxy.port, True, _PROXY_TIMEOUT, breaker, self)

    def over_tls(self, uri: URI, endpoint: IStreamClientEndpoint) -> IStreamClientEndpoint:
        """Return the endpoint that speaks TLS with the host of `uri` over the connections of `endpoint`."""
        return wrapClientTLS(self._policy.creatorForNetloc(uri.host, uri.port), endpoint)

    async def dial(
        self,
        host: str,
        port: int,
        configured: bool,
        timeout: float,
        breaker: CircuitBreaker,
        factory: IProtocolFactory,
    ) -> IProtocol:
        """Connect to `host`, which may have any address if it is `configured`.

        `timeout` is the number of seconds for the name, and again for the connection. `breaker` learns of the
        look-up.

        Raises:
            Denied: one of its addresses is one that clients must not reach through the daemon.
            DNSLookupError: the name cannot be resolved, or not in time.
            OSError: no file descriptor is left to resolve it.
            ConnectError: no connection was made.
        """
        with breaker.looking_up():
            try:
                addresses = await self._resolver.addresses(host).addTimeout(timeout, self._reactor)
            except defer.TimeoutError:
                raise DNSLookupError(f"no answer within {timeout:g} s") from None
        if not configured:
            self._check(host, addresses)
        resolved = _FixedResolver(addresses, self._reactor)
        connection: IProtocol = await HostnameEndpoint(resolved, host, port, timeout=timeout).connect(factory)
        if self._bandwidth.rate is not None:
            # Bytes that the kernel received have used the link before the limit applies to them, so its buffer
            # starts small; `Bandwidth` sets it again for each large body.
            transport: Any = connection.transport  # type: ignore[attr-defined]  # every protocol has one
            transport.getHandle().setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALLEST_BUFFER)
        return connection

    def check_unresolved(self, host: str, port: int) -> None:
        """Check a host that a proxy is going to resolve, as far as its name tells its address.

        Raises:
            Denied: it is an address, or a name of this machine, that clients must not reach through the daemon.
        """
        address = address_in(host)
        if address is not None and not self._is_configured(host, port):
            self._check(host, (address,))

    def _check(self, host: str, addresses: tuple[str, ...]) -> None:
        for address in addresses:
            kind = forbidden(address)
            if kind is not None:
                raise Denied(
                    f"{self._upstream}: {host} has the {kind} address {address}, and only what is named in the "
                    "configuration may have such an address"
                )


@implementer(IStreamClientEndpoint)
class _CheckedEndpoint:
    def __init__(
        self, host: str, port: int, configured: bool, timeout: float, breaker: CircuitBreaker, dialer: Dialer
    ) -> None:
        self._host = host
        self._port = port
        self._configured = configured
        self._timeout = timeout
        self._breaker = breaker
        self._dialer = dialer

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """Connect; the Deferred fires with the connection."""
        return Deferred.fromCoroutine(self._connect(protocolFactory))

    async def _connect(self, factory: IProtocolFactory) -> IProtocol:
        listening = _ListeningFactory(factory, self._breaker.heard)
        connection = await self._dialer.dial(
            self._host, self._port, self._configured, self._timeout, self._breaker, listening
        )
        return cast(_Listening, connection).protocol


@implementer(IProtocolFactory)
class _ListeningFactory:
    """Makes the protocols of `factory`, and calls `heard` when they are connected and when they receive bytes."""

    def __init__(self, factory: IProtocolFactory, heard: Callable[[], object]) -> None:
        self._factory = factory
        self._heard = heard

    def doStart(self) -> None:
        self._factory.doStart()

    def doStop(self) -> None:
        self._factory.doStop()

    def buildProtocol(self, addr: IAddress) -> IProtocol | None:
        protocol = self._factory.buildProtocol(addr)
        return _Listening(protocol, self._heard) if protocol is not None else None


class _Listening(Protocol):
    def __init__(self, protocol: IProtocol, heard: Callable[[], object]) -> None:
        self.protocol = protocol
        self._heard = heard

    def connectionMade(self) -> None:
        self._heard()
        self.protocol.makeConnection(cast(ITransport, self.transport))

    def dataReceived(self, data: bytes) -> None:
        self._heard()
        self.protocol.dataReceived(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.protocol.connectionLost(reason)


@implementer(IReactorPluggableNameResolver, IHostnameResolver)
class _FixedResolver:
    """The reactor with a resolver that only knows the checked addresses, so that no others are connected to."""

    def __init__(self, addresses: tuple[str, ...], reactor: Any) -> None:
        self._addresses = addresses
        self._reactor = reactor
        self.nameResolver = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reactor, name)

    def installNameResolver(self, resolver: IHostnameResolver) -> IHostnameResolver:
        """Not supported."""
        raise NotImplementedError

    def resolveHostName(
        self,
        resolutionReceiver: IResolutionReceiver,
        hostName: str,
        portNumber: int = 0,
        addressTypes: Any = None,
        transportSemantics: str = "TCP",
    ) -> IHostResolution:
        """Report the addresses at once."""
        resolution = _HostResolution(hostName)
        resolutionReceiver.resolutionBegan(resolution)
        for address in self._addresses:
            kind = IPv6Address if ":" in address else IPv4Address
            resolutionReceiver.addressResolved(kind("TCP", address, portNumber))
        resolutionReceiver.resolutionComplete()
        return resolution


@implementer(IHostResolution)
class _HostResolution:
    def __init__(self, name: str) -> None:
        self.name = name

    def cancel(self) -> None:
        """Do nothing: the resolution is complete already."""
