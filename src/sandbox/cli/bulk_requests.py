"""Sends a request for each of several tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from sandbox.cli.errors import ExitCode, print_error
from sandbox.cli.options import current_options
from sandbox.cli.output.json_output import print_json
from sandbox.cli.output.terminal_text import escape_text

if TYPE_CHECKING:
    from sandbox.client import ClientError


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
