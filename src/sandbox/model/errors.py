"""The base class of errors with a stable code, and the exceptions of failed decoding."""

from __future__ import annotations

import msgspec


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
    """Return the error's text; for a timeout, whose exception has no text, return a fixed text."""
    return str(error) or "the operation timed out"


DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""Exceptions that msgspec raises for input that is invalid, not UTF-8 or nested too deeply.

msgspec's documentation names only the first; the other two are Python's own.
"""
