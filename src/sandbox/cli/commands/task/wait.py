"""`sandbox task wait`"""

from __future__ import annotations

import click

from sandbox.cli.errors import ExitCode, fail, of_final_state, watching
from sandbox.cli.options import chosen, common_options, span_seconds, task_argument
from sandbox.cli.output.formatting import duration
from sandbox.cli.output.json_output import ending, print_json
from sandbox.cli.output.text import visible
from sandbox.model.task_state import TERMINAL_STATES


@click.command()
@task_argument
@click.option(
    "--timeout",
    "timeout_seconds",
    callback=span_seconds,
    metavar="SPAN",
    help="Give up after this time, such as 90s, 15m or 2h.",
)
@common_options
def wait(task_id: str, timeout_seconds: int | None) -> None:
    """Wait until a task has ended.

    Prints its final state. Exit code: 0 completed, 1 failed, 8 cancelled, 7 not ended in time.
    """
    options = chosen()
    with options.connect() as client, watching(task_id):
        status = client.wait(task_id, timeout_seconds=timeout_seconds)
    if options.format == "json":
        print_json(status)
    else:
        click.echo(visible(status["state"]))
    if status["state"] not in TERMINAL_STATES:
        message = f"Task {task_id} has not ended within {duration(timeout_seconds or 0)}; it goes on."
        fail(visible(message), ExitCode.WAIT_TIMEOUT)
    code = of_final_state(status["state"])
    if code is not ExitCode.DONE:
        fail(ending(status), code)
