"""Distinguishes public addresses of other machines from private, reserved and local addresses."""

import errno
import socket
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Network

from sandbox.gateway.tcp_connections import Address, unmap_ipv4

_NOT_GLOBAL_V4 = [
    IPv4Network(block)
    for block in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared (CGNAT), metadata of Alibaba Cloud
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # metadata of Azure, within a public block
        "169.254.0.0/16",  # link-local, metadata of most clouds
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments, metadata of Oracle Cloud
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarking, and the synthetic addresses of a sandbox
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
]

_GLOBAL_V6 = IPv6Network("2000::/3")
_NOT_GLOBAL_V6 = [
    IPv6Network(block)
    for block in (
        "2001::/23",  # protocol assignments: Teredo, benchmarks, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4, which embeds an arbitrary IPv4 address
        "3fff::/20",  # documentation
    )
]

_ISATAP_IDENTIFIERS = (0x00005EFE, 0x02005EFE)
"""First half of the interface identifier of an ISATAP address, which embeds an arbitrary IPv4 address (RFC 5214)."""


def is_global(address: Address) -> bool:
    """Return whether this is a global unicast address of a public host, judged by the address alone."""
    address = unmap_ipv4(address)
    if isinstance(address, IPv4Address):
        return not any(address in block for block in _NOT_GLOBAL_V4)
    is_global_v6 = address.scope_id is None and address in _GLOBAL_V6
    is_isatap = int(address) >> 32 & 0xFFFFFFFF in _ISATAP_IDENTIFIERS
    return is_global_v6 and not is_isatap and not any(address in block for block in _NOT_GLOBAL_V6)


AddressPolicy = Callable[[Address], bool]


def is_dialable(address: Address) -> bool:
    """Return whether this is the public address of another machine. This is the policy outside tests."""
    return is_global(address) and not _is_local_address(address)


def _is_local_address(address: Address) -> bool:
    """Return whether the address belongs to this machine, that is, whether a socket can bind to it. True if unknown."""
    family = socket.AF_INET if isinstance(address, IPv4Address) else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError as error:
        return error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
    return True
