"""Replaces the values of secrets by `[REDACTED:NAME]`, in whatever usual encoding they stand.

Pure: no I/O. What is found: the value itself; escaped for JSON, JavaScript, C, shells, HTML or addresses, also partly
and in each other; in base64 (both alphabets, any alignment, wrapped) and in hex, also of an escaped value; with
terminal escapes, carriage returns and characters without a width in between.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from sandbox.secrets.decoders import decode_layers
from sandbox.secrets.limits import REDACTED_CHARACTERS_MIN, RESCAN_BYTES_MAX
from sandbox.secrets.scanner import Scanner, replace_spans


class SecretStreamRedactor:
    """Lets go what is settled; put together, that is the redaction of the whole stream, however it is cut.

    What may be the beginning of a value is held back until it is known: at most `Scanner.span_bytes_max` bytes and the
    escapes that they begin with, and a quarter more until they are looked at. Cut lines out of what is let go, never
    before.
    """

    def __init__(self, scanner: Scanner) -> None:
        self._scanner = scanner
        self._pending = b""
        self._unscanned = bytearray()
        self._emitted = 0
        self.has_redacted = False

    @property
    def pending_bytes(self) -> int:
        """How many bytes are held back."""
        return len(self._pending) + len(self._unscanned) - self._emitted

    def feed(self, chunk: bytes) -> bytes:
        """What may be let go now."""
        if not self._scanner.span_bytes_max:
            return chunk
        self._unscanned += chunk
        # To look at all that is held with every chunk would take the square of its length.
        if len(self._pending) > max(RESCAN_BYTES_MAX, 4 * len(self._unscanned)):
            return b""
        return self._release(is_end=False)

    def flush_lines(self) -> bytes:
        """The whole lines that are held back, for when nothing has come for a while.

        Wrapped base64 or a value of several lines may begin in them. If it does go on, it vanishes from there on.
        """
        settled = self._release(is_end=False) if self._unscanned else b""
        end = self._pending.rfind(b"\n") + 1
        gone = self._pending[self._emitted : end]
        self._emitted = max(self._emitted, end)
        return settled + gone

    def flush(self) -> bytes:
        """What is held back, at the end of the stream."""
        return self._release(is_end=True)

    def _release(self, *, is_end: bool) -> bytes:
        data = self._pending + self._unscanned
        self._unscanned.clear()
        layers = decode_layers(data)
        settled = len(data) if is_end else self._scanner.safe_length(layers)
        spans = [span for span in self._scanner.find(layers) if span.start < settled]
        self.has_redacted = self.has_redacted or bool(spans)
        gone = replace_spans(data, spans, self._emitted, settled)
        self._emitted = max(0, max([self._emitted, *(span.end for span in spans)]) - settled)
        self._pending = data[settled:]
        return gone


class SecretRedactor:
    """Knows the values of one task's secrets, by name. Neither its repr nor its errors tell them."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self.too_short_names: tuple[str, ...] = tuple(
            name for name, value in values.items() if len(value) < REDACTED_CHARACTERS_MIN
        )
        self._scanner = Scanner({name: value for name, value in values.items() if name not in self.too_short_names})

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"

    def redact(self, data: bytes) -> bytes:
        """The bytes without values; the very same object where there are none."""
        spans = self._scanner.find(decode_layers(data)) if self._scanner.span_bytes_max else []
        return replace_spans(data, spans) if spans else data

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

    def redact_json(self, value: Any) -> Any:
        """Plain JSON data without values, neither in texts nor in keys."""
        if isinstance(value, str):
            return self.redact_text(value)
        if isinstance(value, dict):
            return {self.redact_json(key): self.redact_json(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.redact_json(item) for item in value]
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

    def stream(self) -> SecretStreamRedactor:
        """A redaction for one more stream."""
        return SecretStreamRedactor(self._scanner)
