"""What in a model request has no price in the table, so that a budget in dollars could not bound it."""

from collections.abc import Callable
from typing import Any

from sandbox.gateway.model_body import fee_objection, models_beside
from sandbox.gateway.prices import is_priced

_AT_LIST_PRICE = {"speed": (None, "standard"), "inference_geo": (None, "global", "not_available")}
"""What a request may ask for at the prices of the table; fast inference and that of one country cost more."""

_CHOSEN_BY_SERVERS = "default"
"""Fallbacks of the API's own choice."""


def price_objection(document: dict[str, Any], shown: Callable[[str], str]) -> str | None:
    """Why it is refused, and what to do instead; None where everything has its price.

    shown: makes a text from inside fit to be told.
    """
    fallbacks = document.get("fallbacks") or []
    if fallbacks == _CHOSEN_BY_SERVERS:
        fallbacks = []
    if not isinstance(fallbacks, list) or not all(isinstance(one, dict) for one in fallbacks):
        return _refusal("What 'fallbacks' asks for may cost what Sandbox's table does not say", "leave it out")
    for name, listed in _AT_LIST_PRICE.items():
        if any(asked.get(name) not in listed for asked in (document, *fallbacks)):
            return _refusal(f"A request with '{name}' costs more than Sandbox's table says", "leave it out")
    objection = fee_objection(document, shown)
    if objection is not None:
        return _refusal(f"{objection} may cost what Sandbox's table does not say", "leave it out")
    for model in (document.get("model", ""), *models_beside(document)):
        if not is_priced(model):
            unknown = f"The model {shown(model)} has no price in Sandbox's table"
            return _refusal(unknown, "ask for a model that has one")
    return None


def _refusal(why: str, advice: str) -> str:
    return f"{why}, so lifecycle.budget_usd cannot bound it; {advice}, or set lifecycle.budget_tokens instead."
