"""Egress policy: which hosts and addresses a sandbox may reach. Only the check of local addresses uses a socket."""

import errno
import re
import socket
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address

from sandbox.gateway.event_reporter import printable_host
from sandbox.gateway.tcp_connections import Address, unmap_ipv4
from sandbox.model.egress import EgressRules, ends_in_number

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


HTTP_PORT, HTTPS_PORT = 80, 443
ISOLATED_DENY_REASON = "vm.network_mode is isolated: only the model is reachable."
NO_HOSTS_DENY_REASON = "vm.allowed_hosts is empty: only the model is reachable."
NOT_PUBLIC_DENY_REASON = "it is not a public host name."
_HOST = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")


class EgressPolicy:
    """The task's egress rules. The rules never allow the model's host, which only the model listener reaches.

    allows_ip_addresses: with unrestricted egress, also allow a public IP address in place of a name.
    """

    def __init__(self, rules: EgressRules, model_host: str, *, allows_ip_addresses: bool = False) -> None:
        self._rules = rules
        self._model_host = normalize_host(model_host)
        self._allows_ip_addresses = allows_ip_addresses and rules.is_unrestricted

    @property
    def allows_encrypted_hello(self) -> bool:
        """Whether a TLS ClientHello may contain a second, encrypted server name (ECH)."""
        return self._rules.is_unrestricted

    def allows_host(self, host: str) -> bool:
        """Return whether the host is allowed on at least one port. If so, its name resolves inside the sandbox."""
        return is_host_name(host) and normalize_host(host) != self._model_host and self._rules.allows_host(host)

    def name_deny_reason(self, host: str) -> str:
        """Return why a name was not resolved. Call this only for an unresolved name."""
        if self.allows_host(host):
            return "too many names were resolved."
        return self.deny_reason(host, HTTPS_PORT) or "it cannot be resolved."

    def deny_reason(self, host: str, port: int) -> str | None:
        """Return why the host and port are denied, or None if they are allowed."""
        if self._rules.is_isolated:
            return NO_HOSTS_DENY_REASON if self._rules.has_outbound_mode else ISOLATED_DENY_REASON
        if normalize_host(host) == self._model_host:
            return "the model is reachable only at the gateway's address."
        if not 1 <= port <= 65535:
            return "the port is invalid."
        if ends_in_number(host) or ":" in host:
            return self._address_deny_reason(host)
        if not self.allows_host(host):
            return NOT_PUBLIC_DENY_REASON if self._rules.is_unrestricted else "vm.allowed_hosts does not list it."
        return None if self._rules.allows(host, port) else "vm.allowed_hosts does not list it at this port."

    def _address_deny_reason(self, host: str) -> str | None:
        if not self._allows_ip_addresses:
            requirement = "through the proxy" if self._rules.is_unrestricted else "with network_mode full"
            return f"hosts are reachable by name; IP addresses are reachable only {requirement}."
        return None if is_address(host) else "an address must be four decimal numbers, or IPv6."


def normalize_host(host: str) -> str:
    """Normalize a host for comparison: lower case, no trailing dot."""
    return host.removesuffix(".").lower()


def denial_message(host: str, port: int, reason: str) -> str:
    """Format a denial for the client."""
    return f"Sandbox refused {printable_host(host)}:{port}: {reason}"


def is_host_name(host: str) -> bool:
    """Return whether the name is well-formed ASCII that no resolver interprets as an IP address."""
    return len(host) <= 254 and _HOST.fullmatch(normalize_host(host)) is not None and not ends_in_number(host)


def is_address(host: str) -> bool:
    """Return whether this is an IP address in canonical form, without a zone."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return "%" not in host
