"""The story of a task, told line by line while it happens: states, what the agent says, tool calls, the end."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from sandbox.cli.figures import clock, counted, duration, money, span
from sandbox.cli.transcript import Retried, Said, ToolAnswered, ToolUsed, Transcript
from sandbox.cli.visible import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

TEXT_LINES_MAX = 6
ERROR_LINES_MAX = 4
UNFINISHED_TOOLS_MAX = 100
"""Calls whose end is awaited; of more, the oldest are told without what they were about."""

STATE_STYLES = {
    "running": "bold cyan",
    "completed": "bold green",
    "failed": "bold red",
    "failed_preserved": "bold red",
    "cancelled": "bold yellow",
}


def tell(frames: Iterable[dict[str, Any]], console: Console) -> str | None:
    """Print the story that `frames` tell, as they come; give the final state, None if they stop before it.

    On a terminal a last line, gone afterwards, shows what is going on at the moment.
    """
    story = Story(console)
    with _live(story, console) if console.is_terminal else nullcontext():
        for frame in frames:
            story.add(frame)
    return story.final_state


class Story:
    """What is known so far; prints what is new."""

    def __init__(self, console: Console) -> None:
        self.final_state: str | None = None
        self.tool_calls = 0
        self.input_tokens = 0
        self.output_tokens = 0
        self.cost_usd = 0.0
        self.state = ""
        self._console = console
        self._transcript = Transcript()
        self._unfinished: dict[str, ToolUsed] = {}
        self._complaints: dict[str, str] = {}
        self._first_at: str | None = None
        self._last_error = ""

    @property
    def now(self) -> str:
        """What is going on: the oldest tool call that has no end yet, else the state."""
        use = next(iter(self._unfinished.values()), None)
        return _one_line(f"{use.tool}  {use.summary}" if use else self.state)

    @property
    def figures(self) -> str:
        """Tool calls, tokens and dollars until now."""
        told = [counted(self.tool_calls, "tool call")] if self.tool_calls else []
        if self.input_tokens or self.output_tokens:
            told.append(f"{self.input_tokens:,} tokens in, {self.output_tokens:,} out")
        if self.cost_usd:
            told.append(money(self.cost_usd))
        return " · ".join(told)

    def add(self, frame: dict[str, Any]) -> None:
        """Take one frame; types that are not known are passed over."""
        self._first_at = self._first_at or frame.get("timestamp")
        tell_frame = getattr(self, f"_tell_{frame.get('type')}", None)
        if tell_frame is not None:
            tell_frame(frame)

    def _tell_state_change(self, frame: dict[str, Any]) -> None:
        self.state = str(frame.get("new_state"))
        message = str(frame.get("state_message") or "")
        self._state_line(frame, self.state, message if message != self._last_error else "")

    def _tell_output(self, frame: dict[str, Any]) -> None:
        data = str(frame.get("data", ""))
        if frame.get("stream") == "stderr":
            self._lines(frame, data, "dim", lines_max=TEXT_LINES_MAX, mark="stderr  ")
            return
        for saying in self._transcript.read(data, continued=bool(frame.get("continued"))):
            match saying:
                case Said(text):
                    self._lines(frame, text, "", lines_max=TEXT_LINES_MAX)
                case ToolUsed():
                    self._begin_tool(saying)
                case ToolAnswered(use_id, error) if error:
                    self._complaints[use_id] = error
                case Retried(attempt, attempts_max, reason):
                    again = f"The model did not answer ({reason}); trying again, {attempt} of {attempts_max}"
                    self._lines(frame, again, "yellow")

    def _begin_tool(self, use: ToolUsed) -> None:
        self._unfinished[use.id] = use
        if len(self._unfinished) > UNFINISHED_TOOLS_MAX:
            del self._unfinished[next(iter(self._unfinished))]

    def _tell_tool_call(self, frame: dict[str, Any]) -> None:
        self.tool_calls += 1
        use_id = str(frame.get("tool_use_id"))
        use = self._unfinished.pop(use_id, None)
        complaint, is_error = self._complaints.pop(use_id, ""), bool(frame.get("is_error"))
        took = duration(float(frame.get("duration_ms") or 0) / 1000)
        self._tool_line(frame, use.summary if use else "", took, is_error=is_error)
        if is_error and complaint:
            self._lines(frame, _telling(complaint), "red", lines_max=ERROR_LINES_MAX, mark="  ")

    def _tell_usage(self, frame: dict[str, Any]) -> None:
        for field in ("input_tokens", "cache_read_tokens", "cache_write_tokens"):
            self.input_tokens += int(frame.get(field) or 0)
        self.output_tokens += int(frame.get("output_tokens") or 0)
        self.cost_usd += float(frame.get("cost_usd") or 0)

    def _tell_egress_denied(self, frame: dict[str, Any]) -> None:
        denied = f"Refused: {frame.get('host')}:{frame.get('port')} ({frame.get('reason')})"
        self._lines(frame, denied, "yellow")

    def _tell_error(self, frame: dict[str, Any]) -> None:
        self._last_error = str(frame.get("message"))
        self._lines(frame, self._last_error, "red", lines_max=TEXT_LINES_MAX)

    def _tell_gap(self, frame: dict[str, Any]) -> None:
        self._lines(frame, f"Some events are missing: {frame.get('reason')}", "yellow")

    def _tell_end(self, frame: dict[str, Any]) -> None:
        self.final_state = str(frame.get("state"))
        self._unfinished.clear()
        took = span(self._first_at, frame.get("timestamp"))
        summary = " · ".join(part for part in (took, self.figures) if part)
        if summary:
            self._lines(frame, summary, "dim", mark="")

    def _state_line(self, frame: dict[str, Any], state: str, message: str) -> None:
        from rich.text import Text

        style = STATE_STYLES.get(state, "bold")
        line = Text.assemble((_time(frame), "dim"), (f"{visible(state):<13} ", style))
        indent, told = line.cell_len, Text(_one_line(message))
        wraps = self._console.is_terminal and bool(message)
        first, *others = told.wrap(self._console, max(self._console.width - indent - 1, 20)) if wraps else [told]
        self._print(line.append_text(first))
        for other in others:
            self._print(Text(" " * indent).append_text(other))

    def _tool_line(self, frame: dict[str, Any], summary: str, took: str, *, is_error: bool) -> None:
        from rich.text import Text

        mark = ("  ✗ ", "red") if is_error else ("  ▸ ", "cyan")
        line = Text.assemble((_time(frame), "dim"), mark, (_one_line(str(frame.get("tool"))), "bold"), "  ")
        room = self._console.width - line.cell_len - len(took) - 2
        what = Text(_one_line(summary))
        what.truncate(max(room, 0), overflow="ellipsis")
        self._print(line.append_text(what).append("  " if summary else "").append(took, "dim"))

    def _lines(self, frame: dict[str, Any], text: str, style: str, *, lines_max: int = 1, mark: str = "") -> None:
        """Print `text` beside the time, wrapped, at most so many lines of it."""
        from rich.text import Text

        time, indent = _time(frame), "  " + mark
        room = max(self._console.width - len(time) - len(indent) - 1, 20)
        written = Text("\n".join(visible(line) for line in text.strip().splitlines() if line.strip()))
        wrapped = written.wrap(self._console, room)
        for number, line in enumerate(wrapped[:lines_max]):
            more = "…" if number == lines_max - 1 and len(wrapped) > lines_max else ""
            shown = line.plain.rstrip() + more
            self._print(Text.assemble((time if number == 0 else " " * len(time), "dim"), indent, (shown, style)))

    def _print(self, line: Text) -> None:
        self._console.print(line, soft_wrap=True)


def _time(frame: dict[str, Any]) -> str:
    return f"{clock(frame.get('timestamp'))}  "


def _telling(complaint: str) -> str:
    """Without rulers and frames: only the first lines are shown."""
    return "\n".join(line for line in complaint.splitlines() if any(map(str.isalnum, line)))


def _one_line(text: str) -> str:
    return visible(" ".join(text.split()))


def _live(story: Story, console: Console) -> Any:
    from sandbox.cli.now_line import now_line

    return now_line(story, console)
