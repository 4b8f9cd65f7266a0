"""`sandbox demo`: runs an example task from manifest to patch, on a temporary server."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, NoReturn

from sandbox.demo.example_repository import make_example_repository
from sandbox.model.errors import SandboxError

if TYPE_CHECKING:
    from rich.console import Console

    from sandbox.client import Client

_COMMAND_DIRECTORY = Path(sys.executable).parent
"""The directory that contains the command `sandbox` and its Python interpreter."""

START_TIMEOUT_SECONDS = 30.0
STOP_TIMEOUT_SECONDS = 5.0

CANCEL_TIMEOUT_SECONDS = 20.0
"""Time for the task to end when the user interrupts the demo."""

_MODEL_VARIABLES = ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN")
_PATCH_LINES_MAX = 200
_VM = {"cpus": 2, "memory": "2G", "disk": "2G"}
"""Small enough for a machine with one CPU and 1 GiB, and sufficient for the example."""

PROMPT = """\
The tests of this small project fail. Find the bug, fix it, run the tests,
and add a test for the missing case.
End with a short summary of what you did."""


def run() -> int:
    """Run the demo. Return the exit code: 0 if the task completed."""
    from sandbox.cli.output.console import stdout_console

    console = stdout_console(has_color="NO_COLOR" not in os.environ)
    with _exit_on_signals(), contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sandbox-demo-")))
        make_example_repository(directory / "git")
        git_url = stack.enter_context(start_module("sandbox.demo.git_server", "--directory", str(directory / "git")))[
            "url"
        ]
        model = _choose_model(stack, console)
        server = stack.enter_context(start_server(directory / "data", model))
        return _run_task(server["http"], f"{git_url}/example.git", console)


@contextlib.contextmanager
def _exit_on_signals() -> Iterator[None]:
    """On SIGTERM and SIGHUP (a closed terminal), exit as on ^C: stop every process that was started."""

    def exit_process(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, exit_process) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _choose_model(stack: contextlib.ExitStack, console: Console) -> dict[str, str]:
    """Return the environment variables that configure the server's model."""
    if any(os.environ.get(name) for name in _MODEL_VARIABLES):
        console.print("This task uses the real model and costs a few cents, charged to your ANTHROPIC_API_KEY.")
        return {}
    console.print(
        "No ANTHROPIC_API_KEY is set: a scripted model is used.\nEverything else is real: Claude Code, the "
        "clone, the sandbox, the patch.\nTokens and dollars are what the real model would cost; nothing is "
        "charged."
    )
    model = stack.enter_context(start_module("sandbox.demo.scripted_model", "--port", "0"))
    return {"ANTHROPIC_BASE_URL": model["url"], "ANTHROPIC_API_KEY": "scripted", "ANTHROPIC_AUTH_TOKEN": ""}


def _run_task(server: str, repository_url: str, console: Console) -> int:
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
    with Client(server) as client:
        console.print(f"\nTask demo, submitted to {server}:\n")
        client.submit(json.dumps(manifest).encode(), "application/json")
        try:
            state = print_events(client.events("demo"), console)
        finally:
            _end_task(client)
        if state != "completed":
            return 1
        _print_patch(client, console)
    console.print(
        "\nThe demo's server has stopped and its files are removed. Next: docs/tutorial.md\n(ten minutes, no "
        "key). Or run your own tasks with your own key:\n\n"
        f"  export PATH={shlex.quote(str(_COMMAND_DIRECTORY))}:$PATH\n"
        "  export ANTHROPIC_API_KEY=…\n"
        "  sandbox serve"
    )
    return 0


def _end_task(client: Client) -> None:
    """Cancel the task if it is still running; otherwise it would continue without a server."""
    from sandbox.client import ClientError

    with contextlib.suppress(ClientError):  # the task has already ended
        client.cancel("demo", reason="The demo was interrupted.", force=True)
        client.wait("demo", timeout_seconds=CANCEL_TIMEOUT_SECONDS)


def _print_patch(client: Client, console: Console) -> None:
    import click

    from sandbox.cli.checkout.patch import colorize, patch_lines

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "demo.patch"
        client.download("demo", "demo.patch", path)
        lines = list(patch_lines(path))
    console.print("\nThe patch:\n")
    for line in colorize(lines[:_PATCH_LINES_MAX], has_color=console.color_system is not None):
        click.echo(line)


@contextlib.contextmanager
def start_server(data_dir: Path, model: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Start a server on free ports. model: environment variables that configure its model."""
    # Ignore the user's server configuration. Log only errors, so that the log does not mix with the demo's output; the
    # task's status contains its errors.
    model = {"SANDBOX_CONFIG": os.devnull, "SANDBOX_LOG_LEVEL": "error", "SANDBOX_LOG_FORMAT": "text", **model}
    arguments = (
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--ws-port",
        "0",
        "--data-dir",
        str(data_dir),
        "--format",
        "json",
    )
    with start_module("sandbox", *arguments, environment={**os.environ, **model}) as server:
        yield server


@contextlib.contextmanager
def start_module(
    module: str, *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """Run `python -m module`; yield its first output line as JSON. Raises SandboxError if it does not start."""
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=environment,
        process_group=0,  # ^C is handled by the demo, which ends its processes in the right order
    )
    assert process.stdout is not None
    try:
        yield json.loads(_first_line(process.stdout, module))
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _first_line(stdout: IO[bytes], module: str) -> bytes:
    ready, _, _ = select.select([stdout], [], [], START_TIMEOUT_SECONDS)
    line = stdout.readline() if ready else b""
    if not line:
        raise SandboxError(f"{module} did not start within {START_TIMEOUT_SECONDS:.0f} s; run: sandbox doctor")
    return line
