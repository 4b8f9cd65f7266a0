"""Error handling for commands: a message, a remedy and an exit code."""

from __future__ import annotations

import errno
import io
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NoReturn

import click

from sandbox.cli.click_extensions import LazyGroup
from sandbox.cli.output.console import is_color_enabled
from sandbox.cli.output.terminal_text import escape_text, terminal_width, wrap_text
from sandbox.cli.standard_streams import STDOUT, discard_stdout

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


HELP_CELLS_MIN = 50
HELP_CELLS_MAX = 100
"""Minimum and maximum width of help texts on a terminal."""

_ERROR_PREFIX = "Error:"


class RootGroup(LazyGroup):
    """The root group, which converts the errors of all commands to messages and exit codes."""

    describes_global_options = True

    def main(self, *arguments: Any, **keywords: Any) -> Any:
        """Run click's main; also handle output errors of shell completion, which runs outside any click context."""
        try:
            return super().main(*arguments, **keywords)
        except OSError as error:
            with suppress(click.exceptions.Exit):
                _fail_with_os_error(error)
            sys.exit(_os_error_exit_code(error))

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Create the context and handle output errors, because click prints `--help` and `--version` here.

        Click itself cannot find the width of the terminal, because the standard streams have been replaced.
        """
        width = terminal_width(sys.stdout)
        if width is not None:
            extra.setdefault("terminal_width", max(min(width, HELP_CELLS_MAX), HELP_CELLS_MIN) - 2)
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.ClickException as error:
            _fail_with_click_error(error)
        except OSError as error:
            _fail_with_os_error(error)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except KeyboardInterrupt:
            fail("Interrupted.", ExitCode.INTERRUPTED)
        except click.Abort:
            raise click.exceptions.Exit(ExitCode.INTERRUPTED) from None
        except OSError as error:
            _fail_with_os_error(error)
        except click.ClickException as error:
            _fail_with_click_error(error)
        except click.exceptions.Exit:
            raise
        except Exception as error:
            _fail_with_exception(error)
        return result


def fail(message: str, code: ExitCode) -> NoReturn:
    """Print the message and exit with `code`. Indented lines are not wrapped: they contain commands to copy."""
    print_message(message)
    raise click.exceptions.Exit(code)


def print_error(error: SandboxError) -> ExitCode:
    """Print the error. Return the exit code of a command that fails with it."""
    from sandbox.client import ClientError
    from sandbox.model.errors import FIRST_ERROR

    lines = _field_error_lines(error)
    message = error.message.partition(FIRST_ERROR)[0] if lines else error.message  # the lines contain the first error
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


def _fail_with_click_error(error: click.ClickException) -> NoReturn:
    """On a terminal, print the error in the same format as other errors, because click breaks lines within words."""
    if terminal_width(sys.stderr) is None:
        raise error
    shown = io.StringIO()
    error.show(shown)
    fail(shown.getvalue().rstrip("\n"), ExitCode(error.exit_code))


def _fail_with_os_error(error: OSError) -> NoReturn:
    if isinstance(error, BrokenPipeError) or error.filename == STDOUT:
        discard_stdout()
    code = _os_error_exit_code(error)
    if code is ExitCode.BROKEN_PIPE:
        raise click.exceptions.Exit(code) from None
    fail(f"Error: {_os_error_message(error)}", code)


def _os_error_exit_code(error: OSError) -> ExitCode:
    return ExitCode.BROKEN_PIPE if isinstance(error, BrokenPipeError) else ExitCode.SERVER_ERROR


def _fail_with_exception(error: Exception) -> NoReturn:
    from sandbox.model.errors import SandboxError

    if not isinstance(error, SandboxError):
        # This is a bug or an unexpected response. Python's own exit code, 1, would mean that the task failed.
        fail(
            "\n".join(map(escape_text, "".join(traceback.format_exception(error)).splitlines())), ExitCode.SERVER_ERROR
        )
    raise click.exceptions.Exit(print_error(error))


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


def print_message(message: str) -> None:
    """Print the message on stderr. On a terminal, lines that are not indented are wrapped."""
    width = terminal_width(sys.stderr)
    lines = [part for line in message.split("\n") for part in (_wrap_line(line, width) if line[:1] != " " else [line])]
    click.echo("\n".join(lines), err=True)


def _wrap_line(line: str, width_cells: int | None) -> list[str]:
    lines = wrap_text(line, width_cells, "  ")
    if width_cells is not None and lines[0].startswith(_ERROR_PREFIX) and is_color_enabled():
        lines[0] = click.style(_ERROR_PREFIX, fg="red", bold=True) + lines[0].removeprefix(_ERROR_PREFIX)
    return lines


def _os_error_message(error: OSError) -> str:
    prefix = f"{escape_text(str(error.filename))}: " if error.filename else ""
    advice = "; free disk space and try again" if error.errno in {errno.ENOSPC, errno.EDQUOT} else ""
    return f"{prefix}{error.strerror or error}{advice}"
