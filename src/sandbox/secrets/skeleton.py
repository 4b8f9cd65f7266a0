"""Bytes reduced to what matters when a value is searched, at the speed of C.

A skeleton is taken of the text and of what is searched alike, so it may lose information as long as it loses the same
on both sides. Backslashes are dropped, which makes simple escapes at any depth of nesting equal.
"""

import re
from array import array
from itertools import compress

_BLANK = b"\t\n\x0b\x0c\r "
_CONTROLS = bytes(range(32)) + b"\x7f"
_INTRODUCER = re.compile(rb"\xc2[\x90\x98\x9b-\x9f]")
"""Begins a terminal escape, as an escape character does."""


class Skeleton:
    """One way of reducing. `escapes` are replaced first, by something of the same length."""

    def __init__(self, escapes: dict[bytes, bytes], same: tuple[bytes, bytes], dropped: bytes) -> None:
        self._escapes = escapes
        self._table = bytes.maketrans(*same)
        self._dropped = dropped
        self._is_kept = bytes(byte not in dropped for byte in range(256))

    def of(self, data: bytes) -> bytes:
        """The skeleton."""
        return self._prepared(data).translate(self._table, self._dropped)

    def positions(self, data: bytes) -> "array[int]":
        """Where in `data` each byte of its skeleton stands."""
        return array("L", compress(range(len(data)), self._prepared(data).translate(self._is_kept)))

    def _prepared(self, data: bytes) -> bytes:
        if b"\\" in data:
            for escape, meaning in self._escapes.items():
                data = data.replace(escape, meaning)
        if self._escapes and b"\xc2" in data:
            data = _INTRODUCER.sub(b"\0\0", data)
        return data


TEXT = Skeleton(
    {rb"\n": b"\0\n", rb"\t": b"\0\0", rb"\r": b"\0\0", rb"\b": b"\0\0", rb"\f": b"\0\0"},
    (b"+", b" "),
    bytes(set(_CONTROLS) - set(b"\n")) + b"\\",
)
"""Plain text: controls but line feeds are nothing, a plus is a space (as in forms)."""

CODE = Skeleton(
    {rb"\n": b"\0\0", rb"\t": b"\0\0", rb"\r": b"\0\0"},
    (b"-_", b"+/"),
    bytes(set(_CONTROLS) | set(_BLANK)) + b"\\",
)
"""Base64 and hex: line breaks and blanks are nothing, both alphabets are one."""

EXACT = Skeleton({}, (b"", b""), b"")
"""Every byte, for values that consist of what the others drop."""
