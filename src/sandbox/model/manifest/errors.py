"""Validation errors of a manifest, with source locations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from sandbox.model.errors import SandboxError
from sandbox.model.printable import replace_unprintable, replacement_character

FieldPath = tuple[str | int, ...]
"""Path to a value: field names and list indexes."""

RuleName = Literal["required", "type", "enum", "format", "range", "unknown_field", "not_offered"]

_KEY_DISPLAY_LENGTH_MAX = 100


class SourceLocation(msgspec.Struct, frozen=True):
    """A position in the text, counted from 1 as in editors."""

    line: int
    column: int


class FieldError(msgspec.Struct, frozen=True):
    """An error that the author of the manifest has to fix.

    field: the path, such as `secrets[0].name`; empty for the document as a whole.
    line, column: counted from 1; null for JSON.
    """

    field: str
    rule: RuleName
    message: str
    line: int | None = None
    column: int | None = None

    @classmethod
    def at(cls, path: FieldPath, rule: RuleName, message: str, location: SourceLocation | None = None) -> FieldError:
        """Create an error about the value at `path`."""
        line, column = (location.line, location.column) if location is not None else (None, None)
        return cls(field_name(path), rule, message, line, column)


class InvalidManifestError(SandboxError):
    """The manifest is invalid.

    errors: the errors, up to MANIFEST_ERRORS_MAX; for YAML, in the order of the text.
    """

    code = "invalid_manifest"

    def __init__(self, errors: Sequence[FieldError], *, omitted_count: int = 0) -> None:
        super().__init__(_summary(errors, omitted_count))
        self.errors = tuple(errors)


def field_name(path: FieldPath) -> str:
    """Format `("secrets", 0, "name")` as `secrets[0].name`, safe to show on a terminal."""
    name = ""
    for part in path:
        if isinstance(part, int):
            name += f"[{part}]"
        else:
            name += ("." if name else "") + replace_unprintable(part[:_KEY_DISPLAY_LENGTH_MAX], replacement_character)
    return name


def _summary(errors: Sequence[FieldError], omitted_count: int) -> str:
    if len(errors) == 1:
        only = errors[0]
        return f"The manifest is invalid: {only.field or 'it'} {only.message}."
    listed = f"; the first {len(errors)} are listed" if omitted_count else ""
    return f"The manifest has {len(errors) + omitted_count} errors{listed}."
