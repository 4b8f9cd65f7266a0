"""Formats times, counts and outcomes of tasks for people."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from itertools import islice, pairwise, takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from sandbox.cli.output.terminal_text import escape_name, escape_text
from sandbox.model.formatting import format_duration, format_state
from sandbox.model.name_from_prompt import branch_name
from sandbox.model.task_state import FINAL_STATES, TaskState

if TYPE_CHECKING:
    from sandbox.client.response_types import Progress


def parse_timestamp(timestamp: str | None) -> datetime | None:
    """Convert a time from the API (RFC 3339) to local time; return None for an empty or invalid one."""
    try:
        at = datetime.fromisoformat(timestamp) if timestamp else None
        return at and (at if at.tzinfo else at.replace(tzinfo=UTC)).astimezone()
    except (ValueError, OverflowError):
        return None


def format_time(timestamp: str | None) -> str:
    """Format the local time of day: `12:00:01`."""
    at = parse_timestamp(timestamp)
    return at.strftime("%H:%M:%S") if at else "--:--:--"


def format_date(timestamp: str | None) -> str:
    """Format the local date: `2026-01-29`; empty if there is no time."""
    at = parse_timestamp(timestamp)
    return at.strftime("%Y-%m-%d") if at else ""


def format_datetime(timestamp: str | None) -> str:
    """Format local date and time: `2026-01-29 12:00:01`."""
    at = parse_timestamp(timestamp)
    return at.strftime("%Y-%m-%d %H:%M:%S") if at else "-"


def format_elapsed(first: str | None, last: str | None) -> str:
    """Format the time between two timestamps: `2 min 5 s`; empty unless both are given."""
    begin, end = parse_timestamp(first), parse_timestamp(last)
    return format_duration((end - begin).total_seconds()) if begin and end else ""


def task_duration(task: Mapping[str, Any]) -> str:
    """Format how long the agent worked; empty if it never started. Older servers send no duration."""
    seconds = task.get("duration_seconds")
    return "" if seconds is None else format_duration(seconds)


def format_age(timestamp: str | None, now: datetime) -> str:
    """Format an age in one unit: `42 s`, `12 min`, `3 h`, `4 d`."""
    at = parse_timestamp(timestamp)
    seconds = max(int((now - at).total_seconds()), 0) if at else 0
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s" if at else "-"


def state_text(task: Mapping[str, Any], *, on_terminal: bool) -> str:
    """Return a task's state; on a terminal, `failed, preserved` or `failed, released`, as in the dashboard.

    Without a terminal, the state is unchanged, because scripts read it. Older servers do not send `sandbox_kept` in
    lists.
    """
    state = str(task["state"])
    return format_state(state, is_preserved=task.get("sandbox_kept") is not False) if on_terminal else state


def name_text(task: Mapping[str, Any], *, on_terminal: bool) -> str:
    """Return a task's name. On a terminal, ↳ marks a continuation and ↻ a rerun, as in the dashboard.

    The beginning of the prompt follows the mark, because such tasks often share their name. It comes before the name,
    because a narrow window truncates the end. Older servers send neither the relations nor the prompt.
    """
    mark = "↻" if task.get("rerun_of") is not None else "↳" if task.get("parent") is not None else ""
    if not on_terminal or not mark:
        return str(task["name"])
    return f"{mark} {' · '.join(filter(None, (task.get('prompt_beginning'), str(task['name']))))}"


_CLAUSE_END = re.compile(r"[;.](?=\s)|[;.]$")
_CLONE_PREFIX = re.compile(r"^Cannot clone \S+: (?=.)", re.DOTALL)


def failure_text(task: Mapping[str, Any], *, on_terminal: bool) -> str:
    """Return the error of a failed task as text for a table.

    On a terminal, the text is the cause, without the repository's URL and without the remedy. Otherwise, the text is
    for scripts: the error code, and whether the sandbox was released, which the state does not show.
    """
    error = task["error"]
    if not error:
        return ""
    if on_terminal:
        message = _CLONE_PREFIX.sub("Cannot clone: ", error["message"])
        return message[: end.start()] if (end := _CLAUSE_END.search(message)) else message
    is_released = task["state"] == TaskState.FAILED_PRESERVED and task.get("sandbox_kept") is False
    return f"{error['code']}{' (released)' if is_released else ''}"


def pluralize(number: int, noun: str) -> str:
    """Format a count with its noun: `1 task`, `2 tasks`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def current_activity(progress: Progress) -> str:
    """Return the running tool and the subject of its call, or what the agent waits for; empty if there is neither.

    Older servers do not send subjects.
    """
    parts = (progress["current_tool"], progress.get("current_subject"))
    return escape_name(" ".join(part for part in parts if part))


