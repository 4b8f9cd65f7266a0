"""The upper bound on a truncated response's usage: one token per received byte, up to the requested maximum."""

import json

import pytest

from sandbox.agents.claude_code.messages_api.pricing import PRICED_MODELS
from sandbox.agents.claude_code.messages_api.usage_meter import (
    SSE_LINE_BYTES_MAX,
    USAGE_BYTES_MAX,
    JsonMeter,
    StreamMeter,
    create_meter,
)
from sandbox.gateway.model_api.request_gate import TOKENS_MAX, valid_usage
from sandbox.interfaces.gateway import CostBound
from sandbox.model.events import Usage

MODEL = "claude-haiku-4-5"
EVENT_OVERHEAD_BYTES = 80
"""The number of bytes in an event line that are not part of its text."""

REQUEST_BOUND = CostBound("claude-opus-4-1", 500, 64_000, is_streamed=True)


def line(event: dict) -> bytes:
    return f"data: {json.dumps(event)}\n".encode()


def start(**usage: object) -> bytes:
    return line({"type": "message_start", "message": {"model": MODEL, "usage": usage}})


def delta(**usage: object) -> bytes:
    return line({"type": "message_delta", "usage": usage})


def text(byte_count: int) -> bytes:
    """Return a line of `byte_count` bytes, followed by a newline."""
    return (b'data: {"type":"content_block_delta"' + b"x" * byte_count)[:byte_count] + b"\n"


def stream_meter_fed(*pieces: bytes) -> StreamMeter:
    meter = StreamMeter()
    for piece in pieces:
        meter.feed(piece)
    return meter


def output_tokens_bound(
    *pieces: bytes, first_line: bytes = start(input_tokens=10, output_tokens=1), bound: CostBound = REQUEST_BOUND
) -> int:
    """Return the output token bound for a response truncated after these pieces, not counting its first line."""
    first_line_tokens = max(0, len(first_line) - 1 - EVENT_OVERHEAD_BYTES)
    return (
        stream_meter_fed(first_line, *pieces).upper_bound(bound, is_fully_received=True).output_tokens
        - first_line_tokens
    )


# Streams


@pytest.mark.parametrize("byte_count", [EVENT_OVERHEAD_BYTES + 1, 200, 5000])
def test_overhead_bytes_of_each_line_are_not_counted(byte_count):
    assert output_tokens_bound(text(byte_count)) == byte_count - EVENT_OVERHEAD_BYTES
    assert output_tokens_bound(*[text(byte_count)] * 3) == 3 * (byte_count - EVENT_OVERHEAD_BYTES)
    assert output_tokens_bound(text(byte_count)[:50], text(byte_count)[50:]) == byte_count - EVENT_OVERHEAD_BYTES


@pytest.mark.parametrize("byte_count", [10, EVENT_OVERHEAD_BYTES - 1, EVENT_OVERHEAD_BYTES])
def test_line_of_at_most_the_overhead_size_counts_as_zero_tokens(byte_count):
    assert output_tokens_bound(text(byte_count), text(EVENT_OVERHEAD_BYTES + 5)) == 5


@pytest.mark.parametrize("other", [b"event: " + b"x" * 500 + b"\n", b": " + b"x" * 500 + b"\n", b"\n", b"\r\n"])
def test_lines_without_data_count_as_zero_tokens(other):
    assert output_tokens_bound(other) == 0


def test_unterminated_line_counts_in_full():
    assert output_tokens_bound(text(300)[:-1]) == 300
    assert output_tokens_bound(text(200), b"da") == 200 - EVENT_OVERHEAD_BYTES + 2
    assert output_tokens_bound(b"x") == 1


