"""Which addresses are the public internet's: the IANA special-purpose registries as a table of our own.

`ipaddress.is_global` says yes to multicast, site-local, NAT64 and, before 3.12, 6to4 addresses of private hosts.
"""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address

_NOT_GLOBAL_V4 = [
    IPv4Network(block)
    for block in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared behind carriers, metadata of Alibaba's cloud
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # metadata of Azure, in the midst of public addresses
        "169.254.0.0/16",  # link-local, metadata of most clouds
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments, metadata of Oracle's cloud
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks, and the names inside a sandbox
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
        "2002::/16",  # 6to4, which has an IPv4 address of anybody's in it
        "3fff::/20",  # documentation
    )
]


def unwrapped(address: Address) -> Address:
    """The IPv4 address that an IPv4-mapped IPv6 address stands for; every other address itself."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def is_global(address: Address) -> bool:
    """Whether this is one address of one public host, as far as its number tells."""
    address = unwrapped(address)
    if isinstance(address, IPv4Address):
        return not any(address in block for block in _NOT_GLOBAL_V4)
    is_plain = address.scope_id is None and address in _GLOBAL_V6
    return is_plain and not any(address in block for block in _NOT_GLOBAL_V6)
