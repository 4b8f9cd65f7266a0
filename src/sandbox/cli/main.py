"""The `sandbox` command with its groups. It imports commands when they run, and converts errors to exit codes.

Sets up standard streams that are always open and never raise an encoding error.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from contextlib import suppress
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any, NoReturn, cast

import click

from sandbox.cli.click_extensions import LazyGroup, help_examples
from sandbox.cli.errors import ExitCode, fail, print_error
from sandbox.cli.options import common_options
from sandbox.cli.output.console import escape_text, terminal_width

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


STDOUT = "stdout"


class _Stdout(io.BufferedWriter):
    """Standard output. Its write errors have STDOUT as their file name."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = STDOUT
            raise

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            error.filename = STDOUT
            raise


class _Stderr(io.BufferedWriter):
    """Standard error that ignores write errors, so that they neither end a command nor change its exit code."""

    def write(self, data: ReadableBuffer, /) -> int:
        with suppress(OSError):
            return super().write(data)
        return memoryview(data).nbytes

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def set_up_streams() -> None:
    """Reopen closed standard streams, and configure the handling of encoding errors and write errors."""
    _open_closed_streams()
    sys.stdout = _wrap_stream(sys.stdout, _Stdout)
    sys.stderr = _wrap_stream(sys.stderr, _Stderr)


def discard_stdout() -> None:
    """Discard buffered output; otherwise the interpreter prints an error when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _wrap_stream(stream: IO[str], kind: type[io.BufferedWriter]) -> IO[str]:
    """Return a stream that escapes characters missing from its encoding instead of raising an error."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    encoding, is_line_buffered = stream.encoding, stream.line_buffering
    buffer: Any = stream.detach()
    raw: io.RawIOBase = buffer.detach() if isinstance(buffer, io.BufferedWriter) else buffer
    return io.TextIOWrapper(kind(raw), encoding, "backslashreplace", line_buffering=is_line_buffered)


