"""HTML character references by name: what one stands for."""

from html.entities import html5

_MEANINGS = {name.encode(): meaning.encode() for name, meaning in html5.items()}
_OPEN_LENGTHS = sorted({len(name) for name in _MEANINGS if not name.endswith(b";")}, reverse=True)

LONGEST_NAME_BYTES = max(map(len, _MEANINGS)) - 1
"""The longest name, without its semicolon."""


def resolve_name(name: bytes) -> tuple[int, bytes] | None:
    """How much of `name`, with the semicolon if there is one, is a reference, and its text in UTF-8.

    As in HTML: the longest name counts, and some names need no semicolon.
    """
    if name.endswith(b";") and (meaning := _MEANINGS.get(name)) is not None:
        return len(name), meaning
    for length in _OPEN_LENGTHS:
        if length <= len(name) and (meaning := _MEANINGS.get(name[:length])) is not None:
            return length, meaning
    return None
