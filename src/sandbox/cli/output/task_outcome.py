"""How a task ended: its outcome, what to do next, the agent's final message, the cost and the refused connections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sandbox.cli.output.denied_connections import DeniedConnection, denied_connection_rows
from sandbox.cli.output.next_commands import next_commands, task_id_for_command
from sandbox.cli.output.terminal_text import escape_text, wrap_text
from sandbox.model.formatting import format_cost
from sandbox.model.task_state import TaskState

if TYPE_CHECKING:
    from sandbox.client.response_types import Task

_MESSAGE_LINES_MAX = 10
_LABEL_CELLS = 13


def has_no_changes(task: Mapping[str, Any]) -> bool:
    """Return whether the patch is empty. Older servers do not send its size."""
    diff = task.get("diff")
    return diff is not None and not diff["files"]


def outcome_summary(status: Mapping[str, Any], *, ends_with_outcome: bool = False, on_terminal: bool = False) -> str:
    """Describe how a task ended and what to do next.

    ends_with_outcome: print how the task ended as one sentence in the last line, after the commands. on_terminal: list
    all commands that are useful now.
    """
    task_id, error = escape_text(str(status.get("id") or status.get("task_id"))), status.get("error")
    outcome = f"Task {task_id} {_OUTCOMES.get(str(status.get('state')), 'ended')}"
    if status.get("state") == TaskState.COMPLETED and has_no_changes(status):
        outcome += " without changes"
    lines: list[str] = []
    if isinstance(error, Mapping):
        message, code = str(error.get("message")), error.get("code")
        sentence = f"{' '.join(message.split()).removesuffix('.')}." if ends_with_outcome else f"{message} ({code})"
        outcome += f": {escape_text(sentence)}"
        lines += _failure_commands(status, on_terminal=on_terminal)
    else:
        outcome += "."
    if status.get("sandbox_kept"):
        shown_id = task_id_for_command(status, on_terminal=on_terminal)
        lines += [
            "  Its sandbox is preserved.",
            f"  Open a shell:      sandbox task shell {shown_id}",
            f"  Remove it:         sandbox task release {shown_id}",
        ]
    return "\n".join([*lines, outcome] if ends_with_outcome else [outcome, *lines])


def _failure_commands(status: Mapping[str, Any], *, on_terminal: bool) -> list[str]:
    if not on_terminal:
        return [f"  See what happened: sandbox task logs {task_id_for_command(status, on_terminal=False)}"]
    commands = next_commands(status, on_terminal=True)
    return [f"  {label + ':':<18} {command}" for label, command in commands]


_OUTCOMES = {
    "completed": "completed",
    "cancelled": "was cancelled",
    "failed": "failed",
    "failed_preserved": "failed",
}


def closing_lines(
    task: Task, count: int, denied: Counter[DeniedConnection], *, width_cells: int | None, has_message: bool
) -> list[str]:
    """Return the final message, the cost and the refused connections as lines.

    They are printed below the changes, so that they stay visible. count, denied: from `find_denied_connections`.
    width_cells: the width of the terminal; None without a terminal. has_message: include the message and the cost.
    """
    on_terminal = width_cells is not None
    cells = None if width_cells is None else width_cells - _LABEL_CELLS
    lines = []
    # Older servers do not send the message.
    if has_message and (message := task.get("final_message")):
        lines += _labelled("Message", message_lines(message, cells))
    if has_message and task["progress"]["cost_usd"]:
        lines += _labelled("Cost", [format_cost(task["progress"]["cost_usd"])])
    for label, value in denied_connection_rows(task, count, denied, on_terminal=on_terminal):
        # A command is one line, so that it can be copied.
        lines += _labelled(label, [value] if label == "Allow" else wrap_text(value, cells))
    return lines


def _labelled(label: str, lines: list[str]) -> list[str]:
    """Put the label before the first line, and indent the others."""
    return [f"{f'  {label}:' if number == 0 else '':<{_LABEL_CELLS}}{line}" for number, line in enumerate(lines)]


def message_lines(message: str, width_left: int | None) -> list[str]:
    """Return the beginning of the agent's final message."""
    lines = [line for part in message.splitlines() if part.strip() for line in wrap_text(part, width_left)]
    return lines if len(lines) <= _MESSAGE_LINES_MAX else [*lines[: _MESSAGE_LINES_MAX - 1], "…"]
