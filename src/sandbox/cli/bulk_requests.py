"""Sends requests for several tasks, and prompts before them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from sandbox.cli.errors import ExitCode, fail, print_error
from sandbox.cli.options import current_options
from sandbox.cli.output.console import confirm
from sandbox.cli.output.json_output import print_json
from sandbox.cli.output.terminal_text import escape_name, escape_text

if TYPE_CHECKING:
    from sandbox.client import ClientError
    from sandbox.client.response_types import Task


def for_each_task(
    task_ids: Sequence[str],
    request: Callable[[str], Mapping[str, Any]],
    advise: Callable[[ClientError, str], str] = lambda error, task_id: "",
) -> None:
    """Send a request for each task and print the response. Continues even if the server refuses a request.

    Prints the server's message, or with `--format json` the response. Exits with the code of the last error. Raises the
    error if there is only one task. advise: returns a line to print below the error for a task; empty for none.
    """
    from sandbox.client import ClientError, UnreachableError

    code = ExitCode.SUCCESS
    for task_id in task_ids:
        try:
            response = request(task_id)
        except ClientError as error:
            advice = advise(error, task_id)
            if isinstance(error, UnreachableError) or (len(task_ids) == 1 and not advice):
                raise
            code = print_error(error)
            if advice:
                click.echo(advice, err=True)
            continue
        if current_options().format == "json":
            print_json(response)
        else:
            message = escape_text(response["message"])
            is_named = len(task_ids) == 1 or escape_text(task_id) in message
            click.echo(message if is_named else f"{escape_text(task_id)}: {message}", err=True)
    if code is not ExitCode.SUCCESS:
        raise click.exceptions.Exit(code)


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
