"""Where a name that a client chose may lead: not to this machine, its neighbours on the link, or its cloud's keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

_Address = IPv4Address | IPv6Address

_CLOUD_METADATA = frozenset(
    map(
        ip_address,
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
    IPv6Network(net) for net in ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48")
)
_BEHIND_48_BITS = IPv6Network("64:ff9b:1::/48")
_THIS_NETWORK = ip_network("0.0.0.0/8")
_KINDS: tuple[tuple[str, Callable[[_Address], bool]], ...] = (
    ("cloud metadata", _CLOUD_METADATA.__contains__),
    ("loopback", lambda address: address.is_loopback),
    ("link-local", lambda address: address.is_link_local),
    ("unspecified", lambda address: address.is_unspecified or address in _THIS_NETWORK),
    ("multicast", lambda address: address.is_multicast or address == IPv4Address("255.255.255.255")),
)


def forbidden(host: str) -> str | None:
    """What kind of address the IP address `host` is, if it is one that only the operator may lead to."""
    for address in _meanings(ip_address(host.partition("%")[0])):
        for kind, holds in _KINDS:
            if holds(address):
                return kind
    return None


def is_private(host: str) -> bool:
    """Whether the IP address `host` is one that is not routed on the Internet."""
    return ip_address(host.partition("%")[0]).is_private


def _meanings(address: _Address) -> Iterator[_Address]:
    """The address, and the IPv4 address that it stands for."""
    yield address
    if isinstance(address, IPv6Address):
        if any(address in network for network in _LAST_32_BITS):
            yield IPv4Address(int(address) & 0xFFFFFFFF)
        if address in _BEHIND_48_BITS:
            # The eight bits in the middle are nobody's. Without any of these bits it is one of the last 32.
            early = (int(address) >> 64 & 0xFFFF) << 16 | int(address) >> 40 & 0xFFFF
            if early:
                yield IPv4Address(early)
        if address.sixtofour is not None:
            yield address.sixtofour
        if address.teredo is not None:
            yield from address.teredo
