"""Reads and writes manifests as YAML: one document of the YAML 1.2 core schema.

The reader turns YAML events into nodes; the writer omits default values.

The library's composer is recursive, and its schema is YAML 1.1, where `no` is false and `1:30` is ninety.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any, NoReturn

import msgspec
import yaml

from sandbox.model import fixed_limits
from sandbox.model.display_text import replace_invisible
from sandbox.model.errors import SourceLocation
from sandbox.model.manifest.parsed_document import (
    UNSUPPORTED_NUMBER,
    InvalidValue,
    Node,
    Pair,
    Pairs,
    reject,
    reject_count,
    reject_depth,
)
from sandbox.model.manifest.schema import AgentSchema, Manifest

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NON_YAML_CHARACTER = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_DIRECTIVE = re.compile(r"^%", re.MULTILINE)
_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_REAL = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NON_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_CONSTANTS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_DIGITS_MAX = 18
_DIRECTIVES_MAX = 16
_KEY_MESSAGE = "has a name that YAML does not read as text; put it in quotes"
_IN_QUOTES = "while scanning a quoted scalar"
"""The context in the library's error messages about quoted text."""
_UNSUPPORTED_TAG = InvalidValue("format", "has a YAML tag; only the tags of plain values are supported")


def read_yaml(text: str) -> Node | None:
    """Return the root of a YAML text, or None for an empty one. Raises InvalidManifestError if it is not valid."""
    invalid = _NON_YAML_CHARACTER.search(text)
    if invalid is not None:
        reject(f"contains the control character U+{ord(invalid[0]):04X}", location=_location_at(text, invalid.start()))
    # Limit the number of directives, because libyaml compares each directive with all others.
    if len(_DIRECTIVE.findall(text)) > _DIRECTIVES_MAX:
        reject("has too many YAML directives (lines that start with %)")
    builder = _NodeBuilder()
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            builder.handle_event(event)
    except yaml.MarkedYAMLError as error:
        if _has_lost_line_breaks(text):
            problem, mark = error.problem or "it cannot be read", error.problem_mark or error.context_mark
            reject(f"is not valid YAML: {problem}; {_LOST_LINE_BREAKS}", location=_location(mark))
        _reject_invalid(error, builder.last_quoted)
    except yaml.YAMLError:
        reject("is not valid YAML")
    return builder.root


_KEYS_IN_ONE_LINE_MIN = 4
_LOST_LINE_BREAKS = "the manifest has only one line: if curl sent it, use --data-binary, because -d removes line breaks"


def _has_lost_line_breaks(text: str) -> bool:
    return "\n" not in text.strip() and len(re.findall(r"\w:\s", text)) >= _KEYS_IN_ONE_LINE_MIN


def _reject_invalid(error: yaml.MarkedYAMLError, last_quoted: yaml.ScalarEvent | None) -> NoReturn:
    """Report a syntax error. If a quote is not closed, report the quote, because the parser fails many lines later."""
    problem_mark = error.problem_mark or error.context_mark
    if error.context == _IN_QUOTES:
        reject("is not valid YAML: this quote is not closed", location=_location(error.context_mark))
    line = problem_mark.line if problem_mark is not None else None
    if line is not None and last_quoted is not None and last_quoted.end_mark and last_quoted.end_mark.line == line:
        ended = f"the next quote is in line {line + 1}, and text follows it"
        reject(f"is not valid YAML: this quote is not closed; {ended}", location=_location(last_quoted.start_mark))
    reject(f"is not valid YAML: {error.problem or 'it cannot be read'}", location=_location(problem_mark))


