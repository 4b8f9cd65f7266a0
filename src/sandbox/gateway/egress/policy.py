"""What may be reached beside the model, and how a connection from inside is let through. No I/O."""

import re
from collections.abc import Callable
from ipaddress import ip_address
from typing import Protocol

import msgspec

from sandbox.gateway.event_reporter import printable
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

    def __init__(self, rules: EgressRules, model_host: str, *, takes_addresses: bool = False) -> None:
        self._rules = rules
        self._model_host = normal(model_host)
        self._takes_addresses = takes_addresses and rules.is_full

    @property
    def takes_hidden_names(self) -> bool:
        """Whether a TLS ClientHello may have a second name that is encrypted."""
        return self._rules.is_full

    def knows(self, host: str) -> bool:
        """Whether the host may be reached at any port, so that its name resolves inside."""
        return is_host_name(host) and normal(host) != self._model_host and self._rules.knows(host)

    def name_objection(self, host: str) -> str:
        """Why a name is not resolved."""
        if self.knows(host):
            return "too many names were resolved."
        return self.objection(host, HTTPS_PORT) or "it cannot be resolved."

    def objection(self, host: str, port: int) -> str | None:
        """Why this may not be reached; None when it may."""
        if self._rules.allow_nothing:
            return NO_HOSTS if self._rules.is_outbound else ISOLATED
        if normal(host) == self._model_host:
            return "the model is reached through the gateway's own address only."
        if not 1 <= port <= 65535:
            return "there is no such port."
        if ends_in_number(host) or ":" in host:
            return self._address_objection(host)
        if not self.knows(host):
            return NOT_PUBLIC if self._rules.is_full else "vm.allowed_hosts does not list it."
        return None if self._rules.allows(host, port) else "vm.allowed_hosts does not list it at this port."

    def _address_objection(self, host: str) -> str | None:
        if not self._takes_addresses:
            told = "with network_mode full, by the proxy" if self._rules.is_full else "only with network_mode full"
            return f"hosts are reached by their names; addresses {told}."
        return None if is_address(host) else "an address is written as four decimal numbers, or as IPv6."


class Refusal(msgspec.Struct, frozen=True):
    """Not let through. `answer`: bytes for the client before its connection ends."""

    host: str
    port: int
    reason: str
    answer: bytes = b""


class Sieve(Protocol):
    """Looks at what the client sends to the host, for as long as there is something to look for."""

    @property
    def is_over(self) -> bool:
        """Whether nothing more of the client's goes to the host."""
        ...

    @property
    def is_free(self) -> bool:
        """Whether everything that comes from now on goes to the host unread."""
        ...

    def begin(self) -> bytes | Refusal:
        """What goes to the host as soon as it is reached."""
        ...

    def client_sent(self, data: bytes) -> bytes | Refusal:
        """What of this goes to the host; no data mean that no more will come."""
        ...

    def host_spoke(self) -> None:
        """Bytes came from the host."""
        ...


class Passage(msgspec.Struct, frozen=True):
    """Let through to `host`. `greeting`: for the client once it is reached; `unreached`: its answer if it is not."""

    host: str
    port: int
    sieve: Sieve
    greeting: bytes = b""
    unreached: Callable[[int, str], bytes] = lambda _status, _sentence: b""


class Opening(Protocol):
    """The beginning of a connection from inside. Never raises on what comes; says how it ends when no more comes."""

    def client_sent(self, data: bytes) -> Passage | Refusal | None:
        """What to do, None: wait for more. No data mean that no more will come."""
        ...


class Checked:
    """What is inside a tunnel has to open as `opening` demands; `came` is what came of it already."""

    def __init__(self, opening: Opening, came: bytes) -> None:
        self._opening = opening
        self._came = came
        self._sieve: Sieve | None = None
        self._host_has_spoken = False

    @property
    def is_over(self) -> bool:
        """As the one that comes after says."""
        return self._sieve is not None and self._sieve.is_over

    @property
    def is_free(self) -> bool:
        """As the one that comes after says."""
        return self._sieve is not None and self._sieve.is_free

    def begin(self) -> bytes | Refusal:
        """Nothing before it was looked at."""
        return self.client_sent(self._came) if self._came else b""

    def client_sent(self, data: bytes) -> bytes | Refusal:
        """Nothing until the beginning is whole."""
        if self._sieve is not None:
            return self._sieve.client_sent(data)
        outcome = self._opening.client_sent(data)
        if outcome is None or isinstance(outcome, Refusal):
            return outcome or b""
        self._sieve = outcome.sieve
        if self._host_has_spoken:
            self._sieve.host_spoke()
        return self._sieve.begin()

    def host_spoke(self) -> None:
        """Also for the sieve that comes after."""
        self._host_has_spoken = True
        if self._sieve is not None:
            self._sieve.host_spoke()


def normal(host: str) -> str:
    """A host as it is compared: lower case, without a final dot."""
    return host.removesuffix(".").lower()


def sentence(host: str, port: int, reason: str) -> str:
    """A refusal as it is told to the client."""
    return f"Sandbox refused {printable(host)}:{port}: {reason}"


def is_host_name(host: str) -> bool:
    """Whether a name is well-formed ASCII, and none that resolvers may take for an address."""
    return len(host) <= 254 and _HOST.fullmatch(normal(host)) is not None and not ends_in_number(host)


def is_address(host: str) -> bool:
    """Whether this is an IP address in its one proper spelling."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return "%" not in host
