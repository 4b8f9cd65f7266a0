"""`sandbox task attach`"""

from __future__ import annotations

import click

from sandbox.cli.options import chosen, server_options, task_argument
from sandbox.cli.output.text import visible
from sandbox.cli.terminal import DETACH_KEYS, detach_keys, run_terminal, tell_end


@click.command()
@task_argument
@click.option("--watch", is_flag=True, help="Only look on; never type.")
@click.option(
    "--detach-keys",
    "keys",
    callback=detach_keys,
    metavar="KEYS",
    default=DETACH_KEYS,
    help=f"What leaves the agent's terminal [default: {DETACH_KEYS}]",
)
@server_options
def attach(task_id: str, watch: bool, keys: bytes) -> None:
    """Sit down at the terminal of a task's agent.

    Only with claude.headless: false an agent has one. Who came first types, others look on and take over when it
    leaves. The agent goes on when everybody has left. Ends with the agent's exit code when it ends meanwhile.
    """
    found = run_terminal(chosen(), task_id, keys, of="agent", watch=str(watch).lower())
    shown = visible(task_id)
    tell_end(found, task_id, f"\nLeft. The agent goes on.\n  Come back: sandbox task attach {shown}")
