"""Parses bytes into a valid manifest, or collects all errors."""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from collections.abc import Collection, Hashable, Mapping
from contextlib import suppress
from functools import cache
from typing import Any, NoReturn, TypeVar, cast

import msgspec

from sandbox.model import fixed_limits
from sandbox.model.errors import (
    FieldError,
    InvalidManifestError,
    InvalidParameterError,
    RuleViolation,
    SourceLocation,
    closest_name,
)
from sandbox.model.manifest.parsed_document import Document, Pairs, read_json, reject, to_document
from sandbox.model.manifest.schema import AgentSchema, AgentSection, Manifest, declare_manifest
from sandbox.model.manifest.validation import Validator, find_violations, without_nulls
from sandbox.model.manifest.yaml import read_yaml

__all__ = ["FieldError", "InvalidManifestError", "parse_manifest", "parse_object", "read_document", "validate_document"]

ObjectT = TypeVar("ObjectT")

SHIPPED_PROFILES: Mapping[str, str] = {"agentic-dev": "", "basic": ""}
"""The built-in profiles. The empty values mean that each of them is usable."""

MANIFEST_KEY = "manifest"
MANIFEST_TEXT_KEY = "manifest_yaml"
"""Keys of a JSON body that wraps a manifest.

The body has exactly one key, whose value is the manifest or the manifest's text.
"""


def parse_manifest(
    body: bytes,
    *,
    agents: Mapping[str, AgentSchema],
    is_json: bool,
    problem_by_profile: Mapping[str, str] | None = SHIPPED_PROFILES,
    clone_hosts: Collection[str] | None = None,
) -> Manifest:
    """Parse a manifest from a request body and fill in all defaults.

    agents: the agents that a manifest can have a section for, keyed by section key; at least one. A manifest has
    exactly one of these sections.
    problem_by_profile: profile names and why each one is unusable (empty if it is usable); None accepts any name.
    clone_hosts: hosts that repositories may be cloned from; None allows any.

    JSON may also be wrapped as `{"manifest": {…}}` or `{"manifest_yaml": "…"}`. Raises InvalidManifestError with all
    errors; a body that cannot be parsed has one error.
    """
    document = read_document(body, agents=agents, is_json=is_json)
    return validate_document(document, agents=agents, problem_by_profile=problem_by_profile, clone_hosts=clone_hosts)


