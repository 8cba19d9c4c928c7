"""Addresses that clients must not reach by choosing names, in all notations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ociregistry.upstream.connect import forbidden, is_private

# Kind of each address, including the edges of its network.
IPV4 = [
    ("127.0.0.0", "loopback"),
    ("127.0.0.1", "loopback"),
    ("127.255.255.255", "loopback"),
    ("169.254.0.0", "link-local"),
    ("169.254.170.2", "link-local"),
    ("169.254.255.255", "link-local"),
    ("0.0.0.0", "unspecified"),
    ("0.0.0.1", "unspecified"),
    ("0.255.255.255", "unspecified"),
    ("224.0.0.0", "multicast"),
    ("239.255.255.255", "multicast"),
    ("255.255.255.255", "multicast"),
    ("169.254.169.254", "cloud metadata"),
    ("100.100.100.200", "cloud metadata"),
    ("168.63.129.16", "cloud metadata"),
    ("192.0.0.192", "cloud metadata"),
]
IPV6 = [
    ("::1", "loopback"),
    ("fe80::", "link-local"),
    ("febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "link-local"),
    ("::", "unspecified"),
    ("ff00::", "multicast"),
    ("ff02::1", "multicast"),
    ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "multicast"),
    ("fd00:ec2::254", "cloud metadata"),
    ("fd20:ce::254", "cloud metadata"),
    ("fd00:42::42", "cloud metadata"),
]
FINE = [
    *("10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "1.1.1.1", "8.8.8.8", "240.0.0.1"),
    *("126.255.255.255", "128.0.0.0", "1.0.0.0", "169.253.255.255", "169.255.0.0", "223.255.255.255"),
    *("100.100.100.199", "168.63.129.17", "192.0.0.193", "255.255.255.254"),
]
FINE_IPV6 = ["fd00::1", "fd12:3456::1", "2606:4700:4700::1111", "fec0::1", "fe7f::1", "fd00:ec2::253"]


def last_32_bits(prefix: str) -> Callable[[IPv4Address], IPv6Address]:
    """Write an IPv4 address at the end of an IPv6 address."""
    return lambda address: IPv6Address(int(IPv6Address(prefix)) | int(address))


WRITTEN: dict[str, Callable[[IPv4Address], IPv6Address]] = {
    "mapped": last_32_bits("::ffff:0:0"),
    "compatible": last_32_bits("::"),
    "translated": last_32_bits("::ffff:0:0:0"),
    "NAT64": last_32_bits("64:ff9b::"),
    "local NAT64": last_32_bits("64:ff9b:1::"),
    "local NAT64 of a site": last_32_bits("64:ff9b:1:fffe:1::"),
    "6to4": lambda address: IPv6Address((0x2002 << 112) | int(address) << 80),
    "6to4 of a host": lambda address: IPv6Address((0x2002 << 112) | int(address) << 80 | 0x1234),
}


def ways(address: str) -> Iterator[str]:
    """Return the IPv6 addresses that embed an IPv4 address."""
    for write in WRITTEN.values():
        yield str(write(IPv4Address(address)))


@pytest.mark.parametrize(("address", "kind"), [*IPV4, *IPV6])
def test_kind_of_forbidden_address(address: str, kind: str) -> None:
    assert forbidden(address) == kind


@pytest.mark.parametrize("write", WRITTEN.values(), ids=WRITTEN.keys())
@pytest.mark.parametrize(("address", "kind"), IPV4)
def test_forbidden_in_every_ipv6_notation(
    address: str, kind: str, write: Callable[[IPv4Address], IPv6Address]
) -> None:
    written = str(write(IPv4Address(address)))
    # ::1 is loopback, although 0.0.0.1 is not.
    assert forbidden(written) == ("loopback" if written == "::1" else kind)


@pytest.mark.parametrize("address", ["fe80::1%eth0", "::1%1", "::ffff:127.0.0.1%lo", "fd00:ec2::254%1", "ff02::1%2"])
def test_scope_id_is_ignored(address: str) -> None:
    assert forbidden(address) == forbidden(address.partition("%")[0]) is not None


@pytest.mark.parametrize("address", [*FINE, *FINE_IPV6, "fd00::1%eth0"])
def test_other_addresses_are_allowed(address: str) -> None:
    assert forbidden(address) is None


@pytest.mark.parametrize("address", FINE)
def test_allowed_in_every_ipv6_notation(address: str) -> None:
    assert [forbidden(written) for written in ways(address)] == [None] * len(WRITTEN)


@given(st.ip_addresses(v=4))
def test_ipv4_mapped_address_has_the_same_kind(address: IPv4Address) -> None:
    assert forbidden(str(WRITTEN["mapped"](address))) == forbidden(str(address))


@given(st.ip_addresses(v=4, network="169.254.0.0/16") | st.ip_addresses(v=4, network="126.0.0.0/7"))
def test_network_edges_in_every_ipv6_notation(address: IPv4Address) -> None:
    assert {forbidden(written) is None for written in ways(str(address))} == {forbidden(str(address)) is None}


@pytest.mark.parametrize(
    ("address", "private"),
    [
        ("10.1.2.3", True),
        ("172.31.255.255", True),
        ("192.168.0.1", True),
        ("127.0.0.1", True),
        ("169.254.1.1", True),
        ("fd00::1", True),
        ("fe80::1%eth0", True),
        ("::1", True),
        ("::ffff:10.0.0.1", True),
        ("8.8.8.8", False),
        ("172.32.0.1", False),
        ("100.64.0.1", False),
        ("2606:4700:4700::1111", False),
        ("::ffff:8.8.8.8", False),
        ("::8.8.8.8", False),
        ("64:ff9b::8.8.8.8", False),
    ],
)
def test_private_networks(address: str, private: bool) -> None:
    assert is_private(address) is private
