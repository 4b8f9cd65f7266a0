"""How a task ended: its outcome, the next commands, the agent's final message, the cost and the refused connections."""

from __future__ import annotations

import re
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from sandbox.cli.output.console import escape_name, escape_text, wrap_text
from sandbox.cli.output.event_printer import MODEL_HOST
from sandbox.cli.output.formatting import GENERATED_ID_PATTERN, SHORT_ID_CHARACTERS, format_changes, pluralize
from sandbox.cli.output.text_log_parser import parse_log_events
from sandbox.model.display_text import format_cost
from sandbox.model.task_names_and_ids import branch_name
from sandbox.model.task_state import FINAL_STATES, TaskState

if TYPE_CHECKING:
    from sandbox.client import Client
    from sandbox.client.response_types import Task


def next_commands(
    task: Mapping[str, Any], *, on_terminal: bool = False, has_chain_changes: bool = False
) -> list[tuple[str, str]]:
    """Return the commands that are useful now, each with a label. On a terminal, generated ids are shortened.

    has_chain_changes: whether the task or one that it continues changed anything.
    """
    task_id = task_id_for_command(task, on_terminal=on_terminal)
    commands = _next_commands(task, has_chain_changes=has_chain_changes)
    return [(label, f"sandbox task {verb} {task_id}{rest}") for label, verb, rest in commands]


def task_id_for_command(task: Mapping[str, Any], *, on_terminal: bool) -> str:
    """Return a task's id for a command that people copy, shortened on a terminal if it was generated."""
    task_id = escape_text(str(task.get("id") or task.get("task_id")))
    is_shortened = on_terminal and GENERATED_ID_PATTERN.fullmatch(task_id)
    return task_id[:SHORT_ID_CHARACTERS] if is_shortened else task_id


def task_id_for_hint(task_id: str) -> str:
    """Return the id for a command in a hint on stderr, shortened if stderr is a terminal and the id was generated."""
    return task_id_for_command({"id": task_id}, on_terminal=sys.stderr.isatty())


def _next_commands(task: Mapping[str, Any], *, has_chain_changes: bool) -> list[tuple[str, str, str]]:
    """Return the label, the subcommand and the further arguments of each command."""
    if task["state"] not in FINAL_STATES:
        return [("Watch", "status", " --watch"), ("Cancel", "cancel", "")]
    is_completed = task["state"] == TaskState.COMPLETED
    # Older servers do not send the size of the patch.
    has_changes = has_chain_changes or bool(format_changes(task)) or (is_completed and "diff" not in task)
    chain = " --chain" if task.get("parent") is not None else ""
    commands = [("Diff", "diff", chain) if has_changes else ("Logs", "logs", "")]
    if has_changes and is_completed:
        commands.append(("Apply", "apply", chain))
        if can_commit_to_branch(task):
            commands.append(("Commit", "apply", branch_option(str(task.get("id") or task.get("task_id")))))
    if has_changes or is_completed:
        commands.append(("Continue", "continue", ' "…"'))
    if not is_completed:
        commands.append(("Rerun", "rerun", _rerun_options(task)))
    return commands


def can_commit_to_branch(task: Mapping[str, Any]) -> bool:
    """Return whether a branch can start from the task's commit: the task started without uncommitted changes."""
    repository = (task.get("definition") or {}).get("repository") or {}
    return not repository.get("patch")


def branch_option(task_id: str) -> str:
    """Return the option of `sandbox task apply` that commits the task's changes to a new branch.

    The branch contains the changes of the whole chain, so the option replaces `--chain`. The branch is named after the
    id alone, so that the command fits on a line.
    """
    return f" --branch {branch_name(escape_text(task_id))}"


_PLAIN_OVERRIDE = re.compile(r"[a-z_]+\.[a-z_]+=[\w.…]+", re.ASCII)
"""Matches an override that a shell passes on unchanged without quotes."""


