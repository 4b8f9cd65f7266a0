"""The `sandbox task attach` command."""

from __future__ import annotations

import click

from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.options import CliOptions, current_options, server_options
from sandbox.cli.output.console import escape_text
from sandbox.cli.output.task_outcome import next_commands, outcome_summary, task_id_for_hint
from sandbox.cli.sandbox_terminal import DETACH_KEYS, exit_with_terminal, format_keys, parse_detach_keys, run_terminal
from sandbox.cli.task_arguments import task_argument
from sandbox.model.task_state import FINAL_STATES

TASK_END_TIMEOUT_SECONDS = 30.0
"""How long to wait for a task to end after its agent has exited. The task's patch is created during this time."""


@command(
    epilog=help_examples(
        "sandbox task attach 5e173eb5",
        "sandbox task attach 5e173eb5 --watch",
    )
)
@task_argument
@click.option("--watch", is_flag=True, help="Read-only: send no input.")
@click.option(
    "--detach-keys",
    "keys",
    callback=parse_detach_keys,
    metavar="KEYS",
    default=DETACH_KEYS,
    help=f"Keys that detach [default: {DETACH_KEYS}]",
)
@server_options
def attach(task_id: str, watch: bool, keys: bytes) -> None:
    """Attach to the terminal of a task's agent.

    An agent has a terminal only if its section of the manifest sets headless: false. If the agent has not started yet,
    the command waits until it starts, but at most an hour. The first client can type, and the other clients are
    read-only. When the first client detaches, the next client can type. The agent keeps running even after all clients
    have detached. When the agent exits, the command exits with the agent's exit code.
    """
    options = current_options()
    notice = f"Detach: {format_keys(keys)}"
    result = run_terminal(options, task_id, keys, notice=notice, of="agent", watch=str(watch).lower())
    if result is not None and result.exit_code is not None:
        _print_outcome(options, task_id)
    exit_with_terminal(
        result,
        task_id,
        f"Detached. The agent continues.\n  Attach again: sandbox task attach {task_id_for_hint(task_id)}",
    )


def _print_outcome(options: CliOptions, task_id: str) -> None:
    """Print the outcome of a task whose agent has exited, and the next command."""
    from sandbox.client import ClientError

    label, command_line = "See the task", f"sandbox task status {escape_text(task_id)}"
    outcome = f"task {escape_text(task_id)} has not ended yet."
    try:
        with options.connect() as client:
            status = client.wait(task_id, timeout_seconds=TASK_END_TIMEOUT_SECONDS)
    except ClientError:
        outcome = "the outcome of the task is not known yet."
    else:
        if status["state"] in FINAL_STATES:
            outcome = outcome_summary({**status, "error": None, "sandbox_kept": False})
            [(label, command_line), *_] = next_commands(status)
    outcome = outcome[:1].lower() + outcome[1:]
    click.echo(f"The agent ended; {outcome}\n  {label}: {command_line}", err=True)