def resolve_scalar(text: str) -> Any:
    """Resolve an unquoted scalar."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        return _resolve_integer(text)
    if _REAL.fullmatch(text):
        value = float(text)
        return value if math.isfinite(value) else UNSUPPORTED_NUMBER
    return UNSUPPORTED_NUMBER if _NON_FINITE.fullmatch(text) else text


def _resolve_integer(text: str) -> int | InvalidValue:
    if len(text.lstrip("+-")) > _DIGITS_MAX:
        return UNSUPPORTED_NUMBER
    if text.startswith(("0o", "0x")):
        return int(text, 0)
    return int(text)


def _location(yaml_mark: Any) -> SourceLocation:
    return SourceLocation(yaml_mark.line + 1, yaml_mark.column + 1) if yaml_mark is not None else SourceLocation(1, 1)


def _location_at(text: str, index: int) -> SourceLocation:
    before = text[:index]
    return SourceLocation(before.count("\n") + 1, index - before.rfind("\n"))


@dataclass(slots=True)
class _OpenCollection:
    """A list or mapping whose end event has not been read yet."""

    node: Node
    invalid_value: InvalidValue | None
    anchor: str | None
    key: Pair | None = None

    @property
    def expects_key(self) -> bool:
        return isinstance(self.node.value, Pairs) and self.key is None

    def add(self, node: Node) -> None:
        if self.key is None:
            self.node.value.append(node)
        else:
            self.node.value.append(self.key._replace(value=node))
            self.key = None


@dataclass(slots=True)
class _NodeBuilder:
    """Builds the root node from events in order.

    last_quoted: the last text in quotes, if it has several lines.
    """

    root: Node | None = None
    last_quoted: yaml.ScalarEvent | None = None
    _stack: list[_OpenCollection] = field(default_factory=list)
    _anchors: dict[str, Node] = field(default_factory=dict)
    _anchor_count: int = 0
    _alias_count: int = 0
    _value_count: int = 0
    _document_count: int = 0

    def handle_event(self, event: yaml.Event) -> None:
        """Process the next event."""
        match event:
            case yaml.DocumentStartEvent():
                self._document_count += 1
                if self._document_count > 1:
                    reject("must be one YAML document, not several", location=_location(event.start_mark))
            case yaml.AliasEvent():
                self._add(self._resolve_alias(event), event)
            case yaml.ScalarEvent():
                self._add_scalar(event)
            case yaml.SequenceStartEvent():
                self._open_collection(event, [], "seq")
            case yaml.MappingStartEvent():
                self._open_collection(event, Pairs(), "map")
            case yaml.SequenceEndEvent() | yaml.MappingEndEvent():
                self._close_collection()
            case _:
                pass

    def _add_scalar(self, event: yaml.ScalarEvent) -> None:
        value, start, end = _scalar_value(event), event.start_mark, event.end_mark
        if event.style in {"'", '"'}:
            self.last_quoted = event if start and end and start.line != end.line else None
        node = Node(value, _location(start))
        self._register_anchor(event.anchor, node)
        if self._stack and self._stack[-1].expects_key:
            error = None if isinstance(value, str) else _KEY_MESSAGE
            self._stack[-1].key = Pair(str(event.value), None, node.location, error)
        else:
            self._add(node, event)

    def _open_collection(self, event: Any, value: list[Any], kind: str) -> None:
        node = Node(value, _location(event.start_mark))
        self._reject_as_key(event)
        if len(self._stack) >= fixed_limits.MANIFEST_DEPTH_MAX:
            reject_depth(node.location)
        refused = None if event.tag in {None, "!", _TAG + kind} else _UNSUPPORTED_TAG
        self._stack.append(_OpenCollection(node, refused, event.anchor))

    def _close_collection(self) -> None:
        ended = self._stack.pop()
        if ended.invalid_value is not None:
            ended.node.value = ended.invalid_value
        self._register_anchor(ended.anchor, ended.node)
        self._attach(ended.node)

    def _resolve_alias(self, event: Any) -> Node:
        location = _location(event.start_mark)
        self._alias_count += 1
        if self._alias_count > fixed_limits.MANIFEST_ALIASES_MAX:
            reject(f"has more than {fixed_limits.MANIFEST_ALIASES_MAX} YAML aliases", rule="range", location=location)
        node = self._anchors.get(event.anchor)
        if node is None:
            reject("has a YAML alias without an anchor before it", location=location)
        return node

    def _add(self, node: Node, event: Any) -> None:
        self._reject_as_key(event)
        self._attach(node)

    def _attach(self, node: Node) -> None:
        self._value_count += 1
        if self._value_count > fixed_limits.MANIFEST_VALUES_MAX:
            reject_count(node.location)
        if self._stack:
            self._stack[-1].add(node)
        else:
            self.root = node

    def _reject_as_key(self, event: Any) -> None:
        if self._stack and self._stack[-1].expects_key:
            reject("has a field whose name is not text", location=_location(event.start_mark))

    def _register_anchor(self, anchor: str | None, node: Node) -> None:
        """Register an anchor once its value has ended, so no value can contain itself."""
        if anchor is None:
            return
        self._anchor_count += 1
        if self._anchor_count > fixed_limits.MANIFEST_ALIASES_MAX:
            reject(
                f"has more than {fixed_limits.MANIFEST_ALIASES_MAX} YAML anchors", rule="range", location=node.location
            )
        self._anchors[anchor] = node


def _scalar_value(event: Any) -> Any:
    text = str(event.value)
    if event.implicit[0]:
        return resolve_scalar(text)
    if event.implicit[1] or event.tag in {"!", _TAG + "str"}:
        return text
    value = resolve_scalar(text)
    kinds = {bool: "bool", int: "int", float: "float", type(None): "null"}
    return value if event.tag == _TAG + kinds.get(type(value), "") else _UNSUPPORTED_TAG


_WIDTH = 100
_LINE_ENDS = re.compile("[\r\x85\u2028\u2029]")
"""Characters that a YAML reader treats as line breaks and normalizes."""


class _Dumper(yaml.SafeDumper):
    """Indents lists below their key and writes multi-line strings as blocks."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    is_quoted = _LINE_ENDS.search(text) or resolve_scalar(text) != text or _escape_invisible(text) != text
    style = '"' if is_quoted else "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _escape_invisible(text: str) -> str:
    """Return the text with a YAML escape in place of each invisible character except TAB and LF."""
    return replace_invisible(text, lambda character: f"\\U{ord(character):08X}", allowed="\t\n")


