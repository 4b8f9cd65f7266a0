"""Text that others chose, made fit for a line: nothing in it is invisible, breaks the line, or steers a terminal."""

from collections.abc import Callable


def printable(text: str, write: Callable[[str], str]) -> str:
    """`text` with `write(c)` in place of every character `c` that does not show; of spaces only the plain one shows."""
    return text if text.isprintable() else "".join(c if c.isprintable() else write(c) for c in text)


def escaped(character: str) -> str:
    r"""The character written out, ESC as `\x1b`."""
    return character.encode("unicode_escape").decode("ascii")


def replaced(_: str) -> str:
    """The sign for a character that cannot be shown."""
    return "\ufffd"
