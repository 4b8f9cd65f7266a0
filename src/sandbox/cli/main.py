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
    "run": ("sandbox.cli.commands.run:run", "Have a task done from here and now, and apply what it changed."),
    "init": ("sandbox.cli.commands.init:init", "Write a manifest by asking, from the git checkout that you are in."),
    "task": ("sandbox.cli.commands.task.group:task", "Submit tasks, look at them, fetch what they made."),
    "top": ("sandbox.cli.commands.top.command:top", "Watch all tasks on one screen."),
    "serve": ("sandbox.cli.commands.serve:serve", "Run the server."),
    "doctor": ("sandbox.cli.commands.doctor:doctor", "Say what works on this machine and what to mend."),
    "config": ("sandbox.cli.commands.config:config", "Say how the server is configured, and why."),
    "profile": ("sandbox.cli.commands.profile:profile", "Say what is in the sandboxes."),
    "token": ("sandbox.cli.commands.token:token", "Say who may use the server."),
    "admin": ("sandbox.cli.commands.admin.group:admin", "Check, prune, back up and mend what the server keeps."),
    "mcp": ("sandbox.cli.commands.mcp.command:mcp", "Serve Sandbox as tools to an agent (MCP over stdio)."),
    "completion": ("sandbox.cli.commands.completion:completion", "Print the script with which a shell completes."),
    "demo": ("sandbox.cli.commands.demo:demo", "Watch an example task from manifest to patch."),
}


@click.group(
    cls=RootGroup,
    entries=ENTRIES,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog='Begin with: sandbox serve   and, in another terminal, in a git checkout: sandbox run "Mend the tests."',
)
@common_options
@click.version_option(None, "--version", package_name="sandbox", message="sandbox %(version)s")
def root() -> None:
    """Run Claude Code as tasks: a manifest goes in, a patch comes out."""


def main() -> None:
    """Run the command line."""
    set_up_streams()
    # httpx imports its own command line, which is not needed here and takes half of its import time.
    sys.modules["httpx._main"] = cast("ModuleType", None)
    root(prog_name="sandbox")
