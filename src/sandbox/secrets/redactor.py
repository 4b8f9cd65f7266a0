"""Replaces the values of secrets by `[REDACTED:NAME]`, in whatever usual encoding they stand.

Pure: no I/O. What is found: the value itself; escaped for JSON, JavaScript, C, shells, HTML or addresses, also partly
and in each other; in base64 (both alphabets, any alignment, wrapped) and in hex, also of an escaped value; with
terminal escapes, carriage returns and characters without a width in between.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from sandbox.secrets.decoders import peel
from sandbox.secrets.limits import REDACTED_ANEW_BYTES_MAX, REDACTED_CHARACTERS_MIN
from sandbox.secrets.scanner import Scanner, replace


class StreamRedactor:
    """Lets go what is settled; put together, that is the redaction of the whole stream, however it is cut.

    What may be the beginning of a value is held back until it is known: at most `Scanner.span_bytes_max` bytes and the
    escapes that they begin with, and a quarter more until they are looked at. Cut lines out of what is let go, never
    before.
    """

    def __init__(self, scanner: Scanner) -> None:
        self._scanner = scanner
        self._held = b""
        self._fresh = bytearray()
        self._done = 0
        self.has_redacted = False

    @property
    def held_bytes(self) -> int:
        """How many bytes are held back."""
        return len(self._held) + len(self._fresh) - self._done

    def feed(self, chunk: bytes) -> bytes:
        """What may be let go now."""
        if not self._scanner.span_bytes_max:
            return chunk
        self._fresh += chunk
        # To look at all that is held with every chunk would take the square of its length.
        if len(self._held) > max(REDACTED_ANEW_BYTES_MAX, 4 * len(self._fresh)):
            return b""
        return self._let_go(is_end=False)

    def pause(self) -> bytes:
        """The whole lines that are held back, for when nothing has come for a while.

        Wrapped base64 or a value of several lines may begin in them. If it does go on, it vanishes from there on.
        """
        settled = self._let_go(is_end=False) if self._fresh else b""
        end = self._held.rfind(b"\n") + 1
        gone = self._held[self._done : end]
        self._done = max(self._done, end)
        return settled + gone

    def flush(self) -> bytes:
        """What is held back, at the end of the stream."""
        return self._let_go(is_end=True)

    def _let_go(self, *, is_end: bool) -> bytes:
        data = self._held + self._fresh
        self._fresh.clear()
        layers = peel(data)
        settled = len(data) if is_end else self._scanner.settled_length(layers)
        spans = [span for span in self._scanner.find(layers) if span.start < settled]
        self.has_redacted = self.has_redacted or bool(spans)
        gone = replace(data, spans, self._done, settled)
        self._done = max(0, max([self._done, *(span.end for span in spans)]) - settled)
        self._held = data[settled:]
        return gone


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
