"""`sandbox task diff`"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from sandbox.cli.answer import print_json
from sandbox.cli.flagged import secrets_option
from sandbox.cli.options import chosen, common_options
from sandbox.cli.pager import show_paged
from sandbox.cli.patch import fetch_patch, painted, patch_lines
from sandbox.cli.task_argument import task_argument
from sandbox.cli.visible import visible


@click.command(epilog="Apply it to a checkout with: sandbox task apply TASK_ID")
@task_argument
@secrets_option
@common_options
def diff(task_id: str, allows_secrets: bool) -> None:
    """Show what a task changed, as a patch.

    On a terminal in colour and in git's pager, elsewhere as the bytes that git apply takes.
    """
    options = chosen()
    with TemporaryDirectory() as directory:
        patch = Path(directory) / "patch"
        with options.connect() as client:
            fetch_patch(client, task_id, patch, allows_secrets=allows_secrets)
        if options.format == "json":
            print_json({"task_id": task_id, "patch": patch.read_bytes().decode(errors="replace")})
        elif not patch.stat().st_size:
            click.echo(f"Task {visible(task_id)} changed nothing.", err=True)
        elif sys.stdout.isatty():
            show_paged(painted(patch_lines(patch), has_color=options.has_color))
        else:
            with patch.open("rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer)
