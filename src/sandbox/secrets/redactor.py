"""Replaces the values of secrets by `[REDACTED:NAME]`, in whatever usual encoding they stand.

Pure: no I/O. What is found: the value itself; escaped for JSON, JavaScript, C, shells, HTML or addresses, also partly
and in each other; in base64 (both alphabets, any alignment, wrapped) and in hex, also of an escaped value; with
terminal escapes, carriage returns and characters without a width in between.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from sandbox.secrets.layers import peel
from sandbox.secrets.limits import REDACTED_CHARACTERS_MIN
from sandbox.secrets.scanner import Scanner, replace
from sandbox.secrets.stream import StreamRedactor


class Redactor:
    """Knows the values of one task's secrets, by name. Neither its repr nor its errors tell them."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self.too_short: tuple[str, ...] = tuple(
            name for name, value in values.items() if len(value) < REDACTED_CHARACTERS_MIN
        )
        self._scanner = Scanner({name: value for name, value in values.items() if name not in self.too_short})

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"

    def redact(self, data: bytes) -> bytes:
        """The bytes without values; the very same object where there are none."""
        spans = self._scanner.find(peel(data)) if self._scanner.span_bytes_max else []
        return replace(data, spans) if spans else data

    def redact_text(self, text: str) -> str:
        """The text without values."""
        data = text.encode("utf-8", "surrogatepass")
        redacted = self.redact(data)
        if redacted is data:
            return text
        try:
            return redacted.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:  # a value that is no text once its escapes are undone was found within a character
            return redacted.decode("utf-8", "replace")

    def redact_value(self, value: Any) -> Any:
        """Plain JSON data without values, neither in texts nor in keys."""
        if isinstance(value, str):
            return self.redact_text(value)
        if isinstance(value, dict):
            return {self.redact_value(key): self.redact_value(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.redact_value(item) for item in value]
        return value

    def contains(self, chunks: Iterable[bytes]) -> bool:
        """Whether a value stands in the concatenation of the chunks."""
        stream = self.stream()
        for chunk in chunks:
            stream.feed(chunk)
            if stream.has_redacted:
                return True
        stream.flush()
        return stream.has_redacted

    def stream(self) -> StreamRedactor:
        """A redaction for one more stream."""
        return StreamRedactor(self._scanner)