def test_line_over_the_limit_counts_in_full():
    half = b"x" * (SSE_LINE_BYTES_MAX // 2)
    bound = CostBound(MODEL, 500, 10**7, is_streamed=True)
    assert output_tokens_bound(half, half, bound=bound) == SSE_LINE_BYTES_MAX
    assert output_tokens_bound(half, half, b"x", bound=bound) == SSE_LINE_BYTES_MAX + 1
    assert output_tokens_bound(half, half, b"xy", b"z", bound=bound) == SSE_LINE_BYTES_MAX + 3
    assert output_tokens_bound(half, half, b"x", half, b"\n", bound=bound) == SSE_LINE_BYTES_MAX + 1 + len(half)
    assert (
        output_tokens_bound(half, half, b"x\n", text(EVENT_OVERHEAD_BYTES + 7), bound=bound)
        == SSE_LINE_BYTES_MAX + 1 + 7
    )


def test_line_is_parsed_up_to_the_limit():
    for size, output in ((1_048_576, 42), (1_048_577, 1)):
        event = delta(output_tokens=42)[:-2]
        whole = event + b" " * (size - len(event) - 1) + b"}\n"
        assert stream_meter_fed(start(output_tokens=1), whole).usage().output_tokens == output
        assert stream_meter_fed(start(output_tokens=1), whole, delta(output_tokens=43)).usage().output_tokens == 43


def test_upper_bound_includes_the_output_of_an_advisor_at_its_price():
    bound = CostBound("claude-opus-4-1", 500, 6300, is_streamed=True, hidden_output_tokens=6000, has_hidden_input=True)
    usage = stream_meter_fed(start(), text(300)).upper_bound(bound, is_fully_received=True)
    visible = output_tokens_bound(start(), text(300), bound=CostBound(MODEL, 500, 300, is_streamed=True))
    assert (usage.model, usage.output_tokens) == ("claude-opus-4-1", 6000 + visible)
    assert stream_meter_fed(start(), text(5000)).upper_bound(bound, is_fully_received=True).output_tokens == 6300


def test_upper_bound_is_between_reported_usage_and_max_tokens():
    assert (
        stream_meter_fed(start(), text(5000))
        .upper_bound(CostBound(MODEL, 1, 300, is_streamed=True), is_fully_received=True)
        .output_tokens
        == 300
    )
    usage = stream_meter_fed(start(), delta(output_tokens=900)).upper_bound(
        CostBound(MODEL, 1, 300, is_streamed=True), is_fully_received=True
    )
    assert usage.output_tokens == 900
    assert (
        stream_meter_fed(start(), delta(output_tokens=9), text(500))
        .upper_bound(REQUEST_BOUND, is_fully_received=True)
        .output_tokens
        > 9
    )


def test_max_tokens_are_counted_if_the_response_was_not_fully_received():
    for pieces in ([], [start(input_tokens=10)], [start(input_tokens=10), text(500)]):
        assert stream_meter_fed(*pieces).upper_bound(REQUEST_BOUND, is_fully_received=False).output_tokens == 64_000


def test_input_of_the_request_is_used_if_no_input_is_reported():
    assert (
        stream_meter_fed(start(input_tokens=10)).upper_bound(REQUEST_BOUND, is_fully_received=True).input_tokens == 10
    )
    assert stream_meter_fed(start(input_tokens=0)).upper_bound(REQUEST_BOUND, is_fully_received=True).input_tokens == 0
    assert stream_meter_fed(start()).upper_bound(REQUEST_BOUND, is_fully_received=True).input_tokens == 500
    assert stream_meter_fed().upper_bound(REQUEST_BOUND, is_fully_received=True).input_tokens == 500


def test_upper_bound_uses_the_most_expensive_model_of_request_and_response():
    """After a fallback, the stream continues with a model that its start does not name."""
    assert stream_meter_fed(start()).upper_bound(REQUEST_BOUND, is_fully_received=True).model == "claude-opus-4-1"
    for requested in ("claude-3-5-haiku", "nobody-knows-it", MODEL):
        bound = CostBound(requested, 500, 64_000, is_streamed=True)
        assert stream_meter_fed(start()).upper_bound(bound, is_fully_received=True).model == MODEL
    unpriced = line({"type": "message_start", "message": {"model": "nobody-knows-it"}})
    usage = stream_meter_fed(unpriced).upper_bound(REQUEST_BOUND, is_fully_received=True)
    assert (usage.model, usage.cost_usd) == ("nobody-knows-it", None)


def test_reported_input_does_not_replace_the_bound_if_the_model_reads_more_later():
    bound = CostBound(MODEL, 500, 64_000, is_streamed=True, has_hidden_input=True)
    for reported, expected in ((10, 500), (900, 900)):
        meter = stream_meter_fed(start(input_tokens=reported))
        assert meter.upper_bound(bound, is_fully_received=True).input_tokens == expected


def test_model_of_the_request_is_used_if_the_response_names_no_model():
    usage = stream_meter_fed(b": nothing\n").upper_bound(REQUEST_BOUND, is_fully_received=False)
    assert usage == Usage("claude-opus-4-1", 500, 64_000, 0, 0, (500 * 15 + 64_000 * 75) / 1e6)


# Completeness


@pytest.mark.parametrize(
    ("pieces", "is_complete"),
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
def test_stream_is_complete_after_a_delta_with_output_tokens(pieces, is_complete):
    assert stream_meter_fed(*pieces).is_complete is is_complete


def test_stream_has_started_after_a_message_start():
    assert not stream_meter_fed(b"event: message_start\n", start()[:-1]).has_started
    started = stream_meter_fed(start())
    assert started.has_started
    assert started.partial_usage() == started.usage() == Usage(MODEL, 0, 0, 0, 0, 0.0)


ERROR = {"type": "error", "error": {"type": "overloaded_error"}}
UNKNOWN_TEXT = {"type": "content_block_delta", "delta": {"text": "x" * 500}}


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [b": comment\n\n", b"event: ping\r\n", line({"type": "ping"}), b"\r\n"],
        [b"event: error\n", line(ERROR), b"\n"],
        [b"retry: 3\nid: 1\n", b"da"],
        [line({"type": "ping"}), b'data: {"type":"mess'],
        [b": comment\r"],
    ],
)
def test_stream_of_pings_and_errors_has_not_started(pieces):
    assert not stream_meter_fed(*pieces).has_started


