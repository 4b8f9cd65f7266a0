"""The content of the screen: the server's status, a line per task, and key hints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from rich.text import Text

from sandbox.cli.output.event_layout import one_line
from sandbox.cli.output.event_printer import STATE_STYLES
from sandbox.cli.output.formatting import format_age, format_elapsed, pluralize, state_text
from sandbox.cli.output.table import cell, fit_table, plain_lines
from sandbox.model.formatting import format_cost, format_duration, format_size
from sandbox.model.task_state import FINAL_STATES, TaskState

if TYPE_CHECKING:
    from sandbox.client import AsyncClient, Health, TaskSummary

COLUMNS = ("ID", "STATE", "AGE", "TURNS", "TOKENS", "COST", "NOW", "NAME")
SHRINKABLE = ("TURNS", "TOKENS", "COST", "NAME", "AGE", "NOW")
"""Columns that are truncated in a narrow window, in this order."""

KEY_HELP = "↑ ↓ select   enter watch   q quit"
_HEAD_LINES = 3
_FOOT_LINES = 2


class TopView:
    """View model of the screen. The selection stays on its task when other tasks appear or disappear."""

    def __init__(self, server: str) -> None:
        self._error_message = ""
        self._server = server
        self._snapshot: Snapshot | None = None
        self._selected_id: str | None = None
        self._scroll_offset = 0

    def update(self, snapshot: Snapshot) -> None:
        """Replace the data."""
        self._snapshot, self._error_message = snapshot, ""

    def show_error(self, message: str) -> None:
        """Show why the data is outdated, until the next update."""
        self._error_message = message

    @property
    def selected_id(self) -> str | None:
        """The id of the selected task; None if there is no task."""
        tasks = self._snapshot.tasks if self._snapshot else ()
        return tasks[self._selected_index()]["id"] if tasks else None

    def move_selection(self, lines: int) -> None:
        """Move the selection down by this many lines."""
        tasks = self._snapshot.tasks if self._snapshot else ()
        if tasks:
            self._selected_id = tasks[min(max(self._selected_index() + lines, 0), len(tasks) - 1)]["id"]

    def render(self, width: int, height: int, now: datetime) -> list[Text]:
        """Return the screen's lines, limited to its width and height."""
        if self._snapshot is None:
            return [Text(f"Connecting to {self._server} …")]
        rows_max = max(height - _HEAD_LINES - _FOOT_LINES - 1, 1)
        head = [_header_line(self._snapshot, self._server, now), _counts_line(self._snapshot), Text()]
        table = self._table(self._snapshot, width, rows_max, now)
        lines = [*head, *table, *[Text()] * (rows_max + 1 - len(table)), self._overflow_line(rows_max), self._footer()]
        for line in lines:
            line.truncate(width, overflow="ellipsis")
        return lines[:height]

    def _selected_index(self) -> int:
        ids = [task["id"] for task in self._snapshot.tasks] if self._snapshot else []
        return ids.index(self._selected_id) if self._selected_id in ids else 0

    def _table(self, snapshot: Snapshot, width: int, rows_max: int, now: datetime) -> list[Text]:
        if not snapshot.tasks:
            return [Text("No tasks yet. Submit one: sandbox task submit task.yaml", "dim")]
        selected_index = self._selected_index()
        last_first = max(len(snapshot.tasks) - rows_max, 0)
        self._scroll_offset = min(max(self._scroll_offset, selected_index - rows_max + 1), selected_index, last_first)
        visible_tasks = snapshot.tasks[self._scroll_offset : self._scroll_offset + rows_max]
        heading, *rows = plain_lines(
            *fit_table(COLUMNS, [task_row(task, now) for task in visible_tasks], SHRINKABLE, width - 2)
        )
        marked = [Text.assemble("  ", heading)]
        for at, line in enumerate(rows, self._scroll_offset):
            marked.append(Text.assemble(("▸ ", "cyan") if at == selected_index else "  ", line))
            if at == selected_index:
                marked[-1].stylize("bold")
        return marked

    def _overflow_line(self, rows_max: int) -> Text:
        assert self._snapshot is not None
        below = max(len(self._snapshot.tasks) - self._scroll_offset - rows_max, 0)
        parts = [f"{pluralize(below, 'more task')} below"] if below else []
        parts += (
            [f"{self._snapshot.omitted_count:,} older ones: sandbox task list"] if self._snapshot.omitted_count else []
        )
        return Text(" · ".join(parts), "dim")

    def _footer(self) -> Text:
        return Text(one_line(self._error_message), "red") if self._error_message else Text(KEY_HELP, "dim")


