"""Artifact patterns.

`*`, `?` and `[…]` match within one part of a path, `**` as a whole part matches any number of parts. As in a shell, a
name that begins with a dot is matched only by a part that begins with a dot, also below `**`: `**/*.xml` does not
search `.venv`. A trailing slash means everything below. Letters' case counts.
"""

import fnmatch
import re
from collections.abc import Sequence

_Part = re.Pattern[str] | None
State = frozenset[tuple[int, int]]


class Globs:
    """Several patterns, matched part by part down a path.

    Each part is matched by a regular expression that never backtracks (fnmatch makes atomic groups) and `**` by keeping
    the set of places where a pattern may be, so no pattern takes long.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = [_parts(pattern) for pattern in patterns]

    @property
    def start(self) -> State:
        """The state at the root."""
        return self._closed({(number, 0) for number in range(len(self._patterns))})

    def enter(self, state: State, name: str) -> State:
        """The state inside a directory; when it is empty, nothing below can match."""
        moved = set()
        for number, place in state:
            if place == len(self._patterns[number]):
                continue
            part = self._patterns[number][place]
            if part is None and not name.startswith("."):
                moved.add((number, place))
            elif part is not None and part.match(name):
                moved.add((number, place + 1))
        return self._closed(moved)

    def is_match(self, state: State) -> bool:
        """Whether a file that was entered as a directory would be is at the end of a pattern."""
        return any(place == len(self._patterns[number]) for number, place in state)

    def _closed(self, state: set[tuple[int, int]]) -> State:
        """With the places behind each `**`, which may stand for no part at all."""
        closed = set(state)
        for number, place in state:
            parts = self._patterns[number]
            behind = next((at for at in range(place, len(parts)) if parts[at] is not None), len(parts))
            closed.update((number, at) for at in range(place, behind + 1))
        return frozenset(closed)


def _parts(pattern: str) -> list[_Part]:
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    if pattern.endswith("/"):
        parts.append("**")
    if parts[-1:] == ["**"]:
        parts.append("*")  # what is below a directory is not the directory's own name
    return [None if part == "**" else _compile(part) for part in parts]


def _compile(part: str) -> re.Pattern[str]:
    hidden = "" if part.startswith(".") else r"(?!\.)"
    return re.compile(hidden + fnmatch.translate(part))
