"""The content of the screen: a snapshot of the server's status and the selected tasks, a line per task, key hints."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING

from rich.text import Text

from sandbox.cli.output.console import wrap_text
from sandbox.cli.output.event_lines import one_line
from sandbox.cli.output.event_printer import STATE_STYLES
from sandbox.cli.output.formatting import (
    current_activity,
    failure_text,
    format_age,
    format_elapsed,
    name_text,
    pluralize,
    shorten_ids,
    state_text,
    task_duration,
)
from sandbox.cli.output.table import MAIN_COLUMN_CELLS, cell, fit_table, plain_lines
from sandbox.model.display_text import format_cost, format_duration, format_size, format_state
from sandbox.model.task_state import FINAL_STATES, TaskState

if TYPE_CHECKING:
    from sandbox.client import AsyncClient, Health, TaskSummary
    from sandbox.client.requests import TaskFilters


UNFINISHED_MAX = 500
ENDED_MAX = 100

_ACTIVE_STATES = ("running", "completing", "ready", "provisioning", "staging", "pending")
STATE_FILTERS = {
    "all": frozenset(TaskState),
    "active": frozenset(map(TaskState, _ACTIVE_STATES)) - {TaskState.PENDING},
    "pending": frozenset({TaskState.PENDING}),
    "failed": frozenset({TaskState.FAILED, TaskState.FAILED_PRESERVED}),
    "completed": frozenset({TaskState.COMPLETED}),
    "cancelled": frozenset({TaskState.CANCELLED}),
}
"""The states that each filter selects."""

_STATE_ORDER = {state: index for index, state in enumerate(_ACTIVE_STATES)}


@dataclass(frozen=True)
class TaskFilter:
    """Selects the tasks to fetch. search: the words to search for. states: a key of `STATE_FILTERS`."""

    search: str = ""
    states: str = "all"

    def next_states(self) -> TaskFilter:
        """Return the filter with the next group of states."""
        names = list(STATE_FILTERS)
        return replace(self, states=names[(names.index(self.states) + 1) % len(names)])

    def __str__(self) -> str:
        parts = [f"Search: {self.search}"] if self.search else []
        return " · ".join([*parts, *([f"Only {self.states} tasks"] if self.states != "all" else [])])


@dataclass(frozen=True)
class Snapshot:
    """Health and tasks at one point in time.

    tasks: active tasks, then pending tasks, then ended tasks, the latest first.
    omitted_count: number of tasks that are not included.
    """

    health: Health
    tasks: tuple[TaskSummary, ...]
    omitted_count: int


def _query(task_filter: TaskFilter, states: Set[TaskState]) -> TaskFilters:
    query: TaskFilters = {"states": sorted(states)}
    return {**query, "search": task_filter.search} if task_filter.search else query


async def fetch_snapshot(client: AsyncClient, task_filter: TaskFilter | None = None) -> Snapshot:
    """Fetch the data from the server. Raises ClientError."""
    task_filter = task_filter or TaskFilter()
    states = STATE_FILTERS[task_filter.states]
    health = await client.health()
    pages = [
        await client.tasks(**_query(task_filter, group & states), limit=limit, sort=sort, order=order)
        for group, limit, sort, order in (
            (frozenset(TaskState) - FINAL_STATES, UNFINISHED_MAX, "created_at", "asc"),
            (FINAL_STATES, ENDED_MAX, "state_changed_at", "desc"),
        )
        if group & states
    ]
    tasks = [task for page in pages for task in page["tasks"]]
    ordered = sorted(tasks, key=lambda task: _STATE_ORDER.get(task["state"], len(_STATE_ORDER)))
    return Snapshot(health, tuple(ordered), sum(page["total_count"] for page in pages) - len(tasks))


COLUMNS = ("ID", "STATE", "AGE", "TURNS", "TOKENS", "COST", "NOW", "NAME")
OMITTABLE_COLUMNS = ("TURNS", "TOKENS", "COST", "AGE", "NAME", "NOW")
"""Columns that are truncated in a narrow window, in this order."""

KEY_HELP = "enter watch  / search  f filter  c cancel  ? help  q quit"
_KEY_EFFECTS = (
    ("↑ ↓", "select a task; also k and j, page up and page down"),
    ("enter", "watch the selected task; q or Esc returns"),
    ("/", "search tasks"),
    ("f", "show only the tasks of the next filter"),
    ("c", "cancel the selected task, after confirmation"),
    ("?", "show this list"),
    ("q", "quit"),
)
_HELP_KEY_CELLS = 11
_SUBMIT_HINT = "No tasks yet. Submit one: sandbox task submit task.yaml"
ACTIVITY_CELLS_MIN = 26
"""Width to which the column NOW is truncated before another column is omitted."""

NAME_CELLS_MIN = 24
"""Minimum width to which names are truncated. In a wide window, names are truncated to a quarter of its width."""

SEARCH_BYTES_MAX = 100
_ENTER, _ESCAPE, _ERASE, _ERASE_LINE = (b"\r", b"\n"), b"\x1b", (b"\x7f", b"\x08"), b"\x15"
_HEAD_LINES = 3
_FOOT_LINES = 2
_DETAIL_LINES = 3
"""Number of lines that show the name and the whole activity or failure of the selected task."""

_HEIGHT_WITH_DETAILS_MIN = 16


class TopView:
    """View model of the screen. The selection stays on its task when other tasks appear or disappear.

    filter: which tasks to fetch.
    search_input: the search that the user is typing, as bytes from the terminal; None if no search is open.
    task_to_cancel: the task whose cancellation the user must confirm.
    notice: a message to show until the next key is pressed.
    is_help_open: whether the list of keys replaces the tasks.
    """

    def __init__(self, server: str) -> None:
        self.filter = TaskFilter()
        self.search_input: bytes | None = None
        self.task_to_cancel: TaskSummary | None = None
        self.notice = ""
        self.is_help_open = False
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
        return self.selected_task["id"] if self.selected_task is not None else None

    @property
    def selected_task(self) -> TaskSummary | None:
        """The selected task; None if there is no task."""
        tasks = self._snapshot.tasks if self._snapshot else ()
        return tasks[self._selected_index()] if tasks else None

    @property
    def has_question(self) -> bool:
        """Whether the next key answers the cancellation prompt."""
        return self.task_to_cancel is not None

    def show_notice(self, message: str) -> None:
        """Show a message until the next key is pressed."""
        self.notice = message

    def toggle_help(self) -> None:
        """Show the list of keys in place of the tasks, or show the tasks again."""
        self.is_help_open = not self.is_help_open

    def filter_next_states(self) -> None:
        """Filter by the next group of states."""
        self.filter = self.filter.next_states()

    def open_search(self) -> None:
        """Let the user edit the search words."""
        self.search_input = self.filter.search.encode()

    def type_search(self, typed: bytes) -> bool:
        """Handle a key while the search is open; return whether the filter has changed."""
        text = self.search_input or b""
        if typed in _ENTER:
            self.filter = replace(self.filter, search=" ".join(text.decode(errors="ignore").split()))
        if typed in {*_ENTER, _ESCAPE}:
            self.search_input = None
        elif typed in _ERASE:
            self.search_input = text.decode(errors="ignore")[:-1].encode()
        elif typed == _ERASE_LINE:
            self.search_input = b""
        elif len(typed) == 1 and typed >= b" " and len(text) < SEARCH_BYTES_MAX:
            self.search_input = text + typed
        return typed in _ENTER

    def ask_cancel(self) -> None:
        """Ask whether to cancel the selected task. The prompt stays on this task, even if the selection changes."""
        task = self.selected_task
        if task is not None and task["state"] in FINAL_STATES:
            self.notice = "The task has already ended."
        else:
            self.task_to_cancel = task

    def answer_cancel(self, typed: bytes) -> str | None:
        """Close the prompt; return the id of the task to cancel, or None for any answer except `y`."""
        task, self.task_to_cancel = self.task_to_cancel, None
        if task is not None and typed in {b"y", b"Y"}:
            return task["id"]
        self.notice = "Nothing was cancelled."
        return None

    def move_selection(self, lines: int) -> None:
        """Move the selection down by this many lines."""
        tasks = self._snapshot.tasks if self._snapshot else ()
        if tasks:
            self._selected_id = tasks[min(max(self._selected_index() + lines, 0), len(tasks) - 1)]["id"]

    def render(self, width: int, height: int, now: datetime) -> list[Text]:
        """Return the screen's lines, limited to its width and height."""
        if self._snapshot is None:
            return [Text(f"Connecting to {self._server} …")]
        details = self._details(width) if height >= _HEIGHT_WITH_DETAILS_MIN else []
        rows_max = max(height - _HEAD_LINES - _FOOT_LINES - 1 - len(details), 1)
        filter_line = Text(one_line(str(self.filter)), "yellow")
        head = [_header_line(self._snapshot, self._server, now), _counts_line(self._snapshot), filter_line]
        table = (
            _help_lines()[: rows_max + 1] if self.is_help_open else self._table(self._snapshot, width, rows_max, now)
        )
        padding = [Text()] * (rows_max + 1 - len(table))
        lines = [*head, *table, *padding, self._overflow_line(rows_max), *details, self._footer()]
        for line in lines:
            line.truncate(width, overflow="ellipsis")
        return lines[:height]

    def _selected_index(self) -> int:
        ids = [task["id"] for task in self._snapshot.tasks] if self._snapshot else []
        return ids.index(self._selected_id) if self._selected_id in ids else 0

    def _table(self, snapshot: Snapshot, width: int, rows_max: int, now: datetime) -> list[Text]:
        if not snapshot.tasks:
            is_filtered = self.filter != TaskFilter()
            return [Text("No such tasks." if is_filtered else _SUBMIT_HINT, "dim")]
        selected_index = self._selected_index()
        last_first = max(len(snapshot.tasks) - rows_max, 0)
        self._scroll_offset = min(max(self._scroll_offset, selected_index - rows_max + 1), selected_index, last_first)
        visible_tasks = snapshot.tasks[self._scroll_offset : self._scroll_offset + rows_max]
        ids = shorten_ids(task["id"] for task in snapshot.tasks)
        heading, *rows = plain_lines(
            *_fit_rows([task_row(task, now, shown_id=ids[task["id"]]) for task in visible_tasks], width)
        )
        marked = [Text.assemble("  ", heading)]
        for at, line in enumerate(rows, self._scroll_offset):
            marked.append(Text.assemble(("▸ ", "cyan") if at == selected_index else "  ", line))
            if at == selected_index:
                marked[-1].stylize("bold")
        return marked

    def _details(self, width: int) -> list[Text]:
        """Return the name of the selected task, and its whole activity or failure, in a fixed number of lines."""
        task = self.selected_task
        if task is None or self.is_help_open:
            return []
        activity = task["error"]["message"] if task["error"] else _current_activity(task, on_terminal=True)
        lines = wrap_text(f"{one_line(task['name'])}: {one_line(activity)}", width)
        if len(lines) > _DETAIL_LINES:
            lines = [*lines[: _DETAIL_LINES - 1], f"{lines[_DETAIL_LINES - 1]}…"]
        return [Text(line) for line in [*lines, *[""] * (_DETAIL_LINES - len(lines))]]

    def _overflow_line(self, rows_max: int) -> Text:
        assert self._snapshot is not None
        below = max(len(self._snapshot.tasks) - self._scroll_offset - rows_max, 0)
        parts = [f"{pluralize(below, 'more task')} below"] if below else []
        parts += (
            [f"{self._snapshot.omitted_count:,} older ones: sandbox task list"] if self._snapshot.omitted_count else []
        )
        return Text(" · ".join(parts), "dim")

    def _footer(self) -> Text:
        if self.is_help_open:
            return Text("Press any key to return.", "bold")
        if self.search_input is not None:
            words = one_line(self.search_input.decode(errors="ignore"))
            return Text(f"Search: {words}▏  enter search  esc back", "bold")
        if self.task_to_cancel is not None:
            task = self.task_to_cancel
            return Text(f"Cancel {one_line(task['id'])}? y/n  {one_line(task['name'])}", "bold yellow")
        if self.notice or self._error_message:
            return Text(one_line(self.notice or self._error_message), "yellow" if self.notice else "red")
        return Text(KEY_HELP, "dim")


