"""`sandbox demo`: runs an example task from manifest to patch, on a temporary server.

Creates the example repository, and starts and stops the processes that the demo uses: the Sandbox server, the git
server and the scripted model.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, NoReturn

from sandbox.model.errors import SandboxError

if TYPE_CHECKING:
    from rich.console import Console

    from sandbox.client import Client


START_TIMEOUT_SECONDS = 30.0
STOP_TIMEOUT_SECONDS = 5.0


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """Exit on SIGTERM and SIGHUP (closed terminal) as on ^C, so that every started process is stopped."""

    def exit_process(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, exit_process) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def scripted_model_variables() -> Iterator[dict[str, str]]:
    """Start the scripted model; yield the environment variables that make a server use it."""
    with start_module("sandbox.demo.scripted_model", "--port", "0") as model:
        # The server redacts the key in all output, so the key must not be a word.
        key = f"demo-{secrets.token_hex(16)}"
        yield {"ANTHROPIC_BASE_URL": model["url"], "ANTHROPIC_API_KEY": key, "ANTHROPIC_AUTH_TOKEN": ""}


@contextlib.contextmanager
def start_server(
    data_dir: Path, model: Mapping[str, str], *, port: int = 0, ws_port: int = 0
) -> Iterator[dict[str, Any]]:
    """Start a server, by default on free ports. model: environment variables that configure its model."""
    # Ignore the user's server configuration. Log only errors, so that log lines do not mix with the demo's output. The
    # task's errors are in its status.
    model = {"SANDBOX_CONFIG": os.devnull, "SANDBOX_LOG_LEVEL": "error", "SANDBOX_LOG_FORMAT": "text", **model}
    arguments = (
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--ws-port",
        str(ws_port),
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
    """Run `python -I -m module`; yield the JSON in its first output line. Raises SandboxError if it does not start."""
    command = [sys.executable, "-I", "-m", module, *arguments]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=environment,
        process_group=0,  # ^C is handled by the demo, which ends its processes in the right order
    )
    assert process.stdout is not None
    try:
        yield json.loads(read_first_line(process.stdout, module))
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def read_first_line(stdout: IO[bytes], name: str, timeout_seconds: float = START_TIMEOUT_SECONDS) -> bytes:
    """Return the line that a process prints once it has started. Raises SandboxError."""
    ready, _, _ = select.select([stdout], [], [], timeout_seconds)
    if not ready:
        raise SandboxError(f"{name} did not start within {timeout_seconds:.0f} s; run: sandbox doctor")
    line = stdout.readline()
    if not line:
        raise SandboxError(f"{name} exited during startup; run: sandbox doctor")
    return line


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
        "ANTHROPIC_API_KEY is not set, so a scripted model is used.\nEverything else is real: Claude Code, the "
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

    from sandbox.cli.output.console import terminal_width
    from sandbox.cli.output.task_outcome import closing_lines, find_denied_connections
    from sandbox.cli.patches import colorize, patch_lines

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


REPOSITORY_NAME = "example.git"
GIT_TIMEOUT_SECONDS = 30.0

FILES: Mapping[str, str] = {
    "README.md": "# Basket\n\nAdds up a basket of prices. `python3 -m unittest` runs the tests.\n",
    "CLAUDE.md": "Prices are whole cents. Run the tests with `python3 -m unittest`; there is nothing to install.\n",
    ".gitignore": "__pycache__/\n",
    "basket.py": '''\
"""Adds up a basket."""


def total_cents(prices):
    """Return the sum of the prices, in cents."""
    total = 0
    for index in range(len(prices) - 1):
        total += prices[index]
    return total
''',
    "test_basket.py": """\
import unittest

from basket import total_cents


class BasketTest(unittest.TestCase):
    def test_total_of_three_items(self):
        self.assertEqual(total_cents([250, 120, 999]), 1369)


if __name__ == "__main__":
    unittest.main()
""",
}

_IDENTITY = {"NAME": "Example", "EMAIL": "example@sandbox.invalid", "DATE": "2026-01-29T10:00:00+00:00"}


def git_environment() -> dict[str, str]:
    """Return an environment in which git ignores all configuration and never prompts."""
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": "/nonexistent",
        "LANG": "C.UTF-8",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_TERMINAL_PROMPT": "0",
    }


def make_example_repository(directory: Path) -> Path:
    """Create the bare repository `example.git`, with a `main` branch, in `directory`; return its path.

    Raises OSError, or subprocess.SubprocessError if git fails.
    """
    directory.mkdir(parents=True, exist_ok=True)
    bare = directory / REPOSITORY_NAME
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        work = Path(scratch)
        for name, text in FILES.items():
            (work / name).write_text(text)
        _git(work, "init", "--quiet", "--initial-branch=main", "--template=")
        _git(work, "add", ".")
        _git(work, "commit", "--quiet", "--message=Add up a basket")
        _git(work, "clone", "--quiet", "--bare", "--template=", "--no-hardlinks", ".", str(bare))
    return bare


def _git(directory: Path, *arguments: str) -> None:
    identity_variables = {
        f"GIT_{role}_{field}": value for role in ("AUTHOR", "COMMITTER") for field, value in _IDENTITY.items()
    }
    subprocess.run(
        ["git", *arguments],  # noqa: S607  (found by the PATH of the environment below)
        cwd=directory,
        env=git_environment() | identity_variables,
        check=True,
        capture_output=True,
        timeout=GIT_TIMEOUT_SECONDS,
    )
