"""The sandbox's DNS server responds to every query type, and resolves only allowed names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.gateway import synthetic_dns
from sandbox.gateway.egress.policy import ISOLATED_DENY_REASON, EgressPolicy
from sandbox.gateway.event_reporter import EventReporter
from sandbox.gateway.synthetic_dns import DnsResponder, DnsResponse, DnsTcpProtocol, SyntheticIps
from sandbox.model.egress import EgressRule, EgressRules
from sandbox.model.events import EgressDenied
from sandbox.secrets.redaction.redactor import SecretRedactor

A, AAAA, TXT, SRV, ANY, HTTPS = 1, 28, 16, 33, 255, 65


def respond_isolated(message: bytes) -> DnsResponse:
    """Return the response of a server that allows no names."""
    return synthetic_dns.respond(message, lambda _: None)


def query(
    name: str = "example.org", kind: int = A, *, flags: int = 0x0100, questions: int = 1, extra: bytes = b""
) -> bytes:
    labels = b"".join(bytes([len(label.encode())]) + label.encode() for label in name.split(".") if label) + b"\0"
    head = b"\xab\xcd" + flags.to_bytes(2) + questions.to_bytes(2) + bytes(4) + (b"\0\1" if extra else b"\0\0")
    return head + labels + kind.to_bytes(2) + b"\0\1" + extra


def code(message: bytes) -> int:
    return message[3] & 0x0F


@pytest.mark.parametrize("kind", [A, AAAA, TXT, ANY, HTTPS])
def test_nxdomain_is_returned_for_every_query_type(kind):
    message = query(kind=kind)
    response = respond_isolated(message)
    assert response.denied_name == "example.org"
    assert response.message is not None
    assert response.message[:2] == message[:2]
    assert response.message[2] & 0x80, "a response, not a query"
    assert code(response.message) == 3
    assert response.message[4:12] == b"\0\1\0\0\0\0\0\0", "the question and nothing else"
    assert response.message[12:] == message[12:]


def test_edns_record_is_ignored():
    edns = b"\0\0\x29\x10\0\0\0\0\0\0\0"
    response = respond_isolated(query(extra=edns))
    assert response.message is not None
    assert code(response.message) == 3
    assert response.message[12:] == query()[12:]


@pytest.mark.parametrize(
    "malformed",
    [
        query(questions=2),
        query(questions=0),
        query()[:-1],
        query()[:20],
        query()[:12] + b"\xc0\x0c\0\1\0\1",
        query()[:12] + b"\x3f" + b"a" * 10,
        query(".".join(["a" * 60] * 5)),
    ],
)
def test_formerr_is_returned_for_a_malformed_query(malformed):
    response = respond_isolated(malformed)
    assert response.message is not None
    assert (code(response.message), response.denied_name, len(response.message)) == (1, None, 12)


def test_notimp_is_returned_for_opcodes_other_than_query():
    response = respond_isolated(query(flags=0x2800))
    assert response.message is not None
    assert code(response.message) == 4


@pytest.mark.parametrize("message", [b"", b"\0" * 11, query(flags=0x8180)])
def test_no_response_is_sent_for_short_messages_and_responses(message):
    assert respond_isolated(message).message is None


@given(st.binary(max_size=600))
def test_response_is_never_longer_than_the_query(data):
    response = respond_isolated(data)
    assert response.message is None or len(response.message) <= len(data)


@given(st.binary(max_size=100).map(lambda tail: query()[:12] + tail))
def test_response_is_sent_for_every_query(data):
    assert respond_isolated(data).message is not None


def create_responder(*hosts: str, model: str = "api.anthropic.com") -> tuple[DnsResponder, list]:
    events: list = []
    policy = EgressPolicy(EgressRules(tuple(EgressRule(host) for host in hosts)), model)
    return DnsResponder(policy, SyntheticIps(policy.allows_host), EventReporter(events.append, lambda: 0.0)), events


def test_allowed_name_resolves_to_a_stable_unique_address():
    responder, events = create_responder("files.example.org", "git.example.org")
    first = responder.respond(query("files.example.org"))
    assert code(first) == 0
    assert first[4:12] == b"\0\1\0\1\0\0\0\0", "the question and one answer record"
    assert first[12 : len(query("files.example.org"))] == query("files.example.org")[12:]
    assert first[-4:] == bytes([198, 18, 0, 2])
    assert responder.respond(query("git.example.org"))[-4:] == bytes([198, 18, 0, 3])
    assert responder.respond(query("FILES.example.ORG"))[-4:] == bytes([198, 18, 0, 2])
    assert events == []


@pytest.mark.parametrize("kind", [AAAA, TXT, SRV, ANY, HTTPS])
def test_only_queries_of_type_a_for_an_allowed_name_return_a_record(kind):
    responder, events = create_responder("files.example.org")
    reply = responder.respond(query("files.example.org", kind))
    assert code(reply) == 0
    assert reply[4:12] == b"\0\1\0\0\0\0\0\0"
    assert events == []


@pytest.mark.parametrize(
    "name",
    ["example.org", "a.files.example.org", "secret-data.example.net", "api.anthropic.com", "4.4.8.8.in-addr.arpa"],
)
def test_nxdomain_is_returned_for_a_denied_name_and_the_name_is_reported(name):
    responder, events = create_responder("files.example.org", "api.anthropic.com")
    assert code(responder.respond(query(name))) == 3
    assert [(denied.host, denied.port) for denied in events] == [(name, 53)]


def test_assigned_addresses_exclude_the_network_and_broadcast_and_resolver_addresses():
    synthetic_ips = SyntheticIps(lambda _: True)
    assigned = [synthetic_ips.get_or_assign_address(f"host{number}.example") for number in range(1000)]
    assert len(set(assigned)) == 1000
    assert {address.packed[3] for address in assigned}.isdisjoint({0, 255})
    assert "198.18.0.1" not in map(str, assigned)
    assert all(str(address).startswith("198.18.") for address in assigned)
    assert [synthetic_ips.name_of(str(address)) for address in assigned] == [
        f"host{number}.example" for number in range(1000)
    ]
    assert synthetic_ips.name_of("198.18.0.1") is None


def test_name_keeps_the_capitalization_of_its_first_query_for_redaction():
    synthetic_ips = SyntheticIps(lambda _: True)
    assigned = synthetic_ips.get_or_assign_address("SeCrEt.example.org")
    assert synthetic_ips.get_or_assign_address("secret.EXAMPLE.org") == assigned
    assert synthetic_ips.name_of(str(assigned)) == "SeCrEt.example.org"


def test_number_of_names_is_limited(monkeypatch):
    monkeypatch.setattr(synthetic_dns, "SYNTHETIC_IPS_MAX", 2)
    synthetic_ips = SyntheticIps(lambda _: True)
    assert [synthetic_ips.get_or_assign_address(name) is None for name in ("a", "b", "c", "a")] == [
        False,
        False,
        True,
        False,
    ]


def test_report_of_a_denied_name_contains_only_printable_characters():
    responder, events = create_responder()
    responder.respond(query("evil\n\x1b[31m.example"))
    assert events == [EgressDenied("evil??[31m.example", 53, ISOLATED_DENY_REASON)]


@pytest.mark.parametrize("secret", ["Stäple-Battery-9€", "STÄPLE-BATTERY-9€"])
@pytest.mark.parametrize("change", [str, str.lower])
def test_secret_in_a_reported_non_ascii_name_is_redacted(secret, change):
    events: list = []
    redactor = SecretRedactor({"S": secret})
    reporter = EventReporter(events.append, lambda: 0.0, redactor.redact_text)
    policy = EgressPolicy(EgressRules(), "api.anthropic.com")
    responder = DnsResponder(policy, SyntheticIps(policy.allows_host), reporter)
    for name in (change(secret), "other-stäple"):
        responder.respond(query(f"{name}.example.org"))
    assert [event.host for event in events] == ["[REDACTED:S].example.org", "other-st?ple.example.org"]


def test_tcp_query_handling_does_not_depend_on_fragmentation():
    responder, events = create_responder()
    framed = b"".join(len(q).to_bytes(2) + q for q in (query("a.example"), query("b.example")))
    protocol = DnsTcpProtocol(responder)
    sent = b"".join(bytes(protocol.client_data_received(framed[i : i + 1]).to_client) for i in range(len(framed)))
    assert DnsTcpProtocol(responder).client_data_received(framed).to_client == sent
    first = int.from_bytes(sent[:2])
    assert sent[2 : 2 + first] == respond_isolated(query("a.example")).message
    assert [denied.host for denied in events] == ["a.example", "b.example"] * 2


@given(st.lists(st.binary(max_size=50)))
def test_arbitrary_tcp_stream_does_not_raise(pieces):
    protocol = DnsTcpProtocol(create_responder()[0])
    for piece in pieces:
        protocol.client_data_received(piece)
    assert protocol.client_data_received(b"").close_client
