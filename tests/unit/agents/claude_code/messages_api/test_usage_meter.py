"""The gateway meters the cost of a response while it streams. Splitting the stream does not change the result."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.agents.claude_code.messages_api.usage_meter import JSON_BODY_BYTES_MAX, SSE_LINE_BYTES_MAX, create_meter
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
STREAM_USAGE = Usage("claude-sonnet-4-5-20250929", 1000, 50, 2000, 3000, pytest.approx(COST))


def meter_usage(content_type: bytes, *pieces: bytes) -> Usage | None:
    meter = create_meter(content_type)
    for piece in pieces:
        meter.feed(piece)
    return meter.usage()


def test_stream_usage_comes_from_the_start_and_the_last_delta():
    assert meter_usage(SSE, STREAM) == STREAM_USAGE


def test_crlf_line_endings_are_accepted():
    assert meter_usage(SSE, STREAM.replace(b"\n", b"\r\n")) == STREAM_USAGE


@given(st.lists(st.integers(0, len(STREAM)), max_size=20))
def test_fragmentation_does_not_change_the_usage(cuts):
    edges = [0, *sorted(cuts), len(STREAM)]
    assert meter_usage(SSE, *(STREAM[a:b] for a, b in itertools.pairwise(edges))) == STREAM_USAGE


def test_stream_of_single_bytes_is_counted():
    assert meter_usage(SSE, *(STREAM[i : i + 1] for i in range(len(STREAM)))) == STREAM_USAGE


def test_deeply_nested_event_is_skipped():
    deep = b'data: {"type": "message_delta", "x": ' + b"[" * 5_000 + b"\n\n"
    assert meter_usage(SSE, deep + STREAM) == STREAM_USAGE


def test_last_delta_can_correct_the_input_token_count():
    second_delta = DELTA | {"usage": {"output_tokens": 70, "input_tokens": 1100, "cache_read_input_tokens": None}}
    usage = meter_usage(SSE, sse(START, DELTA, second_delta))
    assert (usage.input_tokens, usage.output_tokens, usage.cache_read_tokens) == (1100, 70, 2000)


ITERATIONS = [
    {"type": "compaction", "input_tokens": 180_000, "output_tokens": 3500},
    {"type": "message", "input_tokens": 1000, "output_tokens": 50},
    {"type": "advisor_message", "model": "claude-opus-4-1", "input_tokens": 100, "output_tokens": 10},
]


def test_iterations_are_charged_at_the_price_of_their_model():
    delta = DELTA | {"usage": {"output_tokens": 50, "iterations": ITERATIONS}}
    usage = meter_usage(SSE, sse(START, delta))
    assert (usage.input_tokens, usage.output_tokens) == (181_100, 3560)
    assert (usage.cache_read_tokens, usage.cache_write_tokens) == (2000, 3000)
    assert usage.cost_usd == pytest.approx(COST + (180_000 * 3 + 3500 * 15 + 100 * 15 + 10 * 75) / 1e6)


def json_usage(model: str, *iterations: dict, **counts: int) -> Usage | None:
    document = {"model": model, "usage": counts | {"iterations": list(iterations)}}
    return meter_usage(b"application/json", json.dumps(document).encode())


def test_input_after_an_advisor_response_is_counted():
    """The top-level usage includes the input of only the first iteration, but the output of all iterations."""
    usage = json_usage(
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


def test_fallback_response_costs_the_usage_of_both_models():
    usage = json_usage(
        "claude-opus-4-8",
        {"type": "message", "model": "claude-fable-5", "input_tokens": 1000, "output_tokens": 20},
        {"type": "fallback_message", "model": "claude-opus-4-8", "input_tokens": 1000, "output_tokens": 50},
        input_tokens=1000,
        output_tokens=50,
    )
    assert (usage.input_tokens, usage.output_tokens) == (2000, 70)
    assert usage.cost_usd == pytest.approx((1000 * 10 + 20 * 50 + 1000 * 5 + 50 * 25) / 1e6)


def test_iterations_do_not_reduce_the_cost():
    part = {"type": "message", "model": "claude-haiku-4-5", "input_tokens": 600, "output_tokens": 10}
    whole = {"input_tokens": 1000, "output_tokens": 50, "cache_read_input_tokens": 7}
    assert json_usage("claude-opus-4-1", part, **whole) == json_usage("claude-opus-4-1", **whole)
    assert json_usage("claude-opus-4-1", part, input_tokens=0).cost_usd == pytest.approx((600 * 1 + 10 * 5) / 1e6)


@pytest.mark.parametrize("model", ["", "claude-opus-4-1"])
def test_iteration_without_a_model_uses_the_model_of_the_response(model):
    usage = json_usage(model, {"type": "message", "output_tokens": 9}, output_tokens=9)
    assert (usage.model, usage.output_tokens) == (model, 9)
    assert usage.cost_usd == (pytest.approx(9 * 75 / 1e6) if model else None)


@pytest.mark.parametrize(("geo", "factor"), [("us", 1.1), ("global", 1), ("not_available", 1), (None, 1), (["us"], 1)])
def test_us_inference_geo_raises_the_token_price(geo, factor):
    usage = {"input_tokens": 1000, "inference_geo": geo, "server_tool_use": {"web_search_requests": 1}}
    start = {"type": "message_start", "message": {"model": "claude-opus-5", "usage": usage}}
    assert meter_usage(SSE, sse(start)).cost_usd == pytest.approx(1000 * 5 / 1e6 * factor + 0.01)


@pytest.mark.parametrize("count", [-1, 10**400, 1.5, "3", None, [3], {"n": 3}])
def test_invalid_search_count_is_ignored(count):
    search_usage = {"server_tool_use": {"web_search_requests": count}}
    assert meter_usage(SSE, sse(START, DELTA | {"usage": {"output_tokens": 50} | search_usage})) == STREAM_USAGE


def test_web_searches_are_charged_in_addition_to_tokens():
    search_usage = {"server_tool_use": {"web_search_requests": 3, "web_fetch_requests": 9}}
    usage = meter_usage(SSE, sse(START, DELTA | {"usage": {"output_tokens": 50} | search_usage}))
    assert usage.cost_usd == pytest.approx(COST + 0.03)
    earlier = DELTA | {"usage": {"output_tokens": 9, "server_tool_use": {"web_search_requests": 1}}}
    second_delta = DELTA | {"usage": {"output_tokens": 50} | search_usage}
    assert meter_usage(SSE, sse(START, earlier, second_delta, DELTA)).cost_usd == pytest.approx(COST + 0.03)
    document = {"model": "claude-opus-4-1", "usage": {"input_tokens": 0} | search_usage}
    assert meter_usage(b"application/json", json.dumps(document).encode()).cost_usd == 0.03
    assert (
        meter_usage(SSE, sse(START, DELTA | {"usage": {"output_tokens": 50, "server_tool_use": None}})) == STREAM_USAGE
    )


@pytest.mark.parametrize("server_tool_use", [[], 3, {"web_search_requests": 1.5}, {"web_search_requests": -1}, "x"])
def test_invalid_server_tool_use_does_not_affect_token_counts(server_tool_use):
    assert (
        meter_usage(SSE, sse(START, DELTA | {"usage": {"output_tokens": 50, "server_tool_use": server_tool_use}}))
        == STREAM_USAGE
    )


def test_unpriced_advisor_makes_the_cost_unknown():
    iterations = [{"type": "advisor_message", "model": "nobody-knows-it", "input_tokens": 1, "output_tokens": 1}]
    usage = meter_usage(SSE, sse(START, DELTA | {"usage": {"iterations": iterations}}))
    assert (usage.model, usage.cost_usd) == ("nobody-knows-it", None)


def test_truncated_stream_has_partial_usage():
    usage = meter_usage(SSE, sse(START, TEXT))
    assert (usage.input_tokens, usage.output_tokens) == (1000, 1)


def test_stream_without_message_start_has_no_usage():
    assert meter_usage(SSE, sse({"type": "ping"}, {"type": "error", "error": {"type": "overloaded_error"}})) is None
    assert meter_usage(SSE) is None


def test_line_over_the_limit_is_skipped():
    huge = b"data: " + b"x" * (SSE_LINE_BYTES_MAX + 1) + b"\n\n"
    assert meter_usage(SSE, sse(START), huge, sse(DELTA)) == STREAM_USAGE


def test_line_under_the_limit_is_parsed():
    padded = DELTA | {"padding": "x" * (SSE_LINE_BYTES_MAX - 200)}
    assert meter_usage(SSE, sse(START, padded)) == STREAM_USAGE


def test_buffer_of_an_unterminated_line_is_bounded():
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
def test_invalid_delta_is_ignored(line):
    assert meter_usage(SSE, sse(START, DELTA), line) == STREAM_USAGE


def test_one_hour_cache_costs_more_than_a_five_minute_cache():
    def cost(cache_creation):
        used = {"cache_creation_input_tokens": 1_000_000, "cache_creation": cache_creation}
        return meter_usage(SSE, sse({"type": "message_start", "message": {"model": "claude-haiku-4-5", "usage": used}}))

    assert cost({"ephemeral_1h_input_tokens": 0}).cost_usd == 1.25
    assert cost({"ephemeral_1h_input_tokens": 1_000_000}).cost_usd == 2.0
    assert cost({"ephemeral_1h_input_tokens": 9_000_000}).cost_usd == 2.0


def test_json_response_is_metered():
    body = json.dumps(
        {"type": "message", "model": "claude-opus-4-1", "usage": {"input_tokens": 10, "output_tokens": 2}}
    )
    half = len(body) // 2
    usage = meter_usage(b"application/json", body[:half].encode(), body[half:].encode())
    assert usage == Usage("claude-opus-4-1", 10, 2, 0, 0, pytest.approx((10 * 15 + 2 * 75) / 1e6))


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model":"m"}', b'{"model":"m","usage":3}', b"\xff" * 9])
def test_json_response_without_usage_is_not_metered(body):
    assert meter_usage(b"application/json", body) is None


def test_json_response_over_the_limit_is_discarded():
    meter = create_meter(b"application/json")
    for _ in range(JSON_BODY_BYTES_MAX // 65536 + 2):
        meter.feed(b" " * 65536)
    assert meter.usage() is None
    assert len(meter._body) == 0


@given(st.binary(), st.sampled_from([SSE, b"application/json", b""]))
def test_arbitrary_bytes_do_not_raise(data, content_type):
    meter = create_meter(content_type)
    meter.feed(data)
    meter.usage()
