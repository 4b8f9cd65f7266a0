"""Parses bytes into a valid manifest, or collects all errors."""

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
from typing import Any, NamedTuple, NoReturn, Union, get_args, get_origin, get_type_hints

import msgspec
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from sandbox.model import fixed_limits
from sandbox.model.manifest.document import Document, Pairs, read_json, reject, to_document
from sandbox.model.manifest.errors import FieldError, FieldPath, InvalidManifestError, RuleName, SourceLocation
from sandbox.model.manifest.rules import AgentSchema, RuleViolation, find_violations
from sandbox.model.manifest.schema import AgentSection, Manifest, declare_manifest
from sandbox.model.manifest.yaml import read_yaml

_SUGGESTION_NAME_LENGTH_MAX = 64


def _without_nulls(data: Any, kind: Any) -> Any:
    """Remove null fields from records, because null means absent."""
    if _is_dataclass_type(kind) and isinstance(data, dict):
        kinds = _field_types(kind)
        return {
            name: _without_nulls(value, kinds.get(name))
            for name, value in data.items()
            if value is not None or name not in kinds
        }
    if isinstance(data, list):
        return [_without_nulls(item, _item_type(kind)) for item in data] if _item_type(kind) else data
    if isinstance(data, dict):
        return (
            {key: _without_nulls(value, _item_type(kind)) for key, value in data.items()} if _item_type(kind) else data
        )
    return data


def _is_dataclass_type(kind: Any) -> bool:
    return isinstance(kind, type) and is_dataclass(kind)


@cache
def _field_types(dataclass_type: Any) -> dict[str, Any]:
    """Return the type of each field of a record, without bounds and `None`."""
    hints = get_type_hints(dataclass_type)
    return {field.name: _strip_optional(hints[field.name]) for field in fields(dataclass_type)}


def _strip_optional(kind: Any) -> Any:
    if get_origin(kind) in {Union, types.UnionType}:
        return next(member for member in get_args(kind) if member is not type(None))
    return kind


def _item_type(kind: Any) -> Any:
    """Return the item type of a list or mapping, or None for any other type."""
    if get_origin(kind) is tuple:
        return get_args(kind)[0]
    return get_args(kind)[1] if get_origin(kind) is dict else None


class _Validator:
    """Validates plain data against a manifest type.

    sections: types of the agent sections by key. Each section is required.
    """

    def __init__(self, sections: Mapping[str, Any]) -> None:
        self.manifest_type = declare_manifest(sections)
        self._adapter: TypeAdapter[Any] = TypeAdapter(self.manifest_type)

    def validate(self, data: dict[str, Any]) -> Any:
        """Return the record of the manifest, or the list of all violations of the schema."""
        try:
            return self._adapter.validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            return self._merge_misspelled([self._to_violation(detail) for detail in error.errors(include_url=False)])

    def _merge_misspelled(self, violations: list[RuleViolation]) -> list[RuleViolation]:
        """Omit the error about a missing field if an unknown field is probably its misspelled name."""
        parents = {each.path[:-1] for each in violations if each.rule == "required"}
        unknown = (each.path for each in violations if each.rule == "unknown_field" and each.path[:-1] in parents)
        misspelled = {(*path[:-1], _closest_field(path, self.manifest_type)) for path in unknown}
        return [each for each in violations if each.rule != "required" or each.path not in misspelled]

    def _to_violation(self, error: ErrorDetails) -> RuleViolation:
        path = tuple(part for part in error["loc"] if part != "[key]")
        for pattern, rule, format_message in _MESSAGES:
            if re.fullmatch(pattern, error["type"]):
                return RuleViolation(path, rule, format_message(_Failure(path, error, self.manifest_type)))
        return RuleViolation(path, "format", "is not valid")


class _Failure(NamedTuple):
    """A failed check of the value at a path of a manifest."""

    path: FieldPath
    error: ErrorDetails
    manifest_type: Any


def _type_at(path: FieldPath, manifest_type: Any) -> Any:
    """Return the declared type of the value at a path."""
    kind: Any = manifest_type
    for part in path:
        kind = _field_types(kind).get(str(part)) if _is_dataclass_type(kind) else _item_type(kind)
    return kind


@cache
def _validator(sections: tuple[tuple[str, Any], ...]) -> _Validator:
    return _Validator(dict(sections))


def _unknown_field_message(failure: _Failure) -> str:
    closest = _closest_field(failure.path, failure.manifest_type)
    return f"is an unknown field; did you mean '{closest}'?" if closest else "is an unknown field"


def _closest_field(path: FieldPath, manifest_type: Any) -> str | None:
    """Return the known field whose name resembles that of an unknown field, or None."""
    name, dataclass_type = str(path[-1]), _type_at(path[:-1], manifest_type)
    if len(name) > _SUGGESTION_NAME_LENGTH_MAX or not _is_dataclass_type(dataclass_type):
        return None
    return next(iter(get_close_matches(name, sorted(_field_types(dataclass_type)), n=1)), None)