def _fit_rows(rows: list[list[Text]], width: int) -> tuple[Sequence[str], Sequence[Sequence[Text]]]:
    """Return the columns that fit. If NAME does not fit next to the other columns, NOW shrinks to make room for it."""
    for row in rows:
        row[COLUMNS.index("NAME")].truncate(max(width // 4, NAME_CELLS_MIN), overflow="ellipsis")
    for activity_cells_min in (ACTIVITY_CELLS_MIN, MAIN_COLUMN_CELLS):
        copies = [[each.copy() for each in row] for row in rows]
        columns, fitted = fit_table(COLUMNS, copies, OMITTABLE_COLUMNS, width - 2, main_cells_min=activity_cells_min)
        if "NAME" in columns:
            break
    return columns, fitted


def task_row(task: TaskSummary, now: datetime, *, on_terminal: bool = True, shown_id: str | None = None) -> list[Text]:
    """Return the cells of one task. shown_id: the shortened id; None for the full id."""
    progress = task["progress"]
    tokens = progress["input_tokens"] + progress["output_tokens"]
    return [
        cell(task["id"] if shown_id is None else shown_id),
        cell(state_text(task, on_terminal=on_terminal), STATE_STYLES.get(task["state"], "")),
        cell(format_age(task["created_at"], now)),
        cell(str(progress["turns"] or "")),
        cell(f"{tokens:,}" if tokens else ""),
        cell(format_cost(progress["cost_usd"]) if progress["cost_usd"] else ""),
        cell(_current_activity(task, on_terminal=on_terminal)),
        cell(name_text(task, on_terminal=on_terminal)),
    ]


def _current_activity(task: TaskSummary, *, on_terminal: bool) -> str:
    """Return what the task is doing, or how it ended."""
    if task["state"] in FINAL_STATES:
        if task["error"]:
            return failure_text(task, on_terminal=on_terminal)
        elapsed = task_duration(task) or format_elapsed(task["started_at"], task["finished_at"])
        return f"took {elapsed}" if elapsed else ""
    return current_activity(task["progress"]) or task["state_message"]


def _help_lines() -> list[Text]:
    """Return the keys, and the states that each filter selects."""
    lines = [Text.assemble((f"  {key:<{_HELP_KEY_CELLS}}", "bold"), effect) for key, effect in _KEY_EFFECTS]
    lines += [Text(), Text("Filters", "dim")]
    for name, states in STATE_FILTERS.items():
        shown = [format_state(state) for state in TaskState if state in states]
        text = "all states" if name == "all" else " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))
        lines.append(Text.assemble((f"  {name:<{_HELP_KEY_CELLS}}", "bold"), text))
    return [Text("Keys", "dim"), *lines]


def _header_line(snapshot: Snapshot, server: str, now: datetime) -> Text:
    health = snapshot.health
    disk = health["disk"]
    parts = [f"Sandbox {health['version']} at {server}", f"up {format_duration(health['uptime_seconds'])}"]
    parts += [f"{format_size(disk['free_bytes'])} of disk free"] if "free_bytes" in disk else []
    return Text.assemble((f"{now.astimezone():%H:%M:%S}  ", "dim"), (one_line(" · ".join(parts)), "bold"))


def _counts_line(snapshot: Snapshot) -> Text:
    health = snapshot.health
    parts: list[Text] = []
    # The counts do not show which sandboxes were released, so add up the counts of both states of failed tasks.
    for state in (state for state in TaskState if state is not TaskState.FAILED_PRESERVED):
        states = {state, TaskState.FAILED_PRESERVED} if state is TaskState.FAILED else {state}
        number = sum(health["tasks"].get(counted, 0) for counted in states)
        if number:
            parts.append(Text(f"{number:,} {state}", STATE_STYLES.get(state, "")))
    if not health["ready"]:
        parts.append(Text(one_line(f"Not accepting tasks: {' '.join(health['reasons'])}"), "yellow"))
    return Text(" · ").join(parts)


def table_rows(tasks: Sequence[TaskSummary], now: datetime, *, on_terminal: bool) -> list[list[Text]]:
    """Return one row per task, for non-interactive output."""
    return [task_row(task, now, on_terminal=on_terminal) for task in tasks]
