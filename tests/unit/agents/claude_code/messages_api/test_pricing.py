"""Model prices."""

import time

import pytest

from sandbox.agents.claude_code.messages_api.pricing import (
    IMAGE_TOKENS_MAX,
    INPUT_TOKENS_MAX,
    OUTPUT_TOKENS_MAX,
    PRICES_DATE,
    TokenCounts,
    cost_usd,
    estimate_cost_bound,
    find_price,
    most_expensive,
)


@pytest.mark.parametrize(
    ("model", "input_", "output"),
    [
        ("claude-sonnet-4-5-20250929", 3, 15),
        ("claude-sonnet-4-20250514", 3, 15),
        ("claude-sonnet-4-0", 3, 15),
        ("claude-opus-4-20250514", 15, 75),
        ("claude-opus-4-1-20250805", 15, 75),
        ("claude-opus-4-5-20251101", 5, 25),
        ("claude-opus-4-5[1m]", 5, 25),
        ("claude-haiku-4-5-20251001", 1, 5),
        ("claude-3-5-haiku-20241022", 0.8, 4),
        ("claude-3-5-haiku-latest", 0.8, 4),
        ("claude-opus-5-5", 4, 20),
    ],
)
def test_price_is_found_by_dated_and_undated_name(model, input_, output):
    price = find_price(model)
    assert price is not None
    assert (price.input, price.output) == (input_, output)


@pytest.mark.parametrize(
    "model", ["", "claude", "claude-opus-4-99", "claude-opus-4-20250514-x", "my-own-model", "gpt-5"]
)
def test_unknown_model_has_no_price(model):
    assert find_price(model) is None
    assert cost_usd(model, TokenCounts(1, 1)) is None


def test_cost_includes_every_kind_of_token():
    tokens = TokenCounts(input=1_000_000, output=1_000_000, cache_read=1_000_000, cache_write=1_000_000)
    assert cost_usd("claude-opus-4-8", tokens) == 5 + 25 + 0.5 + 6.25


def test_long_prompt_price_applies_from_the_first_token():
    assert cost_usd("claude-haiku-5-5", TokenCounts(100_000, 1000)) == pytest.approx(0.01 + 0.0005)
    assert cost_usd("claude-haiku-5-5", TokenCounts(1, 1000, cache_read=100_000)) == pytest.approx(
        0.005 + 0.0025, abs=1e-5
    )


@pytest.mark.parametrize(
    ("fields", "model"),
    [
        ({}, "claude-haiku-4-5"),
        ({"fallbacks": [{"model": "claude-3-5-haiku"}]}, "claude-haiku-4-5"),
        ({"fallbacks": [{"model": "claude-opus-4-1"}]}, "claude-opus-4-1"),
        ({"fallbacks": [{"model": "nobody-knows-it"}]}, "claude-haiku-4-5"),
        ({"model": "nobody-knows-it", "fallbacks": [{"model": "claude-3-5-haiku"}]}, "claude-3-5-haiku"),
    ],
)
def test_cost_bound_uses_the_most_expensive_model_of_a_request(fields, model):
    bound = estimate_cost_bound({"model": "claude-haiku-4-5", "max_tokens": 5} | fields, 300)
    assert (bound.model, bound.input_tokens, bound.output_tokens_max) == (model, 100, 5)


def test_most_expensive_of_many_unpriced_models_is_found_quickly():
    started_at = time.process_time()
    names = ["-0" * 128] * 50_000 + [f"{number}{'-0' * 125}" for number in range(50_000)]
    assert most_expensive([*names, "claude-opus-4-5"], TokenCounts(1, 1)) == "claude-opus-4-5"
    assert time.process_time() - started_at < 0.5


def test_most_expensive_model_depends_on_the_tokens():
    models = ("claude-sonnet-4-5", "claude-opus-4-5")
    assert most_expensive(models, TokenCounts(100_000, 1000)) == "claude-opus-4-5"
    assert most_expensive(models, TokenCounts(INPUT_TOKENS_MAX, 1000)) == "claude-sonnet-4-5"


def input_tokens(**fields):
    return estimate_cost_bound({"model": "claude-haiku-4-5", **fields}, 300).input_tokens


def test_cost_bound_counts_images_because_a_small_file_can_contain_a_large_image():
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}
    result = {"type": "tool_result", "tool_use_id": "x", "content": [image, image]}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "image"}, result]}]
    assert input_tokens(messages=messages) == 100 + 3 * IMAGE_TOKENS_MAX
    assert input_tokens(messages=[{"content": [image] * 600}]) == INPUT_TOKENS_MAX


PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}}