def _open_closed_streams() -> None:
    """Open /dev/null in place of closed standard streams, for this process and its children."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor, which is the closed one
            os.set_inheritable(descriptor, True)
            setattr(sys, name, os.fdopen(descriptor, mode, closefd=False))


ROOT_ENTRIES = {
    "run": ("sandbox.cli.commands.run:run", "Run a task from this checkout and apply the task's changes."),
    "init": ("sandbox.cli.commands.init:init", "Create a manifest for the current git checkout."),
    "task": ("sandbox.cli.main:task", "Submit, watch and cancel tasks, and download their results."),
    "top": ("sandbox.cli.commands.top.command:top", "Watch all tasks on one screen."),
    "login": ("sandbox.cli.commands.login:login", "Log in to a server and store it as a context."),
    "context": ("sandbox.cli.commands.context:context", "Choose between the servers that you have logged in to."),
    "serve": ("sandbox.cli.commands.serve:serve", "Run the server."),
    "setup": ("sandbox.cli.commands.setup:setup", "Install missing software on this machine."),
    "doctor": ("sandbox.cli.commands.doctor:doctor", "Check this machine and suggest fixes."),
    "config": (
        "sandbox.cli.commands.config:config",
        "Show the server's settings and the origin of each setting.",
    ),
    "profile": ("sandbox.cli.commands.profile:profile", "Manage sandbox images."),
    "token": ("sandbox.cli.commands.token:token", "Manage access tokens."),
    "admin": ("sandbox.cli.main:admin", "Check, prune, back up and repair the server's data."),
    "mcp": ("sandbox.cli.commands.mcp.command:mcp", "Serve Sandbox as MCP tools over stdio."),
    "completion": ("sandbox.cli.commands.completion:completion", "Print a shell completion script."),
    "demo": ("sandbox.cli.commands.demo:demo", "Run an example task from manifest to patch."),
}

ROOT_SECTIONS = {
    "Task commands": ("run", "init", "task", "top", "demo"),
    "Server commands": ("serve", "setup", "doctor", "config", "profile", "token", "admin"),
    "Client commands": ("login", "context", "mcp", "completion"),
}

HIDDEN_ROOT_COMMANDS = {"worker": "sandbox.cli.commands.worker:worker"}

TASK_ENTRIES = {
    "submit": ("sandbox.cli.commands.task.submit:submit", "Submit a manifest as a task."),
    "rerun": ("sandbox.cli.commands.task.rerun:rerun", "Submit a task again."),
    "continue": (
        "sandbox.cli.commands.task.continue_task:continue_task",
        "Submit a task that continues a finished task.",
    ),
    "list": ("sandbox.cli.commands.task.list:list_tasks", "List tasks, newest first."),
    "status": ("sandbox.cli.commands.task.status:status", "Show a task."),
    "logs": ("sandbox.cli.commands.task.logs:logs", "Print a task's output and events."),
    "open": ("sandbox.cli.commands.task.open:open_task", "Open a task's dashboard page in the browser."),
    "watch": ("sandbox.cli.commands.task.watch:watch", "Print state changes of all tasks until interrupted."),
    "manifest": ("sandbox.cli.commands.task.manifest:manifest", "Print a task's manifest, which you can submit again."),
    "wait": ("sandbox.cli.commands.task.wait:wait", "Wait until a task has ended."),
    "cancel": ("sandbox.cli.commands.task.cancel:cancel", "Cancel tasks and wait until they have ended."),
    "artifacts": ("sandbox.cli.commands.task.artifacts:artifacts", "List a task's artifacts."),
    "download": ("sandbox.cli.commands.task.download:download", "Download artifacts and verify their checksums."),
    "diff": ("sandbox.cli.commands.task.diff:diff", "Show a task's changes as a patch."),
    "apply": ("sandbox.cli.commands.task.apply:apply", "Apply a task's changes to a git checkout."),
    "shell": ("sandbox.cli.commands.task.shell:shell", "Open a shell in a task's sandbox."),
    "attach": ("sandbox.cli.commands.task.attach:attach", "Attach to the terminal of a task's agent."),
    "delete": ("sandbox.cli.commands.task.delete:delete", "Delete tasks that have ended, with all their data."),
    "release": ("sandbox.cli.commands.task.release:release", "Remove the preserved sandboxes of failed tasks."),
    "validate": ("sandbox.cli.commands.task.validate:validate", "Validate a manifest without a server."),
}

TASK_SECTIONS = {
    "Submit": ("submit", "rerun", "continue", "validate"),
    "Watch": ("list", "status", "logs", "open", "watch", "wait", "manifest"),
    "Use the result": ("diff", "apply", "artifacts", "download"),
    "Work in the sandbox": ("shell", "attach"),
    "End and remove": ("cancel", "release", "delete"),
}

ADMIN_ENTRIES = {
    "check": ("sandbox.cli.commands.admin.check:check", "Check that index, journals and artifacts are consistent."),
    "drain": ("sandbox.cli.commands.admin.drain:drain", "Let running tasks finish, and start no new tasks."),
    "hosts": ("sandbox.cli.commands.admin.hosts:hosts", "List the hosts that run tasks."),
    "rebuild": ("sandbox.cli.commands.admin.rebuild:rebuild", "Rebuild the index from the journals."),
    "prune": ("sandbox.cli.commands.admin.prune:prune", "Remove finished tasks and all their data."),
    "backup": ("sandbox.cli.commands.admin.backup:backup", "Back up tasks and tokens to a file."),
    "restore": ("sandbox.cli.commands.admin.restore:restore", "Restore a backup to a new data directory."),
}


HELP_CELLS_MIN = 50
HELP_CELLS_MAX = 100
"""Minimum and maximum width of help on a terminal."""


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


def _os_error_message(error: OSError) -> str:
    prefix = f"{escape_text(str(error.filename))}: " if error.filename else ""
    advice = "; free disk space and try again" if error.errno in {errno.ENOSPC, errno.EDQUOT} else ""
    return f"{prefix}{error.strerror or error}{advice}"


@click.group(
    cls=RootGroup,
    entries=ROOT_ENTRIES,
    sections=ROOT_SECTIONS,
    hidden_commands=HIDDEN_ROOT_COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=help_examples(
        "sandbox demo",
        "sandbox serve",
        'sandbox run "Fix the failing tests."',
    ),
)
@common_options
@click.version_option(None, "--version", package_name="sandbox", message="sandbox %(version)s")
def root() -> None:
    """Run Claude Code as tasks: a manifest goes in, and a patch comes out."""


@click.group(
    cls=LazyGroup,
    entries=TASK_ENTRIES,
    sections=TASK_SECTIONS,
    epilog=help_examples(
        "sandbox task submit task.yaml --follow",
        "sandbox task list --state running",
        "sandbox task apply 5e173eb5",
    ),
)
@common_options
def task() -> None:
    """Submit, watch and cancel tasks, and download their results."""


@click.group(
    cls=LazyGroup,
    entries=ADMIN_ENTRIES,
    epilog=help_examples(
        "sandbox admin check",
        "sandbox admin backup sandbox.tar",
        "sandbox admin drain --wait",
    ),
)
@common_options
def admin() -> None:
    """Check, prune, back up and repair the server's data."""


def main() -> None:
    """Run the command line."""
    set_up_streams()
    # httpx2 imports its own command line, which is not needed here and takes half of its import time.
    sys.modules["httpx2._main"] = cast("ModuleType", None)
    root(prog_name="sandbox")
