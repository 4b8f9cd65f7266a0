"""Validates plain data: types, bounds and formats of fields, and the manifest's rules that involve several fields.

`Validator` checks data against dataclasses. `find_violations` checks the rules, and what the server offers.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Generic, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from sandbox.model import fixed_limits
from sandbox.model.errors import FieldPath, RuleName, RuleViolation, closest_name
from sandbox.model.manifest.field_formats import Format
from sandbox.model.manifest.parsed_document import as_list, as_mapping, as_text
from sandbox.model.manifest.schema import HEADLESS_DEFAULT, AgentSchema, Vm
from sandbox.model.repository_urls import clone_endpoint, is_clone_allowed

ObjectT = TypeVar("ObjectT")


class Validator(Generic[ObjectT]):
    """Validates plain data against a dataclass with `FORBID_EXTRA`."""

    def __init__(self, object_type: type[ObjectT]) -> None:
        self.object_type = object_type
        self._adapter = TypeAdapter(object_type)

    def validate(self, data: dict[str, Any]) -> ObjectT | list[RuleViolation]:
        """Return the record, or the list of all violations."""
        try:
            return self._adapter.validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            details = error.errors(include_url=False)
            # Errors above the maximum are only counted. Searching for similar field names would be wasted: each search
            # takes about 10 µs of CPU, and a request can have MANIFEST_VALUES_MAX unknown fields.
            violations = [
                describe_violation(each, self.object_type, searches_names=index < fixed_limits.INPUT_ERRORS_MAX)
                for index, each in enumerate(details)
            ]
            return self._merge_misspelled(violations)

    def _merge_misspelled(self, violations: list[RuleViolation]) -> list[RuleViolation]:
        """Omit the error about a missing field if an unknown field is probably its misspelled name."""
        misspelled = {(*each.path[:-1], each.suggestion) for each in violations if each.rule == "unknown_field"}
        return [each for each in violations if each.rule != "required" or each.path not in misspelled]


def without_nulls(data: Any, kind: Any) -> Any:
    """Remove null fields from records, because null means absent."""
    if _is_dataclass_type(kind) and isinstance(data, dict):
        kinds = _field_types(kind)
        return {
            name: without_nulls(value, kinds.get(name))
            for name, value in data.items()
            if value is not None or name not in kinds
        }
    if isinstance(data, list):
        return [without_nulls(item, _item_type(kind)) for item in data] if _item_type(kind) else data
    if isinstance(data, dict):
        return (
            {key: without_nulls(value, _item_type(kind)) for key, value in data.items()} if _item_type(kind) else data
        )
    return data


def _is_dataclass_type(kind: Any) -> bool:
    return isinstance(kind, type) and is_dataclass(kind)


@cache
def _field_types(dataclass_type: Any) -> dict[str, Any]:
    """Return the type of each field of a record, without its bounds and without `None`."""
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


class _FailedCheck(NamedTuple):
    """A failed check of the value at a path of a record."""

    path: FieldPath
    error: ErrorDetails
    object_type: Any
    searches_names: bool


def describe_violation(error: ErrorDetails, object_type: Any = None, *, searches_names: bool = True) -> RuleViolation:
    """Describe an error that pydantic found.

    object_type: the dataclass, for suggestions of field names.
    searches_names: whether an unknown name is compared with the known ones.
    """
    path = tuple(part for part in error["loc"] if part != "[key]")
    failed_check = _FailedCheck(path, error, object_type, searches_names)
    for pattern, rule, format_message in _MESSAGES:
        if re.fullmatch(pattern, error["type"]):
            return RuleViolation(path, rule, format_message(failed_check), _suggestion(failed_check))
    return RuleViolation(path, "format", "is not valid")


def _suggestion(failed_check: _FailedCheck) -> str | None:
    error = failed_check.error
    if error["type"] == "literal_error":
        offered = _offered_values(error)
        is_searched = failed_check.searches_names and len(offered) > 1
        return closest_name(str(error["input"]), offered) if is_searched else None
    if error["type"] in {"unexpected_keyword_argument", "extra_forbidden"}:
        return _closest_field(failed_check)
    if (form := _format_of_number(failed_check)) is not None:
        return form.suggest(str(error["input"]))
    suggestion = error.get("ctx", {}).get("suggestion")
    return suggestion if isinstance(suggestion, str) else None


def _format_of_number(failed_check: _FailedCheck) -> Format | None:
    """Return the format of a text field whose value is a number; None if the number would be valid as text."""
    value, dataclass_type = failed_check.error["input"], _type_at(failed_check.path[:-1], failed_check.object_type)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if failed_check.error["type"] != "string_type" or not is_number or not _is_dataclass_type(dataclass_type):
        return None
    form = _field_formats(dataclass_type).get(str(failed_check.path[-1]))
    return form if form is not None and form.find_error(str(value)) is not None else None


@cache
def _field_formats(dataclass_type: Any) -> dict[str, Format]:
    """Return the format of each field that has one."""
    hints = get_type_hints(dataclass_type, include_extras=True)
    metadata = {name: getattr(_strip_optional(hint), "__metadata__", ()) for name, hint in hints.items()}
    return {name: each for name, parts in metadata.items() for each in parts if isinstance(each, Format)}


_SECTION_SIMILARITY_MIN = 0.8
"""Minimum similarity of the name of a field in another section; higher than for a field in the same object."""


def _closest_field(failed_check: _FailedCheck) -> str | None:
    """Return the known field whose name resembles that of an unknown field.

    The result is the name of a field of the same object, or `SECTION.FIELD` for a field of another section.
    """
    dataclass_type = _type_at(failed_check.path[:-1], failed_check.object_type)
    if not failed_check.searches_names or not _is_dataclass_type(dataclass_type):
        return None
    name = str(failed_check.path[-1])
    close = closest_name(name, _field_types(dataclass_type))
    if close is not None:
        return close
    sections = _sections_by_field(failed_check.object_type)
    found = closest_name(name, sections, _SECTION_SIMILARITY_MIN)
    return f"{sections[found]}.{found}" if found is not None else None


@cache
def _sections_by_field(dataclass_type: Any) -> dict[str, str]:
    """Return the names of sections, keyed by field. If several sections have a field, the first section counts."""
    sections: dict[str, str] = {}
    for section, kind in _field_types(dataclass_type).items():
        for name in _field_types(kind) if _is_dataclass_type(kind) else ():
            sections.setdefault(name, section)
    return sections


def _unknown_field_message(failed_check: _FailedCheck) -> str:
    """List the valid fields, unless there is a suggestion."""
    dataclass_type = _type_at(failed_check.path[:-1], failed_check.object_type)
    if not _is_dataclass_type(dataclass_type) or _closest_field(failed_check) is not None:
        return "is an unknown field"
    return f"is an unknown field; valid fields: {', '.join(_field_types(dataclass_type))}"


def _type_at(path: FieldPath, object_type: Any) -> Any:
    """Return the declared type of the value at a path."""
    kind: Any = object_type
    for part in path:
        kind = _field_types(kind).get(str(part)) if _is_dataclass_type(kind) else _item_type(kind)
    return kind


def _offered_values(error: ErrorDetails) -> list[str]:
    """Return the values of a `Literal`, which pydantic formats as `'a', 'b' or 'c'`."""
    expected = error["ctx"]["expected"]
    return re.findall("'([^']*)'", expected) or [expected]


def _enum_message(failed_check: _FailedCheck) -> str:
    offered = _offered_values(failed_check.error)
    return f"must be one of {', '.join(offered)}" if len(offered) > 1 else f'must be "{offered[0]}"'


def _format_message(failed_check: _FailedCheck) -> str:
    return failed_check.error["msg"]


def _type_message(expected: str) -> Callable[[_FailedCheck], str]:
    def format_message(failed_check: _FailedCheck) -> str:
        value = failed_check.error["input"]
        if (form := _format_of_number(failed_check)) is not None:
            return str(form.find_error(str(value)))  # in quotes, the value would be rejected again
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


def _bound_message(failed_check: _FailedCheck) -> str:
    context = failed_check.error.get("ctx", {})
    phrase, bound = ("at least", context["ge"]) if "ge" in context else ("at most", context["le"])
    return f"must be {phrase} {int(bound) if bound == int(bound) else bound}"


def _length_message(failed_check: _FailedCheck) -> str:
    error = failed_check.error
    context, unit = error.get("ctx", {}), "characters" if error["type"].startswith("string") else "entries"
    if "max_length" in context:
        return f"must have at most {context['max_length']} {unit}"
    return "must not be empty"


_MESSAGES: tuple[tuple[str, RuleName, Callable[[_FailedCheck], str]], ...] = (
    ("missing", "required", lambda _: "is required"),
    ("unexpected_keyword_argument|extra_forbidden", "unknown_field", _unknown_field_message),
    ("literal_error", "enum", _enum_message),
    ("enum", "enum", _format_message),
    ("format", "format", _format_message),
    ("range", "range", _format_message),
    ("string_type", "type", _type_message("text")),
    ("int_type|int_from_float", "type", _type_message("a whole number")),
    ("float_type", "type", _type_message("a number")),
    ("bool_type", "type", _type_message("true or false")),
    ("tuple_type|list_type", "type", _type_message("a list")),
    ("dataclass_type|dict_type", "type", _type_message("a mapping")),
    ("int_parsing", "type", lambda _: "must be a whole number"),
    ("float_parsing", "type", lambda _: "must be a number"),
    ("bool_parsing", "type", lambda _: "must be true or false"),
    ("int_parsing_size|finite_number", "range", lambda _: "is not a supported number"),
    ("(greater|less)_than_equal", "range", _bound_message),
    ("(string_)?too_(short|long)", "range", _length_message),
)
"""Patterns of pydantic's error types, each with the rule and the message. Parsing errors occur only for parameters."""


