"""What models cost: Anthropic's public list prices for its own API, standard speed, without batch discount.

Source: the pricing page of Anthropic's documentation and its notices of later changes, as of PRICES_DATE.
A model that is not listed has no price; it never takes a relative's.
"""

import re
from collections.abc import Callable
from typing import Any

import msgspec

from sandbox.gateway.limits import INPUT_TOKENS_MAX, OUTPUT_TOKENS_MAX
from sandbox.gateway.model.request_body import additional_models, unknown_fee_reason

PRICES_DATE = "2026-10-24"

WEB_SEARCH_USD = 0.01
"""One search of the web by the model's own servers, beside its tokens: 10 USD per 1,000. Fetching has no fee."""

SINGLE_REGION_FACTOR = 1.1
"""What tokens cost more where an answer tells that it was made in one country, as models since Claude Opus 4.6 may."""


class Price(msgspec.Struct, frozen=True):
    """USD per million tokens. `long`: what all tokens of a request cost whose prompt is over `long_above` tokens."""

    input: float
    output: float
    cache_read: float
    cache_write: float
    cache_write_1h: float
    long_context: "Price | None" = None
    long_context_above: int = 0


class TokenCounts(msgspec.Struct, frozen=True):
    """Tokens of one request. `cache_write_1h` is the part of `cache_write` that is kept for an hour."""

    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_write: int = 0
    cache_write_1h: int = 0


def find_price(model: str) -> Price | None:
    """The price of a model by its full or its undated name."""
    return _PRICES.get(_VARIANT_SUFFIX.sub("", model))


def is_priced(model: str) -> bool:
    """Whether it is known what a model costs."""
    return find_price(model) is not None


def cost_usd(model: str, tokens: TokenCounts) -> float | None:
    """What a request cost, to a millionth of a dollar; None for a model without a price."""
    rate = find_price(model)
    if rate is None:
        return None
    if (
        rate.long_context is not None
        and tokens.input + tokens.cache_read + tokens.cache_write > rate.long_context_above
    ):
        rate = rate.long_context
    hour = min(tokens.cache_write_1h, tokens.cache_write)
    millionths = (
        tokens.input * rate.input
        + tokens.output * rate.output
        + tokens.cache_read * rate.cache_read
        + (tokens.cache_write - hour) * rate.cache_write
        + hour * rate.cache_write_1h
    )
    return round(millionths / 1_000_000, 6)


_VARIANT_SUFFIX = re.compile(r"(-\d{8}|-latest|-0)?(\[1m\])?\Z")


def _price(
    input_: float, output: float, cache_read: float, long_context: Price | None = None, long_context_above: int = 0
) -> Price:
    # Every model's cache writes cost 1.25 times its input for five minutes, twice its input for an hour.
    return Price(input_, output, cache_read, input_ * 1.25, input_ * 2, long_context, long_context_above)


_SONNET_4 = _price(3, 15, 0.30, _price(6, 22.50, 0.60), 200_000)
_OPUS_4 = _price(15, 75, 1.50)
_OPUS = _price(5, 25, 0.50)

_PRICES = {
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


_INPUT_BYTES_PER_TOKEN = 3
"""Of prose, code and what JSON puts around them a token takes three bytes or more."""


class CostBound(msgspec.Struct, frozen=True):
    """`input_tokens` are estimated by the request's length; `output_tokens` are the most that it allows."""

    model: str
    input_tokens: int
    output_tokens_max: int
    is_streamed: bool


def estimate_cost_bound(document: dict[str, Any], byte_count: int) -> CostBound:
    """What a request that is so long asks for; it may say anything."""
    wanted = document.get("max_tokens")
    if not isinstance(wanted, int) or not 0 < wanted < OUTPUT_TOKENS_MAX:
        wanted = OUTPUT_TOKENS_MAX
    return CostBound(
        document.get("model", ""),
        min(byte_count // _INPUT_BYTES_PER_TOKEN, INPUT_TOKENS_MAX),
        wanted,
        document.get("stream") is True,
    )


_LIST_PRICE_VALUES = {"speed": (None, "standard"), "inference_geo": (None, "global", "not_available")}
"""What a request may ask for at the prices of the table; fast inference and that of one country cost more."""

_SERVER_CHOSEN_FALLBACKS = "default"
"""Fallbacks of the API's own choice."""


def unpriced_reason(document: dict[str, Any], sanitize: Callable[[str], str]) -> str | None:
    """Why it is refused, and what to do instead; None where everything has its price.

    shown: makes a text from inside fit to be told.
    """
    fallbacks = document.get("fallbacks") or []
    if fallbacks == _SERVER_CHOSEN_FALLBACKS:
        fallbacks = []
    if not isinstance(fallbacks, list) or not all(isinstance(one, dict) for one in fallbacks):
        return _denial_text("What 'fallbacks' asks for may cost what Sandbox's table does not say", "leave it out")
    for name, listed in _LIST_PRICE_VALUES.items():
        if any(request.get(name) not in listed for request in (document, *fallbacks)):
            return _denial_text(f"A request with '{name}' costs more than Sandbox's table says", "leave it out")
    objection = unknown_fee_reason(document, sanitize)
    if objection is not None:
        return _denial_text(f"{objection} may cost what Sandbox's table does not say", "leave it out")
    for model in (document.get("model", ""), *additional_models(document)):
        if not is_priced(model):
            unknown = f"The model {sanitize(model)} has no price in Sandbox's table"
            return _denial_text(unknown, "ask for a model that has one")
    return None


def _denial_text(reason: str, advice: str) -> str:
    return f"{reason}, so lifecycle.budget_usd cannot bound it; {advice}, or set lifecycle.budget_tokens instead."
