"""What a sandbox may reach beside the model."""

from __future__ import annotations

import msgspec

from sandbox.model.manifest import Vm

DEFAULT_PORTS = (443, 80)


class EgressRule(msgspec.Struct, frozen=True):
    """One allowed host. `name` is lower case; beginning with `*.` it stands for every subdomain, not the domain."""

    name: str
    ports: tuple[int, ...] = DEFAULT_PORTS

    def allows(self, host: str, port: int) -> bool:
        """Whether `host` (any case, a final dot is fine) may be reached at `port`."""
        wanted = host.rstrip(".").lower()
        if port not in self.ports:
            return False
        if self.name.startswith("*."):
            return wanted.endswith(self.name[1:]) and len(wanted) > len(self.name) - 1
        return wanted == self.name


class EgressRules(msgspec.Struct, frozen=True):
    """All of a task's. Without rules nothing is allowed."""

    rules: tuple[EgressRule, ...] = ()

    def allows(self, host: str, port: int) -> bool:
        """Whether any rule allows it."""
        return any(rule.allows(host, port) for rule in self.rules)

    def knows(self, host: str) -> bool:
        """Whether any rule allows the host at any port: only then does its name resolve."""
        return any(rule.allows(host, port) for rule in self.rules for port in rule.ports)

    @property
    def ports(self) -> frozenset[int]:
        """Every port that some rule allows."""
        return frozenset(port for rule in self.rules for port in rule.ports)


def egress_rules(vm: Vm) -> EgressRules:
    """The rules that a manifest asks for; none unless `network_mode` is `outbound`."""
    if vm.network_mode != "outbound":
        return EgressRules()
    return EgressRules(tuple(_rule(entry) for entry in vm.allowed_hosts))


def _rule(entry: str) -> EgressRule:
    name, _, port = entry.lower().partition(":")
    return EgressRule(name, (int(port),) if port else DEFAULT_PORTS)
