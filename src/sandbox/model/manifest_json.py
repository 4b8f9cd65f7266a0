"""JSON text as nodes, and plain data as JSON text."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from sandbox.model import limits
from sandbox.model.manifest_document import TOO_LARGE, Pair, Pairs, Refused, refuse, refuse_count, refuse_depth
from sandbox.model.mistake import Mark

_INTEGER_DIGITS_MAX = 18
# The closing quote is optional so that an open string is passed over once, not once for every quote in it.
_STRING_OR_MARK = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{},]', re.DOTALL)


def read_json(text: str) -> Any:
    """The root of a JSON text. Raises InvalidManifestError where it is not one."""
    _check_bounds(text)
    try:
        return json.loads(
            text,
            object_pairs_hook=_pairs,
            parse_int=_integer,
            parse_float=_real,
            parse_constant=_constant,
        )
    except json.JSONDecodeError as error:
        message = error.msg[:1].lower() + error.msg[1:]
        refuse(f"is not valid JSON: {message}", mark=Mark(error.lineno, error.colno))


def write_json(data: Any) -> bytes:
    """Plain data as it is sent: in UTF-8, but for half a surrogate pair, which only an escape can say."""
    try:
        return json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(data).encode()


def _check_bounds(text: str) -> None:
    """Before the parser sees it, because that one is recursive and takes whatever comes."""
    depth = opened = commas = 0
    for token in _STRING_OR_MARK.finditer(text):
        mark = token[0]
        if mark in "[{":
            depth += 1
            opened += 1
        elif mark in "]}":
            depth = max(depth - 1, 0)
        elif mark == ",":
            commas += 1
        if depth > limits.MANIFEST_DEPTH_MAX:
            refuse_depth()
        if max(opened, commas) >= limits.MANIFEST_VALUES_MAX:
            refuse_count()


def _pairs(pairs: list[tuple[str, Any]]) -> Pairs:
    return Pairs(Pair(key, value) for key, value in pairs)


def _integer(text: str) -> int | Refused:
    return int(text) if len(text.lstrip("-")) <= _INTEGER_DIGITS_MAX else TOO_LARGE


def _real(text: str) -> float | Refused:
    value = float(text)
    return value if math.isfinite(value) else TOO_LARGE


def _constant(_: str) -> Refused:
    return TOO_LARGE
