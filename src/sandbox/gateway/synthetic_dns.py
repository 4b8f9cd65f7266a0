"""DNS inside a sandbox: maps each allowed host name to a stable synthetic IPv4 address."""

from collections.abc import Callable
from ipaddress import IPv4Address

import msgspec

from sandbox.gateway.egress.policy import EgressPolicy
from sandbox.gateway.event_reporter import EventReporter
from sandbox.gateway.limits import SYNTHETIC_IPS_MAX
from sandbox.gateway.sans_io import Effects, Phase

_FIRST_ADDRESS = int(IPv4Address("198.18.0.0"))
_HOSTS_PER_BLOCK = 254
"""Number of addresses used in each block of 256. Some programs treat .0 and .255 as network or broadcast addresses."""


class SyntheticIps:
    """Assigns 198.18.0.2, 198.18.0.3, … to allowed names; 198.18.0.1 is the resolver."""

    def __init__(self, is_allowed: Callable[[str], bool]) -> None:
        self._is_allowed = is_allowed
        self._addresses: dict[str, IPv4Address] = {}
        self._names: dict[IPv4Address, str] = {}

    def get_or_assign_address(self, name: str) -> IPv4Address | None:
        """Return the address of `name` (any case), or None if the name is denied or the limit is reached."""
        original, name = name, name.lower()
        if name not in self._addresses:
            if not self._is_allowed(name) or len(self._addresses) >= SYNTHETIC_IPS_MAX:
                return None
            block, host = divmod(len(self._addresses) + 1, _HOSTS_PER_BLOCK)
            address = IPv4Address(_FIRST_ADDRESS + block * 256 + host + 1)
            self._addresses[name], self._names[address] = address, original
        return self._addresses[name]

    def name_of(self, address: str) -> str | None:
        """Return the name of an address, with the case of the query (for redaction); None if unassigned."""
        return self._names.get(IPv4Address(address))


_HEADER_BYTES = 12
_RESPONSE, _RECURSION_DESIRED, _RECURSION_AVAILABLE = 0x8000, 0x0100, 0x0080
_OPCODE = 0x7800
_NOERROR, _FORMERR, _NXDOMAIN, _NOTIMP = 0, 1, 3, 4
_TYPE_A, _CLASS_IN = 1, 1
_TTL_SECONDS = 60
_LABEL_BYTES_MAX = 63
_DOMAIN_BYTES_MAX = 255


AddressLookup = Callable[[str], IPv4Address | None]


class DnsResponse(msgspec.Struct, frozen=True):
    """The response to a DNS message. message: None if no response is sent. denied_name: None if no name was denied."""

    message: bytes | None
    denied_name: str | None = None


def respond(query: bytes, resolve: AddressLookup) -> DnsResponse:
    """Respond to one DNS message. Never raises. The response is at most one address record longer than the query."""
    if len(query) < _HEADER_BYTES:
        return DnsResponse(None)
    flags = int.from_bytes(query[2:4])
    if flags & _RESPONSE:
        return DnsResponse(None)  # if responses got responses, two resolvers could loop forever
    if flags & _OPCODE:
        return DnsResponse(_encode_response(query, flags, _NOTIMP))
    question = _parse_question(query) if int.from_bytes(query[4:6]) == 1 else None
    if question is None:
        return DnsResponse(_encode_response(query, flags, _FORMERR))
    name, end = question
    question_bytes = query[_HEADER_BYTES:end]
    address = resolve(name)
    if address is None:
        return DnsResponse(_encode_response(query, flags, _NXDOMAIN, question_bytes), name)
    is_for_address = question_bytes[-4:] == _TYPE_A.to_bytes(2) + _CLASS_IN.to_bytes(2)
    return DnsResponse(_encode_response(query, flags, _NOERROR, question_bytes, address if is_for_address else None))


def _encode_response(
    query: bytes, flags: int, code: int, question: bytes = b"", address: IPv4Address | None = None
) -> bytes:
    kept = flags & (_OPCODE | _RECURSION_DESIRED)
    head = (kept | _RESPONSE | _RECURSION_AVAILABLE | code).to_bytes(2)
    counts = (1 if question else 0).to_bytes(2) + (1 if address else 0).to_bytes(2) + bytes(4)
    return query[:2] + head + counts + question + (_encode_record(address) if address else b"")


def _encode_record(address: IPv4Address) -> bytes:
    """Encode an A record. Its name is a pointer to the question, which follows the header."""
    name = (0xC000 | _HEADER_BYTES).to_bytes(2)
    kind = _TYPE_A.to_bytes(2) + _CLASS_IN.to_bytes(2)
    return name + kind + _TTL_SECONDS.to_bytes(4) + (4).to_bytes(2) + address.packed


def _parse_question(query: bytes) -> tuple[str, int] | None:
    """Return the name in the only question and the offset after the question, or None if the question is malformed."""
    labels: list[str] = []
    offset = _HEADER_BYTES
    while offset < len(query):
        length = query[offset]
        offset += 1
        if length == 0:
            is_whole = offset + 4 <= len(query) and offset - _HEADER_BYTES <= _DOMAIN_BYTES_MAX
            return (".".join(labels) or ".", offset + 4) if is_whole else None
        if length > _LABEL_BYTES_MAX or offset + length > len(query):
            return None
        labels.append(query[offset : offset + length].decode("ascii", errors="backslashreplace"))
        offset += length
    return None


_DNS_PORT = 53


class DnsResponder:
    """Responds to DNS queries. Denied names get NXDOMAIN and are reported."""

    def __init__(self, policy: EgressPolicy, addresses: SyntheticIps, reporter: EventReporter) -> None:
        self._policy = policy
        self._synthetic_ips = addresses
        self._reporter = reporter

    def respond(self, query: bytes) -> bytes | None:
        """Return the response message, or None if there must be no response."""
        response = respond(query, self._synthetic_ips.get_or_assign_address)
        if response.denied_name is not None:
            reason = self._policy.name_deny_reason(response.denied_name)
            self._reporter.report_denied(response.denied_name, _DNS_PORT, reason)
        return response.message


class DnsTcpProtocol:
    """DNS over TCP: any number of queries, each with a length prefix."""

    def __init__(self, responder: DnsResponder) -> None:
        self._responder = responder
        self._received = b""

    @property
    def phase(self) -> Phase:
        """The phase is always HEAD: all queries on a connection must arrive within the timeout for a request head."""
        return Phase.HEAD

    def client_data_received(self, data: bytes) -> Effects:
        """Process data from the client; empty data means EOF."""
        effects = Effects(close_client=not data)
        self._received += data
        begin = 0
        while (end := begin + 2 + int.from_bytes(self._received[begin : begin + 2])) <= len(self._received):
            reply = self._responder.respond(self._received[begin + 2 : end]) or b""
            effects.to_client += len(reply).to_bytes(2) + reply if reply else b""
            begin = end
        self._received = self._received[begin:]
        return effects
