"""Egress rules: the hosts that a sandbox may reach in addition to the model."""

from __future__ import annotations

import re

import msgspec

from sandbox.model.manifest.schema import Vm

DEFAULT_PORTS = (443, 80)
TRANSPARENT_PORTS_MAX = 64
"""Maximum number of ports on which programs without proxy support can reach hosts; other ports require the proxy."""

_SSH_PORT = 22
_GATEWAY_PORTS = frozenset({53, 3128, 8123})
"""Ports that the gateway itself uses: DNS, its HTTP proxy and the model API."""

_NON_PUBLIC_DOMAINS = ("alt", "home.arpa", "internal", "invalid", "local", "localhost", "onion", "test")
"""Top-level and special-use domains that are not public (RFC 6761, 6762, 7686, 8375, 9476; ICANN for `internal`)."""


class EgressRule(msgspec.Struct, frozen=True):
    """One allowed host. `name` is in lower case. `*.` before a domain matches every subdomain but not the domain."""

    name: str
    ports: tuple[int, ...] = DEFAULT_PORTS

    def allows(self, host: str, port: int) -> bool:
        """Return whether `host` (any case, with or without a final dot) may be reached on `port`."""
        return port in self.ports and self.matches_host(host)

    def matches_host(self, host: str) -> bool:
        """Return whether the rule allows this host, regardless of the port."""
        normalized = host.removesuffix(".").lower()
        if self.name.startswith("*."):
            return normalized.endswith(self.name[1:]) and len(normalized) > len(self.name) - 1
        return normalized == self.name


class EgressRules(msgspec.Struct, frozen=True, omit_defaults=True):
    """All egress rules of a task. Without rules, only the model can be reached.

    is_unrestricted: every public name is allowed, on every port.
    has_outbound_mode: the manifest has `network_mode: outbound`, even if it lists no hosts.
    """

    rules: tuple[EgressRule, ...] = ()
    is_unrestricted: bool = False
    has_outbound_mode: bool = False

    @property
    def is_isolated(self) -> bool:
        """Whether only the model can be reached."""
        return not (self.rules or self.is_unrestricted)

    def allows(self, host: str, port: int) -> bool:
        """Return whether any rule allows this host and port."""
        if self.is_unrestricted:
            return is_public_name(host)
        return any(rule.allows(host, port) for rule in self.rules)

    def allows_host(self, host: str) -> bool:
        """Return whether any rule allows the host, regardless of the port. Only allowed hosts resolve."""
        if self.is_unrestricted:
            return is_public_name(host)
        return any(rule.matches_host(host) for rule in self.rules)


def egress_rules(vm: Vm) -> EgressRules:
    """Return the rules of a manifest: none with `network_mode: isolated`."""
    if vm.network_mode == "full":
        return EgressRules(is_unrestricted=True)
    if vm.network_mode != "outbound":
        return EgressRules()
    return EgressRules(tuple(_parse_rule(entry) for entry in vm.allowed_hosts), has_outbound_mode=True)


def transparent_ports(rules: EgressRules) -> tuple[int, ...]:
    """Return the ports on which programs without proxy support reach the gateway, at most TRANSPARENT_PORTS_MAX.

    These are 80, 443, and those in the rules (22 if egress is unrestricted), except the gateway's own ports.
    """
    requested = {_SSH_PORT} if rules.is_unrestricted else {port for rule in rules.rules for port in rule.ports}
    further = sorted(requested - _GATEWAY_PORTS - set(DEFAULT_PORTS))
    return (*DEFAULT_PORTS, *further)[:TRANSPARENT_PORTS_MAX]


def is_public_name(host: str) -> bool:
    """Return whether a host name can be public.

    A public name has at least two labels, the last one is not a number, and the name is not in a special-use domain.
    """
    name = host.removesuffix(".").lower()
    is_local = any(name == domain or name.endswith(f".{domain}") for domain in _NON_PUBLIC_DOMAINS)
    return "." in name and not is_local and not ends_in_number(name)


def ends_in_number(host: str) -> bool:
    """Return whether a resolver may parse this as an IP address, in any notation (`127.1`, `0x7f000001`)."""
    last = host.removesuffix(".").rpartition(".")[2]
    return re.fullmatch(r"[0-9]+|0[xX][0-9A-Fa-f]*", last) is not None


def _parse_rule(entry: str) -> EgressRule:
    name, _, port = entry.lower().partition(":")
    return EgressRule(name, (int(port),) if port else DEFAULT_PORTS)
