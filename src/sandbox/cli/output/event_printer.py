"""The story of a task, told line by line while it happens: states, what the agent says, tool calls, the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sandbox.cli.output.event_layout import STATE_STYLES, EventLayout, one_line
from sandbox.cli.output.formatting import format_cost, format_duration, format_elapsed, pluralize
from sandbox.cli.output.transcript import AgentMessage, ApiRetry, TextOutput, ToolCall, ToolResult, TranscriptParser

if TYPE_CHECKING:
    from rich.console import Console

    from sandbox.cli.options import CliOptions
    from sandbox.client.responses import Task

__all__ = [
    "FULL",
    "SHORT",
    "STATES",
    "STATE_STYLES",
    "STDOUT",
    "Detail",
    "EventPrinter",
    "is_interactive",
    "print_events",
]

TEXT_LINES_MAX = 6
ERROR_LINES_MAX = 4
NOTICE_LINES_MAX = 3
OPEN_TOOL_CALLS_MAX = 100
"""Calls whose end is awaited; of more, the oldest are told without what they were about."""


@dataclass(frozen=True)
class Detail:
    """How much of the story is told.

    has_work: what the agent says and does; text_lines_max: of each thing it says, None for all;
    result_lines_max: of what a tool answers; has_events: calls have events of their own, which tell their end.
    """

    shows_activity: bool = True
    text_lines_max: int | None = TEXT_LINES_MAX
    result_lines_max: int = 0
    has_events: bool = True


SHORT = Detail()
FULL = Detail(text_lines_max=None, result_lines_max=3)
STDOUT = Detail(text_lines_max=None, result_lines_max=3, has_events=False)
STATES = Detail(shows_activity=False)


def print_events(
    frames: Iterable[Mapping[str, Any]],
    console: Console,
    detail: Detail = SHORT,
    *,
    is_live: bool = True,
    is_trusted: bool = True,
    pending_reason: Callable[[], str] = str,
) -> str | None:
    """Print the story that `frames` tell, as they come; give the final state, None if they stop before it.

    On a terminal a last line, gone afterwards, shows what is going on at the moment, if the story `is_live`;
    `why_pending` is asked for it what a pending task waits for. Unless it `is_believed`, stdout is no more than text.
    """
    story = EventPrinter(console, detail, pending_reason, is_trusted=is_trusted)
    with _status_context(story, console) if console.is_terminal and is_live else nullcontext():
        for frame in frames:
            story.handle(frame)
    return story.final_state


def is_interactive(task: Task) -> bool:
    """Whether the agent is on a terminal, where anything in the sandbox can write what looks like its events."""
    return task["definition"].get("claude", {}).get("headless") is False


class EventPrinter:
    """What is known so far; prints what is new."""

    def __init__(
        self,
        console: Console,
        detail: Detail = SHORT,
        pending_reason: Callable[[], str] = str,
        *,
        is_trusted: bool = True,
    ) -> None:
        self.final_state: str | None = None
        self.tool_calls = 0
        self.input_tokens = 0
        self.output_tokens = 0
        self.cost_usd = 0.0
        self.state = ""
        self._detail = detail
        self._pending_reason = pending_reason
        self._layout = EventLayout(console)
        self._transcript = TranscriptParser(is_trusted=is_trusted)
        self._open_calls: dict[str, ToolCall] = {}
        self._results: dict[str, str] = {}
        self._first_at: str | None = None
        self._last_error = ""

    @property
    def current_activity(self) -> str:
        """What is going on: the oldest tool call that has no end yet, else the state."""
        use = next(iter(self._open_calls.values()), None)
        if use is not None:
            return one_line(f"{use.tool}  {use.summary}")
        return one_line(f"{self.state}  {self._pending_reason()}" if self.state == "pending" else self.state)

    @property
    def totals(self) -> list[str]:
        """Tool calls, tokens and dollars until now, as far as there were any."""
        parts = [pluralize(self.tool_calls, "tool call")] if self.tool_calls else []
        if self.input_tokens or self.output_tokens:
            parts.append(f"{self.input_tokens:,} tokens in, {self.output_tokens:,} out")
        if self.cost_usd:
            parts.append(format_cost(self.cost_usd))
        return parts

    def handle(self, frame: Mapping[str, Any]) -> None:
        """Take one frame; types that are not known are passed over."""
        self._first_at = self._first_at or frame.get("timestamp")
        handler = getattr(self, f"_on_{frame.get('type')}", None)
        if handler is not None:
            handler(frame)

    def _on_state_change(self, frame: Mapping[str, Any]) -> None:
        self.state = str(frame.get("new_state"))
        message = str(frame.get("state_message") or "")
        self._layout.print_state(frame, self.state, message if message != self._last_error else "")

    def _on_attempt(self, frame: Mapping[str, Any]) -> None:
        """What the earlier agent had begun has no end."""
        self._open_calls.clear()
        how = "goes on where the last one was lost" if frame.get("resumes") else "begins anew"
        self._layout.print_lines(frame, f"Attempt {frame.get('attempt')} {how}", "yellow", lines_max=NOTICE_LINES_MAX)

    def _on_output(self, frame: Mapping[str, Any]) -> None:
        data = str(frame.get("data", ""))
        if frame.get("stream") == "stderr":
            if self._detail.shows_activity:
                self._layout.print_lines(frame, data, "dim", lines_max=self._detail.text_lines_max, mark="stderr  ")
            return
        for item in self._transcript.feed(data, continued=bool(frame.get("continued"))):
            match item:
                case AgentMessage(text) | TextOutput(text) if self._detail.shows_activity:
                    self._layout.print_lines(frame, text, "", lines_max=self._detail.text_lines_max)
                case ToolCall():
                    self._start_tool(item)
                case ToolResult():
                    self._record_result(frame, item)
                case ApiRetry(attempt, attempts_max, reason):
                    again = f"The model did not answer ({reason}); trying again, {attempt} of {attempts_max}"
                    self._layout.print_lines(frame, again, "yellow", lines_max=NOTICE_LINES_MAX)

    def _start_tool(self, use: ToolCall) -> None:
        _put_bounded(self._open_calls, use.id, use)

    def _record_result(self, frame: Mapping[str, Any], answer: ToolResult) -> None:
        if answer.text and (answer.is_error or self._detail.result_lines_max):
            _put_bounded(self._results, answer.id, answer.text)
        if not self._detail.has_events:
            use = self._open_calls.get(answer.id)
            tool = use.tool if use else "tool"
            parts = {"tool": tool, "tool_use_id": answer.id, "is_error": answer.is_error}
            self._on_tool_call({"timestamp": frame.get("timestamp"), **parts})

    def _on_tool_call(self, frame: Mapping[str, Any]) -> None:
        self.tool_calls += 1
        use_id = str(frame.get("tool_use_id"))
        use = self._open_calls.pop(use_id, None)
        answer, is_error = self._results.pop(use_id, ""), bool(frame.get("is_error"))
        if not self._detail.shows_activity:
            return
        took = format_duration(float(frame["duration_ms"]) / 1000) if frame.get("duration_ms") is not None else ""
        self._layout.print_tool(frame, use.summary if use else "", took, is_error=is_error)
        if is_error and answer:
            self._layout.print_error(frame, _drop_decoration(answer), lines_max=ERROR_LINES_MAX)
        elif self._detail.result_lines_max:
            self._layout.print_result(frame, answer, lines_max=self._detail.result_lines_max)

    def _on_usage(self, frame: Mapping[str, Any]) -> None:
        for field in ("input_tokens", "cache_read_tokens", "cache_write_tokens"):
            self.input_tokens += int(frame.get(field) or 0)
        self.output_tokens += int(frame.get("output_tokens") or 0)
        self.cost_usd += float(frame.get("cost_usd") or 0)

    def _on_egress_denied(self, frame: Mapping[str, Any]) -> None:
        denied = f"Refused {frame.get('host')}:{frame.get('port')}: {frame.get('reason')}"
        self._layout.print_lines(frame, denied, "yellow", lines_max=NOTICE_LINES_MAX)

    def _on_error(self, frame: Mapping[str, Any]) -> None:
        self._last_error = str(frame.get("message"))
        self._layout.print_lines(frame, self._last_error, "red", lines_max=TEXT_LINES_MAX)

    def _on_gap(self, frame: Mapping[str, Any]) -> None:
        missing = f"Some events are missing: {frame.get('reason')}"
        self._layout.print_lines(frame, missing, "yellow", lines_max=NOTICE_LINES_MAX)

    def _on_end(self, frame: Mapping[str, Any]) -> None:
        self.final_state = str(frame.get("state"))
        self._open_calls.clear()
        took = format_elapsed(self._first_at, frame.get("timestamp"))
        summary = " · ".join(part for part in (took, *self.totals) if part)
        if summary:
            self._layout.print_lines(frame, summary, "dim", lines_max=NOTICE_LINES_MAX)


def _put_bounded(known: dict[str, Any], key: str, value: Any) -> None:
    """Keep a bounded number, the latest."""
    known[key] = value
    if len(known) > OPEN_TOOL_CALLS_MAX:
        del known[next(iter(known))]


def _drop_decoration(complaint: str) -> str:
    """Without rulers and frames: only the first lines are shown."""
    return "\n".join(line for line in complaint.splitlines() if any(map(str.isalnum, line)))


def _status_context(story: EventPrinter, console: Console) -> Any:
    from sandbox.cli.output.status_line import live_status_line

    return live_status_line(story, console)


PENDING_POLL_SECONDS = 2.0
PENDING_POLL_TIMEOUT_SECONDS = 2.0
"""The line is not drawn anew meanwhile; without an answer it shows what was known."""


class PendingReason:
    """Asks over a connection of its own, from whatever thread draws the screen."""

    def __init__(self, options: CliOptions, task_id: str) -> None:
        self._options = options
        self._task_id = task_id
        self._reason = ""
        self._polled_at: float | None = None

    def __call__(self) -> str:
        """The latest sentence; empty where there is none."""
        now = time.monotonic()
        if self._polled_at is None or now - self._polled_at >= PENDING_POLL_SECONDS:
            self._polled_at = now
            self._reason = self._poll() or self._reason
        return self._reason

    def _poll(self) -> str:
        from sandbox.client import Client, ClientError

        try:
            with Client(
                self._options.server, self._options.token, timeout_seconds=PENDING_POLL_TIMEOUT_SECONDS
            ) as client:
                return str(client.status(self._task_id)["state_message"] or "")
        except ClientError:
            return ""
