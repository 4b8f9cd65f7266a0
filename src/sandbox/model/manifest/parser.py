"""From bytes to a valid manifest, or to every mistake in them at once."""

from __future__ import annotations

import json
import re
import types
from codecs import BOM_UTF8
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from sandbox.model import limits
from sandbox.model.manifest.document import Document, Pairs, read_json, refuse, settle
from sandbox.model.manifest.errors import InvalidManifestError, Mark, Mistake, Path, Rule
from sandbox.model.manifest.rules import Breach, breaches
from sandbox.model.manifest.schema import Manifest
from sandbox.model.manifest.yaml import read_yaml

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


__all__ = ["InvalidManifestError", "Mistake", "parse_manifest", "read_document"]

OFFERED_PROFILES: Mapping[str, str] = {"agentic-dev": "", "basic": ""}
"""The profiles that come with Sandbox; nothing is in their way."""

_WRAPPERS = ("manifest", "manifest_yaml")


def parse_manifest(
    body: bytes,
    *,
    is_json: bool,
    profiles: Mapping[str, str] | None = OFFERED_PROFILES,
    clone_hosts: Collection[str] | None = None,
    priced: Callable[[str], bool] | None = None,
) -> Manifest:
    """The manifest in a request's body, with all defaults filled in.

    profiles: names with what is in the way of each, nothing where it can be used; None takes any name on trust.
    clone_hosts: the hosts that repositories may come from; None for any. priced: whether a model's price is known,
    which `budget_usd` needs; None takes it on trust.
    JSON may also be wrapped as `{"manifest": {…}}` or `{"manifest_yaml": "…"}`.
    Raises InvalidManifestError with all mistakes; a body that cannot be read at all has just one.
    """
    document = read_document(body, is_json=is_json)
    data = without_nulls(document.data)
    if type(data.get("version")) is int:
        data["version"] = str(data["version"])
    verdict = validate(data)
    found = [] if isinstance(verdict, Manifest) else verdict
    mistakes = [*document.mistakes, *_told(document, found, [*breaches(data, profiles, clone_hosts, priced)])]
    if mistakes or not isinstance(verdict, Manifest):
        _raise(mistakes)
    return verdict


def read_document(body: bytes, *, is_json: bool) -> Document:
    """The mapping in a request's body, unwrapped, with the places of everything, not held against the schema yet.

    Raises InvalidManifestError where it cannot be read; mistakes that leave the rest readable are in the document.
    """
    document = settle(_root(_text(body), is_json=is_json))
    if not isinstance(document.data, dict):
        refuse("must be a mapping with version, kind, metadata, repository and claude", rule="type")
    return document


def _text(body: bytes) -> str:
    if len(body) > limits.BODY_BYTES_MAX:
        refuse(f"must be at most {limits.BODY_BYTES_MAX // 1024} KiB", rule="range")
    body = body.removeprefix(BOM_UTF8)
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        refuse("must be UTF-8 text", mark=_mark_of_byte(body, error.start))
    if text.startswith("\ufeff"):
        refuse("must begin with one byte order mark at most; save it as plain UTF-8", mark=Mark(1, 1))
    if "\x00" in text:
        refuse("must not contain NUL characters", mark=_mark_of_byte(body, body.index(0)))
    if not text.strip():
        refuse("is empty", rule="required")
    return text


def _mark_of_byte(body: bytes, index: int) -> Mark:
    before = body[:index]
    return Mark(before.count(b"\n") + 1, index - before.rfind(b"\n"))


def _root(text: str, *, is_json: bool) -> Any:
    root = _read(text, is_json=is_json)
    if not isinstance(root, Pairs) or len(root) != 1 or root[0].key not in _WRAPPERS:
        return root
    wrapped = root[0]
    if wrapped.key == "manifest":
        return wrapped.value
    if not isinstance(wrapped.value, str):
        refuse("must have the text of a manifest in manifest_yaml", rule="type")
    # Through bytes again, for the same checks; half a character is refused there.
    return read_yaml(_text(wrapped.value.encode(errors="surrogatepass")))


def _read(text: str, *, is_json: bool) -> Any:
    if is_json:
        return read_json(text)
    if text.lstrip().startswith("{"):
        # JSON sent without its content type; YAML does not know all of its escapes.
        with suppress(InvalidManifestError):
            return read_json(text)
    return read_yaml(text)


def _told(document: Document, found: list[Breach], broken: list[Breach]) -> list[Mistake]:
    """With their places; what the document itself refused is told already."""
    kept = [breach for breach in found if breach.path not in document.refused]
    return [_mistake(document, breach) for breach in [*kept, *broken]]


def _mistake(document: Document, breach: Breach) -> Mistake:
    by_key = breach.rule == "unknown_field"
    mark = document.mark_of_key(breach.path) if by_key else document.mark_of_value(breach.path)
    return Mistake.at(breach.path, breach.rule, breach.message, mark)


def _raise(mistakes: list[Mistake]) -> NoReturn:
    ordered = sorted(mistakes, key=lambda mistake: (mistake.line or 0, mistake.column or 0))
    told = ordered[: limits.MANIFEST_MISTAKES_MAX]
    raise InvalidManifestError(told, left_out=len(ordered) - len(told))
