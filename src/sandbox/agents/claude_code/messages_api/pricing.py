"""Model prices: Anthropic's public list prices for its own API, at standard speed and without the batch discount.

Source: the pricing page in Anthropic's documentation and Anthropic's announcements of price changes, as of PRICES_DATE.
A model that is not listed has no price; the price of a similar model is never used.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from sandbox.agents.claude_code.messages_api.request_restrictions import (
    additional_models,
    count_images,
    find_external_access,
    has_compaction,
    unknown_fee_reason,
)
from sandbox.interfaces.gateway import CostBound

INPUT_TOKENS_MAX = 1_000_000
"""Maximum number of input tokens assumed for a response that ended before it reported usage; no model accepts more."""

IMAGE_TOKENS_MAX = 5_000
"""Input tokens assumed for one image; no model counts more. A file of 400 bytes can contain an image of this size."""

OUTPUT_TOKENS_MAX = 1_000_000
"""Output tokens assumed for a response that ended early and whose request sets no limit; no model produces more."""

PRICES_DATE = "2026-10-24"

WEB_SEARCH_USD = 0.01
"""USD per web search by the model's servers, in addition to tokens: 10 USD per 1,000 searches. Web fetches are free."""

SINGLE_REGION_FACTOR = 1.1
"""Price factor for tokens if the response reports single-region inference, which Claude Opus 4.6 and later support."""


class Price(msgspec.Struct, frozen=True):
    """USD per million tokens.

    `long_context`: the price of all tokens if the prompt exceeds `long_context_above` tokens.
    """

    input: float
    output: float
    cache_read: float
    cache_write: float
    cache_write_1h: float
    long_context: "Price | None" = None
    long_context_above: int = 0


class TokenCounts(msgspec.Struct, frozen=True):
    """Token counts of one request. `cache_write_1h` is the part of `cache_write` with a lifetime of one hour."""

    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_write: int = 0
    cache_write_1h: int = 0


def find_price(model: str) -> Price | None:
    """Return the price of a model, given its name with or without a date; None if it has no price."""
    return PRICES.get(_VARIANT_SUFFIX.sub("", model)) if len(model) <= _PRICED_CHARACTERS_MAX else None


def has_price(model: str) -> bool:
    """Return whether the price of a model is known."""
    return find_price(model) is not None


def cost_usd(model: str, tokens: TokenCounts) -> float | None:
    """Return the cost of a request in USD, rounded to 1e-6, or None for a model without a price."""
    rate = find_price(model)
    if rate is None:
        return None
    if (
        rate.long_context is not None
        and tokens.input + tokens.cache_read + tokens.cache_write > rate.long_context_above
    ):
        rate = rate.long_context
    cache_write_1h = min(tokens.cache_write_1h, tokens.cache_write)
    millionths = (
        tokens.input * rate.input
        + tokens.output * rate.output
        + tokens.cache_read * rate.cache_read
        + (tokens.cache_write - cache_write_1h) * rate.cache_write
        + cache_write_1h * rate.cache_write_1h
    )
    return round(millionths / 1_000_000, 6)


_PRICED_CHARACTERS_MAX = 64
"""Maximum length of a name that can have a price. A request can have thousands of long names."""

_VARIANT_SUFFIX = re.compile(r"(-\d{8}|-latest|-0)?(\[1m\])?\Z")


def _price(
    input_: float, output: float, cache_read: float, long_context: Price | None = None, long_context_above: int = 0
) -> Price:
    # For every model, a cache write costs 1.25 times the input price. With a lifetime of an hour instead of five
    # minutes, it costs twice the input price.
    return Price(input_, output, cache_read, input_ * 1.25, input_ * 2, long_context, long_context_above)


_SONNET_4 = _price(3, 15, 0.30, _price(6, 22.50, 0.60), 200_000)
_OPUS_4 = _price(15, 75, 1.50)
_OPUS = _price(5, 25, 0.50)

PRICES = {
    "claude-fable-5-1": _price(10, 50, 0.25),
    "claude-fable-5": _price(10, 50, 1),
    "claude-mythos-5-1": _price(10, 50, 0.25),
    "claude-mythos-5": _price(10, 50, 1),
    "claude-opus-5-5": _price(4, 20, 0.20),
    "claude-opus-5": _OPUS,
    "claude-opus-4-8": _OPUS,
    "claude-opus-4-7": _OPUS,
    "claude-opus-4-6": _OPUS,
    "claude-opus-4-5": _OPUS,
    "claude-opus-4-1": _OPUS_4,
    "claude-opus-4": _OPUS_4,
    "claude-sonnet-5-5": _price(2, 10, 0.10),
    "claude-sonnet-5": _price(2, 10, 0.20),
    "claude-sonnet-4-6": _price(3, 15, 0.30),
    "claude-sonnet-4-5": _SONNET_4,
    "claude-sonnet-4": _SONNET_4,
    "claude-3-7-sonnet": _price(3, 15, 0.30),
    "claude-haiku-5-5": _price(0.10, 0.50, 0.01, _price(0.50, 2.50, 0.05), 100_000),
    "claude-haiku-4-5": _price(1, 5, 0.10),
    "claude-3-5-haiku": _price(0.80, 4, 0.08),
}
"""Prices, keyed by the model's name without its date."""