def _enum_message(failure: _Failure) -> str:
    offered = [str(value) for value in get_args(_type_at(failure.path, failure.manifest_type))]
    return f"must be one of {', '.join(offered)}" if len(offered) > 1 else f'must be "{offered[0]}"'


def _format_message(failure: _Failure) -> str:
    return failure.error["msg"]


def _type_message(expected: str) -> Callable[[_Failure], str]:
    def format_message(failure: _Failure) -> str:
        value = failure.error["input"]
        hint = "; put it in quotes" if expected == "text" and isinstance(value, bool | int | float) else ""
        return f"must be {expected}, not {_describe_type(value)}{hint}"

    return format_message


def _describe_type(value: Any) -> str:
    kinds: dict[type, str] = {
        bool: str(value).lower(),
        str: "text",
        int: "a number",
        float: "a number with a fraction",
        list: "a list",
        dict: "a mapping",
    }
    return kinds.get(type(value), "null")


def _bound_message(failure: _Failure) -> str:
    context = failure.error.get("ctx", {})
    return f"must be at least {context['ge']}" if "ge" in context else f"must be at most {context['le']}"


def _length_message(failure: _Failure) -> str:
    error = failure.error
    context, unit = error.get("ctx", {}), "characters" if error["type"].startswith("string") else "entries"
    if "max_length" in context:
        return f"must have at most {context['max_length']} {unit}"
    return "must not be empty"


_MESSAGES: tuple[tuple[str, RuleName, Callable[[_Failure], str]], ...] = (
    ("missing", "required", lambda _: "is required"),
    ("unexpected_keyword_argument|extra_forbidden", "unknown_field", _unknown_field_message),
    ("literal_error", "enum", _enum_message),
    ("format", "format", _format_message),
    ("range", "range", _format_message),
    ("string_type", "type", _type_message("text")),
    ("int_type|int_from_float", "type", _type_message("a whole number")),
    ("float_type", "type", _type_message("a number")),
    ("bool_type", "type", _type_message("true or false")),
    ("tuple_type|list_type", "type", _type_message("a list")),
    ("dataclass_type|dict_type", "type", _type_message("a mapping")),
    ("(greater|less)_than_equal", "range", _bound_message),
    ("(string_)?too_(short|long)", "range", _length_message),
)


__all__ = ["FieldError", "InvalidManifestError", "parse_manifest", "read_document", "validate_document"]

SHIPPED_PROFILES: Mapping[str, str] = {"agentic-dev": "", "basic": ""}
"""The built-in profiles. The empty values mean that each of them is usable."""

WRAPPED_MANIFEST = "manifest"
WRAPPED_TEXT = "manifest_yaml"
"""The only key of a JSON body that wraps a manifest: its value is the manifest, or the manifest's text."""


def parse_manifest(
    body: bytes,
    *,
    agents: Mapping[str, AgentSchema],
    is_json: bool,
    profiles: Mapping[str, str] | None = SHIPPED_PROFILES,
    clone_hosts: Collection[str] | None = None,
) -> Manifest:
    """Parse a manifest from a request body and fill in all defaults.

    agents: the agents that a manifest can have a section for, by the key of the section; at least one. A manifest has
    exactly one of these sections.
    profiles: profile names and why each one is unusable (empty if it is usable); None accepts any name.
    clone_hosts: hosts that repositories may be cloned from; None allows any.

    JSON may also be wrapped as `{"manifest": {…}}` or `{"manifest_yaml": "…"}`. Raises InvalidManifestError with all
    errors; a body that cannot be parsed has one error.
    """
    document = read_document(body, agents=agents, is_json=is_json)
    return validate_document(document, agents=agents, profiles=profiles, clone_hosts=clone_hosts)


def validate_document(
    document: Document,
    *,
    agents: Mapping[str, AgentSchema],
    profiles: Mapping[str, str] | None = SHIPPED_PROFILES,
    clone_hosts: Collection[str] | None = None,
) -> Manifest:
    """Validate a document, whose data must be a mapping, and fill in all defaults. See `parse_manifest`.

    Raises InvalidManifestError with all errors.
    """
    kinds = [
        key
        for key, section in document.data.items()
        if key in agents and (section is not None or (key,) in document.invalid_paths)
    ]
    agent = agents[kinds[0] if kinds else _probable_kind(document.data, agents)]
    validator = _validator(((agent.kind, agent.section),))
    data = _without_nulls(document.data, validator.manifest_type)
    extra_sections = [RuleViolation((key,), "format", f"cannot be given with {kinds[0]}") for key in kinds[1:]]
    for key in kinds[1:]:
        del data[key]
    if type(data.get("version")) is int:
        data["version"] = str(data["version"])
    result = validator.validate(data)
    schema_violations = result if isinstance(result, list) else []
    if not kinds and len(agents) > 1:
        schema_violations = [_missing_section(agents) if each.path == (agent.kind,) else each for each in result]
    rule_violations = [*find_violations(data, agent, profiles, clone_hosts), *extra_sections]
    errors = [*document.errors, *_to_field_errors(document, schema_violations, rule_violations)]
    if errors or isinstance(result, list):
        _raise_invalid(errors)
    return Manifest.combine(result, AgentSection(agent.kind, _to_plain_data(getattr(result, agent.kind))))


