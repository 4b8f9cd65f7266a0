"""What may be reached beside the model, and how a connection from inside is let through. No I/O."""

import re
from collections.abc import Callable
from ipaddress import ip_address
from typing import Protocol

import msgspec

from sandbox.gateway.event_reporter import printable_host
from sandbox.model.egress import EgressRules, ends_in_number

HTTP_PORT, HTTPS_PORT = 80, 443
ISOLATED = "vm.network_mode is isolated: nothing but the model is reached."
NO_HOSTS = "vm.allowed_hosts is empty: nothing but the model is reached."
NOT_PUBLIC = "it is no name of the public internet."
_HOST = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")


class EgressPolicy:
    """The task's rules, and that the model's host is never reached in another way than through the model's door.

    takes_addresses: where every public host is allowed, so is an address instead of its name.
    """

    def __init__(self, rules: EgressRules, model_host: str, *, allows_ip_addresses: bool = False) -> None:
        self._rules = rules
        self._model_host = normalize_host(model_host)
        self._allows_ip_addresses = allows_ip_addresses and rules.is_unrestricted

    @property
    def allows_encrypted_hello(self) -> bool:
        """Whether a TLS ClientHello may have a second name that is encrypted."""
        return self._rules.is_unrestricted

    def allows_host(self, host: str) -> bool:
        """Whether the host may be reached at any port, so that its name resolves inside."""
        return is_host_name(host) and normalize_host(host) != self._model_host and self._rules.allows_host(host)

    def name_deny_reason(self, host: str) -> str:
        """Why a name is not resolved."""
        if self.allows_host(host):
            return "too many names were resolved."
        return self.deny_reason(host, HTTPS_PORT) or "it cannot be resolved."

    def deny_reason(self, host: str, port: int) -> str | None:
        """Why this may not be reached; None when it may."""
        if self._rules.is_isolated:
            return NO_HOSTS if self._rules.is_outbound else ISOLATED
        if normalize_host(host) == self._model_host:
            return "the model is reached through the gateway's own address only."
        if not 1 <= port <= 65535:
            return "there is no such port."
        if ends_in_number(host) or ":" in host:
            return self._address_deny_reason(host)
        if not self.allows_host(host):
            return NOT_PUBLIC if self._rules.is_unrestricted else "vm.allowed_hosts does not list it."
        return None if self._rules.allows(host, port) else "vm.allowed_hosts does not list it at this port."

    def _address_deny_reason(self, host: str) -> str | None:
        if not self._allows_ip_addresses:
            hint = (
                "with network_mode full, by the proxy" if self._rules.is_unrestricted else "only with network_mode full"
            )
            return f"hosts are reached by their names; addresses {hint}."
        return None if is_address(host) else "an address is written as four decimal numbers, or as IPv6."


class Denial(msgspec.Struct, frozen=True):
    """Not let through. `answer`: bytes for the client before its connection ends."""

    host: str
    port: int
    reason: str
    response: bytes = b""


class StreamFilter(Protocol):
    """Looks at what the client sends to the host, for as long as there is something to look for."""

    @property
    def is_done(self) -> bool:
        """Whether nothing more of the client's goes to the host."""
        ...

    @property
    def is_passthrough(self) -> bool:
        """Whether everything that comes from now on goes to the host unread."""
        ...

    def start(self) -> bytes | Denial:
        """What goes to the host as soon as it is reached."""
        ...

    def client_data_received(self, data: bytes) -> bytes | Denial:
        """What of this goes to the host; no data mean that no more will come."""
        ...

    def host_data_received(self) -> None:
        """Bytes came from the host."""
        ...


class Tunnel(msgspec.Struct, frozen=True):
    """Let through to `host`. `greeting`: for the client once it is reached; `unreached`: its answer if it is not."""

    host: str
    port: int
    stream_filter: StreamFilter
    greeting: bytes = b""
    unreachable_response: Callable[[int, str], bytes] = lambda _status, _sentence: b""


class Handshake(Protocol):
    """The beginning of a connection from inside. Never raises on what comes; says how it ends when no more comes."""

    def client_data_received(self, data: bytes) -> Tunnel | Denial | None:
        """What to do, None: wait for more. No data mean that no more will come."""
        ...


class InspectingFilter:
    """What is inside a tunnel has to open as `opening` demands; `came` is what came of it already."""

    def __init__(self, handshake: Handshake, initial_data: bytes) -> None:
        self._handshake = handshake
        self._initial_data = initial_data
        self._stream_filter: StreamFilter | None = None
        self._has_host_data = False

    @property
    def is_done(self) -> bool:
        """As the one that comes after says."""
        return self._stream_filter is not None and self._stream_filter.is_done

    @property
    def is_passthrough(self) -> bool:
        """As the one that comes after says."""
        return self._stream_filter is not None and self._stream_filter.is_passthrough

    def start(self) -> bytes | Denial:
        """Nothing before it was looked at."""
        return self.client_data_received(self._initial_data) if self._initial_data else b""

    def client_data_received(self, data: bytes) -> bytes | Denial:
        """Nothing until the beginning is whole."""
        if self._stream_filter is not None:
            return self._stream_filter.client_data_received(data)
        outcome = self._handshake.client_data_received(data)
        if outcome is None or isinstance(outcome, Denial):
            return outcome or b""
        self._stream_filter = outcome.stream_filter
        if self._has_host_data:
            self._stream_filter.host_data_received()
        return self._stream_filter.start()

    def host_data_received(self) -> None:
        """Also for the sieve that comes after."""
        self._has_host_data = True
        if self._stream_filter is not None:
            self._stream_filter.host_data_received()


def normalize_host(host: str) -> str:
    """A host as it is compared: lower case, without a final dot."""
    return host.removesuffix(".").lower()


def denial_message(host: str, port: int, reason: str) -> str:
    """A refusal as it is told to the client."""
    return f"Sandbox refused {printable_host(host)}:{port}: {reason}"


def is_host_name(host: str) -> bool:
    """Whether a name is well-formed ASCII, and none that resolvers may take for an address."""
    return len(host) <= 254 and _HOST.fullmatch(normalize_host(host)) is not None and not ends_in_number(host)


def is_address(host: str) -> bool:
    """Whether this is an IP address in its one proper spelling."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return "%" not in host
