"""Overrides: `PATH=VALUE` sets one field of a manifest. The command line and the API accept the same syntax."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from sandbox.model.errors import FieldPath
from sandbox.model.fixed_limits import MANIFEST_DEPTH_MAX

_PATH_STEP = re.compile(r"(?P<name>(?:[^.\[\]\\]|\\.)+)(?P<indices>(?:\[[0-9]{1,4}\])*)(?:\.(?=.)|\Z)", re.DOTALL)


class OverrideError(ValueError):
    """The override is invalid or cannot be applied; the message names a valid alternative."""


@dataclass(frozen=True)
class Override:
    """A path in a manifest and its new value.

    origin: where the override was given, for messages. assignment: the text that `parse_override` parsed.
    """

    path: FieldPath
    value: Any
    origin: str
    assignment: str = ""

    def apply(self, data: dict[str, Any]) -> None:
        """Set the value, creating parent objects and lists.

        The server validates whether the field exists. Raises OverrideError for a gap in a list.
        """
        target: Any = data
        for step, after in zip(self.path, self.path[1:], strict=False):
            kind = list if isinstance(after, int) else dict
            inner = self._get(target, step)
            if not isinstance(inner, kind):
                inner = kind()
            self._set(target, step, inner)
            target = inner
        self._set(target, self.path[-1], self.value)

    def _get(self, parent: Any, step: str | int) -> Any:
        if isinstance(step, str):
            return parent.get(step)
        return parent[step] if step < len(parent) else None

    def _set(self, parent: Any, step: str | int, value: Any) -> None:
        if isinstance(step, str) or step < len(parent):
            parent[step] = value
        elif step == len(parent):
            parent.append(value)
        else:
            raise OverrideError(f"{self.origin}: the next index of this list is [{len(parent)}]")


def parse_override(text: str, origin: str = "") -> Override:
    r"""Parse `vm.cpus=16` or `secrets[0].key=TOKEN`; `\.` is a dot within a name. Raises OverrideError.

    origin: where the override was given, for later messages; the text itself by default.
    """
    written, equals, value = text.partition("=")
    path: list[str | int] = []
    position = 0
    while position < len(written) and len(path) <= MANIFEST_DEPTH_MAX:
        step = _PATH_STEP.match(written, position)
        if step is None:
            break
        path.append(re.sub(r"\\(.)", r"\1", step["name"], flags=re.DOTALL))
        path += [int(index) for index in re.findall("[0-9]+", step["indices"])]
        position = step.end()
    if len(path) > MANIFEST_DEPTH_MAX:
        raise OverrideError(f"{_shorten(text)!r} has a path of more than {MANIFEST_DEPTH_MAX} steps")
    if not equals or not path or position < len(written):
        raise OverrideError(f"{_shorten(text)!r} is not PATH=VALUE, such as vm.cpus=16 or secrets[0].key=TOKEN")
    return Override(tuple(path), _parse_scalar(value), origin or text, text)


_QUOTED_CHARACTERS_MAX = 200


def _shorten(text: str) -> str:
    return text if len(text) <= _QUOTED_CHARACTERS_MAX else f"{text[:_QUOTED_CHARACTERS_MAX]}…"


def _parse_scalar(text: str) -> Any:
    """Parse an unquoted or quoted YAML scalar; return anything else as plain text."""
    from sandbox.model.errors import InvalidManifestError
    from sandbox.model.manifest.parsed_document import InvalidValue, to_document
    from sandbox.model.manifest.yaml import read_yaml, resolve_scalar

    value = resolve_scalar(text)
    if isinstance(value, InvalidValue):
        raise OverrideError(f"{_shorten(text)!r} {value.message}")
    if text[:1] not in {'"', "'"}:
        return value
    try:
        document = to_document(read_yaml(text))
    except InvalidManifestError:
        return text
    return document.data if isinstance(document.data, str) and not document.errors else text
