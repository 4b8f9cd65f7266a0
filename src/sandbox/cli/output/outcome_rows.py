"""Rows that describe the result of a task: the agent's final message, the cost, and refused connections."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sandbox.cli.output.formatting import DeniedConnection, allow_command, command_id, pluralize
from sandbox.cli.output.terminal_text import escape_name, wrap_text
from sandbox.model.formatting import format_cost

if TYPE_CHECKING:
    from sandbox.client.response_types import Task

_DENIED_HOSTS_MAX = 5
_DENIED_REASONS_MAX = 3
_MESSAGE_LINES_MAX = 10
_LABEL_CELLS = 13


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


def denied_connection_rows(
    task: Task, count: int, denied: Counter[DeniedConnection], *, on_terminal: bool
) -> Iterator[tuple[str, str]]:
    """Yield the refused hosts for each reason, and the command that allows them."""
    if not count:
        return
    by_reason = defaultdict[str, Counter[str]](Counter)
    for connection, number in denied.items():
        by_reason[connection.reason][f"{connection.host}:{connection.port}"] += number
    others = count
    for reason, hosts in list(by_reason.items())[:_DENIED_REASONS_MAX]:
        others -= hosts.total()
        yield "Refused", f"{_refused_text(hosts)}: {reason}"
    if others > 0:
        shown_id = command_id(task, on_terminal=on_terminal)
        yield "Refused", f"{pluralize(others, 'connection')}: sandbox task logs {shown_id} --stream events"
    if command := allow_command(task, denied, on_terminal=on_terminal):
        yield "Allow", command


def _refused_text(hosts: Counter[str]) -> str:
    """Return the number of refused connections, and the hosts with the most refused connections."""
    shown = [escape_name(host) for host, _ in hosts.most_common(_DENIED_HOSTS_MAX)]
    more = [f"{len(hosts) - len(shown)} more"] if len(hosts) > len(shown) else []
    return f"{pluralize(hosts.total(), 'connection')} to {', '.join([*shown, *more])}"