def task_row(task: TaskSummary, now: datetime, *, is_terminal: bool = True) -> list[Text]:
    """Return the cells of one task."""
    progress = task["progress"]
    tokens = progress["input_tokens"] + progress["output_tokens"]
    return [
        cell(task["id"]),
        cell(state_text(task, is_terminal=is_terminal), STATE_STYLES.get(task["state"], "")),
        cell(format_age(task["created_at"], now)),
        cell(str(progress["turns"] or "")),
        cell(f"{tokens:,}" if tokens else ""),
        cell(format_cost(progress["cost_usd"]) if progress["cost_usd"] else ""),
        cell(_current_activity(task)),
        cell(task["name"]),
    ]


def _current_activity(task: TaskSummary) -> str:
    if task["state"] in FINAL_STATES:
        elapsed = format_elapsed(task["started_at"], task["finished_at"])
        return task["error"]["code"] if task["error"] else f"took {elapsed}" if elapsed else ""
    return task["progress"]["current_tool"] or task["state_message"]


def _header_line(snapshot: Snapshot, server: str, now: datetime) -> Text:
    health = snapshot.health
    disk = health["disk"]
    parts = [f"Sandbox {health['version']} at {server}", f"up {format_duration(health['uptime_seconds'])}"]
    parts += [f"{format_size(disk['free_bytes'])} of disk free"] if "free_bytes" in disk else []
    return Text.assemble((f"{now.astimezone():%H:%M:%S}  ", "dim"), (one_line(" · ".join(parts)), "bold"))


def _counts_line(snapshot: Snapshot) -> Text:
    health = snapshot.health
    parts: list[Text] = []
    for state in TaskState:
        number = health["tasks"].get(state, 0)
        if number:
            parts.append(Text(f"{number:,} {state}", STATE_STYLES.get(state, "")))
    if not health["ready"]:
        parts.append(Text(one_line(f"Not accepting tasks: {' '.join(health['reasons'])}"), "yellow"))
    return Text(" · ").join(parts)


def table_rows(tasks: Sequence[TaskSummary], now: datetime) -> list[list[Text]]:
    """Return the rows of all tasks, for output without a screen."""
    return [task_row(task, now, is_terminal=False) for task in tasks]


UNFINISHED_MAX = 500
ENDED_MAX = 100

_ACTIVE_STATES = ("running", "completing", "ready", "provisioning", "staging", "pending")
_STATE_ORDER = {state: index for index, state in enumerate(_ACTIVE_STATES)}


@dataclass(frozen=True)
class Snapshot:
    """Health and tasks at one point in time.

    tasks: active tasks, then pending tasks, then ended tasks, the latest first.
    omitted_count: number of tasks that are not included.
    """

    health: Health
    tasks: tuple[TaskSummary, ...]
    omitted_count: int


async def fetch_snapshot(client: AsyncClient) -> Snapshot:
    """Fetch the data from the server. Raises ClientError."""
    unfinished = [state for state in TaskState if state not in FINAL_STATES]
    health = await client.health()
    unfinished_tasks = await client.tasks(states=unfinished, limit=UNFINISHED_MAX, sort="created_at", order="asc")
    ended = await client.tasks(states=sorted(FINAL_STATES), limit=ENDED_MAX, sort="state_changed_at", order="desc")
    ordered = sorted(unfinished_tasks["tasks"], key=lambda task: _STATE_ORDER.get(task["state"], 0))
    missing = unfinished_tasks["total_count"] + ended["total_count"] - len(ordered) - len(ended["tasks"])
    return Snapshot(health, (*ordered, *ended["tasks"]), missing)
