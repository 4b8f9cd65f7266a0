"""Egress policy: which hosts a sandbox may reach. No I/O."""

import re
from ipaddress import ip_address

from sandbox.gateway.event_reporter import printable_host
from sandbox.model.egress import EgressRules, ends_in_number

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
    """Return whether this is an IP address in canonical spelling, without a zone."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return "%" not in host
