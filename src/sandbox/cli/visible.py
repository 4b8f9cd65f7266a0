"""Text that a task brought along, made harmless for a terminal."""

from __future__ import annotations

import json
import unicodedata

from sandbox.model.printable import escaped

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Control, format (direction marks among them), surrogates, and the separators of lines and paragraphs."""


def visible(text: str) -> str:
    r"""`text` with what would steer a terminal, or not show, written out: ESC as `\x1b`. Tabs stay."""
    if text.isprintable():
        return text
    return "".join(escaped(c) if unicodedata.category(c) in _HIDDEN and c != "\t" else c for c in text)


def visible_json(value: object) -> str:
    """JSON for people and programs, indented, harmless on a terminal and still the same value."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return text if text.isascii() else "".join(c if _shows(c) else json.dumps(c)[1:-1] for c in text)


def _shows(character: str) -> bool:
    return character == "\n" or unicodedata.category(character) not in _HIDDEN
