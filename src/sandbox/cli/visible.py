"""Text that a task brought along, made harmless for a terminal."""

from __future__ import annotations

import json

from sandbox.model.printable import escaped, legible, printable


def visible(text: str) -> str:
    r"""Prose with what would steer a terminal, or not show, written out: ESC as `\x1b`. Tabs stay."""
    return legible(text, escaped, "\t")


def visible_name(name: str) -> str:
    """A name or path with everything written out that does not show, so that no two look alike."""
    return printable(name, escaped)


def visible_json(value: object) -> str:
    """JSON for people and programs, indented, harmless on a terminal and still the same value."""
    return legible(json.dumps(value, indent=2, ensure_ascii=False), lambda hidden: json.dumps(hidden)[1:-1], "\n")
