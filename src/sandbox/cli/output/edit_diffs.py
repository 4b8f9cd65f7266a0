"""Small diffs of the edits that the agent makes. All texts are untrusted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from itertools import islice
from typing import Any, NamedTuple

from sandbox.cli.output.formatting import pluralize

_CONTEXT_LINES = 1
_COMPARED_LINES_MAX = 200
"""Larger texts are not compared line by line, because the time grows with the square of the number of lines."""

_MARKS = {"removed": "-", "added": "+", "context": " "}


class DiffLine(NamedTuple):
    """A line of a diff. kind: `removed`, `added`, `context`, `path` or `note`."""

    kind: str
    text: str


def diff_edits(
    edits: Sequence[Mapping[str, Any]], summary: str, lines_max: int, *, is_cut: bool = False
) -> list[DiffLine]:
    """Return the diffs of a tool call's edits, at most `lines_max` lines and a note.

    summary: the text shown with the tool; a path that equals the summary is not repeated. is_cut: whether parts of the
    texts were not recorded.
    """
    lines = list(islice(_diffs(edits, summary), lines_max + 1))
    if len(lines) <= lines_max and not is_cut:
        return lines
    removed, added = map(sum, zip(*map(_count, edits), strict=True))
    counts = [f"{pluralize(count, 'line')} {verb}" for count, verb in ((removed, "removed"), (added, "added")) if count]
    return [*lines[:lines_max], DiffLine("note", f"… {'at least ' if is_cut else ''}{' and '.join(counts)} in total")]


def _diffs(edits: Sequence[Mapping[str, Any]], summary: str) -> Iterator[DiffLine]:
    previous_path = summary
    for number, edit in enumerate(edits):
        path = str(edit.get("path"))
        if path != previous_path:
            yield DiffLine("path", path)
        elif number:
            yield DiffLine("note", "…")
        previous_path = path
        for kind, text in _diff(*_texts(edit)):
            yield DiffLine(kind, f"{_MARKS[kind]}{text}")


def _texts(edit: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    return str(edit.get("old") or "").splitlines(), str(edit.get("new") or "").splitlines()


def _diff(old: list[str], new: list[str]) -> Iterator[tuple[str, str]]:
    start, old_end, new_end = _changed_range(old, new)
    yield from (("context", line) for line in old[max(start - _CONTEXT_LINES, 0) : start])
    yield from _compare(old[start:old_end], new[start:new_end])
    yield from (("context", line) for line in old[old_end : old_end + _CONTEXT_LINES])


def _changed_range(old: list[str], new: list[str]) -> tuple[int, int, int]:
    """Return the range of lines that differ, without the equal lines at its beginning and end."""
    shorter = min(len(old), len(new))
    start = next((at for at in range(shorter) if old[at] != new[at]), shorter)
    same = next((at for at in range(shorter - start) if old[-1 - at] != new[-1 - at]), shorter - start)
    return start, len(old) - same, len(new) - same


def _compare(old: list[str], new: list[str]) -> Iterator[tuple[str, str]]:
    if max(len(old), len(new)) > _COMPARED_LINES_MAX:
        yield from (("removed", line) for line in old)
        yield from (("added", line) for line in new)
        return
    for tag, old_start, old_end, new_start, new_end in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag == "equal":
            yield from (("context", line) for line in old[old_start:old_end])
        else:
            yield from (("removed", line) for line in old[old_start:old_end])
            yield from (("added", line) for line in new[new_start:new_end])


def _count(edit: Mapping[str, Any]) -> tuple[int, int]:
    kinds = [kind for kind, _ in _diff(*_texts(edit))]
    return kinds.count("removed"), kinds.count("added")
