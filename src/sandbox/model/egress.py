"""What a sandbox may reach beside the model."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

import msgspec

from sandbox.model.manifest.schema import Vm

DEFAULT_PORTS = (443, 80)
TRANSPARENT_PORTS_MAX = 64
"""Ports at which programs without proxy support reach hosts; the rest of the ports is reached by the proxy only."""

_SSH_PORT = 22
_GATEWAY_PORTS = frozenset({53, 3128, 8123})
"""What the gateway itself listens on for something else: names, its proxy, the model."""

_NON_PUBLIC_DOMAINS = ("alt", "home.arpa", "internal", "invalid", "local", "localhost", "onion", "test")
"""Domains that are nobody's on the public internet (RFC 6761, 6762, 7686, 8375, 9476; ICANN for `internal`)."""


class EgressRule(msgspec.Struct, frozen=True):
    """One allowed host. `name` is lower case; beginning with `*.` it stands for every subdomain, not the domain."""

    name: str
    ports: tuple[int, ...] = DEFAULT_PORTS

    def allows(self, host: str, port: int) -> bool:
        """Whether `host` (any case, a final dot is fine) may be reached at `port`."""
        return port in self.ports and self.matches_host(host)

    def matches_host(self, host: str) -> bool:
        """Whether it is about this host, at whatever port."""
        normalized = host.removesuffix(".").lower()
        if self.name.startswith("*."):
            return normalized.endswith(self.name[1:]) and len(normalized) > len(self.name) - 1
        return normalized == self.name


class EgressRules(msgspec.Struct, frozen=True, omit_defaults=True):
    """All of a task's. Without rules nothing is allowed; `is_full`: every public name is, at every port.

    is_outbound: rules were asked for, even if there are none.
    """

    rules: tuple[EgressRule, ...] = ()
    is_unrestricted: bool = False
    is_outbound: bool = False

    @property
    def is_isolated(self) -> bool:
        """Whether the model alone is reached."""
        return not (self.rules or self.is_unrestricted)

    def allows(self, host: str, port: int) -> bool:
        """Whether any rule allows it."""
        if self.is_unrestricted:
            return is_public_name(host)
        return any(rule.allows(host, port) for rule in self.rules)

    def allows_host(self, host: str) -> bool:
        """Whether any rule allows the host at any port: only then does its name resolve."""
        if self.is_unrestricted:
            return is_public_name(host)
        return any(rule.matches_host(host) for rule in self.rules)


def egress_rules(vm: Vm) -> EgressRules:
    """The rules that a manifest asks for; none with `network_mode: isolated`."""
    if vm.network_mode == "full":
        return EgressRules(is_unrestricted=True)
    if vm.network_mode != "outbound":
        return EgressRules()
    return EgressRules(tuple(_parse_rule(entry) for entry in vm.allowed_hosts), is_outbound=True)


def transparent_ports(rules: EgressRules) -> tuple[int, ...]:
    """At which ports the gateway listens for programs that know no proxy: 80, 443 and what the rules name."""
    requested = {_SSH_PORT} if rules.is_unrestricted else {port for rule in rules.rules for port in rule.ports}
    further = sorted(requested - _GATEWAY_PORTS - set(DEFAULT_PORTS))
    return (*DEFAULT_PORTS, *further)[:TRANSPARENT_PORTS_MAX]


def is_public_name(host: str) -> bool:
    """Whether a name can be one of the public internet: not of one label, no number at its end, in no local domain."""
    name = host.removesuffix(".").lower()
    is_local = any(name == domain or name.endswith(f".{domain}") for domain in _NON_PUBLIC_DOMAINS)
    return "." in name and not is_local and not ends_in_number(name)


def ends_in_number(host: str) -> bool:
    """Whether resolvers may take this for an IP address, in whatever spelling (`127.1`, `0x7f000001`)."""
    last = host.removesuffix(".").rpartition(".")[2]
    return re.fullmatch(r"[0-9]+|0[xX][0-9A-Fa-f]*", last) is not None


def _parse_rule(entry: str) -> EgressRule:
    name, _, port = entry.lower().partition(":")
    return EgressRule(name, (int(port),) if port else DEFAULT_PORTS)


CLONE_HOST_PATTERN = r"((\*\.)?[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?"
"""How an allowed host is written: a name, an address, or `*.` and a domain (its subdomains), with an optional port."""

_PORTS = {"https": 443, "http": 80, "ssh": 22}
_URL = re.compile(r"(?P<scheme>[a-z]+)://(?:[^/@]*@)?(?P<host>\[[^\]/]*\]|[^/:]+)(?::(?P<port>[0-9]+))?/.*", re.DOTALL)
_SCP_URL = re.compile(r"[^/@:]+@(?P<host>[^/:]+):.*", re.DOTALL)


class CloneEndpoint(NamedTuple):
    """Where git would connect to. is_default_port: the port is the scheme's own."""

    host: str
    port: int
    is_default_port: bool


def clone_endpoint(url: str) -> CloneEndpoint | None:
    """The place that a repository's URL names; None for what is no such URL."""
    if (match := _URL.fullmatch(url)) and match["scheme"] in _PORTS:
        default = _PORTS[match["scheme"]]
        port = int(match["port"] or default)
        return CloneEndpoint(_normalize_host(match["host"]), port, port == default)
    if match := _SCP_URL.fullmatch(url):
        return CloneEndpoint(_normalize_host(match["host"]), _PORTS["ssh"], is_default_port=True)
    return None


def is_clone_allowed(url: str, allowed: Collection[str]) -> bool:
    """Whether an entry allows the place. An entry without a port stands for the scheme's own port only."""
    endpoint = clone_endpoint(url)
    return endpoint is not None and any(_entry_allows(entry, endpoint) for entry in allowed)


def _entry_allows(entry: str, endpoint: CloneEndpoint) -> bool:
    match = re.fullmatch(r"(?P<host>.*?)(?::(?P<port>[0-9]+))?", entry) if not entry.endswith("]") else None
    host, port = (match["host"], match["port"]) if match else (entry, None)
    if not (endpoint.is_default_port if port is None else int(port) == endpoint.port):
        return False
    host = _normalize_host(host)
    if host.startswith("*."):
        return endpoint.host.endswith(host[1:]) and len(endpoint.host) >= len(host)
    return endpoint.host == host


def _normalize_host(host: str) -> str:
    return host.lower().rstrip(".")
