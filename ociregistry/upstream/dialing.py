"""Connections to the hosts that an upstream's requests lead to: each address is looked at before it is dialled."""

from __future__ import annotations

import socket
from collections.abc import Callable
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
    IReactorPluggableNameResolver,
    IResolutionReceiver,
    IStreamClientEndpoint,
)
from twisted.web.client import URI
from twisted.web.iweb import IAgentEndpointFactory, IPolicyForHTTPS
from zope.interface import implementer

from ociregistry.errors import Denied
from ociregistry.upstream.addresses import forbidden
from ociregistry.upstream.bandwidth import SMALLEST_BUFFER, Bandwidth
from ociregistry.upstream.resolver import Resolver

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
