"""What an answer may have cost that broke off: a token for each byte that was heard, at most what was asked for."""

import json

import pytest

from sandbox.gateway.limits import JSON_BODY_BYTES_MAX, SSE_LINE_BYTES_MAX
from sandbox.gateway.model.pricing import CostBound
from sandbox.gateway.model.usage_meter import JsonMeter, StreamMeter, create_meter
from sandbox.model.events import Usage

MODEL = "claude-haiku-4-5"
FRAME_BYTES = 80
"""What stands around the text in the line of an event, and is no text."""

ASKED = CostBound("claude-opus-4-1", 500, 64_000, is_streamed=True)


def line(event: dict) -> bytes:
    return f"data: {json.dumps(event)}\n".encode()


def start(**usage: object) -> bytes:
    return line({"type": "message_start", "message": {"model": MODEL, "usage": usage}})


def delta(**usage: object) -> bytes:
    return line({"type": "message_delta", "usage": usage})


def text(byte_count: int) -> bytes:
    """A line of so many bytes."""
    return (b'data: {"type":"content_block_delta"' + b"x" * byte_count)[:byte_count] + b"\n"


def stream(*pieces: bytes) -> StreamMeter:
    meter = StreamMeter()
    for piece in pieces:
        meter.feed(piece)
    return meter


def heard(*pieces: bytes, begun: bytes = start(input_tokens=10, output_tokens=1), asked: CostBound = ASKED) -> int:
    """Output tokens of an answer that broke off after these pieces, beside what its first line counts as."""
    at_first = max(0, len(begun) - 1 - FRAME_BYTES)
    return stream(begun, *pieces).upper_bound(asked, is_fully_received=True).output_tokens - at_first


# Streams


@pytest.mark.parametrize("byte_count", [FRAME_BYTES + 1, 200, 5000])
def test_each_line_counts_by_its_bytes_without_its_frame(byte_count):
    assert heard(text(byte_count)) == byte_count - FRAME_BYTES
    assert heard(*[text(byte_count)] * 3) == 3 * (byte_count - FRAME_BYTES)
    assert heard(text(byte_count)[:50], text(byte_count)[50:]) == byte_count - FRAME_BYTES


@pytest.mark.parametrize("byte_count", [10, FRAME_BYTES - 1, FRAME_BYTES])
def test_a_line_that_is_no_longer_than_a_frame_brings_no_text(byte_count):
    assert heard(text(byte_count), text(FRAME_BYTES + 5)) == 5


@pytest.mark.parametrize("other", [b"event: " + b"x" * 500 + b"\n", b": " + b"x" * 500 + b"\n", b"\n", b"\r\n"])
def test_lines_without_data_bring_no_text(other):
    assert heard(other) == 0


def test_a_line_that_has_not_ended_counts_in_full():
    assert heard(text(300)[:-1]) == 300
    assert heard(text(200), b"da") == 200 - FRAME_BYTES + 2
    assert heard(b"x") == 1


