"""Redacts the server's key in responses from the model API, which may repeat a request's headers."""

import re

_KEY_BYTES_MIN = 8
"""Minimum length of a key to redact; shorter keys cannot be distinguished from other text."""

_SHORT_ESCAPES = b'"/'
"""Characters that JSON may escape with only a backslash."""

_ESCAPE_BYTES_MAX = 6


class KeyRedactor:
    """Replaces the key with asterisks. Lengths do not change.

    Each character of the key may be escaped as in JSON (`\\u003d`, `\\/`). Thread-safe; one redactor serves a gateway.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key if len(key) >= _KEY_BYTES_MIN else b""
        self._mask = b"*" * len(self._key)
        self._spellings = re.compile(b"".join(map(_spelling, self._key)), re.IGNORECASE)
        self._starts = re.compile(_start_pattern(self._key))
        self._escapes = [rb"\u00", *(b"\\" + bytes([one]) for one in _SHORT_ESCAPES if one in self._key)]

    def redact(self, text: bytes) -> bytes:
        """Replace the key in a complete text."""
        if not self._key:
            return text
        if b"\\" not in text or not any(escape in text for escape in self._escapes):
            return text.replace(self._key, self._mask)
        return self._spellings.sub(lambda match: b"*" * len(match[0]), text)

    def find_unfinished(self, text: bytes) -> int:
        """Return the position in `text` from which the rest may be the start of the key, or the length of `text`."""
        if not self._key:
            return len(text)
        first = max(0, len(text) - _ESCAPE_BYTES_MAX * len(self._key) + 1)
        starts = (match.start() for match in self._starts.finditer(text, first))
        return next((at for at in starts if self._may_start(text, at)), len(text))

    def _may_start(self, text: bytes, at: int) -> bool:
        """Return whether the text from offset `at` to the end may be the start of the key, plain or escaped."""
        for character in self._key:
            rest = text[at : at + _ESCAPE_BYTES_MAX]
            if not rest:
                return True
            if rest[0] == character:
                at += 1
            elif len(rest) > 1 and rest[0] == ord("\\") and rest[1] == character and character in _SHORT_ESCAPES:
                at += 2
            elif (escape := _escape(character)).startswith(rest.lower()):
                if len(rest) < len(escape):
                    return True
                at += len(escape)
            else:
                return False
        return False


class BodyRedactor:
    """Replaces the key in one response body, however the body is split.

    Only bytes that may be the start of the key are held back until more bytes arrive.
    """

    def __init__(self, redactor: KeyRedactor) -> None:
        self._redactor = redactor
        self._pending = b""

    def feed(self, data: bytes) -> bytes:
        """Add the next bytes of the body; return the bytes that can be sent."""
        clean = self._redactor.redact(self._pending + data)
        end = self._redactor.find_unfinished(clean)
        self._pending = clean[end:]
        return clean[:end]

    def flush(self) -> bytes:
        """Return the bytes held back. Call this at the end of the body."""
        held, self._pending = self._pending, b""
        return held


def _start_pattern(key: bytes) -> bytes:
    """Return a pattern for the positions where the key may start. It rules out most positions without Python code.

    A plain first character is followed by the second one, which may be escaped, or by the end of the text.
    """
    first, second = re.escape(key[:1]), re.escape(key[1:2])
    return rb'%b(?=%b|\\|\Z)|\\(?=[uU"/]|\Z)' % (first, second)


def _escape(character: int) -> bytes:
    return b"\\u%04x" % character


def _spelling(character: int) -> bytes:
    """Return a pattern for a character, plain or escaped. Only the hexadecimal digits of an escape ignore case."""
    plain = re.escape(bytes([character]))
    short = [b"\\\\" + plain] if character in _SHORT_ESCAPES else []
    return b"(?:(?-i:" + b"|".join([plain, *short]) + b")|(?-i:\\\\u)%04x)" % character
