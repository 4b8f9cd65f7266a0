"""The base class of errors with a stable code, the exceptions of failed decoding, and the errors in a user's input."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import msgspec

from sandbox.model.display_text import replace_unprintable, replacement_character
from sandbox.model.fixed_limits import INPUT_ERRORS_MAX


class SandboxError(Exception):
    """Base class of errors with a stable code. `message` is one human-readable sentence.

    retryable: whether the same request may succeed later.
    """

    code: str = "internal_error"
    retryable: bool = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


def error_reason(error: BaseException) -> str:
    """Return the error's message; for a timeout, whose exception has none, return a fixed message."""
    return str(error) or "the operation timed out"


DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""Exceptions that msgspec raises for input that is invalid, not UTF-8 or nested too deeply.

msgspec's documentation names only the first; the other two are Python's own.
"""


FieldPath = tuple[str | int, ...]
"""Path to a value: field names and list indexes."""

RuleName = Literal["required", "type", "enum", "format", "range", "unknown_field", "not_offered"]

RequestPart = Literal["body", "query", "path", "header"]
"""The part of a request that contains a value."""

_KEY_DISPLAY_LENGTH_MAX = 100
_SUGGESTION_NAME_LENGTH_MAX = 64


class SourceLocation(msgspec.Struct, frozen=True):
    """A position in the text, counted from 1 as in editors."""

    line: int
    column: int


class FieldError(msgspec.Struct, frozen=True):
    """An error that the author of a request or a manifest has to fix. `FieldErrorBody` describes its JSON.

    location: where the value is in the request, such as `body.vm.memory` or `query.sort`.
    field: the path without the part of the request, such as `secrets[0].name`; empty for the body as a whole.
    suggestion: the known name or value that a misspelled one resembles.
    line, column: counted from 1; null for parameters, and for JSON unless its text cannot be parsed.
    """

    location: str
    field: str
    rule: RuleName
    message: str
    suggestion: str | None = None
    line: int | None = None
    column: int | None = None

    @classmethod
    def at(
        cls,
        path: FieldPath,
        rule: RuleName,
        message: str,
        position: SourceLocation | None = None,
        *,
        part: RequestPart = "body",
        suggestion: str | None = None,
    ) -> FieldError:
        """Create an error about the value at `path`. The suggestion is appended to the message."""
        line, column = (position.line, position.column) if position is not None else (None, None)
        field = field_name(path)
        location = f"{part}.{field}" if field else part
        return cls(location, field, rule, with_suggestion(message, suggestion), suggestion, line, column)


class RuleViolation(NamedTuple):
    """A violation of a rule by the value at `path`. suggestion: the known word that a misspelled one resembles."""

    path: FieldPath
    rule: RuleName
    message: str
    suggestion: str | None = None


FIRST_ERROR_SEPARATOR = " The first one: "
"""Separates the number of errors from the first one in the message of an InvalidInputError."""


class InvalidInputError(SandboxError):
    """A request or a manifest has errors.

    errors: the errors, up to INPUT_ERRORS_MAX; for YAML, in the order of the text.
    """

    subject = "The request"

    def __init__(self, errors: Sequence[FieldError]) -> None:
        self.errors = tuple(errors[:INPUT_ERRORS_MAX])
        super().__init__(f"{self.subject} {self._describe(errors)}")

    def _describe(self, errors: Sequence[FieldError]) -> str:
        if len(errors) > 1:
            listed = f"; the first {len(self.errors)} are listed" if len(errors) > len(self.errors) else ""
            start = f"has {len(errors)} errors{listed}.{FIRST_ERROR_SEPARATOR}"
        else:
            start = "is invalid: "
        text = f"{start}{self._name(errors[0])} {errors[0].message}"
        return text if text.endswith("?") else f"{text}."

    def _name(self, error: FieldError) -> str:
        return error.location


class InvalidManifestError(InvalidInputError):
    """The manifest is invalid."""

    code = "invalid_manifest"
    subject = "The manifest"

    def _name(self, error: FieldError) -> str:
        return error.field or "it"


class InvalidParameterError(InvalidInputError):
    """Parameters, headers or body fields of a request are invalid."""

    code = "invalid_parameter"


def closest_name(name: str, known: Collection[str], similarity_min: float = 0.6) -> str | None:
    """Return the known name that a misspelled one resembles, or None. similarity_min: from 0 to 1."""
    if len(name) > _SUGGESTION_NAME_LENGTH_MAX:
        return None
    from difflib import get_close_matches  # slow, and rarely needed

    return next(iter(get_close_matches(name, sorted(known), n=1, cutoff=similarity_min)), None)


def with_suggestion(message: str, suggestion: str | None) -> str:
    """Append the suggestion to the message."""
    return f"{message}; did you mean '{suggestion}'?" if suggestion else message


def field_name(path: FieldPath) -> str:
    """Format `("secrets", 0, "name")` as `secrets[0].name`, safe to show on a terminal."""
    name = ""
    for part in path:
        if isinstance(part, int):
            name += f"[{part}]"
        else:
            name += ("." if name else "") + replace_unprintable(part[:_KEY_DISPLAY_LENGTH_MAX], replacement_character)
    return name
