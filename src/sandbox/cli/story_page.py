"""The page that a story is printed on: lines beside their times, within the width of the window."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sandbox.cli.figures import clock, counted
from sandbox.cli.visible import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

STATE_STYLES = {
    "running": "bold cyan",
    "completed": "bold green",
    "failed": "bold red",
    "failed_preserved": "bold red",
    "cancelled": "bold yellow",
}


class StoryPage:
    """Prints each kind of line. `frame` is what a line is about; its time stands before it."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def print_state(self, frame: dict[str, Any], state: str, message: str) -> None:
        """A new state and what it means, wrapped in a column of its own."""
        from rich.text import Text

        style = STATE_STYLES.get(state, "bold")
        line = Text.assemble((_time(frame), "dim"), (f"{visible(state):<13} ", style))
        indent, told = line.cell_len, Text(one_line(message))
        wraps = self._console.is_terminal and bool(message)
        first, *others = told.wrap(self._console, max(self._console.width - indent - 1, 20)) if wraps else [told]
        self._print(line.append_text(first))
        for other in others:
            self._print(Text(" " * indent).append_text(other))

    def print_tool(self, frame: dict[str, Any], summary: str, took: str, *, is_error: bool) -> None:
        """A tool call, on one line."""
        from rich.text import Text

        mark = ("  ✗ ", "red") if is_error else ("  ▸ ", "cyan")
        line = Text.assemble((_time(frame), "dim"), mark, (one_line(str(frame.get("tool"))), "bold"), "  ")
        room = self._console.width - line.cell_len - len(took) - 2
        what = Text(one_line(summary))
        what.truncate(max(room, 0), overflow="ellipsis")
        self._print(line.append_text(what).append("  " if summary and took else "").append(took, "dim"))

    def print_lines(
        self, frame: dict[str, Any], text: str, style: str, *, lines_max: int | None = 1, mark: str = ""
    ) -> None:
        """`text` beside the time, wrapped, at most so many lines of it (None: all)."""
        from rich.text import Text

        time, indent = _time(frame), "  " + mark
        room = max(self._console.width - len(time) - len(indent) - 1, 20)
        written = Text("\n".join(visible(line) for line in text.strip().splitlines() if line.strip()))
        wrapped = written.wrap(self._console, room)
        for number, line in enumerate(wrapped[:lines_max]):
            more = "…" if lines_max is not None and number == lines_max - 1 and len(wrapped) > lines_max else ""
            shown = line.plain.rstrip() + more
            self._print(Text.assemble((time if number == 0 else " " * len(time), "dim"), indent, (shown, style)))

    def print_folded(self, frame: dict[str, Any], text: str, *, lines_max: int) -> None:
        """What a tool answered: its first lines, each on one line, and how many more there are."""
        from rich.text import Text

        lines = [line for line in text.splitlines() if line.strip()]
        indent = " " * (len(_time(frame)) + 4)
        for line in lines[:lines_max]:
            shown = Text(visible(line.rstrip()).expandtabs(4))
            shown.truncate(max(self._console.width - len(indent) - 1, 20), overflow="ellipsis")
            self._print(Text.assemble(indent, (shown.plain, "dim")))
        if len(lines) > lines_max:
            self._print(Text.assemble(indent, (f"… {counted(len(lines) - lines_max, 'more line')}", "dim italic")))

    def _print(self, line: Text) -> None:
        self._console.print(line, soft_wrap=True)


def one_line(text: str) -> str:
    """Without breaks, and harmless."""
    return visible(" ".join(text.split()))


def _time(frame: dict[str, Any]) -> str:
    return f"{clock(frame.get('timestamp'))}  "
