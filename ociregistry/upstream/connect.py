"""Connects to upstreams: resolves names in threads of its own, and looks at each address as it is dialled.

Addresses that a client must not reach through the daemon (loopback, link-local, metadata services) are refused unless
the operator named the host.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterator
from typing import Any

from twisted.internet import defer
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import HostnameEndpoint, wrapClientTLS
from twisted.internet.error import DNSLookupError
from twisted.internet.interfaces import (
    IHostnameResolver,
    IHostResolution,
    IProtocol,
    IProtocolFactory,
    IReactorFromThreads,
    IReactorPluggableNameResolver,
    IResolutionReceiver,
    IStreamClientEndpoint,
)
from twisted.internet.threads import deferToThreadPool
from twisted.python.threadpool import ThreadPool
from twisted.web.client import URI
from twisted.web.iweb import IAgentEndpointFactory, IPolicyForHTTPS
from zope.interface import implementer

from ociregistry.concurrency import SingleFlight
from ociregistry.errors import Denied
from ociregistry.upstream.bandwidth import SMALLEST_BUFFER, Bandwidth

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
# Translators and tunnels put the IPv4 address into an IPv6 one: RFC 4291, 2765, 6052, 8215.
_LAST_32_BITS = tuple(
    ipaddress.IPv6Network(net)
    for net in ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48")
)
_BEHIND_48_BITS = ipaddress.IPv6Network("64:ff9b:1::/48")
_THIS_NETWORK = ipaddress.ip_network("0.0.0.0/8")
_KINDS: tuple[tuple[str, Callable[[_Address], bool]], ...] = (
    ("cloud metadata", _CLOUD_METADATA.__contains__),
    ("loopback", lambda address: address.is_loopback),
    ("link-local", lambda address: address.is_link_local),
    ("unspecified", lambda address: address.is_unspecified or address in _THIS_NETWORK),
    ("multicast", lambda address: address.is_multicast or address == ipaddress.IPv4Address("255.255.255.255")),
)


def forbidden(host: str) -> str | None:
    """What kind of address the IP address `host` is, if it is one that only the operator may lead to."""
    for address in _meanings(ipaddress.ip_address(host.partition("%")[0])):
        for kind, holds in _KINDS:
            if holds(address):
                return kind
    return None


def is_private(host: str) -> bool:
    """Whether the IP address `host` is one that is not routed on the Internet."""
    return ipaddress.ip_address(host.partition("%")[0]).is_private


def _meanings(address: _Address) -> Iterator[_Address]:
    """The address, and the IPv4 address that it stands for."""
    yield address
    if isinstance(address, ipaddress.IPv6Address):
        if any(address in network for network in _LAST_32_BITS):
            yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if address in _BEHIND_48_BITS:
            # The eight bits in the middle are nobody's. Without any of these bits it is one of the last 32.
            early = (int(address) >> 64 & 0xFFFF) << 16 | int(address) >> 40 & 0xFFFF
            if early:
                yield ipaddress.IPv4Address(early)
        if address.sixtofour is not None:
            yield address.sixtofour
        if address.teredo is not None:
            yield from address.teredo


_THREADS = 64
"""So many dead names can be waited for at once before they delay a live one."""

GetAddrInfo = Callable[..., list[Any]]


class Resolver:
    """Asks the operating system, once for all who want the same name at the same time."""

    def __init__(self, reactor: IReactorFromThreads, getaddrinfo: GetAddrInfo = socket.getaddrinfo) -> None:
        self._reactor = reactor
        self._getaddrinfo = getaddrinfo
        self._threads = ThreadPool(0, _THREADS, "resolver")
        self._single_flight: SingleFlight[str, tuple[str, ...] | DNSLookupError] = SingleFlight()

    def start(self) -> None:
        """Must be called after the process has daemonized: threads do not survive a fork."""
        self._threads.start()

    def stop(self) -> None:
        """Ends the threads, those in which a look-up hangs when it is done: nobody waits for that."""
        self._threads.adjustPoolsize(0, 0)

    def addresses(self, host: str) -> Deferred[tuple[str, ...]]:
        """Fires with the IP addresses of `host`, at least one, best first; fails with `DNSLookupError`."""
        return self._single_flight.join(host, lambda: self._look_up(host)).addCallback(_found)

    async def _look_up(self, host: str) -> tuple[str, ...] | DNSLookupError:
        # A failure is a value: it may come when nobody waits any more, and is none of the log's then.
        try:
            found = await deferToThreadPool(
                self._reactor, self._threads, self._getaddrinfo, host, None, type=socket.SOCK_STREAM
            )
        except (OSError, UnicodeError) as error:
            return DNSLookupError(str(error))
        addresses = tuple(dict.fromkeys(str(entry[4][0]) for entry in found))
        return addresses or DNSLookupError("it has no address")


def _found(result: tuple[str, ...] | DNSLookupError) -> tuple[str, ...]:
    if isinstance(result, DNSLookupError):
        raise result
    return result


_WITHIN = 10.0
"""Seconds for a name to be resolved, and again for a connection to come about."""

Named = Callable[[str, int], bool]
"""Whether the operator named a host (an IPv6 address without brackets) and port."""


@implementer(IAgentEndpointFactory)
class Dialer:
    """Gives an Agent its connections, those of one upstream."""

    def __init__(
        self,
        upstream: str,
        resolver: Resolver,
        named: Named,
        policy: IPolicyForHTTPS,
        bandwidth: Bandwidth,
        reactor: Any,
    ) -> None:
        """Hosts that are `named` may have any address."""
        self._upstream = upstream
        self._resolver = resolver
        self._named = named
        self._policy = policy
        self._bandwidth = bandwidth
        self._reactor = reactor

    def endpointForURI(self, uri: URI) -> IStreamClientEndpoint:
        """Where a request for `uri` goes."""
        endpoint = _Checked(uri.host.decode("ascii"), uri.port, self)
        if uri.scheme == b"https":
            return wrapClientTLS(self._policy.creatorForNetloc(uri.host, uri.port), endpoint)
        return endpoint

    async def dial(self, host: str, port: int, factory: IProtocolFactory) -> IProtocol:
        """A connection to `host`; raises `Denied` for an address that clients must not lead us to."""
        try:
            addresses = await self._resolver.addresses(host).addTimeout(_WITHIN, self._reactor)
        except defer.TimeoutError:
            raise DNSLookupError(f"no answer within {_WITHIN:g} s") from None
        if not self._named(host, port):
            self._check(host, addresses)
        resolved = _Resolved(addresses, self._reactor)
        connection: IProtocol = await HostnameEndpoint(resolved, host, port, timeout=_WITHIN).connect(factory)
        if self._bandwidth.rate is not None:
            # What the kernel has taken has come over the link already, in whatever order. A body that turns out to
            # be large has it enlarged.
            transport: Any = connection.transport  # type: ignore[attr-defined]  # every protocol has one
            transport.getHandle().setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALLEST_BUFFER)
        return connection

    def _check(self, host: str, addresses: tuple[str, ...]) -> None:
        for address in addresses:
            kind = forbidden(address)
            if kind is not None:
                raise Denied(
                    f"{self._upstream}: {host} has the {kind} address {address}, and only what is named in the "
                    "configuration may have such an address"
                )


@implementer(IStreamClientEndpoint)
class _Checked:
    def __init__(self, host: str, port: int, dialer: Dialer) -> None:
        self._host = host
        self._port = port
        self._dialer = dialer

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """Fires with the connection."""
        return Deferred.fromCoroutine(self._dialer.dial(self._host, self._port, protocolFactory))


@implementer(IReactorPluggableNameResolver, IHostnameResolver)
class _Resolved:
    """The reactor, for a name whose addresses are known: what was looked at is what is dialled."""

    def __init__(self, addresses: tuple[str, ...], reactor: Any) -> None:
        self._addresses = addresses
        self._reactor = reactor
        self.nameResolver = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reactor, name)

    def installNameResolver(self, resolver: IHostnameResolver) -> IHostnameResolver:
        """Nobody does."""
        raise NotImplementedError

    def resolveHostName(
        self,
        resolutionReceiver: IResolutionReceiver,
        hostName: str,
        portNumber: int = 0,
        addressTypes: Any = None,
        transportSemantics: str = "TCP",
    ) -> IHostResolution:
        """Tells them at once."""
        resolution = _Resolution(hostName)
        resolutionReceiver.resolutionBegan(resolution)
        for address in self._addresses:
            kind = IPv6Address if ":" in address else IPv4Address
            resolutionReceiver.addressResolved(kind("TCP", address, portNumber))
        resolutionReceiver.resolutionComplete()
        return resolution


@implementer(IHostResolution)
class _Resolution:
    def __init__(self, name: str) -> None:
        self.name = name

    def cancel(self) -> None:
        """It is over already."""