_RESERVED_NAMES = frozenset(
    {
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TMPDIR", "PWD", "IS_SANDBOX"),
        *("IFS", "ENV", "BASH_ENV", "BASHOPTS", "SHELLOPTS", "GLIBC_TUNABLES"),
        *("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY", "https_proxy", "http_proxy", "all_proxy", "no_proxy"),
    }
)
_RESERVED_PREFIX = "LD_"


def find_violations(
    data: dict[str, Any],
    agent: AgentSchema,
    problem_by_profile: Mapping[str, str] | None,
    clone_hosts: Collection[str] | None = None,
) -> Iterator[RuleViolation]:
    """Yield every violation. Values may have wrong types; the schema reports them."""
    section = as_mapping(data.get(agent.kind))
    yield from _unknown_clone_host(data, clone_hosts)
    yield from _hosts_without_outbound(data)
    yield from _unusable_profile(data, problem_by_profile)
    yield from _duplicate_secrets(data)
    yield from _reserved_secrets(data, agent)
    secret_names = {as_text(as_mapping(secret).get("name")) for secret in as_list(data.get("secrets"))}
    for violation in agent.find_violations(section, secret_names):
        yield violation._replace(path=(agent.kind, *violation.path))
    yield from _unpriced_models(data, section, agent)
    yield from _resume_without_headless(data, section)


