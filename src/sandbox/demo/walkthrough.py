"""`sandbox demo`: runs an example task from manifest to patch, on a temporary server."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from sandbox.demo.example_repository import make_example_repository
from sandbox.demo.server_processes import exit_on_signals, scripted_model_variables, start_module, start_server

if TYPE_CHECKING:
    from rich.console import Console

    from sandbox.client import Client

_COMMAND_DIRECTORY = Path(sys.executable).parent
"""The directory that contains the `sandbox` command and its Python interpreter."""


CANCEL_TIMEOUT_SECONDS = 20.0
"""How long the task may take to end after the user interrupts the demo."""

_MODEL_VARIABLES = ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN")
_PATCH_LINES_MAX = 200
_VM = {"cpus": 2, "memory": "2G", "disk": "2G"}
"""Resources that suffice for the example and are available on a machine with one CPU and 1 GiB of memory."""

PROMPT = """\
The tests of this small project fail. Find the bug, fix it, run the tests,
and add a test for the missing case.
End with a short summary of what you did."""


def next_steps() -> str:
    """Return what to do after the demo. The first step sets the PATH, unless this `sandbox` is already in the PATH."""
    command = shutil.which("sandbox")
    in_path = command is not None and Path(command).resolve() == (_COMMAND_DIRECTORY / "sandbox").resolve()
    return (
        "\nThe demo's server has stopped and its files are removed. Next: docs/tutorial.md\n(ten minutes, no "
        "key). Or run your own tasks with your own key:\n\n"
        + ("" if in_path else f"  export PATH={shlex.quote(str(_COMMAND_DIRECTORY))}:$PATH\n")
        + "  export ANTHROPIC_API_KEY=…\n  sandbox serve"
    )


def run() -> int:
    """Run the demo. Return the exit code: 0 if the task completed."""
    from sandbox.cli.output.console import stdout_console

    console = stdout_console(has_color="NO_COLOR" not in os.environ)
    with exit_on_signals(), contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sandbox-demo-")))
        make_example_repository(directory / "git")
        git_url = stack.enter_context(start_module("sandbox.demo.git_server", "--directory", str(directory / "git")))[
            "url"
        ]
        print_model(console)
        model = {} if has_model_key() else stack.enter_context(scripted_model_variables())
        server = stack.enter_context(start_server(directory / "data", model))
        is_completed = run_task(server["http"], f"{git_url}/example.git", console)
    if is_completed:
        console.print(next_steps(), soft_wrap=True)
    return 0 if is_completed else 1


def has_model_key() -> bool:
    """Return whether the environment has a key for the real model."""
    return any(os.environ.get(name) for name in _MODEL_VARIABLES)


def print_model(console: Console) -> None:
    """Print which model is used, and what it costs."""
    if has_model_key():
        console.print("This task uses the real model and costs a few cents, charged to your ANTHROPIC_API_KEY.")
        return
    console.print(
        "No ANTHROPIC_API_KEY is set: a scripted model is used.\nEverything else is real: Claude Code, the "
        "clone, the sandbox, the patch.\nTokens and dollars are what the real model would cost; nothing is "
        "charged."
    )


def run_task(server: str, repository_url: str, console: Console) -> int:
    from sandbox.cli.output.event_printer import print_events
    from sandbox.client import Client

    manifest = {
        "version": "1",
        "kind": "Task",
        "metadata": {"id": "demo", "name": "Fix the example"},
        "repository": {"url": repository_url, "branch": "main"},
        "vm": _VM,
        "claude": {"prompt": PROMPT},
    }
    with Client(server, "") as client:
        console.print(f"\nTask demo, submitted to {server}:\n")
        client.submit(json.dumps(manifest).encode(), "application/json")
        try:
            state = print_events(client.events("demo"), console)
        finally:
            _end_task(client)
        if state != "completed":
            return False
        _print_patch(client, console)
    return True


def _end_task(client: Client) -> None:
    """Cancel the task if it is still running; otherwise it would continue without a server."""
    from sandbox.client import ClientError

    with contextlib.suppress(ClientError):  # the task has already ended
        client.cancel("demo", reason="The demo was interrupted.", force=True)
        client.wait("demo", timeout_seconds=CANCEL_TIMEOUT_SECONDS)


def _print_patch(client: Client, console: Console) -> None:
    import click

    from sandbox.cli.output.denied_connections import find_denied_connections
    from sandbox.cli.output.patch_text import colorize, patch_lines
    from sandbox.cli.output.task_outcome import closing_lines
    from sandbox.cli.output.terminal_text import terminal_width

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "demo.patch"
        client.download("demo", "demo.patch", path)
        lines = list(patch_lines(path))
    console.print("\nThe patch:\n")
    for line in colorize(lines[:_PATCH_LINES_MAX], has_color=console.color_system is not None):
        click.echo(line)
    # The patch may have scrolled the final message and the cost off the screen.
    status = client.status("demo")
    refusals = find_denied_connections(client, status)
    console.print()
    for line in closing_lines(status, *refusals, width_cells=terminal_width(sys.stdout), has_message=True):
        click.echo(line)
