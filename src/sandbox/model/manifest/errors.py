"""What is wrong with a manifest, and where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from sandbox.model.errors import SandboxError
from sandbox.model.printable import printable, replaced

Path = tuple[str | int, ...]
"""The way to a value: field names and list positions."""

Rule = Literal["required", "type", "enum", "format", "range", "unknown_field", "not_offered"]

_KEY_LENGTH_SHOWN_MAX = 100


class Mark(msgspec.Struct, frozen=True):
    """A place in the text, counted from 1 as editors do."""

    line: int
    column: int


class Mistake(msgspec.Struct, frozen=True):
    """One thing that its author has to change.

    field: the path, such as `secrets[0].name`; empty for the document as a whole.
    line, column: from 1, null where the text has no lines worth naming (JSON).
    """

    field: str
    rule: Rule
    message: str
    line: int | None = None
    column: int | None = None

    @classmethod
    def at(cls, path: Path, rule: Rule, message: str, mark: Mark | None = None) -> Mistake:
        """A mistake of the value at `path`."""
        line, column = (mark.line, mark.column) if mark is not None else (None, None)
        return cls(field_name(path), rule, message, line, column)


class InvalidManifestError(SandboxError):
    """The manifest cannot be accepted. `mistakes` are all that were found, in the order of a YAML text."""

    code = "invalid_manifest"

    def __init__(self, mistakes: Sequence[Mistake], *, left_out: int = 0) -> None:
        super().__init__(_sentence(mistakes, left_out))
        self.mistakes = tuple(mistakes)


def field_name(path: Path) -> str:
    """`("secrets", 0, "name")` as `secrets[0].name`, fit to be shown on a terminal."""
    name = ""
    for part in path:
        if isinstance(part, int):
            name += f"[{part}]"
        else:
            name += ("." if name else "") + printable(part[:_KEY_LENGTH_SHOWN_MAX], replaced)
    return name


def _sentence(mistakes: Sequence[Mistake], left_out: int) -> str:
    if len(mistakes) == 1:
        only = mistakes[0]
        return f"The manifest cannot be accepted: {only.field or 'it'} {only.message}."
    listed = f"; the first {len(mistakes)} are listed" if left_out else ""
    return f"The manifest has {len(mistakes) + left_out} mistakes{listed}."
