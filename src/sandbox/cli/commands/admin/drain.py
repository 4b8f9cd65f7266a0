"""The `sandbox admin drain` command."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from sandbox.cli.command_groups import command, help_examples
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.options import common_options, current_options, parse_duration_option
from sandbox.cli.output.formatting import pluralize
from sandbox.cli.output.json_output import print_json
from sandbox.cli.output.terminal_text import escape_text
from sandbox.model.formatting import format_duration

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandbox.client import Client
    from sandbox.client.response_types import Draining

_POLL_SECONDS = 0.5


@command(
    epilog=help_examples(
        "sandbox admin drain --wait --timeout 15m",
        "sandbox admin drain --undo",
    )
)
@click.option("--undo", is_flag=True, help="Accept and start tasks again.")
@click.option("--wait/--no-wait", "-w", default=False, help="Wait until no task is running.")
@click.option(
    "--timeout",
    "timeout_seconds",
    callback=parse_duration_option,
    metavar="SPAN",
    help="With --wait: timeout, such as 90s, 15m or 2h.",
)
@common_options
def drain(*, undo: bool, wait: bool, timeout_seconds: int | None) -> None:
    """Let running tasks finish, and start no new ones.

    The server rejects new tasks, and pending tasks stay pending, until you run the command with --undo. The server
    stays drained after a restart. Exit code: 0 if done, 7 if tasks are still running when --timeout expires.
    """
    if undo and (wait or timeout_seconds is not None):
        raise click.UsageError("--undo cannot be combined with --wait")
    if timeout_seconds is not None and not wait:
        raise click.UsageError("--timeout requires --wait")
    options = current_options()
    with options.connect() as client:
        status = client.undo_drain() if undo else client.drain()
        if wait:
            with _interrupt_hint():
                status = _wait_until_drained(client, status, timeout_seconds)
    if options.format == "json":
        print_json(status)
    if wait and status["running"]:
        running, waited = pluralize(status["running"], "task"), format_duration(timeout_seconds or 0)
        fail(f"{running} still running after {waited}; the drain continues.", ExitCode.WAIT_TIMEOUT)
    if options.format != "json":
        click.echo(_drain_message(status), err=True)


@contextmanager
def _interrupt_hint() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        message = "\nStopped waiting. The drain continues.\n  Undo it: sandbox admin drain --undo"
        fail(message, ExitCode.INTERRUPTED)


def _wait_until_drained(client: Client, status: Draining, timeout_seconds: int | None) -> Draining:
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    while status["running"] and (deadline is None or time.monotonic() < deadline):
        time.sleep(_POLL_SECONDS)
        status = client.drain_status()
    return status


def _drain_message(status: Draining) -> str:
    if not status["draining"]:
        return "The server accepts and starts tasks again."
    running, waiting = pluralize(status["running"], "task"), pluralize(status["waiting"], "task")
    since = escape_text(str(status["since"]))
    return f"The server has been draining since {since}: {running} running, {waiting} waiting."
