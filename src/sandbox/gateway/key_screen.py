"""Keeps the server's key out of what the upstream says, should it ever echo a request's headers."""

_KEY_BYTES_MIN = 8
"""Shorter keys cannot be told from other text, so they are not looked for."""


class KeyScreen:
    """Blanks the key in one answer's body, cut anywhere, and changes no length.

    What might be the key's beginning is held back until more comes, and nothing else.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key if len(key) >= _KEY_BYTES_MIN else b""
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """The next bytes of the body; gives what can go on."""
        if not self._key:
            return data
        clean = self.blank(self._held + data)
        held = next((n for n in range(min(len(self._key) - 1, len(clean)), 0, -1) if clean.endswith(self._key[:n])), 0)
        self._held = clean[len(clean) - held :]
        return clean[: len(clean) - held]

    def end(self) -> bytes:
        """What was held back, at the body's end."""
        held, self._held = self._held, b""
        return held

    def blank(self, text: bytes) -> bytes:
        """A whole text without the key."""
        return text.replace(self._key, b"*" * len(self._key)) if self._key else text