GENERATED_ID_PATTERN = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
SHORT_ID_CHARACTERS = 8


def shorten_ids(ids: Iterable[str]) -> dict[str, str]:
    """Map each generated id to a prefix that no other id has, and each chosen id to itself."""
    ordered = sorted(set(ids))
    shared = [
        sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(*pair, strict=False))) for pair in pairwise(ordered)
    ]
    lengths = map(max, [0, *shared], [*shared, 0])
    return {
        task_id: task_id[: max(length + 1, SHORT_ID_CHARACTERS)] if GENERATED_ID_PATTERN.fullmatch(task_id) else task_id
        for task_id, length in zip(ordered, lengths, strict=False)
    }


def format_changes(task: Mapping[str, Any]) -> str:
    """Format the number of changed lines: `+16 −4`; empty if the size of the patch is unknown or no file changed."""
    diff = task.get("diff")
    return f"+{diff['additions']:,} −{diff['deletions']:,}" if diff and diff["files"] else ""


def changes_summary(task: Mapping[str, Any], chain_changes: str = "") -> str:
    """Format the size of a task's patch: `+16 −4 in 2 files`; empty if it is unknown or no file changed.

    chain_changes: the same for the task and the earlier tasks of its chain; empty if there are none.
    """
    diff, changes = task.get("diff"), format_changes(task)
    if not diff or not changes:
        return f"none (chain: {chain_changes})" if diff and chain_changes else ""
    return f"{changes} in {pluralize(diff['files'], 'file')}" + (f" (chain: {chain_changes})" if chain_changes else "")


def task_prompt(task: Mapping[str, Any]) -> str:
    """Return the prompt in a task's manifest; empty if there is none."""
    sections = [section for section in (task.get("definition") or {}).values() if isinstance(section, dict)]
    return next((section["prompt"] for section in sections if isinstance(section.get("prompt"), str)), "")


def next_commands(
    task: Mapping[str, Any], *, on_terminal: bool = False, has_chain_changes: bool = False
) -> list[tuple[str, str]]:
    """Return the commands that are useful now, each with a label. On a terminal, generated ids are shortened.

    has_chain_changes: whether the task or one that it continues changed anything.
    """
    task_id = command_id(task, on_terminal=on_terminal)
    commands = _next_commands(task, has_chain_changes=has_chain_changes)
    return [(label, f"sandbox task {verb} {task_id}{rest}") for label, verb, rest in commands]


def command_id(task: Mapping[str, Any], *, on_terminal: bool) -> str:
    """Return a task's id for a command that people copy, shortened on a terminal if it was generated."""
    task_id = escape_text(str(task.get("id") or task.get("task_id")))
    is_shortened = on_terminal and GENERATED_ID_PATTERN.fullmatch(task_id)
    return task_id[:SHORT_ID_CHARACTERS] if is_shortened else task_id


def hint_id(task_id: str) -> str:
    """Return the id for a command in a hint on stderr, shortened if stderr is a terminal and the id was generated."""
    return command_id({"id": task_id}, on_terminal=sys.stderr.isatty())


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
    return f"sandbox task rerun {command_id(task, on_terminal=on_terminal)}{options}"


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
        shown_id = command_id(status, on_terminal=on_terminal)
        lines += [
            "  Its sandbox is preserved.",
            f"  Open a shell:      sandbox task shell {shown_id}",
            f"  Remove it:         sandbox task release {shown_id}",
        ]
    return "\n".join([*lines, outcome] if ends_with_outcome else [outcome, *lines])


def _failure_commands(status: Mapping[str, Any], *, on_terminal: bool) -> list[str]:
    if not on_terminal:
        return [f"  See what happened: sandbox task logs {command_id(status, on_terminal=False)}"]
    commands = next_commands(status, on_terminal=True)
    return [f"  {label + ':':<18} {command}" for label, command in commands]


_OUTCOMES = {
    "completed": "completed",
    "cancelled": "was cancelled",
    "failed": "failed",
    "failed_preserved": "failed",
}