@pytest.mark.parametrize("text", [b":\r:", b":\r::", b": comment\rdata", b":\r\r"])
def test_stream_with_carriage_returns_as_line_endings_has_started(text):
    """Other clients accept them, but the gateway cannot find the response's start."""
    assert stream_meter_fed(text).has_started


@pytest.mark.parametrize(
    ("pieces", "output"),
    [
        ([line(UNKNOWN_TEXT)], None),
        ([line({"type": "message_start"}), line(UNKNOWN_TEXT)], None),
        ([line({"type": "message_start", "message": {"model": MODEL, "usage": {"input_tokens": -1}}})], 64_000),
        ([delta(output_tokens=900)], 900),
        ([b'data: {"type": "message_delta",\ndata: "usage": {"output_tokens": 5}}\n\n'], 64_000),
        ([start().replace(b"\n", b"\r"), line(UNKNOWN_TEXT).replace(b"\n", b"\r")], 64_000),
        ([b'{"model": "claude-haiku-4-5"}'], 64_000),
        ([b"\x1f\x8b\x08\x00compressed\n"], 64_000),
        ([b"event: x\n", b"other: y\n"], 64_000),
    ],
)
def test_stream_without_a_readable_start_counts_as_started_and_is_bounded(pieces, output):
    """The response used tokens, although the gateway cannot determine which model sent it."""
    meter = stream_meter_fed(*pieces)
    assert (meter.has_started, meter.usage()) == (True, None)
    usage = meter.upper_bound(REQUEST_BOUND, is_fully_received=True)
    assert (usage.model, usage.input_tokens) == (REQUEST_BOUND.model, REQUEST_BOUND.input_tokens)
    if output is not None:
        assert usage.output_tokens == output
    else:
        assert usage.output_tokens <= sum(map(len, pieces))


def test_output_bound_of_a_readable_stream_depends_on_its_text():
    usage = stream_meter_fed(start(), line(UNKNOWN_TEXT)).upper_bound(REQUEST_BOUND, is_fully_received=True)
    assert 400 < usage.output_tokens < 600


def test_fields_of_another_event_type_are_ignored():
    mismatched_event = line(
        {"type": "message_delta", "message": {"model": "claude-opus-4-1"}, "usage": {"output_tokens": 3}}
    )
    assert (
        stream_meter_fed(start(), mismatched_event).usage().model,
        stream_meter_fed(start(), mismatched_event).usage().output_tokens,
    ) == (MODEL, 3)
    outside = {"type": "message_start", "message": {"model": MODEL}, "usage": {"output_tokens": 3}}
    assert stream_meter_fed(line(outside)).usage().output_tokens == 0


