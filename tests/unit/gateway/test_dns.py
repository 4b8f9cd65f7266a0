"""Inside, names exist that may be reached, and no others, whatever is asked and however."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.gateway import dns
from sandbox.gateway.dns import DnsResponder, DnsResponse, DnsTcpProtocol, SyntheticIps
from sandbox.gateway.egress.policy import ISOLATED, EgressPolicy
from sandbox.gateway.event_reporter import EventReporter
from sandbox.model.egress import EgressRule, EgressRules
from sandbox.model.events import EgressDenied

A, AAAA, TXT, SRV, ANY, HTTPS = 1, 28, 16, 33, 255, 65


def answer(message: bytes) -> DnsResponse:
    """As where nothing may be reached."""
    return dns.respond(message, lambda _: None)


def query(
    name: str = "example.org", kind: int = A, *, flags: int = 0x0100, questions: int = 1, extra: bytes = b""
) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split(".") if label) + b"\0"
    head = b"\xab\xcd" + flags.to_bytes(2) + questions.to_bytes(2) + bytes(4) + (b"\0\1" if extra else b"\0\0")
    return head + labels + kind.to_bytes(2) + b"\0\1" + extra


def code(message: bytes) -> int:
    return message[3] & 0x0F


@pytest.mark.parametrize("kind", [A, AAAA, TXT, ANY, HTTPS])
def test_every_kind_of_question_is_told_that_there_is_no_such_name(kind):
    asked = query(kind=kind)
    told = answer(asked)
    assert told.denied_name == "example.org"
    assert told.message is not None
    assert told.message[:2] == asked[:2]
    assert told.message[2] & 0x80, "an answer, not a query"
    assert code(told.message) == 3
    assert told.message[4:12] == b"\0\1\0\0\0\0\0\0", "the question and nothing else"
    assert told.message[12:] == asked[12:]


def test_what_resolvers_add_to_a_question_does_not_matter():
    edns = b"\0\0\x29\x10\0\0\0\0\0\0\0"
    told = answer(query(extra=edns))
    assert told.message is not None
    assert code(told.message) == 3
    assert told.message[12:] == query()[12:]


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
def test_a_malformed_question_is_told_so(malformed):
    told = answer(malformed)
    assert told.message is not None
    assert (code(told.message), told.denied_name, len(told.message)) == (1, None, 12)


def test_updates_and_other_operations_are_not_offered():
    told = answer(query(flags=0x2800))
    assert told.message is not None
    assert code(told.message) == 4


@pytest.mark.parametrize("silent", [b"", b"\0" * 11, query(flags=0x8180)])
def test_scraps_and_answers_get_no_answer(silent):
    assert answer(silent).message is None


@given(st.binary(max_size=600))
def test_no_bytes_make_it_raise_or_talk_more_than_it_was_asked(data):
    told = answer(data)
    assert told.message is None or len(told.message) <= len(data)


@given(st.binary(max_size=100).map(lambda tail: query()[:12] + tail))
def test_no_question_makes_it_raise(data):
    assert answer(data).message is not None


def service(*hosts: str, model: str = "api.anthropic.com") -> tuple[DnsResponder, list]:
    told: list = []
    policy = EgressPolicy(EgressRules(tuple(EgressRule(host) for host in hosts)), model)
    return DnsResponder(policy, SyntheticIps(policy.allows_host), EventReporter(told.append, lambda: 0.0)), told


def test_an_allowed_name_has_an_address_of_its_own_and_keeps_it():
    asked, told = service("files.example.org", "git.example.org")
    first = asked.respond(query("files.example.org"))
    assert code(first) == 0
    assert first[4:12] == b"\0\1\0\1\0\0\0\0", "the question and one answer"
    assert first[12 : len(query("files.example.org"))] == query("files.example.org")[12:]
    assert first[-4:] == bytes([198, 18, 0, 2])
    assert asked.respond(query("git.example.org"))[-4:] == bytes([198, 18, 0, 3])
    assert asked.respond(query("FILES.example.ORG"))[-4:] == bytes([198, 18, 0, 2])
    assert told == []


@pytest.mark.parametrize("kind", [AAAA, TXT, SRV, ANY, HTTPS])
def test_an_allowed_name_has_nothing_else(kind):
    asked, told = service("files.example.org")
    reply = asked.respond(query("files.example.org", kind))
    assert code(reply) == 0
    assert reply[4:12] == b"\0\1\0\0\0\0\0\0"
    assert told == []


@pytest.mark.parametrize(
    "name",
    ["example.org", "a.files.example.org", "secret-data.example.net", "api.anthropic.com", "4.4.8.8.in-addr.arpa"],
)
def test_every_other_name_does_not_exist_and_is_told(name):
    asked, told = service("files.example.org", "api.anthropic.com")
    assert code(asked.respond(query(name))) == 3
    assert [(denied.host, denied.port) for denied in told] == [(name, 53)]


def test_addresses_leave_out_networks_own_and_the_resolvers():
    addresses = SyntheticIps(lambda _: True)
    given = [addresses.address_of(f"host{number}.example") for number in range(1000)]
    assert len(set(given)) == 1000
    assert {address.packed[3] for address in given}.isdisjoint({0, 255})
    assert "198.18.0.1" not in map(str, given)
    assert all(str(address).startswith("198.18.") for address in given)
    assert [addresses.name_of(str(address)) for address in given] == [f"host{number}.example" for number in range(1000)]
    assert addresses.name_of("198.18.0.1") is None


def test_a_name_keeps_its_first_spelling_so_that_a_secret_in_it_is_known():
    addresses = SyntheticIps(lambda _: True)
    given = addresses.address_of("SeCrEt.example.org")
    assert addresses.address_of("secret.EXAMPLE.org") == given
    assert addresses.name_of(str(given)) == "SeCrEt.example.org"


def test_names_have_a_bound(monkeypatch):
    monkeypatch.setattr(dns, "SYNTHETIC_IPS_MAX", 2)
    addresses = SyntheticIps(lambda _: True)
    assert [addresses.address_of(name) is None for name in ("a", "b", "c", "a")] == [False, False, True, False]


def test_a_refused_name_is_reported_so_that_it_can_be_read():
    asked, told = service()
    asked.respond(query("evil\n\x1b[31m.example"))
    assert told == [EgressDenied("evil??[31m.example", 53, ISOLATED)]


def test_queries_over_tcp_are_answered_however_they_are_cut():
    asked, told = service()
    framed = b"".join(len(q).to_bytes(2) + q for q in (query("a.example"), query("b.example")))
    conversation = DnsTcpProtocol(asked)
    sent = b"".join(bytes(conversation.client_data_received(framed[i : i + 1]).to_client) for i in range(len(framed)))
    assert DnsTcpProtocol(asked).client_data_received(framed).to_client == sent
    first = int.from_bytes(sent[:2])
    assert sent[2 : 2 + first] == answer(query("a.example")).message
    assert [denied.host for denied in told] == ["a.example", "b.example"] * 2


@given(st.lists(st.binary(max_size=50)))
def test_no_stream_of_queries_makes_it_raise(pieces):
    conversation = DnsTcpProtocol(service()[0])
    for piece in pieces:
        conversation.client_data_received(piece)
    assert conversation.client_data_received(b"").close_client
