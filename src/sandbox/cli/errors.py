"""Errors of commands: their messages, hints and exit codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import TYPE_CHECKING, NoReturn

import click

from sandbox.cli.output.console import escape_text, print_message

if TYPE_CHECKING:
    from sandbox.model.errors import SandboxError


class ExitCode(IntEnum):
    """Exit codes of commands. The numbers never change, because scripts depend on them."""

    SUCCESS = 0
    TASK_FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    CONFLICT = 4
    REFUSED = 5
    UNREACHABLE = 6
    WAIT_TIMEOUT = 7
    TASK_CANCELLED = 8
    INVALID_MANIFEST = 9
    SERVER_ERROR = 10
    INTERRUPTED = 130
    BROKEN_PIPE = 141


_CODE_BY_STATE = {"completed": ExitCode.SUCCESS, "cancelled": ExitCode.TASK_CANCELLED}


_CODE_BY_ERROR = {
    "context_not_found": ExitCode.NOT_FOUND,
    "invalid_context": ExitCode.USAGE,
    "backup_exists": ExitCode.CONFLICT,
    "data_dir_busy": ExitCode.CONFLICT,
    "data_dir_not_empty": ExitCode.CONFLICT,
    "no_data": ExitCode.NOT_FOUND,
    "unsafe_place": ExitCode.USAGE,
}


def exit_code_for_error(error_code: str) -> ExitCode:
    """Return the exit code for a local error that has this stable error code."""
    return _CODE_BY_ERROR.get(error_code, ExitCode.SERVER_ERROR)


def exit_code_for_state(state: str) -> ExitCode:
    """Return the exit code for a task that ended in `state`."""
    return _CODE_BY_STATE.get(state, ExitCode.TASK_FAILED)


def exit_code_for_client_error(error: Exception) -> ExitCode:
    """Return the exit code for a failed request."""
    from sandbox import client

    for family, code in (
        (client.UnreachableError, ExitCode.UNREACHABLE),
        (client.InvalidManifestError, ExitCode.INVALID_MANIFEST),
        (client.NotFoundError, ExitCode.NOT_FOUND),
        (client.ConflictError, ExitCode.CONFLICT),
        (client.AccessError, ExitCode.REFUSED),
        (client.InvalidRequestError, ExitCode.USAGE),
    ):
        if isinstance(error, family):
            return code
    return ExitCode.SERVER_ERROR


def fail(message: str, code: ExitCode) -> NoReturn:
    """Print the message and exit with `code`. Indented lines are not wrapped: they contain commands to copy."""
    print_message(message)
    raise click.exceptions.Exit(code)


def print_error(error: SandboxError) -> ExitCode:
    """Print the error. Return the exit code of a command that fails with it."""
    from sandbox.client import ClientError
    from sandbox.model.errors import FIRST_ERROR_SEPARATOR

    lines = _field_error_lines(error)
    message = (
        error.message.partition(FIRST_ERROR_SEPARATOR)[0] if lines else error.message
    )  # the lines contain the first error
    print_message("\n".join([*lines, f"Error: {escape_text(message)}"]))
    return exit_code_for_client_error(error) if isinstance(error, ClientError) else exit_code_for_error(error.code)


@contextmanager
def hint_if_interrupted(task_id: str, apply_command: str | None = None) -> Iterator[None]:
    """On ^C, stop watching and print that the task continues.

    apply_command: the command that applies the task's changes.
    """
    try:
        yield
    except KeyboardInterrupt:
        escaped_id = escape_text(task_id)
        commands = {
            "Watch again": f"sandbox task status {escaped_id} --watch",
            "Cancel it": f"sandbox task cancel {escaped_id}",
            **({"When it is done": apply_command} if apply_command else {}),
        }
        label_cells = max(map(len, commands)) + 1
        lines = [f"  {label + ':':<{label_cells}} {command}" for label, command in commands.items()]
        fail("\n".join([f"\nStopped watching. Task {escaped_id} continues.", *lines]), ExitCode.INTERRUPTED)


@contextmanager
def hint_if_output_fails(message: str) -> Iterator[None]:
    """If the result cannot be printed, say what was created, because repeating the command would create it again."""
    try:
        yield
    except OSError:
        click.echo(message, err=True)
        raise


def _field_error_lines(error: SandboxError) -> list[str]:
    """Format each error in a request: `query.sort: must be one of …`.

    A single error is omitted, because the error message contains it.
    """
    from sandbox.client import ClientError

    field_errors = error.field_errors if isinstance(error, ClientError) else []
    if len(field_errors) < 2:
        return []
    # A server of an earlier version sends no location.
    located = [(each.get("location") or each.get("field"), each.get("message")) for each in field_errors]
    return [escape_text(f"{location}: {message}") for location, message in located]