def test_a_line_over_the_bound_counts_in_full_and_the_next_one_by_its_own_bytes():
    half = b"x" * (SSE_LINE_BYTES_MAX // 2)
    asked = CostBound(MODEL, 500, 10**7, is_streamed=True)
    assert heard(half, half, asked=asked) == SSE_LINE_BYTES_MAX
    assert heard(half, half, b"x", asked=asked) == SSE_LINE_BYTES_MAX + 1
    assert heard(half, half, b"xy", b"z", asked=asked) == SSE_LINE_BYTES_MAX + 3
    assert heard(half, half, b"x", half, b"\n", asked=asked) == SSE_LINE_BYTES_MAX + 1 + len(half)
    assert heard(half, half, b"x\n", text(FRAME_BYTES + 7), asked=asked) == SSE_LINE_BYTES_MAX + 1 + 7


def test_a_line_at_the_bound_is_read_and_one_over_it_is_not():
    for size, output in ((SSE_LINE_BYTES_MAX, 42), (SSE_LINE_BYTES_MAX + 1, 1)):
        told = delta(output_tokens=42)[:-2]
        whole = told + b" " * (size - len(told) - 1) + b"}\n"
        assert stream(start(output_tokens=1), whole).usage().output_tokens == output
        assert stream(start(output_tokens=1), whole, delta(output_tokens=43)).usage().output_tokens == 43


def test_no_more_counts_than_was_asked_for_and_no_less_than_was_told():
    assert (
        stream(start(), text(5000))
        .upper_bound(CostBound(MODEL, 1, 300, is_streamed=True), is_fully_received=True)
        .output_tokens
        == 300
    )
    told = stream(start(), delta(output_tokens=900)).upper_bound(
        CostBound(MODEL, 1, 300, is_streamed=True), is_fully_received=True
    )
    assert told.output_tokens == 900
    assert (
        stream(start(), delta(output_tokens=9), text(500)).upper_bound(ASKED, is_fully_received=True).output_tokens > 9
    )


def test_all_that_was_asked_for_counts_where_not_all_was_heard():
    for pieces in ([], [start(input_tokens=10)], [start(input_tokens=10), text(500)]):
        assert stream(*pieces).upper_bound(ASKED, is_fully_received=False).output_tokens == 64_000


def test_the_input_is_the_told_one_and_else_that_of_the_request():
    assert stream(start(input_tokens=10)).upper_bound(ASKED, is_fully_received=True).input_tokens == 10
    assert stream(start(input_tokens=0)).upper_bound(ASKED, is_fully_received=True).input_tokens == 0
    assert stream(start()).upper_bound(ASKED, is_fully_received=True).input_tokens == 500
    assert stream().upper_bound(ASKED, is_fully_received=True).input_tokens == 500


def test_the_model_is_the_one_that_answers_and_else_the_one_that_was_asked():
    assert stream(start()).upper_bound(ASKED, is_fully_received=True).model == MODEL
    told = stream(b": nothing\n").upper_bound(ASKED, is_fully_received=False)
    assert told == Usage("claude-opus-4-1", 500, 64_000, 0, 0, (500 * 15 + 64_000 * 75) / 1e6)


# Whether all was told


@pytest.mark.parametrize(
    ("pieces", "has_told_all"),
    [
        ([], False),
        ([start(input_tokens=1, output_tokens=5)], False),
        ([start(), delta(output_tokens=5)], True),
        ([start(), delta(output_tokens=0)], True),
        ([start(), delta(input_tokens=5)], False),
        ([start(), line({"type": "message_delta"})], False),
        ([start(), line({"type": "message_delta", "usage": None})], False),
        ([start(), delta(output_tokens=5), delta(input_tokens=5)], True),
        ([start(), delta(output_tokens=5), line({"type": "message_delta"})], True),
        ([start(), line({"type": "other", "of": "message_delta", "usage": {"output_tokens": 5}})], False),
        ([start(), delta(output_tokens=5)[:-1]], False),
        ([start(), b"event: " + delta(output_tokens=5)], False),
    ],
)
def test_a_stream_has_told_all_once_a_delta_has_told_the_output(pieces, has_told_all):
    assert stream(*pieces).is_complete is has_told_all


def test_a_stream_has_begun_once_it_was_told_which_model_answers():
    assert not stream(b"event: message_start\n", start()[:-1]).has_started
    assert not stream(delta(output_tokens=5)).has_started
    assert not stream(line({"type": "message_start"})).has_started
    begun = stream(start())
    assert begun.has_started
    assert begun.partial_usage() == begun.usage() == Usage(MODEL, 0, 0, 0, 0, 0.0)


def test_a_message_in_a_delta_names_no_model_and_a_usage_beside_a_start_counts_nothing():
    odd = line({"type": "message_delta", "message": {"model": "claude-opus-4-1"}, "usage": {"output_tokens": 3}})
    assert (stream(start(), odd).usage().model, stream(start(), odd).usage().output_tokens) == (MODEL, 3)
    beside = {"type": "message_start", "message": {"model": MODEL}, "usage": {"output_tokens": 3}}
    assert stream(line(beside)).usage().output_tokens == 0


def test_an_answer_that_names_no_model_has_none():
    told = stream(line({"type": "message_start", "message": {"usage": {"input_tokens": 3}}})).usage()
    assert (told.model, told.input_tokens, told.cost_usd) == ("", 3, None)
    assert document(b'{"usage": {"input_tokens": 3}}').usage() == told


def test_a_line_needs_no_space_after_its_name():
    assert stream(start().replace(b"data: ", b"data:")).has_started


@pytest.mark.parametrize("name", [b"Data:", b"DATA:", b"datum", b"     "])
def test_a_line_with_another_name_tells_nothing(name):
    other = delta(output_tokens=5).replace(b"data:", name)
    told = stream(start(), other)
    assert (told.usage().output_tokens, told.is_complete) == (0, False)
    assert stream(start(), delta(output_tokens=5)).usage().output_tokens == 5


def test_costs_of_one_country_are_rounded_to_a_millionth_of_a_dollar():
    assert stream(start(input_tokens=3, inference_geo="us")).usage().cost_usd == 0.000003
    assert stream(start(input_tokens=30, inference_geo="us")).usage().cost_usd == 0.000033
    assert stream(start(input_tokens=30, inference_geo="")).usage().cost_usd == 0.00003


def test_a_name_of_a_model_is_kept_as_far_as_names_go():
    for told, kept in (("m" * 128, "m" * 128), ("m" * 129, "m" * 128)):
        begun = stream(line({"type": "message_start", "message": {"model": told}}))
        assert begun.usage().model == kept
        beside = delta(iterations=[{"type": "advisor_message", "model": told, "input_tokens": 1}])
        assert stream(start(), beside).usage().model == kept


# Documents


def document(body: bytes) -> JsonMeter:
    meter = JsonMeter()
    meter.feed(body)
    return meter


WHOLE = json.dumps({"model": MODEL, "usage": {"input_tokens": 10, "output_tokens": 2}}).encode()


def test_a_document_has_told_all_when_it_is_whole():
    assert document(WHOLE).is_complete
    assert not document(WHOLE[:-1]).is_complete
    assert not document(b'{"model": "m"}').is_complete
    for meter in (document(b""), document(WHOLE)):
        assert meter.has_started
        assert meter.partial_usage() is None


def test_a_document_that_breaks_off_counts_as_all_that_was_asked_for():
    for body in (b"", WHOLE[:-1], WHOLE):
        for is_heard in (True, False):
            told = document(body).upper_bound(ASKED, is_fully_received=is_heard)
            assert (told.model, told.input_tokens, told.output_tokens) == ("claude-opus-4-1", 500, 64_000)


def test_a_document_at_the_bound_is_read_and_one_over_it_is_not():
    padded = WHOLE + b" " * (JSON_BODY_BYTES_MAX - len(WHOLE))
    assert document(padded).is_complete
    over = document(padded + b" ")
    assert not over.is_complete
    over.feed(WHOLE)
    assert not over.is_complete, "what comes after is a part of the same document"


@pytest.mark.parametrize(
    ("content_type", "kind"),
    [
        (b"text/event-stream", StreamMeter),
        (b" Text/Event-Stream ; charset=utf-8", StreamMeter),
        (b"text/event-streams", JsonMeter),
        (b"application/json; text/event-stream", JsonMeter),
        (b"", JsonMeter),
    ],
)
def test_an_answer_is_read_by_its_type(content_type, kind):
    assert type(create_meter(content_type)) is kind


# Counts


@pytest.mark.parametrize(
    "name", ["input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"]
)
def test_counts_are_taken_up_to_a_bound_and_none_below_nothing(name):
    for told, counted in ((10**12, 10**12), (0, 0)):
        usage = stream(start(), delta(**{name: told})).usage()
        assert (
            sum((usage.input_tokens, usage.output_tokens, usage.cache_read_tokens, usage.cache_write_tokens)) == counted
        )
    for told in (10**12 + 1, -1):
        assert stream(start(input_tokens=7), delta(**{name: told})).usage() == stream(start(input_tokens=7)).usage()


def test_searches_are_taken_up_to_a_bound():
    def cost(searches: int) -> float:
        return stream(start(server_tool_use={"web_search_requests": searches})).usage().cost_usd

    assert [cost(0), cost(1), cost(10**12), cost(10**12 + 1), cost(-1)] == [0.0, 0.01, 10.0**10, 0.0, 0.0]


def test_a_later_count_of_searches_may_be_none():
    searched = delta(server_tool_use={"web_search_requests": 3})
    none = delta(server_tool_use={"web_search_requests": 0})
    assert stream(start(), searched, none).usage().cost_usd == 0.0


def test_an_answer_of_which_a_cheaper_model_wrote_a_part_costs_as_much_as_without_that_and_its_advisor_beside():
    whole = {"input_tokens": 1000, "output_tokens": 50}
    part = {"type": "message", "model": "claude-haiku-4-5", **whole}
    advisor = {"type": "advisor_message", "model": "claude-opus-4-1", "input_tokens": 100, "output_tokens": 10}
    opus = line({"type": "message_start", "message": {"model": "claude-opus-4-1", "usage": whole}})
    told = stream(opus, delta(iterations=[part, advisor])).usage()
    assert told.cost_usd == pytest.approx((1100 * 15 + 60 * 75) / 1e6)
    assert (told.input_tokens, told.output_tokens) == (1100, 60)
