"""A manifest's text as plain data, with the places where everything stood.

Readers (`manifest_yaml`, `manifest_json`) make nodes of the text; here the nodes become dicts and lists, aliases
expanded, within bounds that hold before anything grows. No step is recursive, so no nesting can exhaust the stack.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from sandbox.model import limits
from sandbox.model.manifest.errors import InvalidManifestError, Mark, Mistake, Path, Rule

_UNFIT_TEXT = re.compile("[\x00\ud800-\udfff]")


class Refused(NamedTuple):
    """A value that cannot be part of any manifest, and why."""

    rule: Rule
    message: str


TOO_LARGE = Refused("range", "is no number that can be used; text that looks like a number needs quotes")


class Pair(NamedTuple):
    """A key and its value. `complaint` says why the key is refused."""

    key: str
    value: Any
    mark: Mark | None = None
    complaint: str | None = None


class Pairs(list[Pair]):
    """A mapping as it was written, duplicate keys included."""


@dataclass(slots=True)
class Node:
    """A value (scalar, list of nodes, `Pairs` or `Refused`) and where it stood."""

    value: Any
    mark: Mark


@dataclass(slots=True)
class Document:
    """Plain data; `refused` are the places whose value was refused and stands as None."""

    data: Any = None
    key_marks: dict[Path, Mark] = field(default_factory=dict)
    value_marks: dict[Path, Mark] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    refused: set[Path] = field(default_factory=set)

    def mark_of_value(self, path: Path) -> Mark | None:
        """Where the value stood, or the nearest thing around it that has a place."""
        for length in range(len(path), -1, -1):
            mark = self.value_marks.get(path[:length])
            if mark is not None:
                return mark
        return None

    def mark_of_key(self, path: Path) -> Mark | None:
        """Where the key of this value stood."""
        return self.key_marks.get(path) or self.mark_of_value(path)


def refuse(message: str, *, rule: Rule = "format", mark: Mark | None = None) -> NoReturn:
    """Raise InvalidManifestError about the document as a whole."""
    raise InvalidManifestError([Mistake.at((), rule, message, mark)])


def refuse_depth(mark: Mark | None = None) -> NoReturn:
    """Raise InvalidManifestError about nesting."""
    refuse(f"is nested more than {limits.MANIFEST_DEPTH_MAX} levels deep", rule="range", mark=mark)


def refuse_count(mark: Mark | None = None) -> NoReturn:
    """Raise InvalidManifestError about too many values."""
    refuse(f"has more than {limits.MANIFEST_VALUES_MAX} values", rule="range", mark=mark)


def settle(root: Any) -> Document:
    """Make plain data of nodes, all aliases expanded. Raises InvalidManifestError past a bound."""
    return _Settling().settle(root)


class _Settling:
    """One walk over the nodes. What is still to be placed waits in a list, not on the stack."""

    def __init__(self) -> None:
        self._document = Document()
        self._waiting: list[tuple[Any, Path, Any, str | int]] = []
        self._values = 1
        self._characters = 0

    def settle(self, root: Any) -> Document:
        place: list[Any] = [None]
        self._waiting.append((root, (), place, 0))
        while self._waiting:
            node, path, target, key = self._waiting.pop()
            target[key] = self._plain(node, path)
        self._document.data = place[0]
        return self._document

    def _plain(self, node: Any, path: Path) -> Any:
        if isinstance(node, Node):
            self._document.value_marks[path] = node.mark
            node = node.value
        if isinstance(node, Refused):
            return self._refused(node, path)
        if isinstance(node, str):
            return self._text(node, path)
        if not isinstance(node, list):
            return node
        if len(path) >= limits.MANIFEST_DEPTH_MAX:
            refuse_depth(self._document.mark_of_value(path))
        self._count(values=len(node))
        return self._mapping(node, path) if isinstance(node, Pairs) else self._list(node, path)

    def _refused(self, value: Refused, path: Path) -> None:
        self._document.refused.add(path)
        self._complain(path, value.rule, value.message, self._document.mark_of_value(path))

    def _text(self, text: str, path: Path) -> str | None:
        self._count(characters=len(text))
        if _UNFIT_TEXT.search(text):
            self._refused(Refused("format", "must not contain NUL characters or halves of characters"), path)
            return None
        return text

    def _list(self, items: list[Any], path: Path) -> list[Any]:
        plain: list[Any] = [None] * len(items)
        self._waiting.extend((item, (*path, index), plain, index) for index, item in enumerate(items))
        return plain

    def _mapping(self, pairs: Pairs, path: Path) -> dict[str, Any]:
        plain: dict[str, Any] = {}
        for pair in pairs:
            place = (*path, pair.key)
            self._count(characters=len(pair.key))
            complaint = pair.complaint
            if complaint is None and pair.key in plain:
                complaint = "appears more than once; keep one of them"
            if complaint is None and _UNFIT_TEXT.search(pair.key):
                complaint = "has a name that is not proper text"
            if complaint is not None:
                self._complain(place, "format", complaint, pair.mark)
                continue
            if pair.mark is not None:
                self._document.key_marks[place] = pair.mark
            plain[pair.key] = None
            self._waiting.append((pair.value, place, plain, pair.key))
        return plain

    def _complain(self, path: Path, rule: Rule, message: str, mark: Mark | None) -> None:
        self._document.mistakes.append(Mistake.at(path, rule, message, mark))

    def _count(self, *, values: int = 0, characters: int = 0) -> None:
        """Only aliases can make more characters than the body had bytes."""
        self._values += values
        self._characters += characters
        if self._values > limits.MANIFEST_VALUES_MAX:
            refuse_count()
        if self._characters > limits.BODY_BYTES_MAX:
            refuse("grows past 1 MiB when its aliases are expanded", rule="range")


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
