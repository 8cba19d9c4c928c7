"""Addresses that a client's choice of names must not lead to, in each way of writing them, and the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ociregistry.upstream.connect import forbidden, is_private

# The kind of each, the edges of its network included.
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
    """How an IPv4 address is written at the end of an IPv6 one."""
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
    """The IPv6 addresses that an IPv4 address may stand in."""
    for write in WRITTEN.values():
        yield str(write(IPv4Address(address)))


@pytest.mark.parametrize(("address", "kind"), [*IPV4, *IPV6])
def test_the_kind_of_an_address_that_is_forbidden(address: str, kind: str) -> None:
    assert forbidden(address) == kind


@pytest.mark.parametrize("write", WRITTEN.values(), ids=WRITTEN.keys())
@pytest.mark.parametrize(("address", "kind"), IPV4)
def test_it_is_forbidden_in_every_way_of_writing_it(
    address: str, kind: str, write: Callable[[IPv4Address], IPv6Address]
) -> None:
    written = str(write(IPv4Address(address)))
    # ::1 is one thing, and 0.0.0.1 another.
    assert forbidden(written) == ("loopback" if written == "::1" else kind)


@pytest.mark.parametrize("address", ["fe80::1%eth0", "::1%1", "::ffff:127.0.0.1%lo", "fd00:ec2::254%1", "ff02::1%2"])
def test_a_scope_makes_no_other_address_of_it(address: str) -> None:
    assert forbidden(address) == forbidden(address.partition("%")[0]) is not None


@pytest.mark.parametrize("address", [*FINE, *FINE_IPV6, "fd00::1%eth0"])
def test_every_other_address_is_fine(address: str) -> None:
    assert forbidden(address) is None


@pytest.mark.parametrize("address", FINE)
def test_and_so_it_is_in_every_way_of_writing_it(address: str) -> None:
    assert [forbidden(written) for written in ways(address)] == [None] * len(WRITTEN)


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_forbidden_if_and_only_if_its_mapped_form_is(address: IPv4Address) -> None:
    assert forbidden(str(WRITTEN["mapped"](address))) == forbidden(str(address))


@given(st.ip_addresses(v=4, network="169.254.0.0/16") | st.ip_addresses(v=4, network="126.0.0.0/7"))
def test_and_so_it_is_near_the_edges_and_in_every_other_form(address: IPv4Address) -> None:
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
def test_which_addresses_are_not_routed_on_the_internet(address: str, private: bool) -> None:
    assert is_private(address) is private
