"""The command `sandbox` with its groups. Commands are imported when they run."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import cast

import click

from sandbox.cli.errors import RootGroup
from sandbox.cli.options import common_options
from sandbox.cli.startup import set_up_streams

ENTRIES = {
    "run": ("sandbox.cli.commands.run:run", "Run a task from this checkout and apply its changes."),
    "init": ("sandbox.cli.commands.init:init", "Create a manifest for the current git checkout."),
    "task": ("sandbox.cli.commands.task.group:task", "Submit, watch and cancel tasks, and download their results."),
    "top": ("sandbox.cli.commands.top.command:top", "Watch all tasks on one screen."),
    "serve": ("sandbox.cli.commands.serve:serve", "Run the server."),
    "doctor": ("sandbox.cli.commands.doctor:doctor", "Check this machine and suggest fixes."),
    "config": (
        "sandbox.cli.commands.config:config",
        "Show the server's settings and where each comes from.",
    ),
    "profile": ("sandbox.cli.commands.profile:profile", "Manage the images of the sandboxes."),
    "token": ("sandbox.cli.commands.token:token", "Manage access tokens."),
    "admin": ("sandbox.cli.commands.admin.group:admin", "Check, prune, back up and repair the server's data."),
    "mcp": ("sandbox.cli.commands.mcp.command:mcp", "Serve Sandbox as MCP tools over stdio."),
    "completion": ("sandbox.cli.commands.completion:completion", "Print a shell completion script."),
    "demo": ("sandbox.cli.commands.demo:demo", "Run an example task from manifest to patch."),
}


@click.group(
    cls=RootGroup,
    entries=ENTRIES,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog='Start with: sandbox serve   and, in another terminal, in a git checkout: sandbox run "Fix the tests."',
)
@common_options
@click.version_option(None, "--version", package_name="sandbox", message="sandbox %(version)s")
def root() -> None:
    """Run Claude Code as tasks: a manifest goes in, a patch comes out."""


def main() -> None:
    """Run the command line."""
    set_up_streams()
    # httpx2 imports its own command line, which is not needed here and takes half of its import time.
    sys.modules["httpx2._main"] = cast("ModuleType", None)
    root(prog_name="sandbox")
