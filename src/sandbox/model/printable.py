"""Text that others chose, made fit for a line: nothing in it is invisible, breaks the line, or steers a terminal."""

import unicodedata
from collections.abc import Callable

from sandbox.model.invisible import INVISIBLE

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
        shows = character.isprintable() and not INVISIBLE.match(character) and not _hangs(character, before)
        pieces.append(character if shows else write(character))
        before = character if shows else ""
    return "".join(pieces)


def is_printable(text: str) -> bool:
    """Whether `printable` leaves the text as it is."""
    if not text.isprintable():
        return False
    return text.isascii() or not (
        INVISIBLE.search(text) or any(map(_hangs, text, ("", *text)))  # the character before each
    )


def _hangs(character: str, before: str) -> bool:
    """Whether it is a combining mark without a character to combine with."""
    return before in _NOTHING_TO_COMBINE_WITH and unicodedata.category(character) in {"Mn", "Mc", "Me"}


def escaped(character: str) -> str:
    r"""The character written out, ESC as `\x1b`."""
    return character.encode("unicode_escape").decode("ascii")


def replaced(_: str) -> str:
    """The sign for a character that cannot be shown."""
    return "\ufffd"
