"""Name queries over TCP, and what is told of those that find nothing."""

from sandbox.gateway import names
from sandbox.gateway.conversation import Phase, Reaction
from sandbox.gateway.egress import EgressPolicy
from sandbox.gateway.name_addresses import NameAddresses
from sandbox.gateway.reports import Reports

_NAMES_PORT = 53


class NameService:
    """Answers one query. Names that may not be reached do not exist, and are told."""

    def __init__(self, policy: EgressPolicy, addresses: NameAddresses, reports: Reports) -> None:
        self._policy = policy
        self._addresses = addresses
        self._reports = reports

    def answer(self, query: bytes) -> bytes | None:
        """The message to send back, if any."""
        answer = names.answer(query, self._addresses.address_of)
        if answer.refused is not None:
            reason = self._policy.name_objection(answer.refused)
            self._reports.denied(answer.refused, _NAMES_PORT, reason)
        return answer.message


class NamesConversation:
    """Any number of queries, each behind its length."""

    def __init__(self, service: NameService) -> None:
        self._service = service
        self._received = b""

    @property
    def phase(self) -> Phase:
        """All its queries must come within the time of one head."""
        return Phase.HEAD

    def client_sent(self, data: bytes) -> Reaction:
        """Bytes came from inside; none mean that no more will."""
        reaction = Reaction(hang_up_client=not data)
        self._received += data
        begin = 0
        while (end := begin + 2 + int.from_bytes(self._received[begin : begin + 2])) <= len(self._received):
            reply = self._service.answer(self._received[begin + 2 : end]) or b""
            reaction.to_client += len(reply).to_bytes(2) + reply if reply else b""
            begin = end
        self._received = self._received[begin:]
        return reaction
