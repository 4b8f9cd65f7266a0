"""`--set path=value`: sets one field of a manifest on the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import click

FieldPath = tuple[str | int, ...]

_PATH_STEP = re.compile(r"(?P<name>(?:[^.\[\]\\]|\\.)+)(?P<indices>(?:\[[0-9]{1,4}\])*)(?:\.(?=.)|\Z)", re.DOTALL)


class OverrideError(ValueError):
    """The override cannot be applied; the message names a valid alternative."""


@dataclass(frozen=True)
class Override:
    """A path in a manifest and its new value."""

    path: FieldPath
    value: Any
    text: str

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
            raise OverrideError(f"{self.text}: the next index of this list is [{len(parent)}]")


def parse_overrides(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> list[Override]:
    """Parse the values of the option; click calls it."""
    return [parse_override(value) for value in values]


def parse_override(text: str) -> Override:
    r"""Parse `vm.cpus=16` or `secrets[0].key=TOKEN`; `\.` is a dot within a name. Raises click.BadParameter."""
    written, equals, value = text.partition("=")
    path: list[str | int] = []
    position = 0
    while position < len(written):
        step = _PATH_STEP.match(written, position)
        if step is None:
            break
        path.append(re.sub(r"\\(.)", r"\1", step["name"], flags=re.DOTALL))
        path += [int(index) for index in re.findall("[0-9]+", step["indices"])]
        position = step.end()
    if not equals or not path or position < len(written):
        raise click.BadParameter(f"{text!r} is not PATH=VALUE, such as vm.cpus=16 or secrets[0].key=TOKEN")
    return Override(tuple(path), _parse_scalar(value), f"--set {text}")


def _parse_scalar(text: str) -> Any:
    """Parse an unquoted or quoted YAML scalar; anything else is plain text."""
    from sandbox.model.manifest.document import InvalidValue, to_document
    from sandbox.model.manifest.errors import InvalidManifestError
    from sandbox.model.manifest.yaml import read_yaml, resolve_scalar

    value = resolve_scalar(text)
    if isinstance(value, InvalidValue):
        raise click.BadParameter(f"{text!r} {value.message}")
    if text[:1] not in {'"', "'"}:
        return value
    try:
        document = to_document(read_yaml(text))
    except InvalidManifestError:
        return text
    return document.data if isinstance(document.data, str) and not document.errors else text
