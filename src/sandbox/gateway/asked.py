"""What a model request asks for, as far as that bounds what its answer costs."""

from typing import Any

import msgspec

from sandbox.gateway.limits import INPUT_TOKENS_MAX, OUTPUT_TOKENS_MAX

_INPUT_BYTES_PER_TOKEN = 3
"""Of prose, code and what JSON puts around them a token takes three bytes or more."""


class Asked(msgspec.Struct, frozen=True):
    """`input_tokens` are estimated by the request's length; `output_tokens` are the most that it allows."""

    model: str
    input_tokens: int
    output_tokens: int
    is_streamed: bool


def asked_by(document: dict[str, Any], byte_count: int) -> Asked:
    """What a request that is so long asks for; it may say anything."""
    wanted = document.get("max_tokens")
    if not isinstance(wanted, int) or not 0 < wanted < OUTPUT_TOKENS_MAX:
        wanted = OUTPUT_TOKENS_MAX
    return Asked(
        document.get("model", ""),
        min(byte_count // _INPUT_BYTES_PER_TOKEN, INPUT_TOKENS_MAX),
        wanted,
        document.get("stream") is True,
    )
