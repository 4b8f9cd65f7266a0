"""In isolated mode no name exists, whatever is asked and however."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.gateway.names import answer
from sandbox.gateway.refusal import NamesRefusal, refuse_name
from sandbox.gateway.reports import Reports
from sandbox.model.event import EgressDenied

A, AAAA, TXT, ANY, HTTPS = 1, 28, 16, 255, 65


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
    assert told.name == "example.org"
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
    assert (code(told.message), told.name, len(told.message)) == (1, None, 12)


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


def reports() -> tuple[Reports, list]:
    told: list = []
    return Reports(told.append, lambda: 0.0), told


def test_a_refused_name_is_reported_so_that_it_can_be_read():
    sink, told = reports()
    refuse_name(query("evil\n\x1b[31m.example"), sink)
    assert told == [EgressDenied("evil??[31m.example", 53, told[0].reason)]


def test_queries_over_tcp_are_answered_however_they_are_cut():
    sink, told = reports()
    framed = b"".join(len(q).to_bytes(2) + q for q in (query("a.example"), query("b.example")))
    conversation = NamesRefusal(sink)
    sent = b"".join(bytes(conversation.client_sent(framed[i : i + 1]).to_client) for i in range(len(framed)))
    assert NamesRefusal(sink).client_sent(framed).to_client == sent
    first = int.from_bytes(sent[:2])
    assert sent[2 : 2 + first] == answer(query("a.example")).message
    assert [denied.host for denied in told] == ["a.example", "b.example"] * 2


@given(st.lists(st.binary(max_size=50)))
def test_no_stream_of_queries_makes_it_raise(pieces):
    sink, _ = reports()
    conversation = NamesRefusal(sink)
    for piece in pieces:
        conversation.client_sent(piece)
    assert conversation.client_sent(b"").hang_up_client
