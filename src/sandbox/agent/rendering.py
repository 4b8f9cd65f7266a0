"""The task's stdout in the formats that are made of the last result alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec


def render_result(output_format: str, result: Mapping[str, Any] | None) -> bytes:
    """`json`: the result on one line; `text`: its words and a newline; else, and without a result, nothing."""
    if result is None:
        return b""
    match output_format:
        case "json":
            return msgspec.json.encode(result) + b"\n"
        case "text":
            return _words(result)
        case _:
            return b""


def _words(result: Mapping[str, Any]) -> bytes:
    """What Claude Code says at the end; where it was stopped, the reason stands in `errors`."""
    errors = result.get("errors")
    texts = [result.get("result"), *(errors if isinstance(errors, list) else ())]
    words = next((text for text in texts if isinstance(text, str)), None)
    return b"" if words is None else words.encode(errors="replace") + b"\n"