def validate_document(
    document: Document,
    *,
    agents: Mapping[str, AgentSchema],
    problem_by_profile: Mapping[str, str] | None = SHIPPED_PROFILES,
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
    validator = _manifest_validator(((agent.kind, agent.section_type),))
    data = without_nulls(document.data, validator.object_type)
    extra_sections = [RuleViolation((key,), "format", f"cannot be given with {kinds[0]}") for key in kinds[1:]]
    for key in kinds[1:]:
        del data[key]
    if type(data.get("version")) is int:
        data["version"] = str(data["version"])
    result = validator.validate(data)
    schema_violations = result if isinstance(result, list) else []
    if not kinds and len(agents) > 1:
        schema_violations = [_missing_section(agents) if each.path == (agent.kind,) else each for each in result]
    rule_violations = [*find_violations(data, agent, problem_by_profile, clone_hosts), *extra_sections]
    errors = [*document.errors, *_to_field_errors(document, schema_violations, rule_violations)]
    if errors or isinstance(result, list):
        _raise_invalid(errors)
    return Manifest.combine(result, AgentSection(agent.kind, _to_plain_data(getattr(result, agent.kind))))


@cache
def _manifest_validator(section_types: tuple[tuple[str, Any], ...]) -> Validator[Any]:
    return Validator(declare_manifest(dict(section_types)))


@cache
def _object_validator(object_type: Any) -> Validator[Any]:
    return Validator(object_type)


def parse_object(body: bytes, object_type: type[ObjectT], defaults: Mapping[str, Any] | None = None) -> ObjectT:
    """Parse a JSON object into a dataclass with `FORBID_EXTRA`. An empty body counts as an empty object.

    defaults: values of absent fields. Raises InvalidParameterError with all errors.
    """
    try:
        document = to_document(read_json(_decode_text(body if body.strip() else b"{}")))
        if not isinstance(document.data, dict):
            reject("must be a JSON object", rule="type")
    except InvalidManifestError as error:
        raise InvalidParameterError(error.errors) from None
    data = {**(defaults or {}), **document.data}
    validator: Validator[ObjectT] = _object_validator(cast("Hashable", object_type))
    result = validator.validate(data)
    violations = result if isinstance(result, list) else []
    errors = [*document.errors, *_to_field_errors(document, violations, [])]
    if errors or isinstance(result, list):
        raise InvalidParameterError(errors)
    return result


def _to_plain_data(record: Any) -> Any:
    """Convert a record to plain data by encoding it as JSON and decoding the JSON."""
    return msgspec.json.decode(msgspec.json.encode(record))


def _probable_kind(data: Mapping[str, Any], agents: Mapping[str, AgentSchema]) -> str:
    """Return the agent whose key is misspelled in a manifest without an agent section; by default, the first agent."""
    return next((close for name in data if (close := closest_name(name, agents))), next(iter(agents)))


def _missing_section(agents: Mapping[str, AgentSchema]) -> RuleViolation:
    return RuleViolation((), "required", f"must have a section for the agent: {' or '.join(agents)}")


def read_document(body: bytes, *, agents: Mapping[str, AgentSchema], is_json: bool) -> Document:
    """Return the manifest in a request body as a document with source locations. The schema is not checked yet.

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
    if not isinstance(root, Pairs) or len(root) != 1 or root[0].key not in (MANIFEST_KEY, MANIFEST_TEXT_KEY):
        return root
    wrapped = root[0]
    if wrapped.key == MANIFEST_KEY:
        return wrapped.value
    if not isinstance(wrapped.value, str):
        reject(f"must contain the text of a manifest in {MANIFEST_TEXT_KEY}", rule="type")
    # Encode the text again, so that the same checks apply to it. They also reject lone surrogates.
    return read_yaml(_decode_text(wrapped.value.encode(errors="surrogatepass")))


_YAML_START = re.compile(r"(?:\s*#.*\n)*+\s*\w+:\s")
"""The beginning of a mapping in YAML, after comments."""

_YAML_HEADER = "Content-Type: application/yaml"


def _read_json_or_yaml(text: str, *, is_json: bool) -> Any:
    if is_json:
        try:
            return read_json(text)
        except InvalidManifestError as error:
            if not _YAML_START.match(text):
                raise
            message = f"{error.errors[0].message}; the text looks like YAML: send it with {_YAML_HEADER}"
            raise InvalidManifestError([msgspec.structs.replace(error.errors[0], message=message)]) from None
    if text.lstrip().startswith("{"):
        # The body may be JSON despite its content type. Try JSON first: YAML does not support all JSON escapes.
        with suppress(InvalidManifestError):
            return read_json(text)
    return read_yaml(text)


def _to_field_errors(
    document: Document, schema_violations: list[RuleViolation], rule_violations: list[RuleViolation]
) -> list[FieldError]:
    """Add source locations to the errors. Errors that the document already contains are omitted."""
    remaining = [violation for violation in schema_violations if violation.path not in document.invalid_paths]
    return [_to_field_error(document, found_violation) for found_violation in [*remaining, *rule_violations]]


def _to_field_error(document: Document, violation: RuleViolation) -> FieldError:
    by_key = violation.rule == "unknown_field"
    position = document.key_location(violation.path) if by_key else document.value_location(violation.path)
    return FieldError.at(violation.path, violation.rule, violation.message, position, suggestion=violation.suggestion)


def _raise_invalid(errors: list[FieldError]) -> NoReturn:
    raise InvalidManifestError(sorted(errors, key=lambda error: (error.line or 0, error.column or 0)))
