"""Reads and writes JSON texts. The reader has limits, because the standard parser is recursive and has none."""

import json
import math
import re
from typing import Any

from sandbox.model import fixed_limits
from sandbox.model.input_errors import SourceLocation
from sandbox.model.manifest.document import TOO_LARGE, InvalidValue, Pair, Pairs, reject, reject_count, reject_depth

_INTEGER_DIGITS_MAX = 18
# The closing quote is optional: otherwise an unterminated string would be scanned again from every quote in it.
_STRING_OR_PUNCTUATION = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{},]', re.DOTALL)


def read_json(text: str) -> Any:
    """Return the root of a JSON text. Raises InvalidManifestError if it is not valid JSON."""
    _check_bounds(text)
    try:
        return json.loads(
            text,
            object_pairs_hook=_to_pairs,
            parse_int=_parse_integer,
            parse_float=_parse_float,
            parse_constant=_reject_constant,
        )
    except json.JSONDecodeError as error:
        message = error.msg[:1].lower() + error.msg[1:]
        reject(f"is not valid JSON: {message}", location=SourceLocation(error.lineno, error.colno))


def write_json(data: Any) -> bytes:
    """Encode plain data as UTF-8. Lone surrogates, which UTF-8 cannot represent, are escaped."""
    try:
        return json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(data).encode()


def _check_bounds(text: str) -> None:
    """Check the limits before parsing, because the parser is recursive and has no limits."""
    depth = opened = commas = 0
    for token in _STRING_OR_PUNCTUATION.finditer(text):
        character = token[0]
        if character in "[{":
            depth += 1
            opened += 1
        elif character in "]}":
            depth = max(depth - 1, 0)
        elif character == ",":
            commas += 1
        if depth > fixed_limits.MANIFEST_DEPTH_MAX:
            reject_depth()
        if max(opened, commas) >= fixed_limits.MANIFEST_VALUES_MAX:
            reject_count()


def _to_pairs(pairs: list[tuple[str, Any]]) -> Pairs:
    return Pairs(Pair(key, value) for key, value in pairs)


def _parse_integer(text: str) -> int | InvalidValue:
    return int(text) if len(text.lstrip("-")) <= _INTEGER_DIGITS_MAX else TOO_LARGE


def _parse_float(text: str) -> float | InvalidValue:
    value = float(text)
    return value if math.isfinite(value) else TOO_LARGE


def _reject_constant(_: str) -> InvalidValue:
    return TOO_LARGE
