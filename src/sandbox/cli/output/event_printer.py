"""Prints a task's events as they arrive: states, why the task is pending, the agent's messages, tool calls, the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from sandbox.cli.output.event_lines import STATE_STYLES, DiffLine, TimedLinePrinter, diff_edits, one_line
from sandbox.cli.output.formatting import format_elapsed, parse_timestamp, pluralize
from sandbox.model.display_text import format_cost, format_duration, format_state
from sandbox.model.failure import FailureCode
from sandbox.model.task_state import FINAL_STATES

if TYPE_CHECKING:
    from datetime import datetime

    from rich.console import Console

    from sandbox.cli.options import CliOptions


__all__ = [
    "FULL",
    "SHORT",
    "STATES_ONLY",
    "STATE_STYLES",
    "DetailLevel",
    "EventPrinter",
    "print_events",
]

TEXT_LINES_MAX = 6
ERROR_LINES_MAX = 4
NOTICE_LINES_MAX = 3
LINE_CHARACTERS_MAX = 8 * 1024 * 1024
"""Maximum length of a line of stdout; longer lines are skipped."""

MODEL_HOST = "model"
"""The host in events about refused model requests. These events do not report a refused connection."""

_FAILED_STATES = frozenset({"failed", "failed_preserved"})

OPEN_TOOL_CALLS_MAX = 100
"""Maximum number of unfinished tool calls to track; above it, the oldest are printed without a summary."""


@dataclass(frozen=True)
class DetailLevel:
    """How much of a task's events is printed.

    shows_activity: print the agent's messages and tool calls.
    text_lines_max: lines per message, None for all.
    result_lines_max: lines per tool result.
    edit_lines_max: lines per diff of a tool call's edits.
    diffs_need_terminal: print these diffs only on a terminal.
    """

    shows_activity: bool = True
    text_lines_max: int | None = TEXT_LINES_MAX
    result_lines_max: int = 0
    edit_lines_max: int = 8
    diffs_need_terminal: bool = True


SHORT = DetailLevel()
FULL = DetailLevel(text_lines_max=None, result_lines_max=3, edit_lines_max=24, diffs_need_terminal=False)
STATES_ONLY = DetailLevel(shows_activity=False)


def print_events(
    events: Iterable[Mapping[str, Any]],
    console: Console,
    detail: DetailLevel = SHORT,
    *,
    is_live: bool = True,
    pending_reason: Callable[[], str] = str,
    omits_failure: bool = False,
) -> str | None:
    """Print events as they arrive; return the final state, or None if the events end without one.

    omits_failure: do not print why the task failed, because the caller prints it afterwards.

    On a terminal with `is_live`, a transient status line shows the current activity; `pending_reason` returns what a
    pending task is waiting for.
    """
    printer = EventPrinter(console, detail, pending_reason, omits_failure=omits_failure)
    with _status_context(printer, console) if console.is_terminal and is_live else nullcontext():
        for event in events:
            printer.handle(event)
        printer.flush()
    return printer.final_state


class _OpenCall(NamedTuple):
    tool: str
    summary: str
    edits: Sequence[DiffLine]


class EventPrinter:
    """Tracks the state of a task and prints new events."""

    def __init__(
        self,
        console: Console,
        detail: DetailLevel = SHORT,
        pending_reason: Callable[[], str] = str,
        *,
        omits_failure: bool = False,
    ) -> None:
        self.final_state: str | None = None
        self.tool_calls = 0
        self.input_tokens = 0
        self.output_tokens = 0
        self.cost_usd = 0.0
        self.state = ""
        self._detail = detail
        self._pending_reason = pending_reason
        self._line_printer = TimedLinePrinter(console)
        self._line_parts: list[str] = []
        self._line_characters = 0
        self._last_message = ""
        self._open_calls: dict[str, _OpenCall] = {}
        self._shows_edits = detail.shows_activity and (console.is_terminal or not detail.diffs_need_terminal)
        self._results: dict[str, str] = {}
        self._started_at: str | None = None
        self._latest_at: datetime | None = None
        self._handled_at = time.monotonic()
        self._last_error = ""
        self._omits_failure = omits_failure
        self._held_error: Mapping[str, Any] | None = None
        self._spent_budget: Mapping[str, Any] | None = None

    @property
    def current_activity(self) -> str:
        """The oldest tool call that has not ended, or else the state."""
        call = next(iter(self._open_calls.values()), None)
        if call is not None:
            return one_line(f"{call.tool}  {call.summary}")
        state = format_state(self.state)
        return one_line(f"{state}  {self._pending_reason()}" if state == "pending" else state)

    @property
    def is_tool_running(self) -> bool:
        """Whether the current activity is a tool call."""
        return bool(self._open_calls)

    @property
    def elapsed_seconds(self) -> float | None:
        """Time since the agent started, by the server's clock; None if it has not started."""
        started_at = parse_timestamp(self._started_at)
        if started_at is None or self._latest_at is None:
            return None
        return max((self._latest_at - started_at).total_seconds() + time.monotonic() - self._handled_at, 0)

    @property
    def totals(self) -> list[str]:
        """Tool calls, tokens and cost so far, omitting those that are zero."""
        parts = [pluralize(self.tool_calls, "tool call")] if self.tool_calls else []
        if self.input_tokens or self.output_tokens:
            parts.append(f"{self.input_tokens:,} tokens in, {self.output_tokens:,} out")
        if self.cost_usd:
            parts.append(format_cost(self.cost_usd))
        return parts

    def handle(self, event: Mapping[str, Any]) -> None:
        """Handle one event; ignore unknown types."""
        self._update_clock(event)
        handler = getattr(self, f"_on_{event.get('type')}", None)
        if handler is not None:
            if event.get("type") != "state_change":
                self._print_held_error()
            handler(event)

    def _update_clock(self, event: Mapping[str, Any]) -> None:
        at = parse_timestamp(event.get("timestamp"))
        if at is not None and (self._latest_at is None or at > self._latest_at):
            self._latest_at, self._handled_at = at, time.monotonic()

    def _on_state_change(self, event: Mapping[str, Any]) -> None:
        self.state = str(event.get("new_state"))
        if self.state == "running":
            self._started_at = self._started_at or event.get("timestamp")
        message = str(event.get("state_message") or "")
        if self._omits_failure and self.state in _FAILED_STATES:
            if message == self._last_error:
                self._held_error = None
            self._print_held_error()
            if self._spent_budget is not None and message == self._spent_budget.get("message"):
                self._spent_budget = None
            message = ""
        if self.state in FINAL_STATES:
            self._print_spent_budget()
        self._line_printer.print_state(event, self.state, message if message != self._last_error else "")

    def _on_attempt(self, event: Mapping[str, Any]) -> None:
        """Print that a new attempt has started."""
        self._open_calls.clear()  # the previous agent's calls never get an end event
        start_kind = "resumes where the previous attempt stopped" if event.get("resumes") else "starts over"
        self._line_printer.print_lines(
            event, f"Attempt {event.get('attempt')} {start_kind}", "yellow", lines_max=NOTICE_LINES_MAX
        )

    def _on_output(self, event: Mapping[str, Any]) -> None:
        data = str(event.get("data", ""))
        if event.get("stream") == "stderr":
            if self._detail.shows_activity:
                self._line_printer.print_lines(
                    event, data, "dim", lines_max=self._detail.text_lines_max, mark="stderr  "
                )
            return
        line = self._join_line(data, is_continued=bool(event.get("continued")))
        is_parsed = event.get("parsed", _is_json_object(line))  # missing if the server is older
        if not is_parsed and line.strip() != self._last_message:  # stdout may be the text of the last message
            self._print_message(event, line)
        self._on_conversation(event)

    def _join_line(self, data: str, *, is_continued: bool) -> str:
        """Return the line that the data completes; empty if the line is incomplete or too long."""
        self._line_characters += len(data)
        if self._line_characters <= LINE_CHARACTERS_MAX:
            self._line_parts.append(data)
        if is_continued:
            return ""
        line = "".join(self._line_parts) if self._line_characters <= LINE_CHARACTERS_MAX else ""
        self._line_parts, self._line_characters = [], 0
        return line

    def _on_conversation(self, event: Mapping[str, Any]) -> None:
        """Handle the events that the server converted from one line of output."""
        for each in event.get("conversation") or ():
            self.handle({**each, "timestamp": event.get("timestamp")})

    def _on_agent_message(self, event: Mapping[str, Any]) -> None:
        if event.get("kind") == "text":
            self._last_message = str(event.get("text")).strip()
            self._print_message(event, str(event.get("text")))

    def _on_agent_result(self, event: Mapping[str, Any]) -> None:
        """Print the final text if there was no message, for example if the result is the agent's only event."""
        if not self._last_message:
            self._print_message(event, str(event.get("text")))

    def _print_message(self, event: Mapping[str, Any], text: str) -> None:
        if self._detail.shows_activity:
            self._line_printer.print_lines(event, text, "", lines_max=self._detail.text_lines_max)

    def _on_tool_call_started(self, event: Mapping[str, Any]) -> None:
        summary, edits = str(event.get("summary") or ""), event.get("edits")
        lines: list[DiffLine] = []
        if edits and self._shows_edits:
            is_cut = bool(event.get("omitted_characters"))
            lines = diff_edits(edits, summary, self._detail.edit_lines_max, is_cut=is_cut)
        call = _OpenCall(str(event.get("tool")), summary, lines)
        _put_bounded(self._open_calls, str(event.get("tool_use_id")), call)

    def _on_tool_result(self, event: Mapping[str, Any]) -> None:
        output = str(event.get("output") or "")
        if output and (event.get("is_error") or self._detail.result_lines_max):
            _put_bounded(self._results, str(event.get("tool_use_id")), output)

    def _on_tool_call(self, event: Mapping[str, Any]) -> None:
        self.tool_calls += 1
        use_id = str(event.get("tool_use_id"))
        call = self._open_calls.pop(use_id, _OpenCall("", "", ()))
        result, is_error = self._results.pop(use_id, ""), bool(event.get("is_error"))
        if not self._detail.shows_activity:
            return
        duration = format_duration(float(event["duration_ms"]) / 1000) if event.get("duration_ms") is not None else ""
        self._line_printer.print_tool(event, call.summary, duration, is_error=is_error)
        if is_error and result:
            self._line_printer.print_error(event, _drop_decoration(result), lines_max=ERROR_LINES_MAX)
        elif call.edits and not is_error:
            self._line_printer.print_edits(event, call.edits)
        elif self._detail.result_lines_max:
            self._line_printer.print_result(event, result, lines_max=self._detail.result_lines_max)

    def _on_usage(self, event: Mapping[str, Any]) -> None:
        for field in ("input_tokens", "cache_read_tokens", "cache_write_tokens"):
            self.input_tokens += int(event.get(field) or 0)
        self.output_tokens += int(event.get("output_tokens") or 0)
        self.cost_usd += float(event.get("cost_usd") or 0)

    def _on_egress_denied(self, event: Mapping[str, Any]) -> None:
        is_model = event.get("host") == MODEL_HOST
        if is_model and self._spent_budget is not None and event.get("reason") == self._spent_budget.get("message"):
            return
        subject = "a model request" if is_model else f"{event.get('host')}:{event.get('port')}"
        denied = f"Refused {subject}: {event.get('reason')}"
        self._line_printer.print_lines(event, denied, "yellow", lines_max=NOTICE_LINES_MAX)

    def _on_error(self, event: Mapping[str, Any]) -> None:
        if self._omits_failure and event.get("error") == FailureCode.BUDGET_EXCEEDED:
            self._spent_budget = event  # the cause of the failure; other events follow before the end
            return
        self._last_error = str(event.get("message"))
        self._held_error = event
        if not self._omits_failure:
            self._print_held_error()

    def flush(self) -> None:
        """Print the events that are still held back. Call this after the last event."""
        self._print_held_error()
        self._print_spent_budget()

    def _print_held_error(self) -> None:
        """Print the held error, if any. An error is held as long as it may be the reason why the task failed."""
        event, self._held_error = self._held_error, None
        if event is not None:
            self._print_error(event)

    def _print_spent_budget(self) -> None:
        event, self._spent_budget = self._spent_budget, None
        if event is not None:
            self._print_error(event)

    def _print_error(self, event: Mapping[str, Any]) -> None:
        self._line_printer.print_lines(event, str(event.get("message")), "red", lines_max=TEXT_LINES_MAX)

    def _on_gap(self, event: Mapping[str, Any]) -> None:
        missing = f"Some events are missing: {event.get('reason')}"
        self._line_printer.print_lines(event, missing, "yellow", lines_max=NOTICE_LINES_MAX)

    def _on_end(self, event: Mapping[str, Any]) -> None:
        self.final_state = str(event.get("state"))
        self._open_calls.clear()
        elapsed = format_elapsed(self._started_at, event.get("timestamp"))  # the task's `duration_seconds`
        summary = " · ".join(part for part in (elapsed, *self.totals) if part)
        if summary:
            self._line_printer.print_lines(event, summary, "dim", lines_max=NOTICE_LINES_MAX)