PRICED_MODELS = tuple(PRICES)
"""Names of the models that have a price, without their dates."""


_INPUT_BYTES_PER_TOKEN = 3
"""Minimum number of bytes per input token of prose, code and the surrounding JSON."""


def estimate_cost_bound(document: dict[str, Any], byte_count: int) -> CostBound:
    """Estimate an upper bound on a request's cost from its untrusted body and the body's length.

    If other models may serve the request too, the bound is for the most expensive one. If the request has content whose
    length is unknown, such as a PDF, the number of input tokens is INPUT_TOKENS_MAX. The `max_tokens` of the request
    does not limit an advisor, whose output is not in the response. All calls of all advisors together count as at most
    INPUT_TOKENS_MAX and OUTPUT_TOKENS_MAX.
    """
    additional = list(additional_models(document))
    advisors = [each for each in additional if each.is_advisor]
    fallback_limits = (each.max_tokens for each in additional if not each.is_advisor and each.max_tokens is not None)
    output_tokens = max(map(_output_limit, (document.get("max_tokens"), *fallback_limits)))
    hidden_output_tokens = sum(_output_limit(each.max_tokens) * _output_limit(each.max_uses) for each in advisors)
    images = count_images(document)
    input_tokens = (
        INPUT_TOKENS_MAX if images is None else byte_count // _INPUT_BYTES_PER_TOKEN + images * IMAGE_TOKENS_MAX
    )
    input_tokens = min(input_tokens * (1 + sum(_output_limit(each.max_uses) for each in advisors)), INPUT_TOKENS_MAX)
    output_tokens_max = min(output_tokens + hidden_output_tokens, OUTPUT_TOKENS_MAX)
    return CostBound(
        most_expensive(
            (document.get("model", ""), *(each.name for each in additional)),
            TokenCounts(input_tokens, output_tokens_max),
        ),
        input_tokens,
        output_tokens_max,
        document.get("stream") is True,
        min(hidden_output_tokens, OUTPUT_TOKENS_MAX),
        has_hidden_input=bool(advisors)
        or has_compaction(document)
        or (images is None and find_external_access(document, str) is not None),
    )


def most_expensive(models: Iterable[str], tokens: TokenCounts) -> str:
    """Return the model that costs most for these tokens. A model without a price counts as free."""
    return max(dict.fromkeys(models), key=lambda model: cost_usd(model, tokens) or 0.0)


def _output_limit(limit: Any) -> int:
    """Return a limit in the request, or OUTPUT_TOKENS_MAX if it is missing or invalid."""
    return limit if type(limit) is int and 0 < limit < OUTPUT_TOKENS_MAX else OUTPUT_TOKENS_MAX


_VALUES_WITHOUT_SURCHARGE = {"speed": (None, "standard"), "inference_geo": (None, "global", "not_available")}
"""Request fields, and the values for which the list price applies; fast mode and single-region inference cost more."""

_SERVER_CHOSEN_FALLBACKS = "default"
"""Value of a request's `fallbacks` with which the API itself selects the models."""


def unpriced_reason(document: dict[str, Any], sanitize: Callable[[str], str]) -> str | None:
    """Return why the cost of the request cannot be bounded and what to do instead, or None if all parts have a price.

    sanitize: makes untrusted text safe to report.
    """
    fallbacks = document.get("fallbacks") or []
    if fallbacks == _SERVER_CHOSEN_FALLBACKS:
        fallbacks = []
    if not isinstance(fallbacks, list) or not all(isinstance(one, dict) for one in fallbacks):
        return _denial_text("The price of 'fallbacks' is not in Sandbox's table", "leave it out")
    for name, listed in _VALUES_WITHOUT_SURCHARGE.items():
        if any(request.get(name) not in listed for request in (document, *fallbacks)):
            return _denial_text(f"A request with '{name}' costs more than the list price", "leave it out")
    fee_reason = unknown_fee_reason(document, sanitize)
    if fee_reason is not None:
        return _denial_text(f"The price of {fee_reason} is not in Sandbox's table", "leave it out")
    for model in (document.get("model", ""), *(each.name for each in additional_models(document))):
        if not has_price(model):
            unknown = f"The model {sanitize(model)} has no price in Sandbox's table"
            return _denial_text(unknown, "use a model that has one")
    return None


def _denial_text(reason: str, advice: str) -> str:
    return f"{reason}, so lifecycle.budget_usd cannot bound the cost; {advice}, or set lifecycle.budget_tokens instead."