def test_response_without_a_model_has_an_empty_model():
    usage = stream_meter_fed(line({"type": "message_start", "message": {"usage": {"input_tokens": 3}}})).usage()
    assert (usage.model, usage.input_tokens, usage.cost_usd) == ("", 3, None)
    assert json_meter_fed(b'{"usage": {"input_tokens": 3}}').usage() == usage


def test_space_after_the_field_name_is_optional():
    assert stream_meter_fed(start().replace(b"data: ", b"data:")).has_started


@pytest.mark.parametrize("name", [b"Data:", b"DATA:", b"datum", b"     "])
def test_line_with_another_field_name_is_ignored(name):
    other = delta(output_tokens=5).replace(b"data:", name)
    meter = stream_meter_fed(start(), other)
    assert (meter.usage().output_tokens, meter.is_complete) == (0, False)
    assert stream_meter_fed(start(), delta(output_tokens=5)).usage().output_tokens == 5


def test_geo_surcharge_is_rounded_to_a_millionth_of_a_dollar():
    assert stream_meter_fed(start(input_tokens=3, inference_geo="us")).usage().cost_usd == 0.000003
    assert stream_meter_fed(start(input_tokens=30, inference_geo="us")).usage().cost_usd == 0.000033
    assert stream_meter_fed(start(input_tokens=30, inference_geo="")).usage().cost_usd == 0.00003


def test_long_model_name_is_replaced_because_its_start_may_be_part_of_a_secret():
    for name, expected in (("m" * 128, "m" * 128), ("m" * 129, "(too-long)")):
        meter = stream_meter_fed(line({"type": "message_start", "message": {"model": name}}))
        assert meter.usage().model == expected
        advisor = delta(iterations=[{"type": "advisor_message", "model": name, "input_tokens": 1}])
        assert stream_meter_fed(start(), advisor).usage().model == expected
    meter = stream_meter_fed(
        start(input_tokens=1).replace(MODEL.encode(), b"x" * 100 + b"a-secret-value-of-40-characters-in-total")
    )
    assert "secret" not in meter.usage().model


