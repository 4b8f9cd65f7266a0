"""Prompts that ask the user to confirm an action."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.output.console import escape_name, escape_text

if TYPE_CHECKING:
    from sandbox.client.response_types import Task


def confirm(question: str, *, default: bool | None = None, show_details: Callable[[], None] | None = None) -> bool:
    """Ask on stderr until the answer is yes or no.

    default: the answer for an empty line; None to ask again. show_details: called for the answer `d`.
    """
    hint = {None: "y/n", True: "Y/n", False: "y/N"}[default] + ("/d" if show_details else "")
    while True:
        answer = click.prompt(f"{question} [{hint}]", default="", show_default=False, err=True).strip().lower()
        if answer in {"y", "yes"}:
            return True
        if answer in {"n", "no"}:
            return False
        if not answer and default is not None:
            return default
        if answer == "d" and show_details is not None:
            show_details()
        else:
            click.echo("Type y or n." if show_details is None else "Type y, n or d.", err=True)


def require_terminal_for_prompt(action: str) -> None:
    """Exit with an error if the command cannot prompt. action: what `--yes` does, such as `Delete the task`."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        message = "Error: This command prompts for confirmation and needs a terminal."
        fail(f"{message}\n  {action} without a prompt: add --yes", ExitCode.USAGE)


def confirm_for_tasks(tasks: Sequence[Task], *, one: tuple[str, str], several: tuple[str, str]) -> None:
    """Ask once about all tasks. Exits if the user declines; does nothing without a task.

    one, several: the question, and the text to print if the user declines. `{}` in the question stands for the task's
    id and name, or for the number of tasks.
    """
    if not tasks:
        return
    shown = [f"{escape_text(task['id'])} ({escape_name(task['name'])})" for task in tasks]
    if len(shown) == 1:
        (question, refusal), subject = one, shown[0]
    else:
        click.echo("\n".join(f"  {text}" for text in shown), err=True)
        (question, refusal), subject = several, str(len(shown))
    if not confirm(question.format(subject), default=False):
        fail(refusal, ExitCode.INTERRUPTED)
