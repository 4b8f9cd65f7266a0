"""The records of `manifest` held against plain data; what pydantic finds is told in words for people."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from sandbox.model.manifest import Manifest
from sandbox.model.manifest_rules import Breach
from sandbox.model.mistake import Path, Rule

_NAME_LENGTH_MATCHED_MAX = 64


def validate(data: dict[str, Any]) -> Manifest | list[Breach]:
    """The manifest that the data is, or everything that the schema has against it."""
    try:
        return _adapter().validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        return [_breach(detail) for detail in error.errors(include_url=False)]


def without_nulls(data: Any, kind: Any = Manifest) -> Any:
    """The data without those fields of records that are null, which means that they are absent."""
    if _is_record(kind) and isinstance(data, dict):
        kinds = _kinds(kind)
        return {
            name: without_nulls(value, kinds.get(name))
            for name, value in data.items()
            if value is not None or name not in kinds
        }
    if isinstance(data, list):
        return [without_nulls(item, _item(kind)) for item in data] if _item(kind) else data
    if isinstance(data, dict):
        return {key: without_nulls(value, _item(kind)) for key, value in data.items()} if _item(kind) else data
    return data


def _is_record(kind: Any) -> bool:
    return isinstance(kind, type) and is_dataclass(kind)


@cache
def _adapter() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


@cache
def _kinds(record: Any) -> dict[str, Any]:
    """The type of each field of a record, without bounds and without `None`."""
    hints = get_type_hints(record)
    return {field.name: _bare(hints[field.name]) for field in fields(record)}


def _bare(kind: Any) -> Any:
    if get_origin(kind) in {Union, types.UnionType}:
        return next(member for member in get_args(kind) if member is not type(None))
    return kind


def _item(kind: Any) -> Any:
    """What is in a list or mapping of this type, None for anything else."""
    if get_origin(kind) is tuple:
        return get_args(kind)[0]
    return get_args(kind)[1] if get_origin(kind) is dict else None


def _kind_at(path: Path) -> Any:
    kind: Any = Manifest
    for part in path:
        kind = _kinds(kind).get(str(part)) if _is_record(kind) else _item(kind)
    return kind


def _breach(error: ErrorDetails) -> Breach:
    path = tuple(part for part in error["loc"] if part != "[key]")
    for pattern, rule, tell in _TELLERS:
        if re.fullmatch(pattern, error["type"]):
            return Breach(path, rule, tell(path, error))
    return Breach(path, "format", "is not valid")


def _tell_unknown(path: Path, _: ErrorDetails) -> str:
    name, record = str(path[-1]), _kind_at(path[:-1])
    if len(name) > _NAME_LENGTH_MATCHED_MAX or not _is_record(record):
        return "is an unknown field"
    near = get_close_matches(name, sorted(_kinds(record)), n=1)
    return f"is an unknown field; did you mean '{near[0]}'?" if near else "is an unknown field"


def _tell_enum(path: Path, _: ErrorDetails) -> str:
    offered = [str(value) for value in get_args(_kind_at(path))]
    return f"must be one of {', '.join(offered)}" if len(offered) > 1 else f'must be "{offered[0]}"'


def _tell_complaint(_: Path, error: ErrorDetails) -> str:
    return error["msg"]


def _tell_type(wanted: str) -> Callable[[Path, ErrorDetails], str]:
    def tell(_: Path, error: ErrorDetails) -> str:
        given = error["input"]
        hint = "; put it in quotes" if wanted == "text" and isinstance(given, bool | int | float) else ""
        return f"must be {wanted}, not {_shown_kind(given)}{hint}"

    return tell


def _shown_kind(value: Any) -> str:
    kinds: dict[type, str] = {
        bool: str(value).lower(),
        str: "text",
        int: "a number",
        float: "a number with a fraction",
        list: "a list",
        dict: "a mapping",
    }
    return kinds.get(type(value), "null")


def _tell_number(_: Path, error: ErrorDetails) -> str:
    context = error.get("ctx", {})
    return f"must be at least {context['ge']}" if "ge" in context else f"must be at most {context['le']}"


def _tell_length(_: Path, error: ErrorDetails) -> str:
    context, unit = error.get("ctx", {}), "characters" if error["type"].startswith("string") else "entries"
    if "max_length" in context:
        return f"must have at most {context['max_length']} {unit}"
    return "must not be empty"


_TELLERS: tuple[tuple[str, Rule, Callable[[Path, ErrorDetails], str]], ...] = (
    ("missing", "required", lambda *_: "is required"),
    ("unexpected_keyword_argument|extra_forbidden", "unknown_field", _tell_unknown),
    ("literal_error", "enum", _tell_enum),
    ("format", "format", _tell_complaint),
    ("range", "range", _tell_complaint),
    ("string_type", "type", _tell_type("text")),
    ("int_type|int_from_float", "type", _tell_type("a whole number")),
    ("float_type", "type", _tell_type("a number")),
    ("bool_type", "type", _tell_type("true or false")),
    ("tuple_type|list_type", "type", _tell_type("a list")),
    ("dataclass_type|dict_type", "type", _tell_type("a mapping")),
    ("(greater|less)_than_equal", "range", _tell_number),
    ("(string_)?too_(short|long)", "range", _tell_length),
)
