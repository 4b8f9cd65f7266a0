"""The lines of a task's events: text next to its time, and small diffs of the agent's edits. All text is untrusted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime
from difflib import SequenceMatcher
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from sandbox.cli.output.console import escape_text
from sandbox.cli.output.formatting import format_date, format_time, pluralize
from sandbox.model.display_text import format_state
from sandbox.model.task_state import TaskState

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


_CONTEXT_LINES = 1
_COMPARED_LINES_MAX = 200
"""Larger contents are not compared line by line, because the time grows with the square of the number of lines."""

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


STATE_STYLES = {
    "running": "bold cyan",
    "completed": "bold green",
    "failed": "bold red",
    "failed_preserved": "bold red",
    "cancelled": "bold yellow",
}

_STATE_CELLS_ON_TERMINAL = max(len(format_state(state)) for state in TaskState)
_STATE_CELLS = 13
"""Width of the state column if the output is not a terminal. Scripts may rely on this width."""

_EDIT_STYLES = {"removed": "red", "added": "green", "context": "dim", "path": "bold", "note": "dim italic"}

_WRAPPED_CHARACTERS_MAX = 20_000
"""Maximum number of characters to wrap if text is cut to a few lines."""


class TimedLinePrinter:
    """Prints lines with the time of their event.

    A line is preceded by its date if the date differs from the previous line's or, for the first line, from today's.
    """

    def __init__(self, console: Console, today: date | None = None) -> None:
        self._console = console
        self._day = str(today or datetime.now().astimezone().date())

    def print_state(self, event: Mapping[str, Any], state: str, message: str) -> None:
        """Print a new state and its message, wrapped in a separate column."""
        from rich.text import Text

        style, on_terminal = STATE_STYLES.get(state, "bold"), self._console.is_terminal
        shown, width = (format_state(state), _STATE_CELLS_ON_TERMINAL) if on_terminal else (state, _STATE_CELLS)
        line = Text.assemble((self._time_column(event), "dim"), (f"{escape_text(shown):<{width}} ", style))
        indent, message_text = line.cell_len, Text(one_line(message))
        wraps = on_terminal and bool(message)
        first, *others = (
            message_text.wrap(self._console, max(self._console.width - indent - 1, 20)) if wraps else [message_text]
        )
        self._print(line.append_text(first))
        for other in others:
            self._print(Text(" " * indent).append_text(other))

    def print_tool(self, event: Mapping[str, Any], summary: str, duration: str, *, is_error: bool) -> None:
        """Print a tool call on one line."""
        from rich.text import Text

        mark = ("  ✗ ", "red") if is_error else ("  ▸ ", "cyan")
        line = Text.assemble((self._time_column(event), "dim"), mark, (one_line(str(event.get("tool"))), "bold"), "  ")
        width_left = self._console.width - line.cell_len - len(duration) - 2
        summary_text = Text(one_line(summary))
        summary_text.truncate(max(width_left, 0), overflow="ellipsis")
        self._print(line.append_text(summary_text).append("  " if summary and duration else "").append(duration, "dim"))

    def print_lines(
        self, event: Mapping[str, Any], text: str, style: str, *, lines_max: int | None = 1, mark: str = ""
    ) -> None:
        """Print wrapped text next to the time, at most `lines_max` lines (None: all)."""
        from rich.text import Text

        time, indent = self._time_column(event), "  " + mark
        for number, line in enumerate(self._wrap(text, len(time) + len(indent), lines_max)):
            self._print(Text.assemble((time if number == 0 else " " * len(time), "dim"), indent, (line, style)))

    def print_error(self, event: Mapping[str, Any], text: str, *, lines_max: int) -> None:
        """Print why a tool call failed, at most `lines_max` lines below the call."""
        from rich.text import Text

        indent = " " * (len(self._time_column(event)) + 4)
        for line in self._wrap(text, len(indent), lines_max):
            self._print(Text.assemble(indent, (line, "red")))

    def print_result(self, event: Mapping[str, Any], text: str, *, lines_max: int) -> None:
        """Print the first lines of a tool's result without wrapping them, and the number of further lines."""
        from rich.text import Text

        lines = [line for line in text.splitlines() if line.strip()]
        indent = " " * (len(self._time_column(event)) + 4)
        for line in lines[:lines_max]:
            line_text = Text(escape_text(line.rstrip()).expandtabs(4))
            line_text.truncate(max(self._console.width - len(indent) - 1, 20), overflow="ellipsis")
            self._print(Text.assemble(indent, (line_text.plain, "dim")))
        if len(lines) > lines_max:
            self._print(Text.assemble(indent, (f"… {pluralize(len(lines) - lines_max, 'more line')}", "dim italic")))

    def print_edits(self, event: Mapping[str, Any], lines: Iterable[DiffLine]) -> None:
        """Print a diff below the tool call, without wrapping its lines."""
        from rich.text import Text

        indent = " " * (len(self._time_column(event)) + 4)
        for kind, text in lines:
            escaped = Text(escape_text(text.rstrip()).expandtabs(4))
            escaped.truncate(max(self._console.width - len(indent) - 1, 20), overflow="ellipsis")
            self._print(Text.assemble(indent, (escaped.plain, _EDIT_STYLES[kind])))

    def _wrap(self, text: str, indent_cells: int, lines_max: int | None) -> list[str]:
        from rich.text import Text

        lines = (line for line in text.strip()[: lines_max and _WRAPPED_CHARACTERS_MAX].splitlines() if line.strip())
        written = Text("\n".join(map(escape_text, islice(lines, lines_max and lines_max + 1))))
        width_left = max(self._console.width - indent_cells - 1, 20)
        wrapped = [line.plain.rstrip() for line in written.wrap(self._console, width_left)]
        if lines_max and len(wrapped) > lines_max:
            return [*wrapped[: lines_max - 1], wrapped[lines_max - 1] + "…"]
        return wrapped

    def _time_column(self, event: Mapping[str, Any]) -> str:
        timestamp = event.get("timestamp")
        if (today := format_date(timestamp)) and today != self._day:
            self._day = today
            from rich.text import Text

            self._print(Text(today, "dim"))
        return f"{format_time(timestamp)}  "

    def _print(self, line: Text) -> None:
        self._console.print(line, soft_wrap=True)


def one_line(text: str) -> str:
    """Put the text on a single line and escape it."""
    return escape_text(" ".join(text.split()))
