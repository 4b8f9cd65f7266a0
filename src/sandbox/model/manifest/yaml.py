"""YAML text as nodes: one document of the core schema of YAML 1.2, read event by event.

The library's own composer is recursive and its schema is YAML 1.1, where `no` is false and `1:30` is ninety.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from sandbox.model import limits
from sandbox.model.manifest.document import TOO_LARGE, Node, Pair, Pairs, Refused, refuse, refuse_count, refuse_depth
from sandbox.model.manifest.errors import Mark

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NOT_YAML = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_DIRECTIVE = re.compile(r"^%", re.MULTILINE)
_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_REAL = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_DIGITS_MAX = 18
_DIRECTIVES_MAX = 16
_KEY_COMPLAINT = "has a name that YAML does not read as text; put it in quotes"
_TAG_REFUSED = Refused("format", "has a YAML tag; only the tags of plain values are supported")


def read_yaml(text: str) -> Node | None:
    """The root of a YAML text, None for an empty one. Raises InvalidManifestError where it is not one."""
    unfit = _NOT_YAML.search(text)
    if unfit is not None:
        refuse(f"contains the control character U+{ord(unfit[0]):04X}", mark=_mark_at(text, unfit.start()))
    # libyaml compares every directive with every other one.
    if len(_DIRECTIVE.findall(text)) > _DIRECTIVES_MAX:
        refuse("has too many YAML directives (lines that begin with %)")
    reading = _Reading()
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            reading.take(event)
    except yaml.MarkedYAMLError as error:
        problem = error.problem or "it cannot be read"
        refuse(f"is not valid YAML: {problem}", mark=_mark(error.problem_mark or error.context_mark))
    except yaml.YAMLError:
        refuse("is not valid YAML")
    return reading.root


def plain_scalar(text: str) -> Any:
    """What an unquoted scalar stands for."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return _integer(text)
    if _REAL.fullmatch(text):
        value = float(text)
        return value if math.isfinite(value) else TOO_LARGE
    return TOO_LARGE if _NOT_FINITE.fullmatch(text) else text


def _integer(text: str) -> int | Refused:
    if len(text.lstrip("+-")) > _DIGITS_MAX:
        return TOO_LARGE
    if text.startswith(("0o", "0x")):
        return int(text, 0)
    return int(text)


def _mark(mark: Any) -> Mark:
    return Mark(mark.line + 1, mark.column + 1) if mark is not None else Mark(1, 1)


def _mark_at(text: str, index: int) -> Mark:
    before = text[:index]
    return Mark(before.count("\n") + 1, index - before.rfind("\n"))


@dataclass(slots=True)
class _Open:
    """A list or mapping whose end was not read yet."""

    node: Node
    refused: Refused | None
    anchor: str | None
    key: Pair | None = None

    @property
    def awaits_key(self) -> bool:
        return isinstance(self.node.value, Pairs) and self.key is None

    def add(self, node: Node) -> None:
        if self.key is None:
            self.node.value.append(node)
        else:
            self.node.value.append(self.key._replace(value=node))
            self.key = None


@dataclass(slots=True)
class _Reading:
    """Takes events in order and builds the root of them."""

    root: Node | None = None
    _open: list[_Open] = field(default_factory=list)
    _anchors: dict[str, Node] = field(default_factory=dict)
    _names_seen: int = 0
    _aliases: int = 0
    _values: int = 0
    _documents: int = 0

    def take(self, event: yaml.Event) -> None:
        """Take the next event."""
        match event:
            case yaml.DocumentStartEvent():
                self._documents += 1
                if self._documents > 1:
                    refuse("must be one YAML document, not several", mark=_mark(event.start_mark))
            case yaml.AliasEvent():
                self._add(self._alias(event), event)
            case yaml.ScalarEvent():
                self._scalar(event)
            case yaml.SequenceStartEvent():
                self._begin(event, [], "seq")
            case yaml.MappingStartEvent():
                self._begin(event, Pairs(), "map")
            case yaml.SequenceEndEvent() | yaml.MappingEndEvent():
                self._end()
            case _:
                pass

    def _scalar(self, event: yaml.ScalarEvent) -> None:
        value = _scalar(event)
        node = Node(value, _mark(event.start_mark))
        self._name(event.anchor, node)
        if self._open and self._open[-1].awaits_key:
            complaint = None if isinstance(value, str) else _KEY_COMPLAINT
            self._open[-1].key = Pair(str(event.value), None, node.mark, complaint)
        else:
            self._add(node, event)

    def _begin(self, event: Any, value: list[Any], kind: str) -> None:
        node = Node(value, _mark(event.start_mark))
        self._refuse_as_key(event)
        if len(self._open) >= limits.MANIFEST_DEPTH_MAX:
            refuse_depth(node.mark)
        refused = None if event.tag in {None, "!", _TAG + kind} else _TAG_REFUSED
        self._open.append(_Open(node, refused, event.anchor))

    def _end(self) -> None:
        ended = self._open.pop()
        if ended.refused is not None:
            ended.node.value = ended.refused
        self._name(ended.anchor, ended.node)
        self._place(ended.node)

    def _alias(self, event: Any) -> Node:
        mark = _mark(event.start_mark)
        self._aliases += 1
        if self._aliases > limits.MANIFEST_ALIASES_MAX:
            refuse(f"has more than {limits.MANIFEST_ALIASES_MAX} YAML aliases", rule="range", mark=mark)
        node = self._anchors.get(event.anchor)
        if node is None:
            refuse("has a YAML alias without an anchor before it", mark=mark)
        return node

    def _add(self, node: Node, event: Any) -> None:
        self._refuse_as_key(event)
        self._place(node)

    def _place(self, node: Node) -> None:
        self._values += 1
        if self._values > limits.MANIFEST_VALUES_MAX:
            refuse_count(node.mark)
        if self._open:
            self._open[-1].add(node)
        else:
            self.root = node

    def _refuse_as_key(self, event: Any) -> None:
        if self._open and self._open[-1].awaits_key:
            refuse("has a field whose name is not text", mark=_mark(event.start_mark))

    def _name(self, anchor: str | None, node: Node) -> None:
        """An anchor counts from the end of its value on, so nothing can contain itself."""
        if anchor is None:
            return
        self._names_seen += 1
        if self._names_seen > limits.MANIFEST_ALIASES_MAX:
            refuse(f"has more than {limits.MANIFEST_ALIASES_MAX} YAML anchors", rule="range", mark=node.mark)
        self._anchors[anchor] = node


def _scalar(event: Any) -> Any:
    text = str(event.value)
    if event.implicit[0]:
        return plain_scalar(text)
    if event.implicit[1] or event.tag in {"!", _TAG + "str"}:
        return text
    value = plain_scalar(text)
    kinds = {bool: "bool", int: "int", float: "float", type(None): "null"}
    return value if event.tag == _TAG + kinds.get(type(value), "") else _TAG_REFUSED


_WIDTH = 100
_LINE_ENDS = re.compile("[\r\x85\u2028\u2029]")
"""What a YAML reader takes for the end of a line, and gives back as another one."""


class _Dumper(yaml.SafeDumper):
    """Indents lists below their key, and writes texts of several lines as blocks."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = '"' if _LINE_ENDS.search(text) or plain_scalar(text) != text else "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def write_yaml(data: dict[str, Any]) -> str:
    """The text of a document, in the order of the data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=_WIDTH)
