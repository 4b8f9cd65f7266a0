"""Model prices."""

import pytest

from sandbox.agents.claude_code.messages_api.pricing import (
    PRICES_DATE,
    TokenCounts,
    cost_usd,
    estimate_cost_bound,
    find_price,
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
        ({"tools": [{"type": "advisor_20260301", "name": "advisor", "model": "claude-opus-4-8"}]}, "claude-opus-4-8"),
        ({"fallbacks": [{"model": "nobody-knows-it"}]}, "claude-haiku-4-5"),
    ],
)
def test_cost_bound_uses_the_most_expensive_model_of_a_request(fields, model):
    bound = estimate_cost_bound({"model": "claude-haiku-4-5", "max_tokens": 5} | fields, 300)
    assert (bound.model, bound.input_tokens, bound.output_tokens_max) == (model, 100, 5)


def test_price_table_has_a_date():
    assert len(PRICES_DATE.split("-")) == 3