_Dumper.add_representer(str, _represent_text)


def write_yaml(data: dict[str, Any]) -> str:
    """Return the document as YAML, with its fields in their given order and with invisible characters as escapes."""
    document = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=_WIDTH)
    return _escape_invisible(document)  # valid, because every string with such a character is double-quoted


def manifest_yaml(
    manifest: Manifest, agents: Mapping[str, AgentSchema], *, with_id: bool = False, with_sources: bool = True
) -> str:
    """Return the YAML text of the data that `manifest_data` returns."""
    return write_yaml(manifest_data(manifest, agents, with_id=with_id, with_sources=with_sources))


def manifest_data(
    manifest: Manifest, agents: Mapping[str, AgentSchema], *, with_id: bool = False, with_sources: bool = True
) -> dict[str, Any]:
    """Return a manifest as plain data, without default values.

    with_id: include the task's id; omit it to submit the manifest again. with_sources: include the sources of secrets,
    which only operators may see; otherwise include only their names.
    """
    data = {
        "version": "1",
        "kind": "Task",
        "metadata": _explicit_fields(manifest.metadata),
        "repository": _explicit_fields(manifest.repository),
        manifest.agent.kind: _explicit_fields(_read_section(manifest, agents)),
    }
    optional = {name: _explicit_fields(getattr(manifest, name)) for name in ("vm", "secrets", "lifecycle")}
    data |= {name: explicit for name, explicit in optional.items() if explicit}
    if not with_sources and manifest.secrets:
        data["secrets"] = [{"name": secret.name} for secret in manifest.secrets]
    if not with_id:
        data["metadata"].pop("id", None)
    return data


def _read_section(manifest: Manifest, agents: Mapping[str, AgentSchema]) -> Any:
    """Return the agent's section. If a newer version wrote it and this version cannot read it, return plain data."""
    agent = agents.get(manifest.agent.kind)
    if agent is not None:
        with suppress(msgspec.ValidationError):
            return msgspec.convert(manifest.agent.settings, agent.section_type)
    return manifest.agent.settings


def _explicit_fields(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        values = [(declared, getattr(value, declared.name)) for declared in fields(value)]
        return {declared.name: _explicit_fields(each) for declared, each in values if each != _field_default(declared)}
    if isinstance(value, dict):
        return {key: _explicit_fields(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [_explicit_fields(each) for each in value]
    return value


def _field_default(declared: Field[Any]) -> Any:
    return declared.default if declared.default_factory is MISSING else declared.default_factory()
