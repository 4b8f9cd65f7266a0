"""Transient status line below the events on a terminal: current activity, durations, the cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from sandbox.model.display_text import format_duration

_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
REFRESHES_PER_SECOND = 8


class TaskActivity(Protocol):
    """The properties of a task that the status line shows."""

    @property
    def current_activity(self) -> str:
        """The running tool call, or else the state."""

    @property
    def is_tool_running(self) -> bool:
        """Whether the current activity is a tool call."""

    @property
    def elapsed_seconds(self) -> float | None:
        """Time since the agent started; None if it has not started."""

    @property
    def totals(self) -> Sequence[str]:
        """Tool calls, tokens and cost so far, in this order, omitting those that are zero."""


class StatusLine:
    """Renders the status line; Rich calls it several times per second."""

    def __init__(self, activity: TaskActivity, console: Console) -> None:
        self._activity = activity
        self._console = console
        self._current = ""
        self._since = time.monotonic()

    def __rich__(self) -> Text:
        activity = self._activity.current_activity
        if activity != self._current:
            self._current, self._since = activity, time.monotonic()
        seconds = time.monotonic() - self._since
        spinner = _SPINNER[int(time.monotonic() * REFRESHES_PER_SECOND) % len(_SPINNER)]
        activity_text = Text(activity)
        tail = self._suffix(self._durations(seconds), activity_text.cell_len)
        activity_text.truncate(max(self._console.width - len(tail) - 3, 10), overflow="ellipsis")
        return Text.assemble((f"{spinner} ", "cyan"), activity_text, (tail, "dim"), no_wrap=True, overflow="ellipsis")

    def _durations(self, activity_seconds: float) -> list[str]:
        """Return the tool call's and the task's duration. Before the agent starts, return the state's duration."""
        total_seconds = self._activity.elapsed_seconds
        if total_seconds is None:
            return [_format_clock(activity_seconds)]
        if not self._activity.is_tool_running:
            return [_format_clock(total_seconds)]
        return [_format_clock(activity_seconds), f"{_format_clock(total_seconds)} total"]

    def _suffix(self, durations: Sequence[str], wanted_cells: int) -> str:
        """Return durations and totals; only durations and cost if the activity would get less than half the width."""
        tails = [
            "  " + " · ".join([*durations, *figures]) for figures in (self._activity.totals, self._activity.totals[-1:])
        ]
        width_left = min(wanted_cells, self._console.width // 2)
        return next((tail for tail in tails if len(tail) + 3 + width_left <= self._console.width), tails[-1])


def _format_clock(seconds: float) -> str:
    return format_duration(seconds) if seconds >= 10 else f"{int(seconds)} s"


def live_status_line(activity: TaskActivity, console: Console) -> Live:
    """Return a context that shows the status line below the output on `console`."""
    return Live(
        StatusLine(activity, console),
        console=console,
        transient=True,
        refresh_per_second=REFRESHES_PER_SECOND,
        redirect_stdout=False,
        redirect_stderr=False,
    )