def _hosts_without_outbound(data: dict[str, Any]) -> Iterator[RuleViolation]:
    vm = as_mapping(data.get("vm"))
    if vm.get("allowed_hosts") and vm.get("network_mode", Vm.network_mode) in ("isolated", "full"):
        yield RuleViolation(("vm", "allowed_hosts"), "format", "can only be given with network_mode: outbound")


def _unusable_profile(data: dict[str, Any], problem_by_profile: Mapping[str, str] | None) -> Iterator[RuleViolation]:
    profile = as_mapping(data.get("vm")).get("profile", Vm.profile)
    if problem_by_profile is None or not isinstance(profile, str):
        return
    if profile not in problem_by_profile:
        offered = [name for name in sorted(problem_by_profile) if not problem_by_profile[name]]
        message = f"must be one of this server's profiles: {', '.join(offered)}"
        yield RuleViolation(("vm", "profile"), "not_offered", message, closest_name(profile, offered))
    elif problem_by_profile[profile]:
        yield RuleViolation(("vm", "profile"), "not_offered", problem_by_profile[profile])


def _unknown_clone_host(data: dict[str, Any], clone_hosts: Collection[str] | None) -> Iterator[RuleViolation]:
    url = as_text(as_mapping(data.get("repository")).get("url"))
    if clone_hosts is None or clone_endpoint(url) is None or is_clone_allowed(url, clone_hosts):
        return
    offered = ", ".join(sorted(clone_hosts)) or "none"
    setting = "the operator can allow more in git.allowed_hosts (sandbox.toml) or SANDBOX_GIT_ALLOWED_HOSTS"
    message = f"must be on one of the hosts from which this server clones: {offered}; {setting}"
    yield RuleViolation(("repository", "url"), "not_offered", message)


def _duplicate_secrets(data: dict[str, Any]) -> Iterator[RuleViolation]:
    seen: set[str] = set()
    for index, secret in enumerate(as_list(data.get("secrets"))):
        name = as_mapping(secret).get("name")
        if isinstance(name, str) and name in seen:
            yield RuleViolation(
                ("secrets", index, "name"), "format", "is the name of another secret; names must differ"
            )
        elif isinstance(name, str):
            seen.add(name)


def _reserved_secrets(data: dict[str, Any], agent: AgentSchema) -> Iterator[RuleViolation]:
    """Yield the secrets that would, as environment variables, redirect the agent or load code into it."""
    for index, secret in enumerate(as_list(data.get("secrets"))):
        name = as_text(as_mapping(secret).get("name"))
        if name in _RESERVED_NAMES or name.startswith(_RESERVED_PREFIX) or agent.is_reserved_variable(name):
            message = "is reserved for the sandbox or the agent; choose another name"
            yield RuleViolation(("secrets", index, "name"), "format", message)


def _unpriced_models(data: dict[str, Any], section: dict[str, Any], agent: AgentSchema) -> Iterator[RuleViolation]:
    if "budget_usd" not in as_mapping(data.get("lifecycle")):
        return
    for name, model in agent.used_models(section):
        if not agent.has_price(model):
            message = (
                f"cannot be enforced, because the price of {agent.kind}.{name} is unknown; set budget_tokens instead"
            )
            yield RuleViolation(("lifecycle", "budget_usd"), "not_offered", message)


def _resume_without_headless(data: dict[str, Any], section: dict[str, Any]) -> Iterator[RuleViolation]:
    if section.get("headless", HEADLESS_DEFAULT) is False and as_mapping(data.get("lifecycle")).get("resume") is True:
        yield RuleViolation(("lifecycle", "resume"), "format", "can only be given with headless: true")
