"""Redacts the server's key from responses of the model API, which may repeat the headers of a request."""

_KEY_BYTES_MIN = 8
"""Minimum length of a key to redact; shorter keys cannot be distinguished from other text."""


class KeyRedactor:
    """Replaces the key in one response body with asterisks, however the body is split. Lengths do not change.

    Only bytes that may be the start of the key are held back until more bytes arrive.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key if len(key) >= _KEY_BYTES_MIN else b""
        self._pending = b""

    def feed(self, data: bytes) -> bytes:
        """Add the next bytes of the body; return the bytes that can be sent."""
        if not self._key:
            return data
        clean = self.redact(self._pending + data)
        held_count = next(
            (n for n in range(min(len(self._key) - 1, len(clean)), 0, -1) if clean.endswith(self._key[:n])), 0
        )
        self._pending = clean[len(clean) - held_count :]
        return clean[: len(clean) - held_count]

    def flush(self) -> bytes:
        """Return the bytes held back, at the end of the body."""
        held, self._pending = self._pending, b""
        return held

    def redact(self, text: bytes) -> bytes:
        """Replace the key in a complete text."""
        return text.replace(self._key, b"*" * len(self._key)) if self._key else text

    def redact_text(self, text: str) -> str:
        """Replace the key in a complete decoded text."""
        return self.redact(text.encode(errors="surrogatepass")).decode(errors="surrogatepass")