def _to_plain_data(record: Any) -> Any:
    """Convert a record to plain data by encoding it as JSON and decoding the JSON."""
    return msgspec.json.decode(msgspec.json.encode(record))


def _probable_kind(data: Mapping[str, Any], agents: Mapping[str, AgentSchema]) -> str:
    """Return the agent whose key is misspelled in a manifest without an agent section; if none is, the first agent."""
    names = [key for key in data if len(key) <= _SUGGESTION_NAME_LENGTH_MAX]
    return next((close for name in names for close in get_close_matches(name, agents, n=1)), next(iter(agents)))


def _missing_section(agents: Mapping[str, AgentSchema]) -> RuleViolation:
    return RuleViolation((), "required", f"must have a section for the agent: {' or '.join(agents)}")


def read_document(body: bytes, *, agents: Mapping[str, AgentSchema], is_json: bool) -> Document:
    """Read the mapping in a request body, unwrapped, with source locations. The schema is not checked yet.

    Raises InvalidManifestError if the body is unreadable; other errors are in the document.
    """
    document = to_document(_unwrap(_decode_text(body), is_json=is_json))
    if not isinstance(document.data, dict):
        sections = " or ".join(agents)
        reject(f"must be a mapping with version, kind, metadata, repository and {sections}", rule="type")
    return document


def _decode_text(body: bytes) -> str:
    if len(body) > fixed_limits.BODY_BYTES_MAX:
        reject(f"must be at most {fixed_limits.BODY_BYTES_MAX // 1024} KiB", rule="range")
    body = body.removeprefix(BOM_UTF8)
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        reject("must be UTF-8 text", location=_location_of_byte(body, error.start))
    if text.startswith("\ufeff"):
        reject("must start with at most one byte order mark; save it as plain UTF-8", location=SourceLocation(1, 1))
    if "\x00" in text:
        reject("must not contain NUL characters", location=_location_of_byte(body, body.index(0)))
    if not text.strip():
        reject("is empty", rule="required")
    return text


def _location_of_byte(body: bytes, index: int) -> SourceLocation:
    before = body[:index]
    return SourceLocation(before.count(b"\n") + 1, index - before.rfind(b"\n"))


def _unwrap(text: str, *, is_json: bool) -> Any:
    root = _read_json_or_yaml(text, is_json=is_json)
    if not isinstance(root, Pairs) or len(root) != 1 or root[0].key not in (WRAPPED_MANIFEST, WRAPPED_TEXT):
        return root
    wrapped = root[0]
    if wrapped.key == WRAPPED_MANIFEST:
        return wrapped.value
    if not isinstance(wrapped.value, str):
        reject(f"must contain the text of a manifest in {WRAPPED_TEXT}", rule="type")
    # Encode it again, so the same checks apply; they also reject lone surrogates.
    return read_yaml(_decode_text(wrapped.value.encode(errors="surrogatepass")))


def _read_json_or_yaml(text: str, *, is_json: bool) -> Any:
    if is_json:
        return read_json(text)
    if text.lstrip().startswith("{"):
        # JSON sent without its content type. YAML does not support all JSON escapes.
        with suppress(InvalidManifestError):
            return read_json(text)
    return read_yaml(text)


def _to_field_errors(
    document: Document, schema_violations: list[RuleViolation], rule_violations: list[RuleViolation]
) -> list[FieldError]:
    """Add source locations. Errors that the document already contains are omitted."""
    remaining = [violation for violation in schema_violations if violation.path not in document.invalid_paths]
    return [_to_field_error(document, found_violation) for found_violation in [*remaining, *rule_violations]]


def _to_field_error(document: Document, violation: RuleViolation) -> FieldError:
    by_key = violation.rule == "unknown_field"
    location = document.key_location(violation.path) if by_key else document.value_location(violation.path)
    return FieldError.at(violation.path, violation.rule, violation.message, location)


def _raise_invalid(errors: list[FieldError]) -> NoReturn:
    ordered = sorted(errors, key=lambda error: (error.line or 0, error.column or 0))
    reported = ordered[: fixed_limits.MANIFEST_ERRORS_MAX]
    raise InvalidManifestError(reported, omitted_count=len(ordered) - len(reported))
