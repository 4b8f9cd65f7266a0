"""Glob patterns, matched against paths segment by segment."""

import fnmatch
import re
from collections.abc import Iterator, Sequence

_Segment = re.Pattern[str] | None
GlobState = int
"""A set of positions in all patterns, with one bit for each position. A million sets may be in memory."""


class GlobSet:
    """Several glob patterns, matched against a path segment by segment.

    Matching takes bounded time: each segment's regular expression never backtracks (fnmatch uses atomic groups), and
    `**` is handled by tracking the set of positions in each pattern.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._segments: list[_Segment] = []
        self._closures: list[GlobState] = []
        """For each position, the position itself and those after each `**` there, because `**` may match no segment."""
        self._ends = 0
        self.start: GlobState = 0
        """The state at the root."""
        for pattern in patterns:
            self._add(_parse_pattern(pattern))

    def _add(self, segments: list[_Segment]) -> None:
        begin, end = len(self._segments), len(self._segments) + len(segments)
        closures = [1 << end]
        for index in range(len(segments) - 1, -1, -1):
            own = 1 << (begin + index)
            closures.append(own if segments[index] is not None else own | closures[-1])
        self._segments += [*segments, _END]
        self._closures += reversed(closures)
        self._ends |= 1 << end
        self.start |= self._closures[begin]

    def advance(self, state: GlobState, name: str) -> GlobState:
        """Return the state inside a directory. If the state is empty, nothing under the directory can match."""
        advanced = 0
        for position in _positions(state & ~self._ends):
            segment = self._segments[position]
            if segment is None:
                advanced |= 0 if name.startswith(".") else self._closures[position]
            elif segment.match(name):
                advanced |= self._closures[position + 1]
        return advanced

    def is_match(self, state: GlobState) -> bool:
        """Return whether the state, advanced by a file's name, is at the end of a pattern."""
        return bool(state & self._ends)


_END = re.compile("")
"""Fills the position at the end of a pattern, where nothing is compared."""


def _positions(state: GlobState) -> Iterator[int]:
    return (position for position, bit in enumerate(reversed(f"{state:b}")) if bit == "1")


def _parse_pattern(pattern: str) -> list[_Segment]:
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    if pattern.endswith("/"):
        parts.append("**")
    if parts[-1:] == ["**"]:
        parts.append("*")  # a pattern for the content of a directory does not match the directory's own name
    return [None if part == "**" else _compile_segment(part) for part in parts]


def _compile_segment(part: str) -> re.Pattern[str]:
    hidden = "" if part.startswith(".") else r"(?!\.)"
    return re.compile(hidden + fnmatch.translate(part))
