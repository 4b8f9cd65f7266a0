"""A manifest's text as plain data, with source locations; reads and writes JSON texts.

The readers (`yaml.read_yaml`, `read_json`) turn text into nodes. `to_document` turns nodes into dicts and lists, and
expands aliases. Limits are checked before the result grows. The conversion is not recursive, so deep nesting cannot
exhaust the stack. The standard JSON parser is recursive and has no limits, so `read_json` checks them first.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from sandbox.model import fixed_limits
from sandbox.model.errors import FieldError, FieldPath, InvalidManifestError, RuleName, SourceLocation

_INVALID_TEXT = re.compile("[\x00\ud800-\udfff]")


class InvalidValue(NamedTuple):
    """A value that no manifest may contain, and the reason."""

    rule: RuleName
    message: str


UNSUPPORTED_NUMBER = InvalidValue("range", "is not a supported number; put text that looks like a number in quotes")


class Pair(NamedTuple):
    """A key and its value.

    key_error: why the key is rejected; None if it is valid.
    """

    key: str
    value: Any
    location: SourceLocation | None = None
    key_error: str | None = None


class Pairs(list[Pair]):
    """A mapping as written, including duplicate keys."""


@dataclass(slots=True)
class Node:
    """A value (scalar, list of nodes, `Pairs` or `InvalidValue`) and its location."""

    value: Any
    location: SourceLocation


@dataclass(slots=True)
class Document:
    """A manifest as plain data with source locations.

    invalid_paths: paths of rejected values, which are None in `data`.
    """

    data: Any = None
    key_locations: dict[FieldPath, SourceLocation] = field(default_factory=dict)
    value_locations: dict[FieldPath, SourceLocation] = field(default_factory=dict)
    errors: list[FieldError] = field(default_factory=list)
    invalid_paths: set[FieldPath] = field(default_factory=set)

    def value_location(self, path: FieldPath) -> SourceLocation | None:
        """Return the location of the value, or of the nearest enclosing value that has a location."""
        for length in range(len(path), -1, -1):
            location = self.value_locations.get(path[:length])
            if location is not None:
                return location
        return None

    def key_location(self, path: FieldPath) -> SourceLocation | None:
        """Return the location of the value's key."""
        return self.key_locations.get(path) or self.value_location(path)


def reject(message: str, *, rule: RuleName = "format", location: SourceLocation | None = None) -> NoReturn:
    """Raise InvalidManifestError about the document as a whole."""
    raise InvalidManifestError([FieldError.at((), rule, message, location)])


def reject_depth(location: SourceLocation | None = None) -> NoReturn:
    """Raise InvalidManifestError because values are nested too deeply."""
    reject(f"is nested more than {fixed_limits.MANIFEST_DEPTH_MAX} levels deep", rule="range", location=location)


def reject_count(location: SourceLocation | None = None) -> NoReturn:
    """Raise InvalidManifestError because there are too many values."""
    reject(f"has more than {fixed_limits.MANIFEST_VALUES_MAX} values", rule="range", location=location)


def to_document(root: Any) -> Document:
    """Convert nodes to plain data with all aliases expanded. Raises InvalidManifestError beyond a limit."""
    return _DocumentBuilder().build(root)


class _DocumentBuilder:
    """One iterative walk over the nodes. Pending nodes are in a list, not on the stack."""

    def __init__(self) -> None:
        self._document = Document()
        self._pending: list[tuple[Any, FieldPath, Any, str | int]] = []
        self._value_count = 1
        self._character_count = 0

    def build(self, root: Any) -> Document:
        holder: list[Any] = [None]
        self._pending.append((root, (), holder, 0))
        while self._pending:
            node, path, target, key = self._pending.pop()
            target[key] = self._convert(node, path)
        self._document.data = holder[0]
        return self._document

    def _convert(self, node: Any, path: FieldPath) -> Any:
        if isinstance(node, Node):
            self._document.value_locations[path] = node.location
            node = node.value
        if isinstance(node, InvalidValue):
            return self._reject_value(node, path)
        if isinstance(node, str):
            return self._convert_text(node, path)
        if not isinstance(node, list):
            return node
        if len(path) >= fixed_limits.MANIFEST_DEPTH_MAX:
            reject_depth(self._document.value_location(path))
        self._count(values=len(node))
        return self._convert_mapping(node, path) if isinstance(node, Pairs) else self._convert_list(node, path)

    def _reject_value(self, value: InvalidValue, path: FieldPath) -> None:
        self._document.invalid_paths.add(path)
        self._add_error(path, value.rule, value.message, self._document.value_location(path))

    def _convert_text(self, text: str, path: FieldPath) -> str | None:
        self._count(characters=len(text))
        if _INVALID_TEXT.search(text):
            self._reject_value(InvalidValue("format", "must not contain NUL or unpaired surrogate characters"), path)
            return None
        return text

    def _convert_list(self, items: list[Any], path: FieldPath) -> list[Any]:
        plain: list[Any] = [None] * len(items)
        self._pending.extend((item, (*path, index), plain, index) for index, item in enumerate(items))
        return plain

    def _convert_mapping(self, pairs: Pairs, path: FieldPath) -> dict[str, Any]:
        plain: dict[str, Any] = {}
        for pair in pairs:
            child_path = (*path, pair.key)
            self._count(characters=len(pair.key))
            message = pair.key_error
            if message is None and pair.key in plain:
                message = "appears more than once; keep only one"
            if message is None and _INVALID_TEXT.search(pair.key):
                message = "has a name that is not valid text"
            if message is not None:
                self._add_error(child_path, "format", message, pair.location)
                continue
            if pair.location is not None:
                self._document.key_locations[child_path] = pair.location
            plain[pair.key] = None
            self._pending.append((pair.value, child_path, plain, pair.key))
        return plain

    def _add_error(self, path: FieldPath, rule: RuleName, message: str, location: SourceLocation | None) -> None:
        self._document.errors.append(FieldError.at(path, rule, message, location))

    def _count(self, *, values: int = 0, characters: int = 0) -> None:
        """Update the counts and enforce the limits. Only aliases can yield more characters than the body has bytes."""
        self._value_count += values
        self._character_count += characters
        if self._value_count > fixed_limits.MANIFEST_VALUES_MAX:
            reject_count()
        if self._character_count > fixed_limits.BODY_BYTES_MAX:
            reject("exceeds 1 MiB when its aliases are expanded", rule="range")


def as_mapping(value: Any) -> dict[str, Any]:
    """Return the value if it is a mapping, otherwise an empty mapping."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """Return the value if it is a list, otherwise an empty list."""
    return value if isinstance(value, list) else []


def as_text(value: Any) -> str:
    """Return the value if it is a string, otherwise an empty string."""
    return value if isinstance(value, str) else ""


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
    return int(text) if len(text.lstrip("-")) <= _INTEGER_DIGITS_MAX else UNSUPPORTED_NUMBER


def _parse_float(text: str) -> float | InvalidValue:
    value = float(text)
    return value if math.isfinite(value) else UNSUPPORTED_NUMBER


def _reject_constant(_: str) -> InvalidValue:
    return UNSUPPORTED_NUMBER