def _rerun_options(task: Mapping[str, Any]) -> str:
    """Return the options that change the field that caused the failure; `…` stands for a value that the user chooses.

    Servers of earlier versions may omit the remedy or its field.
    """
    remedy = (task.get("error") or {}).get("remedy") or {}
    field = remedy.get("field")
    changes = remedy.get("overrides") or ([f"{field}=…"] if field else [])
    return "".join(f" --set {change}" for change in changes if _PLAIN_OVERRIDE.fullmatch(change))


class DeniedConnection(NamedTuple):
    """A connection that the sandbox tried to make and that was refused."""

    host: str
    port: int
    reason: str


ALLOWED_HOSTS_MAX = 10
"""Maximum number of hosts in a command that allows refused hosts."""

_HOST_NAME = re.compile(r"[a-z0-9_][a-z0-9._-]*", re.IGNORECASE)  # a program may also request a wildcard: *.com
_MANIFEST_REASON = re.compile(r"vm\.(allowed_hosts|network_mode)")
_DEFAULT_PORTS = {80, 443}
"""The ports that an allowed host covers if it has no port."""


def allow_command(task: Mapping[str, Any], denied: Iterable[DeniedConnection], *, on_terminal: bool = False) -> str:
    """Return the command that runs the task again with the refused hosts allowed; empty if no host can be allowed."""
    hosts = dict.fromkeys(
        each.host if each.port in _DEFAULT_PORTS else f"{each.host}:{each.port}"
        for each in denied
        if _HOST_NAME.fullmatch(each.host) and _MANIFEST_REASON.match(each.reason)
    )
    if not hosts:
        return ""
    vm = (task.get("definition") or {}).get("vm") or {}
    # A manifest with another mode has no allowed hosts.
    is_outbound = vm.get("network_mode") == "outbound"
    assignments = [] if is_outbound else ["vm.network_mode=outbound"]
    listed = len(vm.get("allowed_hosts") or ()) if is_outbound else 0
    assignments += [
        f"vm.allowed_hosts[{number}]={host}" for number, host in enumerate(islice(hosts, ALLOWED_HOSTS_MAX), listed)
    ]
    options = "".join(f" --set {shlex.quote(assignment)}" for assignment in assignments)
    return f"sandbox task rerun {task_id_for_command(task, on_terminal=on_terminal)}{options}"


def find_denied_connections(client: Client, task: Task) -> tuple[int, Counter[DeniedConnection]]:
    """Return the number of a task's refused connections, and how often each connection occurs in the log.

    The status also counts refused model requests, which are not connections. If the log is unavailable, the
    number includes these requests.
    """
    from sandbox.client import ClientError

    count, denied = task["progress"].get("egress_denied") or 0, Counter[DeniedConnection]()
    if count:
        with suppress(ClientError):
            for event in parse_log_events(client.logs(task["id"], stream="events"), task["id"]):
                if event["type"] != "egress_denied":
                    continue
                if event["host"] == MODEL_HOST:
                    count -= 1
                else:
                    denied[DeniedConnection(event["host"], event["port"], event["reason"])] += 1
    return max(count, 0), denied


_DENIED_HOSTS_MAX = 5


_DENIED_REASONS_MAX = 3


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
        shown_id = task_id_for_command(task, on_terminal=on_terminal)
        yield "Refused", f"{pluralize(others, 'connection')}: sandbox task logs {shown_id} --stream events"
    if command := allow_command(task, denied, on_terminal=on_terminal):
        yield "Allow", command


def _refused_text(hosts: Counter[str]) -> str:
    """Return the number of refused connections, and the hosts with the most refused connections."""
    shown = [escape_name(host) for host, _ in hosts.most_common(_DENIED_HOSTS_MAX)]
    more = [f"{len(hosts) - len(shown)} more"] if len(hosts) > len(shown) else []
    return f"{pluralize(hosts.total(), 'connection')} to {', '.join([*shown, *more])}"


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
