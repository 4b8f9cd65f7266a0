"""The `sandbox task wait` command."""

from __future__ import annotations

import sys

import click

from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.errors import ExitCode, exit_code_for_state, fail, hint_if_interrupted
from sandbox.cli.options import common_options, current_options, parse_duration_option
from sandbox.cli.output.console import escape_text, print_json, terminal_width
from sandbox.cli.output.formatting import state_text
from sandbox.cli.output.task_outcome import outcome_summary
from sandbox.cli.task_arguments import task_argument
from sandbox.model.display_text import format_duration
from sandbox.model.task_state import FINAL_STATES


@command(epilog=help_examples("sandbox task wait 5e173eb5 --timeout 2h"))
@task_argument
@click.option(
    "--timeout",
    "timeout_seconds",
    callback=parse_duration_option,
    metavar="SPAN",
    help="Maximum time to wait, such as 90s, 15m or 2h.",
)
@common_options
def wait(task_id: str, timeout_seconds: int | None) -> None:
    """Wait until a task has ended.

    Prints the task's final state. Exit code: 0 if the task completed, 1 if it failed, 8 if it was cancelled, 7 if the
    task had not ended when --timeout expired.
    """
    options = current_options()
    with options.connect() as client, hint_if_interrupted(task_id):
        status = client.wait(task_id, timeout_seconds=timeout_seconds)
    if options.format == "json":
        print_json(status)
    else:
        click.echo(escape_text(state_text(status, on_terminal=sys.stdout.isatty())))
    if status["state"] not in FINAL_STATES:
        message = f"Task {task_id} did not end within {format_duration(timeout_seconds or 0)}; it continues."
        fail(escape_text(message), ExitCode.WAIT_TIMEOUT)
    code = exit_code_for_state(status["state"])
    if code is not ExitCode.SUCCESS:
        fail(outcome_summary(status, on_terminal=terminal_width(sys.stderr) is not None), code)