def usage_of_size(byte_count: int) -> str:
    """Return a JSON usage object of this size, with as many iterations as fit."""
    prefix = '{"output_tokens":7,"iterations":['
    iterations = ",".join(["{}"] * ((byte_count - len(prefix) - 2) // 3))
    return (prefix + iterations).ljust(byte_count - 2) + "]}"


@pytest.mark.parametrize(("byte_count", "is_read"), [(16_384, True), (16_385, False)])
def test_large_usage_is_not_read(byte_count, is_read):
    """Decoding many iterations would use a lot of memory, and would take time for each part of the response."""
    usage = usage_of_size(byte_count)
    stream = stream_meter_fed(start(input_tokens=1), f'data: {{"type":"message_delta","usage":{usage}}}\n'.encode())
    document = json_meter_fed(f'{{"model":"{MODEL}","usage":{usage}}}'.encode())
    assert stream.usage().output_tokens == (7 if is_read else 0)
    assert (document.usage() is not None) is is_read
    assert (stream.is_complete, document.is_complete) == (is_read, is_read)


def test_counts_of_the_largest_usage_are_plausible():
    """The meter adds up the tokens of all iterations. A usage with an implausible sum would be ignored."""
    item = {"type": "advisor_message", "input_tokens": 10**9}
    usage = {"output_tokens": 1, "iterations": [item] * (USAGE_BYTES_MAX // 61)}
    assert USAGE_BYTES_MAX * 0.9 < len(json.dumps(usage)) <= USAGE_BYTES_MAX
    assert 10**9 < stream_meter_fed(start(), delta(**usage)).usage().input_tokens < TOKENS_MAX


@pytest.mark.parametrize("model", PRICED_MODELS)
def test_cost_of_the_largest_usage_is_valid(model):
    """A server rejects a worker's records if their cost exceeds the maximum."""
    iterations = [{"type": "compaction", "output_tokens": 10**9}] * (USAGE_BYTES_MAX // 56)
    searches = {"web_search_requests": 10**9}
    usage = {"input_tokens": 10**9, "iterations": iterations, "server_tool_use": searches}
    assert USAGE_BYTES_MAX * 0.9 < len(json.dumps(usage)) <= USAGE_BYTES_MAX
    counted = json_meter_fed(json.dumps({"model": model, "usage": usage}).encode()).usage()
    assert counted.output_tokens > 10**11
    assert valid_usage(counted) is counted


def test_usage_is_computed_once_for_each_change():
    meter = stream_meter_fed(start(input_tokens=1), delta(output_tokens=3))
    usage = meter.partial_usage()
    meter.feed(text(100))
    assert meter.partial_usage() is usage
    meter.feed(delta(output_tokens=4))
    assert meter.partial_usage().output_tokens == 4


# Documents


def json_meter_fed(body: bytes) -> JsonMeter:
    meter = JsonMeter()
    meter.feed(body)
    return meter


COMPLETE_RESPONSE = json.dumps({"model": MODEL, "usage": {"input_tokens": 10, "output_tokens": 2}}).encode()


def test_json_response_is_complete_when_it_can_be_parsed_and_reports_output():
    assert json_meter_fed(COMPLETE_RESPONSE).is_complete
    assert not json_meter_fed(COMPLETE_RESPONSE[:-1]).is_complete
    assert not json_meter_fed(b'{"model": "m"}').is_complete
    for usage in (b"{}", b'{"input_tokens": 10}', b'{"output_tokens": null}'):
        assert not json_meter_fed(b'{"model": "m", "usage": %b}' % usage).is_complete
    for meter in (json_meter_fed(b""), json_meter_fed(COMPLETE_RESPONSE)):
        assert meter.has_started
        assert meter.partial_usage() is None


def test_truncated_json_response_counts_max_tokens():
    for body in (b"", COMPLETE_RESPONSE[:-1], COMPLETE_RESPONSE):
        for is_fully_received in (True, False):
            usage = json_meter_fed(body).upper_bound(REQUEST_BOUND, is_fully_received=is_fully_received)
            assert (usage.model, usage.input_tokens, usage.output_tokens) == ("claude-opus-4-1", 500, 64_000)


def test_json_response_is_parsed_up_to_the_limit():
    padded = COMPLETE_RESPONSE.ljust(4_194_304)
    assert json_meter_fed(padded).is_complete
    oversized = json_meter_fed(padded + b" ")
    assert not oversized.is_complete
    oversized.feed(COMPLETE_RESPONSE)
    assert not oversized.is_complete, "later data belongs to the same document"


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
def test_meter_is_chosen_by_content_type(content_type, kind):
    assert type(create_meter(content_type)) is kind


# Counts


@pytest.mark.parametrize(
    "name", ["input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"]
)
def test_counts_out_of_range_are_ignored(name):
    for count, expected in ((10**9, 10**9), (0, 0)):
        usage = stream_meter_fed(start(), delta(**{name: count})).usage()
        assert (
            sum((usage.input_tokens, usage.output_tokens, usage.cache_read_tokens, usage.cache_write_tokens))
            == expected
        )
    for count in (10**9 + 1, -1):
        assert (
            stream_meter_fed(start(input_tokens=7), delta(**{name: count})).usage()
            == stream_meter_fed(start(input_tokens=7)).usage()
        )


def test_search_counts_out_of_range_are_ignored():
    def cost(searches: int) -> float:
        return stream_meter_fed(start(server_tool_use={"web_search_requests": searches})).usage().cost_usd

    assert [cost(0), cost(1), cost(10**9), cost(10**9 + 1), cost(-1)] == [0.0, 0.01, 10.0**7, 0.0, 0.0]


def test_later_search_count_of_zero_replaces_an_earlier_count():
    searched = delta(server_tool_use={"web_search_requests": 3})
    none = delta(server_tool_use={"web_search_requests": 0})
    assert stream_meter_fed(start(), searched, none).usage().cost_usd == 0.0


def test_cheaper_iteration_does_not_reduce_the_cost_of_the_response():
    whole = {"input_tokens": 1000, "output_tokens": 50}
    part = {"type": "message", "model": "claude-haiku-4-5", **whole}
    advisor = {"type": "advisor_message", "model": "claude-opus-4-1", "input_tokens": 100, "output_tokens": 10}
    message_start = line({"type": "message_start", "message": {"model": "claude-opus-4-1", "usage": whole}})
    usage = stream_meter_fed(message_start, delta(iterations=[part, advisor])).usage()
    assert usage.cost_usd == pytest.approx((1100 * 15 + 60 * 75) / 1e6)
    assert (usage.input_tokens, usage.output_tokens) == (1100, 60)
