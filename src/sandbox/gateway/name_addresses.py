"""Addresses inside that stand for names outside: each allowed name gets one, and keeps it."""

from collections.abc import Callable
from ipaddress import IPv4Address

from sandbox.gateway.limits import NAMES_MAX

_FIRST = int(IPv4Address("198.18.0.0"))
_HOSTS = 254
"""Addresses of a block of 256 that are used: neither .0 nor .255, which some programs take for a network's own."""


class NameAddresses:
    """Hands out 198.18.0.2, 198.18.0.3, … to names for which `is_known` says yes; 198.18.0.1 is the resolver's."""

    def __init__(self, is_known: Callable[[str], bool]) -> None:
        self._is_known = is_known
        self._addresses: dict[str, IPv4Address] = {}
        self._names: dict[IPv4Address, str] = {}

    def address_of(self, name: str) -> IPv4Address | None:
        """The address that stands for a name (any case); None for one that is not known, and over the bound."""
        spelt, name = name, name.lower()
        if name not in self._addresses:
            if not self._is_known(name) or len(self._addresses) >= NAMES_MAX:
                return None
            block, host = divmod(len(self._addresses) + 1, _HOSTS)
            address = IPv4Address(_FIRST + block * 256 + host + 1)
            self._addresses[name], self._names[address] = address, spelt
        return self._addresses[name]

    def name_of(self, address: str) -> str | None:
        """The name that an address was handed out to, spelt as it was asked for, so that secrets in it are known."""
        return self._names.get(IPv4Address(address))
