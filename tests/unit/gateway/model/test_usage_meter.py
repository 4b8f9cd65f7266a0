"""The gateway counts what a model's answer cost while it passes, however the bytes are cut."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.gateway.limits import JSON_BODY_BYTES_MAX, SSE_LINE_BYTES_MAX
from sandbox.gateway.model.usage_meter import create_meter
from sandbox.model.events import Usage

SSE = b"text/event-stream; charset=utf-8"


def sse(*events: dict) -> bytes:
    return b"".join(f"event: {e.get('type')}\ndata: {json.dumps(e)}\n\n".encode() for e in events)


START = {
    "type": "message_start",
    "message": {
        "model": "claude-sonnet-4-5-20250929",
        "usage": {
            "input_tokens": 1000,
            "cache_read_input_tokens": 2000,
            "cache_creation_input_tokens": 3000,
            "output_tokens": 1,
        },
    },
}
TEXT = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": 'é "message_delta" {'}}
DELTA = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 50}}
STREAM = sse(START, {"type": "ping"}, TEXT, {"type": "brand_new", "message": 7}, DELTA, {"type": "message_stop"})
COST = (1000 * 3 + 50 * 15 + 2000 * 0.3 + 3000 * 3.75) / 1e6
USED = Usage("claude-sonnet-4-5-20250929", 1000, 50, 2000, 3000, pytest.approx(COST))


def metered(content_type: bytes, *pieces: bytes) -> Usage | None:
    meter = create_meter(content_type)
    for piece in pieces:
        meter.feed(piece)
    return meter.usage()


def test_a_streamed_answer_is_counted_from_its_start_and_its_last_delta():
    assert metered(SSE, STREAM) == USED


def test_windows_line_ends_change_nothing():
    assert metered(SSE, STREAM.replace(b"\n", b"\r\n")) == USED


@given(st.lists(st.integers(0, len(STREAM)), max_size=20))
def test_it_does_not_matter_where_the_stream_is_cut(cuts):
    edges = [0, *sorted(cuts), len(STREAM)]
    assert metered(SSE, *(STREAM[a:b] for a, b in itertools.pairwise(edges))) == USED


def test_one_byte_at_a_time():
    assert metered(SSE, *(STREAM[i : i + 1] for i in range(len(STREAM)))) == USED


def test_an_event_too_deep_to_read_is_passed_over():
    deep = b'data: {"type": "message_delta", "x": ' + b"[" * 5_000 + b"\n\n"
    assert metered(SSE, deep + STREAM) == USED


def test_the_last_delta_wins_and_may_correct_the_input():
    again = DELTA | {"usage": {"output_tokens": 70, "input_tokens": 1100, "cache_read_input_tokens": None}}
    usage = metered(SSE, sse(START, DELTA, again))
    assert (usage.input_tokens, usage.output_tokens, usage.cache_read_tokens) == (1100, 70, 2000)


ITERATIONS = [
    {"type": "compaction", "input_tokens": 180_000, "output_tokens": 3500},
    {"type": "message", "input_tokens": 1000, "output_tokens": 50},
    {"type": "advisor_message", "model": "claude-opus-4-1", "input_tokens": 100, "output_tokens": 10},
]


def test_what_is_billed_beside_the_answer_is_counted_at_its_own_models_price():
    delta = DELTA | {"usage": {"output_tokens": 50, "iterations": ITERATIONS}}
    usage = metered(SSE, sse(START, delta))
    assert (usage.input_tokens, usage.output_tokens) == (181_100, 3560)
    assert (usage.cache_read_tokens, usage.cache_write_tokens) == (2000, 3000)
    assert usage.cost_usd == pytest.approx(COST + (180_000 * 3 + 3500 * 15 + 100 * 15 + 10 * 75) / 1e6)


def told(model: str, *iterations: dict, **counts: int) -> Usage | None:
    document = {"model": model, "usage": counts | {"iterations": list(iterations)}}
    return metered(b"application/json", json.dumps(document).encode())


def test_what_the_model_reads_again_after_an_advisors_word_is_counted_too():
    """On the top level stands the input of the first round only, and the output of all."""
    usage = told(
        "claude-sonnet-4-5",
        {"type": "message", "input_tokens": 400, "output_tokens": 90},
        {"type": "advisor_message", "model": "claude-opus-4-1", "input_tokens": 800, "output_tokens": 1600},
        {"type": "message", "input_tokens": 1500, "cache_read_input_tokens": 400, "output_tokens": 450},
        input_tokens=400,
        output_tokens=540,
    )
    assert (usage.model, usage.input_tokens, usage.output_tokens) == ("claude-sonnet-4-5", 2700, 2140)
    assert usage.cache_read_tokens == 400
    assert usage.cost_usd == pytest.approx((1900 * 3 + 540 * 15 + 400 * 0.3 + 800 * 15 + 1600 * 75) / 1e6)


def test_an_answer_that_another_model_began_costs_what_both_have_used():
    usage = told(
        "claude-opus-4-8",
        {"type": "message", "model": "claude-fable-5", "input_tokens": 1000, "output_tokens": 20},
        {"type": "fallback_message", "model": "claude-opus-4-8", "input_tokens": 1000, "output_tokens": 50},
        input_tokens=1000,
        output_tokens=50,
    )
    assert (usage.input_tokens, usage.output_tokens) == (2000, 70)
    assert usage.cost_usd == pytest.approx((1000 * 10 + 20 * 50 + 1000 * 5 + 50 * 25) / 1e6)


def test_an_answer_costs_no_less_for_what_is_told_of_its_parts():
    part = {"type": "message", "model": "claude-haiku-4-5", "input_tokens": 600, "output_tokens": 10}
    whole = {"input_tokens": 1000, "output_tokens": 50, "cache_read_input_tokens": 7}
    assert told("claude-opus-4-1", part, **whole) == told("claude-opus-4-1", **whole)
    assert told("claude-opus-4-1", part, input_tokens=0).cost_usd == pytest.approx((600 * 1 + 10 * 5) / 1e6)


@pytest.mark.parametrize(("geo", "factor"), [("us", 1.1), ("global", 1), ("not_available", 1), (None, 1), (["us"], 1)])
def test_tokens_cost_more_where_an_answer_was_made_in_one_country(geo, factor):
    usage = {"input_tokens": 1000, "inference_geo": geo, "server_tool_use": {"web_search_requests": 1}}
    start = {"type": "message_start", "message": {"model": "claude-opus-5", "usage": usage}}
    assert metered(SSE, sse(start)).cost_usd == pytest.approx(1000 * 5 / 1e6 * factor + 0.01)


@pytest.mark.parametrize("told", [-1, 10**400, 1.5, "3", None, [3], {"n": 3}])
def test_a_number_of_searches_that_is_none_is_not_counted(told):
    searched = {"server_tool_use": {"web_search_requests": told}}
    assert metered(SSE, sse(START, DELTA | {"usage": {"output_tokens": 50} | searched})) == USED


def test_searches_of_the_models_own_servers_are_paid_for_beside_the_tokens():
    searched = {"server_tool_use": {"web_search_requests": 3, "web_fetch_requests": 9}}
    usage = metered(SSE, sse(START, DELTA | {"usage": {"output_tokens": 50} | searched}))
    assert usage.cost_usd == pytest.approx(COST + 0.03)
    earlier = DELTA | {"usage": {"output_tokens": 9, "server_tool_use": {"web_search_requests": 1}}}
    again = DELTA | {"usage": {"output_tokens": 50} | searched}
    assert metered(SSE, sse(START, earlier, again, DELTA)).cost_usd == pytest.approx(COST + 0.03)
    document = {"model": "claude-opus-4-1", "usage": {"input_tokens": 0} | searched}
    assert metered(b"application/json", json.dumps(document).encode()).cost_usd == 0.03
    assert metered(SSE, sse(START, DELTA | {"usage": {"output_tokens": 50, "server_tool_use": None}})) == USED


@pytest.mark.parametrize("odd", [[], 3, {"web_search_requests": 1.5}, {"web_search_requests": -1}, "x"])
def test_counts_beside_which_something_odd_is_told_are_read(odd):
    assert metered(SSE, sse(START, DELTA | {"usage": {"output_tokens": 50, "server_tool_use": odd}})) == USED


def test_an_advisor_without_a_price_leaves_the_answer_without_one():
    unknown = [{"type": "advisor_message", "model": "nobody-knows-it", "input_tokens": 1, "output_tokens": 1}]
    usage = metered(SSE, sse(START, DELTA | {"usage": {"iterations": unknown}}))
    assert (usage.model, usage.cost_usd) == ("nobody-knows-it", None)


def test_a_broken_answer_is_counted_as_far_as_it_came():
    usage = metered(SSE, sse(START, TEXT))
    assert (usage.input_tokens, usage.output_tokens) == (1000, 1)


def test_nothing_is_counted_before_a_model_has_answered():
    assert metered(SSE, sse({"type": "ping"}, {"type": "error", "error": {"type": "overloaded_error"}})) is None
    assert metered(SSE) is None


def test_a_line_over_the_bound_passes_unread_and_the_next_is_read():
    huge = b"data: " + b"x" * (SSE_LINE_BYTES_MAX + 1) + b"\n\n"
    assert metered(SSE, sse(START), huge, sse(DELTA)) == USED


def test_a_line_just_under_the_bound_is_read():
    padded = DELTA | {"padding": "x" * (SSE_LINE_BYTES_MAX - 200)}
    assert metered(SSE, sse(START, padded)) == USED


def test_what_is_kept_of_an_endless_line_is_bounded():
    meter = create_meter(SSE)
    for _ in range(64):
        meter.feed(b"x" * 65536)
    assert len(meter._line) <= SSE_LINE_BYTES_MAX


@pytest.mark.parametrize(
    "line",
    [
        b'data: {"type":"message_delta","usage":{"output_tokens":-5}}\n',
        b'data: {"type":"message_delta","usage":{"output_tokens":"many"}}\n',
        b'data: {"type":"message_delta","usage":[]}\n',
        b'data: {"type":"message_delta"\n',
        b'data: {"type":"message_delta","usage":{"output_tokens":1e400}}\n',
        b'data: "message_delta"\n',
        b'data: {"type":"message_delta","usage":{"output_tokens":99999999999999999999999999}}\n',
    ],
)
def test_a_senseless_delta_changes_no_count(line):
    assert metered(SSE, sse(START, DELTA), line) == USED


def test_an_hour_of_cache_costs_more_than_five_minutes():
    def cost(cache_creation):
        used = {"cache_creation_input_tokens": 1_000_000, "cache_creation": cache_creation}
        return metered(SSE, sse({"type": "message_start", "message": {"model": "claude-haiku-4-5", "usage": used}}))

    assert cost({"ephemeral_1h_input_tokens": 0}).cost_usd == 1.25
    assert cost({"ephemeral_1h_input_tokens": 1_000_000}).cost_usd == 2.0
    assert cost({"ephemeral_1h_input_tokens": 9_000_000}).cost_usd == 2.0


def test_an_answer_without_streaming_is_counted_from_its_document():
    body = json.dumps(
        {"type": "message", "model": "claude-opus-4-1", "usage": {"input_tokens": 10, "output_tokens": 2}}
    )
    half = len(body) // 2
    usage = metered(b"application/json", body[:half].encode(), body[half:].encode())
    assert usage == Usage("claude-opus-4-1", 10, 2, 0, 0, pytest.approx((10 * 15 + 2 * 75) / 1e6))


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model":"m"}', b'{"model":"m","usage":3}', b"\xff" * 9])
def test_a_document_without_usage_counts_nothing(body):
    assert metered(b"application/json", body) is None


def test_a_document_over_the_bound_is_not_kept():
    meter = create_meter(b"application/json")
    for _ in range(JSON_BODY_BYTES_MAX // 65536 + 2):
        meter.feed(b" " * 65536)
    assert meter.usage() is None
    assert len(meter._body) == 0


@given(st.binary(), st.sampled_from([SSE, b"application/json", b""]))
def test_no_bytes_make_it_raise(data, content_type):
    meter = create_meter(content_type)
    meter.feed(data)
    meter.usage()
