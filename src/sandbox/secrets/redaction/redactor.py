"""Replaces the values of secrets, in all common encodings, with `[REDACTED:NAME]`.

Pure: no I/O. Finds a value unchanged; escaped for JSON, JavaScript, C, shells, HTML or URLs, even partly or nested; in
base64 (both alphabets, any alignment, wrapped) or in hex, even of an escaped value; and interspersed with terminal
escapes, carriage returns and zero-width characters.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from sandbox.secrets.limits import ALWAYS_RESCANNED_BYTES_MAX, REDACTED_VALUE_CHARACTERS_MIN
from sandbox.secrets.redaction.value_scanner import Scanner, Span

_QUOTE = re.compile(rb'\\{0,64}+"')


class SecretStreamRedactor:
    """Redacts a stream. The output is the redaction of the whole stream, however the input is split.

    Bytes that may be the start of a value are held back until more input shows whether they are: at most
    `Scanner.span_bytes_max` bytes plus the escapes at their start, and a quarter more until they are rescanned. Split
    the output into lines, never the input.
    """

    def __init__(self, scanner: Scanner) -> None:
        self._scanner = scanner
        self._pending = b""
        self._unscanned = bytearray()
        self._emitted = 0
        self._started_value: int | None = None
        """Position in the pending data at which a value has probably started; None before the search."""
        self.has_redacted = False

    @property
    def pending_bytes(self) -> int:
        """The number of bytes held back."""
        return len(self._pending) + len(self._unscanned) - self._emitted

    def feed(self, chunk: bytes) -> bytes:
        """Add input. Returns the output that is ready."""
        if not self._scanner.span_bytes_max:
            return chunk
        self._unscanned += chunk
        # Rescanning everything for each chunk would take quadratic time.
        if len(self._pending) > max(ALWAYS_RESCANNED_BYTES_MAX, 4 * len(self._unscanned)):
            return b""
        return self._release(is_end=False)

    def flush_lines(self) -> bytes:
        """Return the complete lines that are held back, up to a line that probably contains the start of a value.

        Call it after a pause of the input. The lines may contain the first few characters of wrapped base64, hex or a
        multi-line value; then only the rest of the value is redacted.
        """
        released = self._release(is_end=False) if self._unscanned else b""
        if self._started_value is None:
            self._started_value = self._scanner.find_partial_value(self._scanner.decode(self._pending))
        end = self._pending.rfind(b"\n", 0, self._started_value) + 1
        flushed = self._pending[self._emitted : end]
        self._emitted = max(self._emitted, end)
        return released + flushed

    def flush(self) -> bytes:
        """Return everything held back, at the end of the stream."""
        return self._release(is_end=True)

    def _release(self, *, is_end: bool) -> bytes:
        data = self._pending + self._unscanned
        self._unscanned.clear()
        layers = self._scanner.decode(data)
        safe_length = len(data) if is_end else self._scanner.safe_length(layers)
        spans = [span for span in self._scanner.find(layers) if span.start < safe_length]
        self.has_redacted = self.has_redacted or bool(spans)
        released = _replace_spans(data, spans, self._emitted, safe_length)
        self._emitted = max(0, max([self._emitted, *(span.end for span in spans)]) - safe_length)
        self._pending = data[safe_length:]
        self._started_value = None
        return released


class SecretRedactor:
    """Redacts the secrets of one task. values: keyed by secret name; neither the repr nor errors contain them."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self.unsearchable_secret_names: tuple[str, ...] = tuple(
            name for name, value in values.items() if len(value) < REDACTED_VALUE_CHARACTERS_MIN
        )
        self._scanner = Scanner(
            {name: value for name, value in values.items() if name not in self.unsearchable_secret_names}
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"

    def redact(self, data: bytes) -> bytes:
        """Return the bytes with all values redacted; the same object if there is nothing to redact."""
        spans = self._scanner.find(self._scanner.decode(data)) if self._scanner.span_bytes_max else []
        return _replace_spans(data, spans) if spans else data

    def redact_text(self, text: str) -> str:
        """Return the text without values."""
        data = text.encode("utf-8", "surrogatepass")
        redacted = self.redact(data)
        if redacted is data:
            return text
        try:
            return redacted.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:  # a match may split a character if the value is not text
            return redacted.decode("utf-8", "replace")

    def redact_json(self, value: Any) -> Any:
        """Return JSON data with all values in its strings and keys redacted."""
        if isinstance(value, str):
            return self.redact_text(value)
        if isinstance(value, dict):
            return {self.redact_json(key): self.redact_json(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.redact_json(item) for item in value]
        return value

    def contains(self, chunks: Iterable[bytes]) -> bool:
        """Return whether the concatenated chunks contain a value."""
        stream = self.stream()
        for chunk in chunks:
            stream.feed(chunk)
            if stream.has_redacted:
                return True
        stream.flush()
        return stream.has_redacted

    def stream(self) -> SecretStreamRedactor:
        """Return a redactor for another stream."""
        return SecretStreamRedactor(self._scanner)


def _replace_spans(data: bytes, spans: Iterable[Span], begin: int = 0, end: int | None = None) -> bytes:
    """Return `data[begin:end]` with one placeholder for each group of overlapping spans."""
    pieces: list[bytes] = []
    for span in spans:
        if span.start >= begin:
            pieces += (data[begin : span.start], _placeholder(data[span.start : span.end], span.name))
        begin = max(begin, span.end)
    return b"".join((*pieces, data[begin:end]))


def _placeholder(matched: bytes, name: str) -> bytes:
    """Return the placeholder of a value. JSON remains valid: outer quotes are kept, and objects become strings."""
    placeholder = f"[REDACTED:{name}]".encode()
    quote = _QUOTE.search(matched)
    if quote and matched[:1] + matched[-1:] in (b"{}", b"[]"):
        return quote[0] + placeholder + quote[0]
    opening_quote = quote[0] if quote and quote.start() == 0 else b""
    closing = matched[len(matched[:-1].rstrip(b"\\")) :] if matched.endswith(b'"') else b""
    return opening_quote + placeholder + closing
