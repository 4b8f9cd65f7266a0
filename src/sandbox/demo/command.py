"""`sandbox demo`: an example task from manifest to patch, on a server of its own."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandbox.demo.git_server import make_example_repository
from sandbox.demo.parts import start_module, start_server

if TYPE_CHECKING:
    from rich.console import Console

_MODEL_VARIABLES = ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN")
_PATCH_LINES_MAX = 200

PROMPT = """\
The tests of this small project fail. Find the bug, mend it, run the tests,
and add a test for the case that was missing.
End with a short summary of what you did."""


def run() -> int:
    """Play the demo. Gives an exit code: 0 when the task completed."""
    from sandbox.cli.console import output_console

    console = output_console(has_color="NO_COLOR" not in os.environ)
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sandbox-demo-")))
        make_example_repository(directory / "git")
        git_url = stack.enter_context(start_module("sandbox.demo.git_server", "--directory", str(directory / "git")))[
            "url"
        ]
        model = _choose_model(stack, console)
        server = stack.enter_context(start_server(directory / "data", model))
        return _play(server["http"], f"{git_url}/example.git", console)


def _choose_model(stack: contextlib.ExitStack, console: Console) -> dict[str, str]:
    """The variables that tell the server where the model is."""
    if any(os.environ.get(name) for name in _MODEL_VARIABLES):
        console.print("The real model works on this task: it costs a few cents of your ANTHROPIC_API_KEY's account.")
        return {}
    console.print(
        "No ANTHROPIC_API_KEY is set, so the model is played by a script that comes with Sandbox.\n"
        "Everything else is real: Claude Code, the clone, the sandbox, the patch."
    )
    model = stack.enter_context(start_module("sandbox.demo.scripted_model", "--port", "0"))
    return {"ANTHROPIC_BASE_URL": model["url"], "ANTHROPIC_API_KEY": "scripted", "ANTHROPIC_AUTH_TOKEN": ""}


def _play(server: str, repository_url: str, console: Console) -> int:
    from sandbox.cli.story import tell
    from sandbox.client import Client

    manifest = {
        "version": "1",
        "kind": "Task",
        "metadata": {"id": "demo", "name": "Mend the example"},
        "repository": {"url": repository_url, "branch": "main"},
        "claude": {"prompt": PROMPT},
    }
    with Client(server) as client:
        console.print(f"\nTask demo, submitted to {server}:\n")
        client.submit(json.dumps(manifest).encode(), "application/json")
        state = tell(client.events("demo"), console)
        _print_patch(client, console)
    return 0 if state == "completed" else 1


def _print_patch(client: Any, console: Console) -> None:
    from sandbox.cli.visible import visible

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "demo.patch"
        client.download("demo", "demo.patch", path)
        lines = path.read_text(errors="replace").splitlines()
    console.print("\nThe patch, demo.patch:\n")
    for line in lines[:_PATCH_LINES_MAX]:
        console.print(visible(line), style=_patch_style(line), soft_wrap=True)


def _patch_style(line: str) -> str:
    if line.startswith(("diff ", "index ", "--- ", "+++ ", "new file")):
        return "bold"
    return {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "")
