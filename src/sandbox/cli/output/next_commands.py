"""The commands that are useful next for a task, as text to copy."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

from sandbox.cli.output.formatting import GENERATED_ID_PATTERN, SHORT_ID_CHARACTERS, format_changes
from sandbox.cli.output.terminal_text import escape_text
from sandbox.model.task_names import branch_name
from sandbox.model.task_state import FINAL_STATES, TaskState


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
