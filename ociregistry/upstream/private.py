"""Whether a host is on a private network: the only hosts that are asked over plain http unbidden."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IAddress, IHostnameResolver, IHostResolution, IResolutionReceiver
from zope.interface import implementer

from ociregistry.names import Upstream


def plain_allowed(resolver: IHostnameResolver) -> Callable[[Upstream], Deferred[bool]]:
    """What says whether an upstream may be asked over http: one with a port, or with private addresses alone."""

    def allowed(upstream: Upstream) -> Deferred[bool]:
        if upstream.port is not None:
            return succeed(True)
        receiver = _Addresses()
        resolver.resolveHostName(receiver, upstream.host.strip("[]"))
        return receiver.complete.addCallback(_all_private)

    return allowed


def _all_private(addresses: list[str]) -> bool:
    return bool(addresses) and all(ipaddress.ip_address(address).is_private for address in addresses)


@implementer(IResolutionReceiver)
class _Addresses:
    def __init__(self) -> None:
        self._found: list[str] = []
        self.complete: Deferred[list[str]] = Deferred()

    def resolutionBegan(self, resolutionInProgress: IHostResolution) -> None:
        """Nothing is known yet."""

    def addressResolved(self, address: IAddress) -> None:
        if isinstance(address, IPv4Address | IPv6Address):
            self._found.append(address.host.partition("%")[0])

    def resolutionComplete(self) -> None:
        self.complete.callback(self._found)