@pytest.mark.parametrize(
    "content",
    [
        PDF,
        {"type": "image", "source": {"type": "url", "url": "https://example.org/x"}},
        {"type": "document", "source": {"type": "file", "file_id": "x"}},
    ],
)
def test_cost_bound_is_the_maximum_if_the_length_of_the_content_is_unknown(content):
    assert input_tokens(messages=[{"content": [content]}]) == INPUT_TOKENS_MAX


def test_cost_bound_is_the_maximum_if_the_model_provider_fetches_content():
    assert input_tokens(tools=[{"type": "web_fetch_20250910", "name": "web_fetch"}]) == INPUT_TOKENS_MAX


def test_cost_bound_is_the_maximum_if_the_models_servers_add_a_stored_conversation():
    assert input_tokens(thread={"type": "continue", "previous_message_id": "msg_1"}) == INPUT_TOKENS_MAX
    assert input_tokens(thread={"type": "create"}) == 100


@pytest.mark.parametrize(
    ("fields", "has_hidden_input"),
    [
        ({"tools": [{"type": "web_fetch_20250910", "name": "web_fetch"}]}, True),
        ({"thread": {"type": "continue", "previous_message_id": "msg_1"}}, True),
        ({"tools": [{"name": "Read", "input_schema": {}}]}, False),
        ({"messages": [{"content": [PDF]}]}, False),
        ({"context_management": {"edits": [{"type": "compact_20260112"}]}}, True),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}, 7, {"type": 7}]}}, False),
        ({"context_management": {"edits": 7}}, False),
        ({"context_management": "compact_20260112"}, False),
    ],
)
def test_input_is_hidden_if_the_model_reads_more_than_the_request(fields, has_hidden_input):
    bound = estimate_cost_bound({"model": "claude-haiku-4-5"} | fields, 300)
    assert bound.has_hidden_input is has_hidden_input


def advisor(**limits):
    return {"type": "advisor_20260301", "name": "advisor", "model": "claude-opus-4-1", **limits}


@pytest.mark.parametrize(
    ("limits", "input_tokens", "hidden_output_tokens"),
    [
        ({"max_uses": 3, "max_tokens": 2000}, 400, 6000),
        ({"max_uses": 3}, 400, OUTPUT_TOKENS_MAX),
        ({"max_tokens": 2000}, INPUT_TOKENS_MAX, OUTPUT_TOKENS_MAX),
        ({}, INPUT_TOKENS_MAX, OUTPUT_TOKENS_MAX),
        ({"max_uses": -1, "max_tokens": "2"}, INPUT_TOKENS_MAX, OUTPUT_TOKENS_MAX),
        ({"max_uses": True, "max_tokens": True}, INPUT_TOKENS_MAX, OUTPUT_TOKENS_MAX),
    ],
)
def test_cost_bound_includes_the_output_of_an_advisor(limits, input_tokens, hidden_output_tokens):
    document = {"model": "claude-haiku-4-5", "max_tokens": 50, "tools": [advisor(**limits)]}
    bound = estimate_cost_bound(document, 300)
    assert (bound.model, bound.input_tokens) == ("claude-opus-4-1", input_tokens)
    assert (bound.hidden_output_tokens, bound.has_hidden_input) == (hidden_output_tokens, True)
    assert bound.output_tokens_max == min(50 + hidden_output_tokens, OUTPUT_TOKENS_MAX)


def test_cost_bound_is_for_the_largest_output_limit_of_a_fallback():
    fallbacks = [{"model": "claude-haiku-4-5", "max_tokens": 64_000}, {"model": "claude-haiku-4-5"}]
    document = {"model": "claude-haiku-4-5", "max_tokens": 50, "fallbacks": fallbacks}
    bound = estimate_cost_bound(document, 300)
    assert (bound.output_tokens_max, bound.hidden_output_tokens) == (64_000, 0)
    assert estimate_cost_bound(document | {"fallbacks": fallbacks[1:]}, 300).output_tokens_max == 50


@pytest.mark.parametrize(
    "source",
    [
        {"type": "text", "media_type": "text/plain", "data": "words"},
        {"type": "content", "content": [{"type": "text", "text": "words"}]},
    ],
)
def test_cost_bound_of_text_and_of_data_is_a_third_of_the_length(source):
    call = {"type": "tool_use", "id": "x", "name": "Read", "input": {"type": "image", "url": "https://example.org/x"}}
    content = [{"type": "document", "source": source}, call]
    tools = [{"name": "Read", "input_schema": {"type": "image"}}, {"type": "bash_20250124", "name": "bash"}]
    assert input_tokens(messages=[{"content": content}], tools=tools) == 100


def test_price_table_has_a_date():
    assert len(PRICES_DATE.split("-")) == 3