def _is_json_object(line: str) -> bool:
    """Return whether a line looks like a JSON object, as in an agent's event stream."""
    return line.startswith('{"') and line.rstrip().endswith("}")


def _put_bounded(known: dict[str, Any], key: str, value: Any) -> None:
    """Add an entry, and drop the oldest one if there are too many."""
    known[key] = value
    if len(known) > OPEN_TOOL_CALLS_MAX:
        del known[next(iter(known))]


def _drop_decoration(message: str) -> str:
    """Remove lines without letters or digits, such as separators, because only the first lines are shown."""
    return "\n".join(line for line in message.splitlines() if any(map(str.isalnum, line)))


def _status_context(printer: EventPrinter, console: Console) -> Any:
    from sandbox.cli.output.status_line import live_status_line

    return live_status_line(printer, console)


PENDING_POLL_INTERVAL_SECONDS = 2.0
PENDING_POLL_TIMEOUT_SECONDS = 2.0
"""Timeout of a poll. The status line is not updated during a poll; if there is no response, it keeps the old reason."""


class PendingReasonPoller:
    """Polls why a task is pending, over a separate connection. Called by the thread that draws the screen."""

    def __init__(self, options: CliOptions, task_id: str) -> None:
        self._options = options
        self._task_id = task_id
        self._reason = ""
        self._polled_at: float | None = None

    def __call__(self) -> str:
        """Return the latest reason; empty if there is none."""
        now = time.monotonic()
        if self._polled_at is None or now - self._polled_at >= PENDING_POLL_INTERVAL_SECONDS:
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
