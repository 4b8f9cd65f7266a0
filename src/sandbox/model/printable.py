"""Text that others chose, made fit for a line: nothing in it is invisible, breaks the line, or steers a terminal."""

import re
import unicodedata
from collections.abc import Callable

from sandbox.model.invisible import INVISIBLE

_SELECTORS = "\ufe0e\ufe0f"
"""Choose the plain or the colourful glyph of a symbol."""

_SYMBOL_CATEGORIES = frozenset({"So", "Sm", "Po", "Pd"})
_SYMBOLS_AMONG_LETTERS = "\N{INFORMATION SOURCE}"
_KEYCAP, _KEYS = "\u20e3", frozenset("0123456789#*")

_NOTHING_TO_COMBINE_WITH = frozenset({"", " ", "/"})


def printable(text: str, write: Callable[[str], str]) -> str:
    """`text` with `write(c)` in place of every character `c` that does not show.

    Written out are invisible characters, spaces other than U+0020, private and unassigned characters, and a combining
    mark at the beginning of the text or of a part of a path: it would change the character before the text.
    """
    if is_printable(text):
        return text
    pieces: list[str] = []
    before = ""
    for character in text:
        shows = character.isprintable() and not INVISIBLE.match(character) and not _is_lone_mark(character, before)
        pieces.append(character if shows else write(character))
        before = character if shows else ""
    return "".join(pieces)


def is_printable(text: str) -> bool:
    """Whether `printable` leaves the text as it is."""
    if not text.isprintable():
        return False
    return text.isascii() or not (
        INVISIBLE.search(text) or any(map(_is_lone_mark, text, ("", *text)))  # the character before each
    )


def _is_lone_mark(character: str, before: str) -> bool:
    """Whether it is a combining mark without a character to combine with."""
    return before in _NOTHING_TO_COMBINE_WITH and unicodedata.category(character) in {"Mn", "Mc", "Me"}


def legible(text: str, write: Callable[[str], str], kept: str = "") -> str:
    """Prose with `write(c)` in place of every invisible character `c` that is not `kept`.

    What `printable` does to names besides, it leaves: spaces, private and unassigned characters, combining marks, and
    a variation selector of an emoji, which is one behind a symbol or between a key and its keycap.
    """

    def shown(found: re.Match[str]) -> str:
        character = found[0]
        is_kept = character in kept or (character in _SELECTORS and _selects(text, found.start()))
        return character if is_kept else write(character)

    return text if text.isascii() and text.isprintable() else INVISIBLE.sub(shown, text)


def _selects(text: str, at: int) -> bool:
    """Whether the selector there belongs to a symbol that shows."""
    before = text[at - 1 : at]
    if text[at + 1 : at + 2] == _KEYCAP:
        return before in _KEYS
    is_symbol = not before.isascii() and unicodedata.category(before) in _SYMBOL_CATEGORIES
    return (is_symbol and not INVISIBLE.match(before)) or (before != "" and before in _SYMBOLS_AMONG_LETTERS)


def escaped(character: str) -> str:
    r"""The character written out, ESC as `\x1b`."""
    return character.encode("unicode_escape").decode("ascii")


def replaced(_: str) -> str:
    """The sign for a character that cannot be shown."""
    return "\ufffd"
