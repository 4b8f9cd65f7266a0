"""Normalizes bytes before the search for values: drops bytes and unifies equivalent ones."""

import re
from array import array
from itertools import compress

_BLANK = b"\t\n\x0b\x0c\r "
_CONTROLS = bytes(range(32)) + b"\x7f"
_ESCAPE_INTRODUCER = re.compile(rb"\xc2[\x90\x98\x9b-\x9f]")
"""C1 controls that start a terminal escape, as an escape character does."""


class Normalizer:
    """A way of normalizing bytes before the search.

    `escapes` are replaced first, by text of the same length. `equivalents` are then unified, and `dropped` bytes
    removed.
    """

    def __init__(self, escapes: dict[bytes, bytes], equivalents: tuple[bytes, bytes], dropped: bytes) -> None:
        self._escapes = escapes
        self._table = bytes.maketrans(*equivalents)
        self._dropped = dropped
        self._keep_table = bytes(byte not in dropped for byte in range(256))

    def normalize(self, data: bytes) -> bytes:
        """Return the normalized bytes."""
        return self._replace_escapes(data).translate(self._table, self._dropped)

    def positions(self, data: bytes) -> array[int]:
        """Return the position in `data` of each byte of its normalized form."""
        return array("L", compress(range(len(data)), self._replace_escapes(data).translate(self._keep_table)))

    def _replace_escapes(self, data: bytes) -> bytes:
        if b"\\" in data:
            for escape, replacement in self._escapes.items():
                data = data.replace(escape, replacement)
        if self._escapes and b"\xc2" in data:
            data = _ESCAPE_INTRODUCER.sub(b"\0\0", data)
        return data


TEXT_NORMALIZER = Normalizer(
    {rb"\n": b"\0\n", rb"\t": b"\0\0", rb"\r": b"\0\0", rb"\b": b"\0\0", rb"\f": b"\0\0"},
    (b"+", b" "),
    bytes(set(_CONTROLS) - set(b"\n")) + b"\\",
)
"""Plain text: drops controls except line feeds; a plus counts as a space, as in the data of HTML forms."""

ENCODED_NORMALIZER = Normalizer(
    {rb"\n": b"\0\0", rb"\t": b"\0\0", rb"\r": b"\0\0"},
    (b"-_", b"+/"),
    bytes(set(_CONTROLS) | set(_BLANK)) + b"\\",
)
"""Base64 and hex: drops line breaks and blanks, and unifies both base64 alphabets."""

EXACT_NORMALIZER = Normalizer({}, (b"", b""), b"")
"""Keeps every byte, for values that consist of bytes that the other normalizers drop."""
