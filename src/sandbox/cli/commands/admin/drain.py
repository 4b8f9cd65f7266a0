"""The `sandbox admin drain` command."""

from __future__ import annotations

import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import click

from sandbox.cli.click_extensions import command, help_examples
from sandbox.cli.errors import ExitCode, fail
from sandbox.cli.options import common_options, current_options, parse_duration_option
from sandbox.cli.output.console import escape_text, print_json
from sandbox.cli.output.formatting import pluralize
from sandbox.model.display_text import format_duration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sandbox.client import Client
    from sandbox.client.response_types import Draining, Host

    _Status = TypeVar("_Status", Draining, Host)

_POLL_SECONDS = 0.5


@command(
    epilog=help_examples(
        "sandbox admin drain --wait --timeout 15m",
        "sandbox admin drain --undo",
        "sandbox admin drain --host node-2 --wait",
    )
)
@click.option("--host", metavar="NAME", help="Drain only this host of the cluster.")
@click.option("--undo", is_flag=True, help="Accept and start tasks again.")
@click.option("--wait/--no-wait", "-w", default=False, help="Wait until no task is running; with --host, on that host.")
@click.option(
    "--timeout",
    "timeout_seconds",
    callback=parse_duration_option,
    metavar="SPAN",
    help="With --wait: maximum time to wait, such as 90s, 15m or 2h.",
)
@common_options
def drain(*, host: str | None, undo: bool, wait: bool, timeout_seconds: int | None) -> None:
    """Let running tasks finish, and start no new tasks.

    Until you run the command with --undo, the server rejects new tasks, and pending tasks stay pending. The server
    stays drained after a restart. With --host, no tasks start on that host of the cluster. Exit code: 0 on
    success, 7 if tasks are still running when --timeout expires.
    """
    if undo and (wait or timeout_seconds is not None):
        raise click.UsageError("--undo cannot be combined with --wait")
    if timeout_seconds is not None and not wait:
        raise click.UsageError("--timeout requires --wait")
    options = current_options()
    status: Draining | Host
    with options.connect() as client:
        if host is None:
            server = client.undo_drain() if undo else client.drain()
            if wait:
                with _hint_if_interrupted(""):
                    server = _wait_until_drained(server, client.drain_status, timeout_seconds)
            status, message = server, _drain_message(server)
        else:
            one = client.undo_host_drain(host) if undo else client.drain_host(host)
            if wait:
                with _hint_if_interrupted(f" --host {escape_text(host)}"):
                    one = _wait_until_drained(one, partial(_read_host, client, one), timeout_seconds)
            status, message = one, _host_message(one)
    if options.format == "json":
        print_json(status)
    if wait and status["running"]:
        running, waited = pluralize(status["running"], "task"), format_duration(timeout_seconds or 0)
        fail(f"{running} still running after {waited}; the drain continues.", ExitCode.WAIT_TIMEOUT)
    if options.format != "json":
        click.echo(message, err=True)


@contextmanager
def _hint_if_interrupted(option: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        message = f"\nStopped waiting. The drain continues.\n  Undo it: sandbox admin drain{option} --undo"
        fail(message, ExitCode.INTERRUPTED)


def _wait_until_drained(status: _Status, poll: Callable[[], _Status], timeout_seconds: int | None) -> _Status:
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    while status["running"] and (deadline is None or time.monotonic() < deadline):
        time.sleep(_POLL_SECONDS)
        status = poll()
    return status


def _read_host(client: Client, host: Host) -> Host:
    """Return the current status of a host. If the host is not listed, no tasks are running on it."""
    unlisted = host.copy()
    unlisted["running"] = 0
    return next((each for each in client.hosts()["hosts"] if each["name"] == host["name"]), unlisted)


def _host_message(host: Host) -> str:
    name, running = escape_text(host["name"]), pluralize(host["running"], "task")
    if host["draining_since"] is None:
        return f"Tasks start on {name} again."
    return f"The host {name} has been draining since {escape_text(host['draining_since'])}: {running} running."


def _drain_message(status: Draining) -> str:
    if not status["draining"]:
        return "The server accepts and starts tasks again."
    running, waiting = pluralize(status["running"], "task"), pluralize(status["waiting"], "task")
    since = escape_text(str(status["since"]))
    return f"The server has been draining since {since}: {running} running, {waiting} waiting."
